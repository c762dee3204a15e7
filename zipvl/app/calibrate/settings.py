"""Settings by name: a name says everything that differs from the paper's configuration."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from zipvl.config import ZipVLConfig

__all__ = ["DENSE", "SettingError", "changes", "config", "is_harder"]

DENSE = "dense"

WORDS: dict[str, Callable[[str], dict[str, Any]]] = {
    r"tau (0?\.\d+|1)": lambda share: {"tau": float(share)},
    r"(default) tau": lambda _: {"tau": None},
    r"ratio (0?\.\d+|1)": lambda share: {"ratio": float(share)},
    r"window (\d+)": lambda tokens: {"local_window": int(tokens), "num_sinks": 4},
    r"(\d+) sinks": lambda tokens: {"num_sinks": int(tokens)},
    r"(all) queries": lambda _: {"all_queries": True},
    r"first (\d+) dense": lambda layers: {"dense_first_layers": int(layers)},
    r"MLPs skipped in (\d+(?: \d+)*)": lambda layers: {"skip_mlp_layers": tuple(map(int, layers.split()))},
    r"(text) kept": lambda _: {"keep_text": True},
    r"stored (0?\.\d+|1)": lambda share: {"cache_ratio": float(share)},
    r"(drop|full)": lambda cache: {"cache": cache},
    r"quantize( \d(?:-\d)?/\d(?:-\d)?)?": lambda bits: {"cache": "quantize"} | _bits(bits),
}
_SHARE = re.compile(r"(tau|ratio|stored) ((?:0?\.\d+|1))")


class SettingError(ValueError):
    """A name that says nothing."""


def _bits(text: str | None) -> dict[str, Any]:
    """Of ``8/4`` or ``4-4/4-2``: the selected tokens' and the others', of keys and values where there are two."""
    if text is None:
        return {"high_bits": (4, 4), "low_bits": (4, 2)}
    high, low = (tuple(int(digit) for digit in part.split("-")) for part in text.strip().split("/"))
    return {"high_bits": high * (2 // len(high)), "low_bits": low * (2 // len(low))}


def changes(name: str) -> dict[str, Any]:
    """The fields of ``ZipVLConfig`` that a name sets, such as ``tau 0.95, window 128, all queries, full``.

    Raises:
        SettingError: a part of it is none of the words.
    """
    found: dict[str, Any] = {}
    for part in name.split(","):
        for pattern, meaning in WORDS.items():
            if match := re.fullmatch(pattern, part.strip()):
                found |= meaning(match[1])
                break
        else:
            raise SettingError(f"{part.strip()!r} in {name!r} is none of {', '.join(WORDS)}")
    return found


def config(name: str, **beside: Any) -> ZipVLConfig | None:
    """The configuration of a name: the paper's with what the name changes, sparse from 256 tokens on; None: dense.

    Args:
        name: ``dense``, or as for ``changes``.
        beside: fields that no name says.

    Raises:
        SettingError: as for ``changes``.
        ValueError: as for a new configuration.
    """
    if name == DENSE:
        return None
    return ZipVLConfig.paper(**({"dense_below": 256} | beside | changes(name)))


def is_harder(name: str, than: str) -> bool:
    """Whether a setting differs from another by its shares alone, and none of them is larger."""
    mine, theirs = dict(_SHARE.findall(name)), dict(_SHARE.findall(than))
    if mine.keys() != theirs.keys() or _SHARE.sub("", name) != _SHARE.sub("", than) or mine == theirs:
        return False
    return all(float(mine[word]) <= float(theirs[word]) for word in mine)
