"""ZipVL's token selection in plain PyTorch: what the last training stage and the training script's evaluation use.

It follows the paper (arXiv 2410.08584): probe rows, accumulated and normalised scores, a token budget for each layer
from `tau`, attention among the selected tokens, a cache that keeps only those. The `zipvl` package is the fast version;
this one is short, differentiable where training needs it, and lets train.py evaluate without the package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RECENT_PROBES, RANDOM_PROBES = 64, 64
MASKED = -1e4
"""Score of a future token: finite, so that 0 * log(0) in the entropy is 0."""


def probe_positions(length: int, generator: torch.Generator) -> Tensor:
    """64 random positions, one from each of 64 strata of the earlier tokens, then the 64 most recent; ascending."""
    device = generator.device
    earlier = max(length - RECENT_PROBES, 0)
    recent = torch.arange(earlier, length, device=device)
    if earlier <= RANDOM_PROBES:
        return torch.cat([torch.arange(earlier, device=device), recent])
    edges = torch.arange(RANDOM_PROBES + 1, device=device) * earlier // RANDOM_PROBES
    drawn = torch.rand(RANDOM_PROBES, generator=generator, device=device) * (edges[1:] - edges[:-1])
    return torch.cat([edges[:-1] + drawn.long(), recent])


def probe_logits(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Causally masked, scaled scores of some rows in float32.

    q `[B, Hq, n, D]`, k `[B, Hkv, n, D]`, rows `[r]` -> `[B, Hq, r, n]`.
    """
    grouped = q[:, :, rows].unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, Hkv, group * rows, D]
    logits = (grouped @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
    future = torch.arange(k.shape[2], device=k.device)[None] > rows[:, None]
    return logits.unflatten(2, (-1, rows.numel())).flatten(1, 2).masked_fill(future, MASKED)


@torch.no_grad()
def probe_scores(q: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Accumulated and normalised scores of each token over the probe rows, both `[B, n]` float32."""
    accumulated = probe_logits(q, k, rows).softmax(-1).mean(1).sum(1)
    observers = (torch.arange(k.shape[2], device=k.device)[None] <= rows[:, None]).sum(0)
    return accumulated, accumulated / observers.clamp(min=1)


def tokens_needed(accumulated: Tensor, tau: float) -> Tensor:
    """Smallest number of tokens whose largest accumulated scores reach `tau` of the total, `[B]`."""
    if tau >= 1:
        return torch.full_like(accumulated[:, 0], accumulated.shape[1], dtype=torch.long)
    sums = accumulated.sort(-1, descending=True).values.cumsum(-1)
    return ((sums < tau * sums[:, -1:]).sum(-1) + 1).clamp(max=accumulated.shape[1])


def keep_best(normalised: Tensor, count: Tensor) -> Tensor:
    """Mask of the last token and the best ones by normalised score, `count[b]` in all, bool `[B, n]`."""
    score = normalised.clone()
    score[:, -1] = float("inf")
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return rank < count[:, None].clamp(min=1)


class TrainingAttention:
    """Attention of a training step: dense, or among tokens chosen as ZipVL would, with answers as they will be decoded.

    prompt: number of prompt tokens; those after it are answer tokens, which see the kept tokens and the answer so far.
    ratios: share of prompt tokens to keep in each layer, or None for dense attention.
    Every layer has the same probe rows, as in the package.
    with_entropy: after a forward pass `entropy()` is the mean entropy of 24 probe rows over the prompt.
    """

    def __init__(self, prompt: int, ratios: list[float] | None, generator: torch.Generator, with_entropy: bool) -> None:
        self.prompt, self.ratios, self.generator, self.with_entropy = prompt, ratios, generator, with_entropy
        self.rows = probe_positions(prompt, generator)
        self.entropies: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_prompt, k_prompt, rows = q[:, :, : self.prompt], k[:, :, : self.prompt], self.rows
        if self.with_entropy:
            self.entropies.append(self._row_entropy(q_prompt, k_prompt, rows))
        if self.ratios is None or self.ratios[layer] >= 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        _, normalised = probe_scores(q_prompt, k_prompt, rows)
        normalised[:, -1] = float("inf")
        count = max(int(self.ratios[layer] * self.prompt), 8)
        kept = normalised.topk(count, -1).indices.sort(-1).values
        answers = torch.arange(self.prompt, q.shape[2], device=q.device).expand(q.shape[0], -1)
        return attend_among(q, k, v, torch.cat([kept, answers], 1))

    def _row_entropy(self, q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
        """Mean entropy in nats of up to 12 of the random probe rows and of the last 12 rows, a scalar with gradient."""
        random_rows = rows[: -min(RECENT_PROBES, rows.numel() - 1)]
        shuffled = torch.randperm(random_rows.numel(), generator=self.generator, device=rows.device)
        chosen = torch.cat([random_rows[shuffled[:12]], rows[-12:]])
        log_probability = probe_logits(q, k, chosen).log_softmax(-1)
        return -(log_probability.exp() * log_probability).sum(-1).mean()

    def entropy(self) -> Tensor:
        """Mean over the layers of this forward pass, a scalar."""
        return torch.stack(self.entropies).mean()


def attend_among(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """Causal attention among the tokens `index` `[B, t]` (ascending), `[B, Hq, n, D]`; rows outside are 0."""
    place = index[:, None, :, None]

    def take(x: Tensor) -> Tensor:
        return x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3]))

    attended = F.scaled_dot_product_attention(take(q), take(k), take(v), is_causal=True, enable_gqa=True)
    return torch.zeros_like(q).scatter(2, place.expand_as(attended), attended.to(q.dtype))


class DecodingAttention:
    """Prefill with ZipVL's selection, then greedy decoding from the kept tokens (the `drop` cache), for evaluation.

    The first call for a layer is the prefill; each later call brings one new token, which sees the kept prompt tokens,
    the tokens generated before it and itself. tau None (and ratio None) is dense attention. Every layer has the same
    probe rows, as in the package. `shares` holds, for each layer, the share of prompt tokens kept, `[B]`.
    """

    def __init__(self, generator: torch.Generator, tau: float | None = None, ratio: float | None = None) -> None:
        self.generator, self.tau, self.ratio = generator, tau, ratio
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        self.shares: list[Tensor] = []
        self.rows: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._decode(layer, q, k, v) if layer in self.keys else self._prefill(layer, q, k, v)

    def _select(self, q: Tensor, k: Tensor) -> Tensor:
        """Kept tokens of a layer, bool `[B, n]`."""
        batch, _, length, _ = k.shape
        if self.tau is None and self.ratio is None:
            return torch.ones(batch, length, dtype=torch.bool, device=k.device)
        if self.rows is None:
            self.rows = probe_positions(length, self.generator)
        accumulated, normalised = probe_scores(q, k, self.rows)
        if self.ratio is not None:
            count = torch.full((batch,), -int(-self.ratio * length // 1), device=k.device)
        else:
            count = tokens_needed(accumulated, self.tau)
        return keep_best(normalised, count)

    def _prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept = self._select(q, k)
        self.keys[layer], self.values[layer], self.kept[layer] = k, v, kept
        self.shares.append(kept.float().mean(-1))
        if self.tau is None and self.ratio is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        groups = q.shape[1] // k.shape[1]
        causal = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril()
        attended = F.scaled_dot_product_attention(
            q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), (causal & kept[:, None])[:, None]
        )
        return torch.where(kept[:, None, :, None], attended, 0)

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[layer] = torch.cat([self.keys[layer], k], 2)
        self.values[layer] = torch.cat([self.values[layer], v], 2)
        self.kept[layer] = torch.cat([self.kept[layer], torch.ones_like(self.kept[layer][:, :1])], 1)
        groups = q.shape[1] // k.shape[1]
        return F.scaled_dot_product_attention(
            q,
            self.keys[layer].repeat_interleave(groups, 1),
            self.values[layer].repeat_interleave(groups, 1),
            self.kept[layer][:, None, None],
        )
