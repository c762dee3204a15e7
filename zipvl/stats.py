"""Statistics of a run: how each layer attended, how many tokens it kept, what its cache takes."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch._subclasses import FakeTensor

Mode = Literal["sparse", "dense"]
LATEST = 1000
UNCOUNTED = 1000  # sparse prefills whose ratios are not added up yet, at most


class Holder(Protocol):
    """A holder of a layer's cache, which can be asked for its bytes."""

    @property
    def nbytes(self) -> int: ...

    @property
    def full_nbytes(self) -> int: ...


@dataclass
class LayerStats:
    """The last prefill of one attention layer. Counts stay on their device and bytes in the cache until they are asked
    for.

    Args:
        layer: the layer's index in the model.
        mode: whether its attention was sparse.
        reason: why it was dense; None if it was sparse.
        prompt: length of the prompt, padding positions included.
        real: ``[B]`` real tokens of each row.
        counts: ``[B]`` kept tokens of each row.
        positions: ``[B, N]``, the kept tokens of row ``b`` in ``[b, :counts[b]]``; None if not recorded or dense.
        stored_counts: ``[B]`` tokens of each row that the cache holds after it; None if dense, or where the cache has
            no budget of its own (``ZipVLConfig.cache_ratio``).
        stored_positions: ``[B, N]`` int32, the prompt's (a chunk's) tokens that it took, ``N`` in unused places; None
            if not recorded, or as ``stored_counts``.
        mlp_counts: ``[B]`` tokens of each row, of this forward, for which the layer's MLP ran; None: for all
            (``ZipVLConfig.skip_mlp_layers``).
    """

    layer: int
    mode: Mode
    reason: str | None
    prompt: int
    real: torch.Tensor = field(repr=False)
    counts: torch.Tensor = field(repr=False)
    positions: torch.Tensor | None = field(default=None, repr=False)
    stored_counts: torch.Tensor | None = field(default=None, repr=False)
    stored_positions: torch.Tensor | None = field(default=None, repr=False)
    mlp_counts: torch.Tensor | None = field(default=None, repr=False)
    _holder: weakref.ref[Holder] | None = field(default=None, repr=False)
    _last_bytes: tuple[int, int] | None = field(default=None, repr=False)

    def measures(self, holder: Holder) -> None:
        """Asks ``holder``, which is not kept alive, for its bytes from now on."""
        self._holder = weakref.ref(holder)

    def cache_gone(self, holder: Holder) -> None:
        """Takes the last bytes of ``holder``."""
        self._last_bytes, self._holder = (holder.nbytes, holder.full_nbytes), None

    def _bytes(self) -> tuple[int, int] | None:
        holder = None if self._holder is None else self._holder()
        return self._last_bytes if holder is None else (holder.nbytes, holder.full_nbytes)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_holder": None, "_last_bytes": self._bytes()}

    @property
    def cache_bytes(self) -> int | None:
        """Bytes that the layer's ``ZipVLCache`` storage takes, or took in the end; None without such a cache."""
        found = self._bytes()
        return None if found is None else found[0]

    @property
    def full_cache_bytes(self) -> int | None:
        """Bytes that a cache of every token seen would take, or took in the end; None without a ``ZipVLCache``."""
        found = self._bytes()
        return None if found is None else found[1]

    @property
    def tokens(self) -> list[int]:
        """Real tokens of each row."""
        return [int(n) for n in self.real.tolist()]

    @property
    def kept(self) -> list[int]:
        """Kept tokens of each row."""
        return [int(n) for n in self.counts.tolist()]

    @property
    def ratio(self) -> float:
        """Mean over the rows of kept / real tokens."""
        return float(_ratios(self.real, self.counts).mean())

    @property
    def stored(self) -> list[int] | None:
        """Tokens of each row in the cache after the prefill; None where the cache has no budget of its own."""
        return None if self.stored_counts is None else [int(n) for n in self.stored_counts.tolist()]

    @property
    def mlp_tokens(self) -> list[int] | None:
        """Tokens of each row for which the layer's MLP ran, of a chunk its own; None: for all."""
        return None if self.mlp_counts is None else [int(n) for n in self.mlp_counts.tolist()]

    @property
    def stored_ratio(self) -> float | None:
        """Mean over the rows of stored / real tokens; None where ``stored`` is."""
        return None if self.stored_counts is None else float(_ratios(self.real, self.stored_counts).mean())

    @property
    def stored_index(self) -> list[torch.Tensor] | None:
        """Positions of each row's tokens that this prefill stored, as ``index``; None where ``stored`` is, or if they
        were not recorded."""
        if self.stored_positions is None:
            return None
        return [row[row < row.shape[0]].long().cpu() for row in self.stored_positions]

    @property
    def index(self) -> list[torch.Tensor] | None:
        """Positions of each row's kept tokens, ascending (LongTensors on the CPU); None if they were not recorded."""
        if self.positions is None:
            return None
        return [row[:count].long().cpu() for row, count in zip(self.positions, self.kept, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, without ``index``."""
        names = ("layer", "mode", "reason", "prompt", "tokens", "kept", "ratio", "stored", "stored_ratio", "mlp_tokens")
        return {name: getattr(self, name) for name in (*names, "cache_bytes", "full_cache_bytes")}


@dataclass
class Decoding:
    """How one ``generate()`` decoded.

    Args:
        reason: why its steps were run one by one; None: they were replays of a captured one.
        steps: steps that ran as they are, before the capture.
        replayed: steps that were replays of a CUDA graph.
    """

    reason: str | None = None
    steps: int = 0
    replayed: int = 0

    @property
    def how(self) -> Literal["graph", "eager"]:
        """Whether any step was a replay."""
        return "graph" if self.replayed else "eager"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {"how": self.how, "reason": self.reason, "replayed": self.replayed}


def _ratios(real: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``kept / real`` of each row, float64 ``[B]``; a row without real tokens counts 1."""
    # Not torch.where, which copies a constant to the device and waits for it.
    return (kept.double() / real.clamp(min=1)).masked_fill(real <= 0, 1.0)


class _Traced:
    """What the last forward of each layer in a compiled graph did, one attribute a layer.

    ``torch.compile`` replays attributes that are only written without a guard on what they were before; a dictionary or
    a list, which it reads, would make every forward a new graph.
    """

    def leave(self, layer: int, *prefill: Any) -> None:
        """Keeps ``prefill``, the arguments of ``Stats.add`` after the layer, until it is taken."""
        setattr(self, f"layer_{layer}", prefill)

    def take(self) -> list[tuple[int, Any]]:
        """The layers and what was kept of each, which is then forgotten. ``torch.export`` leaves tensors without data:
        nothing ran."""
        kept = vars(self).items()
        found = [
            (int(name.removeprefix("layer_")), prefill)
            for name, prefill in kept
            if not any(isinstance(value, FakeTensor) for value in prefill)
        ]
        self.__dict__.clear()
        return found


class Stats:
    """Statistics of every attention layer under ``zipvl.sparse`` or ``zipvl.configure``.

    ``layers`` holds each layer's last prefill, by layer index. ``mean_ratio`` runs over all prefills since the start or
    the last ``reset()``. Counts stay on the device until they are read. A forward inside a compiled graph is counted
    when the statistics are next read or written: of several compiled forwards in between, the last one counts.

    Args:
        record_index: keep the positions of the selected tokens too (``LayerStats.index``).
    """

    def __init__(self, record_index: bool = False) -> None:
        self.record_index = record_index
        self.traced = _Traced()
        self._lock = threading.Lock()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        self._count_traced()
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Forgets everything recorded."""
        with self._lock:
            self.traced.take()
            self._layers: dict[int, LayerStats] = {}
            self._rows, self._dense_rows = 0, 0
            self._uncounted: list[tuple[torch.Tensor, torch.Tensor]] = []
            self._ratio_sums: list[torch.Tensor] = []
            self._ratio_sum = 0.0
            self._prefill_counts: dict[int, int] = {}
            self._sparse_prefills = 0
            self.decodings: deque[Decoding] = deque(maxlen=LATEST)
            """How each ``generate()`` decoded, in order: the latest ``LATEST``."""

    def add(
        self,
        layer: int,
        reason: str | None,
        prompt: int,
        real: torch.Tensor,
        index: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
        stored: tuple[torch.Tensor, torch.Tensor] | None = None,
        mlp: torch.Tensor | None = None,
    ) -> LayerStats:
        """Records the prefill of one layer.

        Args:
            layer: its index.
            reason: why it was dense, or None: it was sparse.
            prompt: ``N``.
            real: ``[B]`` real tokens of each row.
            index, count: ``[B, N]`` and ``[B]``, the selection of a sparse layer.
            stored: of a cache with a budget of its own, ``[B, N]`` the tokens that it took, ``[B]`` how many it holds.
            mlp: ``[B]``, for how many tokens of each row its MLP ran; None: for all.
        """
        self._count_traced()
        return self._add(layer, reason, prompt, real, index, count, stored, mlp)

    def _count_traced(self) -> None:
        for layer, prefill in self.traced.take():
            self._add(layer, *prefill)

    def _add(
        self,
        layer: int,
        reason: str | None,
        prompt: int,
        real: torch.Tensor,
        index: torch.Tensor | None,
        count: torch.Tensor | None,
        stored: tuple[torch.Tensor, torch.Tensor] | None,
        mlp: torch.Tensor | None,
    ) -> LayerStats:
        kept = real if count is None else count
        entry = LayerStats(
            layer=layer,
            mode="sparse" if reason is None else "dense",
            reason=reason,
            prompt=prompt,
            real=real,
            counts=kept,
            positions=index if self.record_index else None,
            stored_counts=None if stored is None else stored[1],
            stored_positions=None if stored is None or not self.record_index else stored[0],
            mlp_counts=mlp,
        )
        with self._lock:
            self._layers[layer] = entry
            self._rows += real.shape[0]
            if count is None:
                self._dense_rows += real.shape[0]
            else:
                self._uncounted.append((real, count))
                if len(self._uncounted) == UNCOUNTED:
                    self._sum_ratios()
            self._prefill_counts[layer] = self._prefill_counts.get(layer, 0) + 1
            self._sparse_prefills += reason is None
        return entry

    def _sum_ratios(self) -> None:
        """Adds up the ratios of the latest sparse prefills, on the device: many at once, because each layer of a short
        prompt would wait for the launches. The lock is held."""
        of_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for pair in self._uncounted:
            of_device.setdefault(pair[1].device, []).append(pair)
        for pairs in of_device.values():
            real, kept = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
            self._ratio_sums.append(_ratios(real, kept).sum())
        self._uncounted.clear()

    def decodes(self) -> Decoding:
        """Records that a ``generate()`` begins, which tells the result how it decodes."""
        self.decodings.append(Decoding())
        return self.decodings[-1]

    @property
    def layers(self) -> dict[int, LayerStats]:
        """Each layer's last prefill."""
        self._count_traced()
        return self._layers

    @property
    def active(self) -> bool:
        """Whether any layer of any prefill was sparse."""
        self._count_traced()
        return self._sparse_prefills > 0

    @property
    def prefills(self) -> int:
        """How many prefills were recorded."""
        self._count_traced()
        return max(self._prefill_counts.values(), default=0)

    @property
    def mean_ratio(self) -> float:
        """Mean of kept / real tokens over layers, rows and prefills; a dense layer counts 1. 1.0 if nothing ran."""
        self._count_traced()
        with self._lock:
            self._sum_ratios()
            self._ratio_sum += sum(total.item() for total in self._ratio_sums)
            self._ratio_sums.clear()
            return (self._dense_rows + self._ratio_sum) / self._rows if self._rows else 1.0

    @property
    def stored_ratio(self) -> float | None:
        """Mean over layers of the share of tokens in the cache after the last prefill, of a cache with a budget of its
        own; a dense layer counts 1. None where no layer has one."""
        shares = [entry.stored_ratio for entry in self.layers.values()]
        if all(share is None for share in shares):
            return None
        return sum(1.0 if share is None else share for share in shares) / len(shares)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the last prefill's ``ZipVLCache`` layers, now or in the end."""
        return sum(entry.cache_bytes or 0 for entry in self.layers.values())

    @property
    def full_cache_bytes(self) -> int:
        """Bytes that those layers would take with every token seen."""
        return sum(entry.full_cache_bytes or 0 for entry in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        names = ("active", "prefills", "mean_ratio", "stored_ratio", "cache_bytes", "full_cache_bytes")
        totals = {name: getattr(self, name) for name in names}
        totals["decodings"] = [decoding.to_dict() for decoding in self.decodings]
        return totals | {"layers": [self.layers[layer].to_dict() for layer in sorted(self.layers)]}

    def summary(self) -> str:
        """A few lines of text: the totals, and one line a layer."""
        if not self.layers:
            return "zipvl: no prefill yet"
        lines = [
            f"zipvl: {'sparse' if self.active else 'NOT sparse'}, {self.prefills} prefill(s), "
            f"mean ratio {self.mean_ratio:.3f}, cache {self.cache_bytes:,} of {self.full_cache_bytes:,} bytes"
        ]
        if self.decodings:
            last = self.decodings[-1]
            lines.append(f"  decoded by {last.how}" + (f": {last.reason}" if last.reason else ""))
        for layer in sorted(self.layers):
            entry = self.layers[layer]
            note = f" ({entry.reason})" if entry.reason else ""
            stored = "" if entry.stored is None else f", stored {entry.stored}"
            mlp = "" if entry.mlp_tokens is None else f", MLP of {entry.mlp_tokens}"
            lines.append(f"  layer {layer:3d} {entry.mode:6s} kept {entry.kept} of {entry.tokens}{stored}{mlp}{note}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Stats(layers={len(self.layers)}, prefills={self.prefills}, active={self.active})"
