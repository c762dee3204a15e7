"""AIM (arXiv 2412.03248): similar image tokens are merged before the language model, unimportant ones pruned inside.

Merging: image by image, on the embeddings that enter the language model, a bipartite matching as in ToMe: tokens at
even places are sources, those at odd places destinations; each source names the destination of highest cosine
similarity; the best pairs are merged, a destination becoming the mean of itself and its sources, at its own position.
A round removes at most half of the tokens; rounds follow until a share `retain` is left.

Pruning, after the schedule of the authors' code for 28 layers (`max(0, 1 - 0.125 * (layer - 14 + 1))` from layer 14
on): the first half of the layers sees all merged tokens; then a share of them that falls linearly, after each layer,
and reaches 0 two sevenths of the depth later. The last layers see no image at all. Importance is PageRank on the
attention matrix of the layer: each head's logits, divided by a temperature of 0.1, through a softmax; five steps of the
random walk from equal shares, no damping; the root of the mean of squares over the heads. The steps weigh the queries,
each head its own way, so they need the matrix itself: the sums of `probe_scores` are not enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipvl.baselines.common import Baseline, Prompt, Record, applied, places_of, solve

__all__ = ["AIM", "aim", "merge_most_similar", "walked"]

TEMPERATURE, STEPS = 0.1, 5
FALL = 2 / 7
"""Part of the depth over which the retained share falls from 1 to 0: 8 of 28 layers."""


def merge_most_similar(tokens: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merges the most similar pairs until ``count`` tokens are left.

    Args:
        tokens: ``[B, n, d]``; places: int64 ``[B, n]``, ascending; count: in ``[1, n]``.

    Returns:
        the tokens left, ``[B, count, d]``, and their places, ascending.
    """
    while (surplus := tokens.shape[1] - count) > 0:
        merged = min(surplus, tokens.shape[1] // 2)
        unit = F.normalize(tokens.float(), dim=-1)
        similarity, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
        order = similarity.argsort(dim=1, descending=True, stable=True)
        sources, others = order[:, :merged], order[:, merged:]
        targets = partner.gather(1, sources)
        width = tokens.shape[2]
        wide = [index[..., None].expand(-1, -1, width) for index in (sources, others, targets)]
        met = tokens[:, 1::2].scatter_reduce(1, wide[2], tokens[:, ::2].gather(1, wide[0]), "mean", include_self=True)
        tokens = torch.cat([tokens[:, ::2].gather(1, wide[1]), met], 1)
        places = torch.cat([places[:, ::2].gather(1, others), places[:, 1::2]], 1)
        places, ascending = places.sort(1)
        tokens = tokens.gather(1, ascending[..., None].expand(-1, -1, width))
    return tokens, places


def walked(logits: Tensor) -> Tensor:
    """How often a walk that follows attention is at each token after five steps.

    Args:
        logits: ``[..., n, n]``, causally masked with minus infinity.

    Returns:
        float32 ``[..., n]``, rows sum to 1.
    """
    walk = (logits.float() / TEMPERATURE).softmax(-1)
    share = walk.new_full((*walk.shape[:-2], 1, walk.shape[-1]), 1 / walk.shape[-1])
    for _ in range(STEPS):
        share = share @ walk
    return share.squeeze(-2)


class AIM(Baseline):
    """AIM's schedule.

    Args:
        retain: the share of the image tokens left after merging, in ``(0, 1]``.
        start: the layer, in parts of the depth, from which on tokens are pruned; 1.5 prunes none.
    """

    name = "AIM"

    def __init__(self, retain: float = 0.25, start: float = 0.5) -> None:
        if not 0.0 < retain <= 1.0:
            raise ValueError(f"AIM: retain must be in (0, 1], got {retain}")
        self.retain, self.start = retain, start

    @classmethod
    def for_budget(cls, share: float, layers: int) -> AIM:
        """The parameters with which the layers see on average ``share`` of the image tokens: merging decides it, and
        above what no merging at all gives, a later start of pruning."""
        factor = sum(cls(1.0).schedule(layers)) / layers
        if share <= factor:
            return cls(share / factor)
        return cls(1.0, solve(lambda start: sum(cls(1.0, start).schedule(layers)) / layers, share, 0.5, 1.5))

    def schedule(self, layers: int) -> list[float]:
        first, fall = self.start * layers, FALL * layers
        after = [min(1.0, max(0.0, 1 - (i - first + 1) / fall)) if i >= first else 1.0 for i in range(layers)]
        return [self.retain * share for share in [1.0, *after[:-1]]]

    def importance(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        batch, heads, n, _ = q.shape
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        squares = torch.zeros(batch, n, device=q.device)
        for head in range(heads):  # one head's matrix at a time: at 32K tokens it takes 4 GiB
            keys = k[:, head * k.shape[1] // heads].float()
            logits = (scale * q[:, head].float() @ keys.transpose(-1, -2)).masked_fill_(future, -torch.inf)
            squares += walked(logits).square()
        return (squares / heads).sqrt()

    def reduce(self, layer: int, hidden: Tensor, prompt: Prompt) -> Tensor:
        if layer:
            return super().reduce(layer, hidden, prompt)
        batch, images = hidden.shape[0], prompt.images
        if prompt.image_total % images:
            raise ValueError(f"AIM: {images} images of different sizes in one prompt are not supported")
        width = hidden.shape[2]
        of_images = places_of(prompt.image, prompt.image_total)
        tokens = hidden.gather(1, of_images[..., None].expand(-1, -1, width)).view(batch * images, -1, width)
        places = of_images.view(batch * images, -1)
        count = max(1, round(self.retain * tokens.shape[1]))
        tokens, places = merge_most_similar(tokens, places, count)
        tokens, places = tokens.view(batch, -1, width), places.view(batch, -1)
        merged = hidden.scatter(1, places[..., None].expand_as(tokens), tokens)
        stays = (~prompt.image).scatter(1, places, True)
        text = hidden.shape[1] - prompt.image_total
        return prompt.keep(places_of(stays, text + places.shape[1]), merged)


@contextmanager
def aim(model: nn.Module, retain: float = 0.25, start: float = 0.5) -> Iterator[Record]:
    """AIM on ``model`` inside the ``with`` block; see the module's text and `AIM`."""
    with applied(model, AIM(retain, start)) as record:
        yield record
