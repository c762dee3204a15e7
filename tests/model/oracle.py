"""What a sparse model computes, from one dense forward without a cache: a mask a layer, nothing of zipvl."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "zipvl_test_oracle"


@contextmanager
def oracle(
    model: Any, kept: dict[int, torch.Tensor], prompt: int, full: bool = False, all_queries: bool = False
) -> Iterator[None]:
    """Makes ``model(whole sequence, use_cache=False)`` compute what prefill and decoding with ZipVL should.

    Args:
        kept: for each sparse layer the positions of the prompt that were kept, ``[n]``; other layers are dense.
        prompt: length of the prompt; later tokens are decoded ones.
        full: they attend to the whole prompt (``cache="full"``), not to the kept tokens alone.
        all_queries: the prompt's other tokens are computed too, against the kept ones.
    """

    def attention(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        tokens = q.shape[2]
        groups = q.shape[1] // k.shape[1]
        may = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        computed = torch.ones(tokens, dtype=torch.bool, device=q.device)
        window = getattr(module, "sliding_window", None)
        if window is not None:
            may &= torch.ones_like(may).triu(1 - window)
        elif module.layer_idx in kept:
            alive = torch.zeros(tokens, dtype=torch.bool, device=q.device)
            alive[kept[module.layer_idx].to(q.device)] = True
            alive[prompt:] = True
            computed = computed if all_queries else alive
            may[:prompt] &= alive
            if not full:
                may[prompt:] &= alive
        scores = (q.double() @ k.double().repeat_interleave(groups, 1).mT) * scaling
        weights = scores.masked_fill(~may, -torch.inf).softmax(-1).nan_to_num(0.0)
        out = weights @ v.double().repeat_interleave(groups, 1)
        return (out * computed[:, None]).to(q.dtype).transpose(1, 2), None

    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation_internal
    AttentionInterface.register(NAME, attention)
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        del ALL_ATTENTION_FUNCTIONS._global_mapping[NAME]
