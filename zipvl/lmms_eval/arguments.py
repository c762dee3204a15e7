"""The arguments of ``lmms-eval --model zipvl --model_args name=value,...``."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from zipvl.config import ZipVLConfig
from zipvl.lmms_eval.methods import METHODS, PADDED, options_of

__all__ = ["Arguments", "parse"]

VideoMode = Literal["auto", "video", "images"]


@dataclass(frozen=True)
class Arguments:
    """What one evaluation runs.

    Args:
        pretrained: folder or hub id of an image-text-to-text model of transformers.
        revision: branch, tag or commit of the hub repository.
        method: ``zipvl``, ``dense`` (the model as it is), a baseline's name, or ``variant``.
        device: where the model goes, with one process; ``None``: the first GPU, or the CPU.
        device_map: accelerate's device map, such as ``auto``, to spread one model over several GPUs.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention of what runs densely; with ``method=zipvl`` that is the vision tower.
        trust_remote_code: let a checkpoint bring its own code.
        batch_size: questions answered together.
        max_frames_num: most frames taken of a video, evenly spaced.
        video: ``video`` hands them to the processor as a video, ``images`` as so many images; ``auto``: as a video
            where the processor knows videos.
        min_pixels, max_pixels: handed to the processor where given (Qwen-VL).
        system_prompt: text of a system turn before every question.
        stats: JSON file to write with what the method kept, task by task.
        zipvl: what ZipVL keeps; its fields are arguments of their own (``tau=0.975,cache=drop``).
        options: arguments of a baseline, those of its class in ``zipvl.baselines`` (``keep=0.5``) or ``budget``, or of
            ``variant``, those of ``zipvl.baselines.Variant``.
    """

    pretrained: str
    revision: str = "main"
    method: str = "zipvl"
    device: str | None = None
    device_map: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    batch_size: int = 1
    max_frames_num: int = 32
    video: VideoMode = "auto"
    min_pixels: int | None = None
    max_pixels: int | None = None
    system_prompt: str | None = None
    stats: str | None = None
    zipvl: ZipVLConfig = field(default_factory=ZipVLConfig)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(isinstance(self.pretrained, str) and self.pretrained != "", "pretrained", "a folder or hub id", self)
        _check(
            self.dtype in ("auto", "float32", "bfloat16", "float16"),
            "dtype",
            "auto, float32, bfloat16 or float16",
            self,
        )
        _check(self.video in get_args(VideoMode), "video", f"one of {', '.join(get_args(VideoMode))}", self)
        for name in ("batch_size", "max_frames_num"):
            _check(_is_count(getattr(self, name)), name, "an integer of at least 1", self)
        alone = self.batch_size == 1 or self.method in PADDED
        _check(alone, "batch_size", f"1 with method={self.method}, which does not take padded batches", self)
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            _check(value is None or _is_count(value), name, "an integer of at least 1", self)
        _check(isinstance(self.trust_remote_code, bool), "trust_remote_code", "True or False", self)
        _check(self.device is None or self.device_map is None, "device", "left out where device_map is given", self)
        writable = self.stats is None or os.path.isdir(Path(self.stats).absolute().parent)
        _check(writable, "stats", "a file in an existing directory", self)


def parse(given: dict[str, Any]) -> Arguments:
    """``Arguments`` from the names and values that lmms-eval read off its command line.

    Raises:
        ValueError: an argument is unknown, out of range, or belongs to another method; the message names it.
    """
    given = dict(given)
    given.pop("max_batch_size", None)  # lmms-eval hands it to every model; no size is searched for here
    method = given.get("method", "zipvl")
    if method not in METHODS:
        raise ValueError(f"zipvl: method must be one of {', '.join(METHODS)}, got {method!r}")
    own = {f.name for f in fields(Arguments)} - {"zipvl", "options"}
    of_zipvl = {f.name for f in fields(ZipVLConfig)}
    of_baseline = options_of(method)
    mine = {"zipvl": of_zipvl, "dense": set()}.get(method, of_baseline)
    for name in given:
        if name in own | mine:
            continue
        if name in of_zipvl:
            raise ValueError(f"zipvl: {name} is an argument of method=zipvl, but method={method} was asked for")
        known = sorted(own | mine)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"zipvl: unknown model argument {name!r} for method={method}; {hint}known: {', '.join(known)}")
    if "pretrained" not in given:
        raise ValueError("zipvl: the model argument 'pretrained' is missing: expected a folder or hub id")
    values = {name: value for name, value in given.items() if name in own}
    if "batch_size" in values:
        values["batch_size"] = _batch_size(values["batch_size"])
    config = ZipVLConfig(**{name: _field(name, value) for name, value in given.items() if name in of_zipvl & mine})
    return Arguments(**values, zipvl=config, options={n: v for n, v in given.items() if n in of_baseline & mine - own})


def _field(name: str, value: Any) -> Any:
    """lmms-eval reads ``layers=0-5``, ``skip_mlp_layers=1+3`` and ``low_bits=4+2`` as text, ``layers=3`` as number."""
    if name in ("high_bits", "low_bits") and isinstance(value, str):
        parts = value.split("+")
        return tuple(int(bits) for bits in parts) if all(bits.isdecimal() for bits in parts) else value
    if name not in ("layers", "skip_mlp_layers") or value is None:
        return value
    try:
        if isinstance(value, int):
            return (value,)
        first, dash, last = str(value).partition("-")
        return tuple(range(int(first), int(last) + 1)) if dash else tuple(int(v) for v in str(value).split("+"))
    except ValueError as error:
        raise ValueError(f"zipvl: {name} must be a range such as 0-5 or a list such as 0+2+4, got {value!r}") from error


def _batch_size(value: Any) -> int:
    """lmms-eval hands the batch size over as text or number."""
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"zipvl: batch_size must be an integer of at least 1, got {value!r}") from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check(holds: bool, name: str, expected: str, arguments: Arguments) -> None:
    if not holds:
        raise ValueError(f"zipvl: {name} must be {expected}, got {getattr(arguments, name)!r}")
