"""ZipVL with a choice that `zipvl.ZipVLConfig` does not offer, put together from the ops for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from zipvl import ops
from zipvl.baselines.common import attention_replaced
from zipvl.transformers import target as targets

__all__ = ["Metric", "Probes", "Variant", "VariantRecord", "uniform_probes", "variant"]

Metric = Literal["accumulated", "normalized"]
Probes = Literal["stratified", "uniform"]


@dataclass(frozen=True)
class Variant:
    """One way of selecting tokens. As it stands it is ZipVL's own.

    Args:
        tau: share of the budget metric's total that the selected tokens hold.
        num_recent, num_random, seed: of the probes.
        budget: the metric that decides how many tokens.
        rank: the metric that decides which.
        probes: random probes one from each stratum, or uniformly without replacement from all earlier tokens.
        keep_text: select every token that is no image token, whatever its scores.
    """

    tau: float = 0.975
    num_recent: int = 64
    num_random: int = 64
    seed: int = 0
    budget: Metric = "accumulated"
    rank: Metric = "normalized"
    probes: Probes = "stratified"
    keep_text: bool = False


@dataclass
class VariantRecord:
    """Which share of the tokens was selected.

    Args:
        kept: of the last prefill, for each layer bool ``[B, N]``.
    """

    kept: dict[int, Tensor] = field(default_factory=dict)
    _shares: list[Tensor] = field(default_factory=list)

    @property
    def mean_ratio(self) -> float:
        """Mean over layers, rows and prefills."""
        return float(torch.stack(self._shares).mean()) if self._shares else 1.0


def uniform_probes(tokens: int, num_recent: int, num_random: int, seed: int) -> Tensor:
    """The recent tokens, and random ones drawn uniformly from all earlier ones. int32 ``[probes]``, ascending."""
    earlier = max(tokens - num_recent, 0)
    drawn = torch.randperm(earlier, generator=torch.Generator().manual_seed(seed))[:num_random].sort().values
    return torch.cat([drawn, torch.arange(earlier, tokens)]).to(torch.int32)


@contextmanager
def variant(model: nn.Module, choice: Variant) -> Iterator[VariantRecord]:
    """Runs ``model`` with ``choice`` inside the ``with`` block: sparse prefills without padding, tokens that were not
    selected forgotten (they stay in the cache, masked). One generation at a time.

    Yields:
        what was selected.
    """
    target, record = targets.find(model), VariantRecord()
    config: Any = model.config
    text_mask: list[Tensor | None] = [None]

    def note_text(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        text_mask[0] = ids != config.image_token_id if choice.keep_text and ids is not None else None

    def prefill(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, _, tokens, _ = q.shape
        counts: dict[str, Any] = {"num_recent": choice.num_recent, "num_random": choice.num_random, "seed": choice.seed}
        if choice.probes == "uniform":
            probes = uniform_probes(tokens, **counts).to(q.device).expand(batch, -1).contiguous()
        else:
            probes = ops.probe_index(q, **counts)
        scores = dict(zip(("accumulated", "normalized"), ops.probe_scores(q, k, probes, scale=scale), strict=True))
        keep = torch.zeros(batch, tokens, dtype=torch.bool, device=q.device)
        keep[:, -1] = True
        if text_mask[0] is not None:
            keep |= text_mask[0]
        index, count = ops.select_tokens(scores[choice.budget], scores[choice.rank], tau=choice.tau, keep_mask=keep)
        kept = torch.zeros(batch, tokens + 1, dtype=torch.bool, device=q.device).scatter(1, index.long(), True)
        record.kept[layer] = kept[:, :tokens]
        record._shares.append(count.double().mean() / tokens)
        return ops.sparse_attn(q, k, v, index, count, scale=scale)

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        if mask is not None:
            raise ValueError("variant: prompts with padding or a mask of their own are not supported")
        if q.shape[2] == k.shape[2]:
            return prefill(module.layer_idx, q, k, v, scale).transpose(1, 2), None
        past = record.kept[module.layer_idx]
        new = past.new_ones(past.shape[0], k.shape[2] - past.shape[1])
        may = torch.cat([past, new], 1)[:, None, None].expand(-1, 1, q.shape[2], -1)
        return sdpa_attention_forward(module, q, k, v, may, scaling=scale)

    with ExitStack() as undo:
        undo.enter_context(attention_replaced(target.attention, target.configs, attend))
        undo.callback(model.register_forward_pre_hook(note_text, with_kwargs=True).remove)
        yield record
