"""Which linear layers are no more than that, and whose products can be told on the device how many rows they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(part: Any) -> bool:
    """Whether ``part`` is a linear layer without adapters, hooks or quantisation. torchao quantises the weight alone: a
    tensor of a class of its own, which no op of ours takes."""
    patched = "forward" in part.__dict__ or part._forward_hooks or part._forward_pre_hooks
    return type(part) is nn.Linear and not patched and not is_traceable_wrapper_subclass(part.weight)


def counts_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's grouped product reads its sizes on the device: CUTLASS's on Hopper does, for bfloat16.
    Elsewhere the host would read them."""
    return device.type == "cuda" and dtype == torch.bfloat16 and _compute_capability(device) == 9


@torch.compiler.assume_constant_result
def _compute_capability(device: torch.device) -> int:
    """The major compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)[0]
