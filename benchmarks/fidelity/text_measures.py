"""What the text model says dense and under a setting: the next tokens of a text, and a hidden key."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import zipvl
from benchmarks.fidelity.texts import PROMPT, Key, Text
from zipvl.transformers import cache_names

__all__ = ["Run", "compare", "find_key", "next_tokens"]

CHUNK = 20
"""Tokens that one forward adds behind a prompt. They attend to what the cache kept and causally to themselves, as they
would one by one; and 100, after which the quantised cache compresses what is new, is a multiple."""


@dataclass
class Run:
    """What one prompt's forwards took and kept.

    kept: share of the prompt's tokens, mean over layers; layer_ms: self-attention of a layer, its projections
    included, mean over layers; prefill_ms: the whole prompt; cache_share: of the bytes of a full cache.
    """

    kept: float
    layer_ms: float
    prefill_ms: float
    cache_share: float


class _Clock:
    """Time in the self-attention of all layers."""

    def __init__(self, model: Any) -> None:
        self.layers = [layer.self_attn for layer in model.model.layers]
        self.device = model.device
        self.total = self.started = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what runs inside the ``with`` block."""

        def begin(*_: Any) -> None:
            self.started = self.now()

        def end(*_: Any) -> None:
            self.total += self.now() - self.started

        hooks = [
            hook
            for layer in self.layers
            for hook in (layer.register_forward_pre_hook(begin), layer.register_forward_hook(end))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def layer_ms(self) -> float:
        """Milliseconds of one layer."""
        return 1000 * self.total / len(self.layers)


def _block(model: Any, config: zipvl.ZipVLConfig | None) -> AbstractContextManager[Any]:
    return zipvl.sparse(model, config) if config is not None else nullcontext()


def _prefill(model: Any, ids: Tensor) -> tuple[Any, _Clock, float]:
    clock = _Clock(model)
    started = clock.now()
    with clock.running():
        output = model(ids, use_cache=True, logits_to_keep=1)
    return output, clock, 1000 * (clock.now() - started)


def _run(stats: Any, clock: _Clock, prefill_ms: float, prompt: int) -> Run:
    if stats is None:
        return Run(1.0, clock.layer_ms, prefill_ms, 1.0)
    if stats.layers[max(stats.layers)].prompt != prompt or stats.prefills != 1:
        raise RuntimeError("fidelity: tokens behind the prompt were taken for one")
    if not stats.active:
        raise RuntimeError(f"fidelity: no layer was sparse: {stats.layers[0].reason}")
    share = stats.cache_bytes / stats.full_cache_bytes
    return Run(stats.mean_ratio, clock.layer_ms, prefill_ms, share)


@torch.inference_mode()
def next_tokens(model: Any, text: Text, config: zipvl.ZipVLConfig | None) -> tuple[Tensor, Run]:
    """Log-probabilities ``[NEW, V]`` float32 of what follows the prompt, each behind the text's own tokens."""
    ids = torch.tensor([text.ids], device=model.device)
    with _block(model, config) as stats:
        output, clock, prefill_ms = _prefill(model, ids[:, :PROMPT])
        logits, cache = [output.logits[0, -1:]], cache_names.of_output(output)
        for chunk in ids[:, PROMPT:-1].split(CHUNK, dim=1):
            logits.append(model(chunk, past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(logits).float().log_softmax(-1), _run(stats, clock, prefill_ms, PROMPT)


def compare(dense: Tensor, other: Tensor, text: Text) -> dict[str, float]:
    """KL divergence of ``other`` from ``dense``, the share of positions where both prefer one token, and the mean
    negative log-likelihood of the text's tokens; all over its ``NEW`` last ones, in nats."""
    kl = (dense.exp() * (dense - other)).sum(-1).mean()
    same = (dense.argmax(-1) == other.argmax(-1)).double().mean()
    tokens = torch.tensor(text.ids[PROMPT:], device=other.device)
    nll = -other.gather(1, tokens[:, None]).mean()
    return {"kl": float(kl), "same": float(same), "nll": float(nll)}


@torch.inference_mode()
def find_key(model: Any, key: Key, config: zipvl.ZipVLConfig | None) -> tuple[bool, Run]:
    """Whether greedy decoding says the key."""
    ids = torch.tensor([key.ids], device=model.device)
    with _block(model, config) as stats:
        output, clock, prefill_ms = _prefill(model, ids)
        cache, right = cache_names.of_output(output), True
        for place, digit in enumerate(key.answer):
            token = output.logits[:, -1:].argmax(-1)
            right = right and int(token) == digit
            if not right or place == len(key.answer) - 1:
                break
            output = model(token, past_key_values=cache, use_cache=True)
    return right, _run(stats, clock, prefill_ms, len(key.ids))
