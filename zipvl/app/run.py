"""Ask one image-text-to-text model of transformers a question about a page, densely or with ZipVL, and time it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from zipvl.app.cache_bytes import cache_bytes
from zipvl.app.timing import synchronize
from zipvl.errors import InputError, first_line
from zipvl.transformers import cache_names

if TYPE_CHECKING:
    from zipvl.config import ZipVLConfig

__all__ = ["LONGEST", "Answer", "FirstToken", "ask", "attention", "prepare", "reasons_for_dense"]

LONGEST = 1000
"""A page is at most so many times as long as it is wide."""


@dataclass(frozen=True)
class Answer:
    """What a model said, how long it took and what it held in memory.

    Attributes:
        text: the answer, special tokens removed.
        prompt_tokens: tokens of the prompt, image tokens included.
        new_tokens: tokens generated.
        first_token_s: seconds from the call of ``generate`` to the first token on the host, vision tower included.
        total_s: seconds to the last token.
        cache_bytes: memory of the key/value cache after the prompt, before any answer token; ``None`` where the model
            hands no cache out.
        final_cache_bytes: the same after the answer, room set aside for further tokens included.
        layer_cache_bytes: ``cache_bytes`` layer by layer.
        stats: ``zipvl.Stats`` of this run; ``None`` for the dense run.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    total_s: float
    cache_bytes: int | None
    final_cache_bytes: int | None
    layer_cache_bytes: list[int] | None
    stats: Any = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; ``None`` where there are none."""
        seconds = self.total_s - self.first_token_s
        return (self.new_tokens - 1) / seconds if self.new_tokens > 1 and seconds > 0 else None


def prepare(processor: Any, image: Image.Image, question: str, model: Any) -> Any:
    """The model's inputs for one user turn of ``image`` and ``question``, on the model's device and in its dtype.

    Raises:
        InputError: the picture is too long and narrow, or the processor rejects it.
    """
    width, height = image.size
    if max(width, height) > LONGEST * min(width, height):  # a processor that scales the short side would fill memory
        raise InputError(
            "image", f"expected a picture at most {LONGEST} times as long as it is wide, got one of {width} x {height}"
        )
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    except Exception as error:  # each processor stumbles over other pages and texts in its own way
        raise InputError(
            "image", f"the model's processor rejects this page of {width} x {height}: {first_line(error)}"
        ) from error
    return inputs.to(model.device, dtype=model.dtype)


def ask(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    config: ZipVLConfig | None = None,
    *,
    max_new_tokens: int = 32,
    warm_up: bool = True,
    record_index: bool = False,
) -> Answer:
    """Answer ``question`` about ``image`` by greedy decoding.

    Args:
        model: an image-text-to-text model of transformers.
        processor: its processor, with a chat template.
        image: the page.
        question: the text after the page.
        config: how to be sparse; ``None``: the model's ordinary attention and full cache.
        max_new_tokens: longest answer.
        warm_up: run the prompt once before the measured run, so that first-call costs are charged to neither side.
        record_index: have ``stats`` keep the positions of the kept tokens.
    """
    inputs = prepare(processor, image, question, model)
    if warm_up:
        with attention(model, config, record_index=False):
            _generate(model, inputs, max_new_tokens=1)
    with attention(model, config, record_index=record_index) as stats, FirstToken.of(model) as first:
        synchronize(model.device)
        start = time.perf_counter()
        output = _generate(model, inputs, max_new_tokens=max_new_tokens, streamer=first)
        synchronize(model.device)
        end = time.perf_counter()
    new = output.sequences[0]
    prompt_tokens = inputs["input_ids"].shape[1]
    if not model.config.is_encoder_decoder:
        new = new[prompt_tokens:]
    return Answer(
        text=processor.decode(new, skip_special_tokens=True).strip(),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new),
        first_token_s=first.time - start,
        total_s=end - start,
        cache_bytes=first.cache_bytes,
        final_cache_bytes=cache_bytes(cache_names.of_output(output)),
        layer_cache_bytes=first.layer_cache_bytes,
        stats=stats,
    )


def reasons_for_dense(stats: Any) -> list[str]:
    """Why layers of a ZipVL run were dense, each reason once, with the layers it concerns."""
    layers: dict[str, list[int]] = {}
    for index, layer in stats.layers.items():
        if layer.mode != "sparse":
            layers.setdefault(layer.reason or "no reason given", []).append(index)
    if not stats.layers:
        return ["no attention layer of this model runs through ZipVL"]
    return [f"{_layer_range(where)}: {reason}" for reason, where in layers.items()]


class FirstToken(BaseStreamer):
    """Notes when the first token reached the host, and how large the cache was then.

    ``generate`` puts the prompt first and each token after it, as CPU tensors, so a put means that the device is done.
    The cache is seen by a forward hook, and measured after the clock was read.
    """

    def __init__(self) -> None:
        self.time = 0.0
        self.cache_bytes: int | None = None
        self.layer_cache_bytes: list[int] | None = None
        self._cache: Any = None
        self._puts = 0

    @classmethod
    @contextmanager
    def of(cls, model: Any) -> Iterator[FirstToken]:
        """A streamer for one ``generate`` of ``model``."""
        streamer = cls()
        hook = model.register_forward_hook(streamer._see)
        try:
            yield streamer
        finally:
            hook.remove()

    def _see(self, _module: Any, _args: Any, output: Any) -> None:
        self._cache = cache_names.of_output(output)

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2:
            self.time = time.perf_counter()
            self.cache_bytes = cache_bytes(self._cache)
            layers = getattr(self._cache, "layers", None)
            self.layer_cache_bytes = None if layers is None else [cache_bytes(layer) or 0 for layer in layers]

    def end(self) -> None:
        self._cache = None


@contextmanager
def attention(model: Any, config: ZipVLConfig | None, *, record_index: bool) -> Iterator[Any]:
    """The model's ordinary attention (yields ``None``), or ZipVL's (yields its ``Stats``).

    ZipVL's warnings are silenced, because the statistics hold the same reasons; its refusals become ``InputError``.
    """
    if config is None:
        yield None
        return
    import zipvl

    try:
        with warnings.catch_warnings(), zipvl.sparse(model, config, record_index=record_index) as stats:
            warnings.filterwarnings("ignore", message="zipvl", category=UserWarning)
            yield stats
    except ValueError as error:
        if not str(error).lower().startswith("zipvl"):
            raise
        raise InputError("model", f"ZipVL cannot run this model: {first_line(error)}") from error


def _generate(model: Any, inputs: Any, *, max_new_tokens: int, streamer: BaseStreamer | None = None) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        return_dict_in_generate=True,
        streamer=streamer,
    )


def _layer_range(layers: list[int]) -> str:
    """``layer 3``, ``layers 0-5`` or ``layers 0, 2, 4``."""
    layers = sorted(layers)
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return "layers " + ", ".join(map(str, layers))
