"""VisionZip (arXiv 2412.04467): each tile is reduced by the vision tower's own attention, before the language model.

Schedule: of a share `keep` of each tile's patches, 54 in 64 are *dominant*: those that the tower's CLS token attends to
most, in the layer whose output becomes the features, mean over the heads (towers without a CLS token: the attention a
patch receives, mean over queries and heads). The rest, 10 in 64, are *contextual*: patches at equal strides among the
remaining ones are targets, every other remaining patch joins the target of most similar key (cosine, mean over heads),
and a target becomes the mean of itself and what joined it. All layers of the language model see the same tokens.

Merged tokens stand at their target's position. Row ends of LLaVA-NeXT's layout are no patches: they stay, and count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from zipvl import ops
from zipvl.baselines.common import Baseline, Prompt, Record, applied, attention_replaced, places_of

__all__ = ["TowerAttention", "VisionZip", "compress", "observed_tower", "visionzip"]

DOMINANT = 54 / 64


@dataclass
class TowerAttention:
    """The vision tower's attention to each patch when it last ran.

    Args:
        score: float32 ``[tiles, P]``.
        key: float32 ``[tiles, P, D]``, mean over the heads.
    """

    score: Tensor | None = None
    key: Tensor | None = None


def compress(features: Tensor, score: Tensor, key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """One tile's patches reduced to ``count``.

    Args:
        features: ``[B, P, d]``; score: ``[B, P]``; key: ``[B, P, D]``; count: in ``[1, P]``.

    Returns:
        places int64 ``[B, count]`` among the patches, ascending, and the features ``[B, count, d]`` that go there.
    """
    batch, patches, width = features.shape
    dominant = round(count * DOMINANT)
    order = score.argsort(dim=1, descending=True, stable=True)
    best, rest = order[:, :dominant], order[:, dominant:].sort(1).values
    contextual = count - dominant
    if contextual:
        stride = torch.arange(contextual, device=rest.device) * (rest.shape[1] // contextual)
        targets = rest[:, stride]
        unit = F.normalize(key.float(), dim=-1)
        of_targets = unit.gather(1, targets[..., None].expand(-1, -1, unit.shape[2]))
        nearest = (unit @ of_targets.transpose(1, 2)).argmax(2)  # [B, P]
        joins = torch.zeros(batch, patches, dtype=torch.bool, device=rest.device).scatter(1, rest, True)
        joins.scatter_(1, targets, False)
        group = F.one_hot(nearest, contextual).to(features.dtype) * joins[..., None]  # [B, P, contextual]
        total = features.gather(1, targets[..., None].expand(-1, -1, width)) + group.transpose(1, 2) @ features
        features = features.scatter(1, targets[..., None].expand(-1, -1, width), total / (1 + group.sum(1)[..., None]))
        best = torch.cat([best, targets], 1)
    places = best.sort(1).values
    return places, features.gather(1, places[..., None].expand(-1, -1, width))


class VisionZip(Baseline):
    """VisionZip's schedule.

    Args:
        keep: the share of each tile's patches that is left, in ``(0, 1]``.
        tower: what the tower's attention said of the pictures that are coming, where the caller computes features once
            for several methods; None observes the tower when it runs.
    """

    name = "VisionZip"

    def __init__(self, keep: float = 1 / 3, tower: TowerAttention | None = None) -> None:
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"VisionZip: keep must be in (0, 1], got {keep}")
        self.keep, self.tower, self.shared = keep, tower or TowerAttention(), tower is not None
        self.model: Any = None

    @classmethod
    def for_budget(cls, share: float, row_ends: float = 0.0, tower: TowerAttention | None = None) -> VisionZip:
        """The parameters with which the layers see ``share`` of the image tokens.

        Args:
            row_ends: the share of the image tokens that are row ends and always stay.
        """
        if share <= row_ends:
            raise ValueError(f"VisionZip: budget {share:.3f} is out of reach: row ends alone are {row_ends:.3f}")
        return cls((share - row_ends) / (1 - row_ends), tower)

    def schedule(self, layers: int) -> list[float]:
        return [self.keep] * layers

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        inner: Any = getattr(model, "model", None)
        if not hasattr(inner, "pack_image_features") or not hasattr(inner, "image_newline"):
            raise ValueError(f"VisionZip: {type(model).__name__} does not pack image features as LLaVA-NeXT does")
        self.model = inner
        if self.shared:
            yield
            return
        with observed_tower(model, self.tower):
            yield

    def reduce(self, layer: int, hidden: Tensor, prompt: Prompt) -> Tensor:
        if layer:
            return hidden
        score, key = self.tower.score, self.tower.key
        if score is None or key is None:
            raise ValueError("VisionZip: the vision tower was not observed; give it pixel_values inside the block")
        batch, patches, width = hidden.shape[0], score.shape[1], hidden.shape[2]
        score, key = score.view(batch, -1, patches), key.view(batch, -1, patches, key.shape[2])
        origin = self._origin(prompt, batch, score.shape[1], patches)
        of_image = places_of(prompt.image, prompt.image_total)
        features = hidden.gather(1, of_image[..., None].expand(-1, -1, width))
        stays = (origin < 0).to(hidden.device).expand(batch, -1).clone()
        tile = origin.div(patches, rounding_mode="floor")
        row_ends = int((tile < 0).sum())
        by_tile = tile.argsort(stable=True)[row_ends:]
        lengths = torch.bincount(tile[by_tile], minlength=score.shape[1])
        total = hidden.shape[1] - prompt.image_total + row_ends
        for length in lengths.unique().tolist():  # tiles at an edge of a picture that was padded have fewer patches
            if not length:
                continue
            which = (lengths == length).nonzero()[:, 0]
            tokens = by_tile[lengths[tile[by_tile]] == length].view(len(which), length)
            at = (origin[tokens] % patches).to(hidden.device).expand(batch, -1, -1)
            which, tokens = which.to(hidden.device), tokens.to(hidden.device)
            count = max(1, round(self.keep * length))
            places, values = compress(
                features[:, tokens].flatten(0, 1),
                score[:, which].gather(2, at).flatten(0, 1),
                key[:, which].gather(2, at[..., None].expand(*at.shape, key.shape[3])).flatten(0, 1),
                count,
            )
            left = tokens.repeat(batch, 1).gather(1, places).view(batch, -1)
            features = features.scatter(1, left[..., None].expand(-1, -1, width), values.view(*left.shape, -1))
            stays.scatter_(1, left, True)
            total += left.shape[1]
        merged = hidden.scatter(1, of_image[..., None].expand(-1, -1, width), features)
        all_stay = (~prompt.image).scatter(1, of_image, stays)
        return prompt.keep(places_of(all_stay, total), merged)

    def _origin(self, prompt: Prompt, batch: int, tiles: int, patches: int) -> Tensor:
        """For each image token of a row ``tile * P + patch`` where it comes from, or -1 for a row end. int64, on the
        CPU, since all of it follows from the sizes of the pictures."""
        given = prompt.image_sizes
        sizes = None if given is None else given.cpu().view(batch, -1, 2)
        if sizes is None or bool((sizes != sizes[0]).any()):
            raise ValueError("VisionZip: rows must have images of the same sizes, given as image_sizes")
        row = sizes[0]
        config = self.model.config
        counts = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in row.tolist()
        ]
        numbers = torch.arange(tiles * patches, dtype=torch.float64).view(tiles, patches, 1)
        packed, _ = self.model.pack_image_features(
            list(numbers.split(counts)),
            row,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=numbers.new_full((1,), -1),
        )
        return torch.cat(list(packed))[:, 0].long()


@contextmanager
def observed_tower(model: nn.Module, tower: TowerAttention) -> Iterator[None]:
    """Writes what the vision tower's attention says to ``tower`` whenever it runs inside the ``with`` block."""
    inner: Any = getattr(model, "model", model)
    vision: Any = getattr(inner.vision_tower, "vision_model", inner.vision_tower)
    layers = vision.encoder.layers
    chosen = inner.config.vision_feature_layer
    if not isinstance(chosen, int):
        raise ValueError(f"VisionZip: expected one vision_feature_layer, got {chosen}")
    attention = layers[len(layers) + chosen if chosen < 0 else chosen - 1].self_attn
    first = int(inner.config.vision_feature_select_strategy == "default")  # the CLS token is no feature

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        asking = torch.arange(1 if first else q.shape[2], dtype=torch.int32, device=q.device).expand(q.shape[0], -1)
        paid, _ = ops.probe_scores(q, k, asking.contiguous(), scale=scale, causal=False)
        tower.score = paid[:, first:] / asking.shape[1]
        tower.key = k[:, :, first:].float().mean(1)
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scale, **kwargs)

    with attention_replaced([attention], [attention.config], attend):
        yield


@contextmanager
def visionzip(model: nn.Module, keep: float = 1 / 3, tower: TowerAttention | None = None) -> Iterator[Record]:
    """VisionZip on ``model`` inside the ``with`` block; see the module's text and `VisionZip`."""
    with applied(model, VisionZip(keep, tower)) as record:
        yield record
