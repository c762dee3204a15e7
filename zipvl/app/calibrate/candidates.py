"""The settings that a calibration tries, the likely ones first: where time is short, it tries the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

__all__ = ["ENGINES", "GOALS", "Engine", "Goal", "beside", "candidates", "full_name"]

Goal = Literal["ttft", "memory", "answer"]
Engine = Literal["transformers", "vllm"]
GOALS: tuple[Goal, ...] = get_args(Goal)
ENGINES: tuple[Engine, ...] = get_args(Engine)

# Of the same words with other shares, the one with the larger share comes first: where it loses too much, the other is
# not tried.
_TIME = (
    "tau 0.95, window 512, full",
    "tau 0.9, window 128, full",
    "tau 0.975, full",
    "tau 0.9, window 512, full",
    "tau 0.85, window 512, full",
    "tau 0.8, window 128, full",
    "tau 0.975, all queries, full",
    "tau 0.9, window 128, all queries, first 2 dense, full",
    "tau 0.95, full",
    "tau 0.8, window 512, full",
    "tau 0.7, window 128, full",
    "tau 0.95, window 512, first 1 dense, full",
)
_BYTES = (
    "tau 0.95, window 512, quantize",
    "tau 0.975, window 512, drop",
    "tau 0.95, window 512, drop, stored 0.5",
    "tau 0.9, window 128, quantize",
    "tau 0.95, window 512, drop",
    "tau 0.95, window 512, drop, stored 0.35",
    "tau 0.95, window 512, drop, stored 0.25",
    "tau 0.975, drop",
    "tau 0.9, window 512, quantize 4/4",
)


def candidates(goal: Goal, engine: Engine, pictures: bool, mlps: Sequence[int] = ()) -> list[str]:
    """Names of settings for a goal.

    Args:
        goal: ``ttft``, time to the first token; ``memory``, bytes of the cache; ``answer``, time of the whole answer.
        engine: vLLM has no quantised cache, cannot tell text from pictures, and runs whole MLPs.
        pictures: whether any sample has one.
        mlps: the layers whose MLPs can run for selected tokens alone.
    """
    time = _with_skipped_mlps(mlps) if engine == "transformers" else _TIME
    every = {
        "ttft": time,
        "memory": _BYTES,
        "answer": tuple(name for pair in zip(time, _BYTES, strict=False) for name in pair),
    }[goal]
    if engine == "vllm":
        every = tuple(name for name in every if "quantize" not in name)
    return [full_name(name, engine, pictures) for name in every]


def _with_skipped_mlps(layers: Sequence[int]) -> tuple[str, ...]:
    """``_TIME``, and MLPs skipped in every third and in every second layer. The first layer's is never skipped: an MLP
    that early is missed most (docs/notes/2026-11-30-skipped-mlps.md)."""
    usable = [layer for layer in layers if layer > 0]
    sets = [usable[1::3], usable[::2]] if len(usable) > 1 else []
    names = [f"tau 0.95, window 512, MLPs skipped in {' '.join(map(str, skipped))}, full" for skipped in sets]
    return (*_TIME[:2], *names[:1], *_TIME[2:4], *names[1:], *_TIME[4:])


def full_name(name: str, engine: Engine, pictures: bool) -> str:
    """The name of a setting with what goes without saying: text beside pictures is kept where the engine can tell."""
    return f"{name}, text kept" if pictures and engine == "transformers" and "text kept" not in name else name


def beside(engine: Engine, text_prompts: bool, dense_below: int) -> dict[str, Any]:
    """The fields of every candidate that its name does not say.

    Args:
        text_prompts: whether any sample is a prompt of text; where none is, those stay dense, as nothing is known of
            them. vLLM makes no difference.
        dense_below: prompts with fewer tokens stay dense.
    """
    sparse = text_prompts or engine == "vllm"
    return {"text_prompts": "sparse" if sparse else "dense", "dense_below": dense_below}
