"""ZipVL's token selection in plain PyTorch: what the last training stage and the training script's evaluation use.

It follows the paper (arXiv 2410.08584): probe rows, accumulated and normalised scores, a token budget for each layer
from `tau`, attention among the selected tokens, a cache that keeps only those. The `zipvl` package is the fast version;
this one is short, differentiable where training needs it, and lets train.py evaluate without the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
    grouped = q.index_select(2, rows).unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, Hkv, group * rows, D]
    logits = (grouped @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
    future = torch.arange(k.shape[2], device=k.device)[None] > rows[:, None]
    return logits.unflatten(2, (-1, rows.numel())).flatten(1, 2).masked_fill(future, MASKED)


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


def row_entropy(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Mean entropy of some rows' attention, each divided by the largest it could be: the log of its context length.

    So a row early in the prompt, which sees few tokens, counts as much as a late one. A scalar with gradient.
    """
    log_probability = probe_logits(q, k, rows).log_softmax(-1)
    entropy = -(log_probability.exp() * log_probability).sum(-1)
    return (entropy / (rows + 1).clamp(min=2).log()).mean()


def best_tokens(normalised: Tensor, limit: int, count: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Positions of the last token and the best ones by normalised score, and which of them are kept.

    limit: how many to return, `[B, limit]`. count `[B]`: how many of them each row keeps; None: all. The kept ones come
    first, ascending; the second result is their mask, None if it would be all true.
    """
    length = normalised.shape[1]
    score = normalised.clone()
    score[:, -1] = float("inf")
    best = score.topk(limit, -1).indices
    if count is None:
        return best.sort(-1).values, None
    surplus = torch.arange(limit, device=best.device) >= count[:, None]
    order = (best + length * surplus).sort(-1).values
    return order % length, order < length


def attend_among(q: Tensor, k: Tensor, v: Tensor, prompt: int, index: Tensor, kept: Tensor | None) -> Tensor:
    """Causal attention among the kept tokens of a prompt; tokens after it see those and, causally, themselves.

    q `[B, Hq, n, D]`, k and v `[B, Hkv, n, D]`; index and kept as `best_tokens` gives them for the first `prompt`
    tokens. Prompt rows that are not kept are 0. Returns `[B, Hq, n, D]`.
    """
    place = index[:, None, :, None]

    def take(x: Tensor) -> Tensor:
        return x[:, :, :prompt].gather(2, place.expand(-1, x.shape[1], -1, x.shape[3]))

    keys, values = take(k), take(v)
    # Surplus tokens stand behind the kept ones, where no kept row sees them.
    attended = F.scaled_dot_product_attention(take(q), keys, values, is_causal=True, enable_gqa=True)
    if kept is not None:
        attended = attended.masked_fill(~kept[:, None, :, None], 0)
    out = torch.zeros_like(q[:, :, :prompt]).scatter(2, place.expand_as(attended), attended.to(q.dtype))
    if q.shape[2] == prompt:
        return out
    queries = q[:, :, prompt:].unflatten(1, (k.shape[1], -1))  # [B, Hkv, group, a, D]
    keys, values = torch.cat([keys, k[:, :, prompt:]], 2), torch.cat([values, v[:, :, prompt:]], 2)
    answers = queries.shape[3]
    logits = (queries @ keys.transpose(2, 3)[:, :, None]).float() * q.shape[-1] ** -0.5
    column = torch.arange(keys.shape[2], device=q.device)
    unseen = column > index.shape[1] + torch.arange(answers, device=q.device)[:, None]  # [a, t + a]
    if kept is not None:
        surplus = F.pad(~kept, (0, answers), value=False)
        unseen = unseen | surplus[:, None, None, None]
    probability = logits.masked_fill(unseen, MASKED).softmax(-1).to(values.dtype)
    answered = (probability @ values[:, :, None]).flatten(1, 2)
    return torch.cat([out, answered.to(q.dtype)], 2)


class TrainingAttention:
    """Attention of a training step: dense, or among tokens chosen as ZipVL would, with answers as they will be decoded.

    prompt: number of prompt tokens; those after it are answer tokens, which see the kept tokens and the answer so far.
    ratios: share of prompt tokens to keep in each layer. tau: the share of attention mass that decides, row by row, how
    many are kept, exactly as in evaluation; limits: the largest share of each layer that a row may then keep, which
    saves time if it is above what tau needs (None: everything). Neither ratios nor tau: dense attention.
    Every layer has the same probe rows, as in the package.
    with_entropy: collect in `entropies` the mean relative entropy of 24 probe rows over the prompt, layer by layer.
    functions: `probe_scores` and `row_entropy`, or compiled versions of them.

    `shares` holds, for each layer of a forward pass with tau, the share of prompt tokens that tau asks for, `[B]`.
    """

    def __init__(
        self,
        prompt: int,
        generator: torch.Generator,
        *,
        ratios: list[float] | None = None,
        tau: float | None = None,
        limits: list[float] | None = None,
        with_entropy: bool = False,
        functions: tuple[Callable, Callable] = (probe_scores, row_entropy),
    ) -> None:
        self.prompt, self.ratios, self.tau, self.limits, self.with_entropy = prompt, ratios, tau, limits, with_entropy
        self.score_function, self.entropy_function = functions
        self.rows = probe_positions(prompt, generator)
        random_rows = self.rows[: -min(RECENT_PROBES, self.rows.numel() - 1)]
        shuffled = torch.randperm(random_rows.numel(), generator=generator, device=self.rows.device)
        self.entropy_rows = torch.cat([random_rows.index_select(0, shuffled[:12]), self.rows[-12:]])
        self.entropies: list[Tensor] = []
        self.shares: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_prompt, k_prompt = q[:, :, : self.prompt], k[:, :, : self.prompt]
        if self.with_entropy:
            self.entropies.append(self.entropy_function(q_prompt, k_prompt, self.entropy_rows))
        if self.tau is None and (self.ratios is None or self.ratios[layer] >= 1):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        with torch.no_grad():
            accumulated, normalised = self.score_function(q_prompt.detach(), k_prompt.detach(), self.rows)
            count = None
            if self.tau is not None:
                count = tokens_needed(accumulated, self.tau)
                self.shares.append(count / self.prompt)
            index, kept = best_tokens(normalised, self._limit(layer), count)
        return attend_among(q, k, v, self.prompt, index, kept)

    def _limit(self, layer: int) -> int:
        """Most tokens of a row that this layer keeps."""
        if self.ratios is not None:
            return min(self.prompt, max(math.ceil(self.ratios[layer] * self.prompt), 8))
        share = 1.0 if self.limits is None else self.limits[layer]
        return min(self.prompt, math.ceil(share * self.prompt / 128) * 128)  # few sizes, so that memory is reused


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
