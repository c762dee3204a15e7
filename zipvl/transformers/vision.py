"""Vision towers: one call of attention for all windows of a layer instead of one for each, and compiled blocks.

The attention modules of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, GLM-4V and their kin are given the bounds of their windows,
``cu_seqlens``. With an attention implementation whose name contains "flash" they hand those on and call it once. With
any other they split the tokens and call it once a window: 57,000 times for 8 pages in Qwen2.5-VL-7B. The function here
takes the bounds. Windows of one length are a batch of one SDPA call; others go to PyTorch's attention over sequences of
any lengths. Both are exact: no token is left out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from zipvl.transformers.walk import modules_of

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch that has none
    varlen_attn = None  # type: ignore[assignment]

VISION = "zipvl_flash_vision"
"""The attention implementation of such towers. Its name makes them hand on the bounds."""

BACKEND = "inductor"
"""The compiler of the blocks of towers."""

COMPILED = "_compiled_call_impl"
"""What a module's calls are handed to, if it is not None; ``torch.nn.Module.compile`` sets it."""

DEVICES = ("cuda",)
"""Types of devices on which one call is faster than many."""


def configs_of(model: nn.Module, others: Iterable[PretrainedConfig]) -> list[PretrainedConfig]:
    """The configurations of towers in ``model`` that can have the implementation: those that would run SDPA on a GPU.

    Args:
        others: configurations of its language part, which are none.
    """
    if varlen_attn is None:
        return []
    taken = {id(config) for config in others}
    found: dict[int, Any] = {}
    for module in modules_of(model):
        kind: Any = type(module)
        if not _splits(kind):
            continue
        config: Any = getattr(module, "config", None)
        if id(config) in taken or getattr(config, "_attn_implementation", None) != "sdpa":
            continue
        if all(parameter.device.type in DEVICES for parameter in module.parameters()):
            found[id(config)] = config
    return list(found.values())


def blocks_of(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The blocks of the towers of ``model``: lists of several modules of one class that are not in ``decoder``."""
    within = set(modules_of(decoder))
    found: list[nn.Module] = []
    for module in modules_of(model):
        if isinstance(module, nn.ModuleList) and module not in within:
            if len(module) > 1 and len({type(block) for block in module}) == 1:
                found += module
                within.update(inner for block in module for inner in modules_of(block))
    return found


def compile_block(block: nn.Module) -> None:
    """Has calls of a block run as compiled, as ``block.compile()`` has them, until its ``_compiled_call_impl`` is set
    again.

    One function is compiled for all blocks of a class: to make one for each takes as long as to run them all.
    """
    kind: Any = type(block)
    vars(block)[COMPILED] = functools.partial(_compiled(kind, BACKEND), block)


@functools.cache
def _compiled(kind: Any, backend: Any) -> Callable[..., Any]:
    call = FunctionType(_call.__code__.replace(), globals())  # the compiler bounds the graphs of one code object
    compiled: Callable[..., Any] = torch.compile(call, dynamic=True, backend=backend)
    return compiled


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block._call_impl(*args, **kwargs)


@functools.cache
def _splits(kind: Any) -> bool:
    """Whether attention modules of this class are given the bounds of their windows, and hand them on if they may."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    if code is None:
        return False
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return "cu_seqlens" in parameters and "is_flash_attention_requested" in code.co_names


def vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each of the windows ``[cu_seq_lens_q[i], cu_seq_lens_q[i + 1])``, both ways.

    Args:
        module: the attention module.
        query, key, value: ``[1, H, S, D]``.
        attention_mask, dropout, is_causal, kwargs: as the module passes them; no mask and not causal with windows.
        scaling: factor of the scores, ``D ** -0.5`` if None.
        cu_seq_lens_q, cu_seq_lens_k: ``[windows + 1]``, the same; None: ordinary attention of one sequence.
        max_length_q, max_length_k: length of the longest window.

    Returns:
        ``[1, S, H, D]``, and None.
    """
    common: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal}
    if cu_seq_lens_q is None or is_causal is not False:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **common, **kwargs)
    head_dim, count = query.shape[-1], cu_seq_lens_q.shape[0] - 1
    longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else int(max_length_q)
    if count * longest == query.shape[2] and attention_mask is None:
        q, k, v = (states[0].unflatten(1, (count, longest)).transpose(0, 1) for states in (query, key, value))
        return sdpa_attention_forward(module, q, k, v, None, **common, **kwargs)[0].flatten(0, 1)[None], None
    if not _has_kernel(query) or dropout > 0 or attention_mask is not None:
        lengths = cu_seq_lens_q.diff().tolist()
        windows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        parts = [sdpa_attention_forward(module, q, k, v, None, **common, **kwargs)[0] for q, k, v in windows]
        return torch.cat(parts, dim=1), None
    if scaling is not None and scaling != head_dim**-0.5:
        query = query * (scaling * head_dim**0.5)
    bounds = cu_seq_lens_q.to(torch.int32)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest)
    return out[None], None


def _has_kernel(query: Tensor) -> bool:
    """Whether PyTorch's attention over sequences of any lengths takes such tensors."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return varlen_attn is not None and query.is_cuda and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
