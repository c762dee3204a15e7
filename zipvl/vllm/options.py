"""What the user asked for: ``--additional-config '{"zipvl": {...}}'``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from zipvl import policy
from zipvl.config import ZipVLConfig, read_fields

KEY = "zipvl"
"""The entry of vLLM's ``additional_config``."""

# A backend is given queries, keys and values: no ids, no weights, and no say in how steps are run.
OUT_OF_REACH = {
    "keep_text": "an attention backend does not know which tokens are text",
    "text_prompts": "an attention backend does not know which prompts have images: every prompt is sparse",
    "skip_projections": "vLLM runs the projections itself",
    "skip_mlp_layers": "vLLM runs the MLPs itself",
    "decode": "vLLM runs decoding steps itself, in CUDA graphs where it can",
    "vision_attention": "vLLM runs the vision tower itself",
    "vision_compile": "vLLM runs the vision tower itself",
    "decode_compile": "vLLM compiles its steps itself",
    "high_bits": "there is no quantised cache in vLLM's blocks",
    "low_bits": "there is no quantised cache in vLLM's blocks",
}
DONE = {"keep_text": False, "text_prompts": "sparse"}
"""Values of ``OUT_OF_REACH`` that say what is done anyway, and so may be given."""
OURS = ("prefill_chunk_size",)
FILE = "config"
"""The entry that names a file of ``zipvl calibrate`` or ``ZipVLConfig.save``."""


@dataclass(frozen=True)
class Options:
    """What one engine does. Of the fields of ``ZipVLConfig`` those that an attention backend can follow.

    Args:
        config: the fields of ``ZipVLConfig``, with its defaults but for ``keep_text`` and ``text_prompts``: a backend
            sees neither, and every prompt is sparse.
        prefill_chunk_size: under ``cache="full"`` a prompt is cut at multiples of so many tokens, wherever the
            scheduler cuts it, and prefixes are taken from the prefix cache up to such a multiple. A multiple of the
            block size. None: the tokens of a step, ``max_num_batched_tokens``.
    """

    config: ZipVLConfig
    prefill_chunk_size: int | None = None

    @classmethod
    def read(cls, given: Any) -> Options:
        """The options in ``additional_config["zipvl"]``; those beside ``config`` replace the file's.

        Raises:
            ValueError: it is no mapping, or an entry, or one of the file's, is unknown, out of a backend's reach, or
                wrong; the message names it.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f'zipvl: additional_config["{KEY}"] must be an object of options, got {given!r}')
        settings = dict(given)
        for name, reason in OUT_OF_REACH.items():
            if name in settings and not (name in DONE and settings[name] == DONE[name]):
                accepted = f", or give {name}={DONE[name]!r}" if name in DONE else ""
                raise ValueError(f"zipvl: {name} cannot be had in vLLM: {reason}. Leave it out{accepted}")
            settings.pop(name, None)
        names = {field.name for field in fields(ZipVLConfig)} - set(OUT_OF_REACH)
        if unknown := sorted(set(settings) - names - {*OURS, FILE}):
            known = ", ".join(sorted(names | {*OURS, FILE}))
            raise ValueError(f"zipvl: there is no option {', '.join(map(str, unknown))}; there are {known}")
        if FILE in settings:
            settings = _of_file(settings.pop(FILE), given) | settings
        if settings.get("cache") == "quantize":
            raise ValueError(
                'zipvl: cache="quantize" cannot be had in vLLM, whose blocks hold one type of number: use "full" or '
                '"drop"'
            )
        chunk = settings.pop("prefill_chunk_size", None)
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"zipvl: prefill_chunk_size must be None or an integer of at least 1, got {chunk!r}")
        config = ZipVLConfig(**(settings | DONE))
        if chunk is not None and config.cache == "drop":
            raise ValueError(
                'zipvl: prefill_chunk_size is for cache="full"; under "drop" a prompt is selected whole, in one step'
            )
        return cls(config, chunk)

    @property
    def drops(self) -> bool:
        """Blocks hold kept tokens alone."""
        return self.config.cache == "drop"

    @property
    def compact(self) -> bool:
        """The scheduler knows beforehand how much is kept at most, and reserves no blocks for the rest."""
        config = self.config
        share = config.cache_ratio or min(config.ratio or 1.0, config.max_ratio)
        return self.drops and share < 1.0

    def describe(self) -> str:
        """One line for the log."""
        config = self.config
        kept = f"ratio {config.ratio:g}" if config.ratio is not None else f"tau {config.for_model(visual=False).tau:g}"
        if config.max_ratio < 1.0:
            kept += f", at most {config.max_ratio:g}"
        if config.cache_ratio is not None:
            kept += f", {config.cache_ratio:g} in the cache"
        seen = f", window {config.local_window} and {config.sinks} sinks" if config.local_window else ""
        blocks = {
            (False, False): "the cache holds all tokens",
            (True, False): "the cache holds kept tokens, blocks are reserved for all",
            (True, True): "the cache holds kept tokens, blocks are reserved for these alone",
        }
        return f"sparse prefill of every prompt ({kept}{seen}); {blocks[self.drops, self.compact]}"


def _of_file(path: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a file that a backend can follow, once the others say nothing that it would have to.

    Args:
        path: of the file.
        given: what is asked for beside it, which counts in its place.
    """
    if not isinstance(path, str):
        raise ValueError(f"zipvl: {FILE} must be the path of a file of zipvl calibrate, got {path!r}")
    found = read_fields(path)
    config, default = ZipVLConfig(**found), ZipVLConfig()
    for name, reason in OUT_OF_REACH.items():
        value = getattr(config, name)
        idle = value == getattr(default, name) or (name in ("high_bits", "low_bits") and config.cache != "quantize")
        if name not in given and not (value == DONE[name] if name in DONE else idle):
            accepted = f", or give {name}={DONE[name]!r} beside it" if name in DONE else ""
            raise ValueError(
                f"zipvl: {name}={value!r} of {path} cannot be had in vLLM: {reason}. Find a setting with "
                f"zipvl calibrate --engine vllm{accepted}"
            )
    return {name: value for name, value in found.items() if name not in OUT_OF_REACH}


@dataclass(frozen=True)
class Budget:
    """What the scheduler must know: part of the KV cache's spec, so it travels from the workers to the scheduler.

    Args:
        options: of the engine.
        dense_below: prompts with fewer tokens keep them all.
        chunk: ``prefill_chunk_size`` as resolved, in tokens.
    """

    options: Options
    dense_below: int
    chunk: int

    def slots(self, tokens: int) -> int:
        """Slots that a prompt of ``tokens`` tokens is given in every layer, at most."""
        if not self.options.compact or tokens < self.dense_below:
            return tokens
        most = policy.max_kept(self.options.config, tokens, self.dense_below, masked=False)
        return tokens if most is None else int(most)
