"""Decoding by replaying one step that was captured in a CUDA graph.

A step of a 7B model takes the GPU a few milliseconds and Python a few tens: with a small cache the launches are what is
left to save. The cache's lengths live on the device and its storage is reserved beforehand, so one captured step serves
every later one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from zipvl.transformers import cache_names
from zipvl.transformers.cache_layer import ZipVLCacheLayer


class DecodeGraph:
    """One new token a row behind a filled ``ZipVLCache``, as often as room was reserved.

    Use it where the prefill was run: inside the ``zipvl.sparse`` block, or with ``attn_implementation="zipvl"``.
    Nothing else may change the cache as long as steps are taken.

    Args:
        model: the model that filled ``cache``.
        cache: a ``ZipVLCache`` whose layers all had a sparse prefill.
        positions: ``[B]`` or ``[B, 1]``, the position of each row's next token; by default the number of tokens seen.
        steps: how many steps may be taken.
        kwargs: further arguments of every step's forward.

    Raises:
        ValueError: a layer's prefill was dense or it is no full-attention layer, or the cache is not on one GPU.
    """

    def __init__(
        self, model: Any, cache: DynamicCache, *, steps: int, positions: torch.Tensor | None = None, **kwargs: Any
    ) -> None:
        self._layers = [_capturable(layer, index) for index, layer in enumerate(cache.layers)]
        batch, device = self._layers[0].rows, _one_device(self._layers)
        for layer in self._layers:
            layer.reserve(steps + 1)
        self._left = steps
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.full_like(self._ids, cache.get_seq_length())
        if positions is not None:
            self._positions.copy_(positions.reshape(batch, 1))

        for layer in self._layers:
            layer.make_room(2)  # for the step that is taken back and the one that is captured

        name = cache_names.name_for(type(model).forward)

        def step() -> torch.Tensor:
            inputs = {"input_ids": self._ids, "position_ids": self._positions, name: cache}
            logits: torch.Tensor = model(**inputs, use_cache=True, **kwargs).logits
            return logits

        with torch.cuda.device(device):  # a graph belongs to the current device, and is captured on its stream
            self._graph = torch.cuda.CUDAGraph()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()  # libraries set themselves up outside the capture; the token it appends is taken back
                for layer in self._layers:
                    layer.crop(-1)
            torch.cuda.current_stream().wait_stream(side)
            # Not torch's own stream for captures, which is of the device that captured first.
            with torch.cuda.graph(self._graph, stream=side):
                self._logits = step()
        for layer in self._layers:
            layer.advance(-1)  # captured, not run

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits ``[B, 1, vocabulary]`` after ``tokens [B, 1]``, overwritten by the next call.

        Raises:
            RuntimeError: no room is left.
        """
        if self._left == 0:
            raise RuntimeError("DecodeGraph: all reserved steps were taken; make another with more steps")
        self._left -= 1
        for layer in self._layers:
            layer.make_room(1)
        self._ids.copy_(tokens)
        with torch.cuda.device(self._ids.device):
            self._graph.replay()
        self._positions.add_(1)
        for layer in self._layers:
            layer.advance(1)
        return self._logits


def _capturable(layer: Any, index: int) -> ZipVLCacheLayer:
    if not isinstance(layer, ZipVLCacheLayer):
        raise ValueError(f"DecodeGraph: layer {index} of the cache is a {type(layer).__name__}, not a ZipVLCacheLayer")
    if layer.packed is None:
        raise ValueError(
            f"DecodeGraph: the prefill of layer {index} was dense, or there was none; its cache is not packed"
        )
    if layer.device.type != "cuda":
        raise ValueError(f"DecodeGraph: the cache must be on a GPU, layer {index} is on {layer.device}")
    return layer


def _one_device(layers: list[ZipVLCacheLayer]) -> torch.device:
    devices = sorted({str(layer.device) for layer in layers})
    if len(devices) > 1:
        raise ValueError(
            f"DecodeGraph: a CUDA graph is of one GPU, the layers of the cache are on {', '.join(devices)}"
        )
    return layers[0].device
