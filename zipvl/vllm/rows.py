"""Which tokens of a step are prompts, and how they are cut: arithmetic on the host, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Piece:
    """Tokens of a prompt that select for themselves.

    Args:
        start, end: of the tokens in the step.
        seen: tokens of the prompt up to the piece's end.
        sparse: whether selected tokens alone are attended to, or all.
    """

    start: int
    end: int
    seen: int
    sparse: bool


@dataclass(frozen=True)
class Prompt:
    """A row of a step whose tokens are of a prompt, with at least one sparse piece.

    Args:
        row: of the batch.
        start, end: of its tokens in the step.
        seen: tokens of the prompt so far, those of the step included.
    """

    row: int
    start: int
    end: int
    seen: int
    pieces: tuple[Piece, ...]

    @property
    def whole(self) -> bool:
        return self.end - self.start == self.seen


def cut(start: int, end: int, seen: int, chunk: int, is_sparse: Callable[[int, int], bool]) -> tuple[Piece, ...]:
    """Tokens ``[start, end)`` of a step, the last of ``seen``, in pieces that end at multiples of ``chunk``.

    Args:
        is_sparse: of the number of a piece's tokens and of those up to its end.
    """
    first, pieces = seen - (end - start), []
    position = first
    while position < seen:
        last = min((position // chunk + 1) * chunk, seen)
        begin, stop = start + position - first, start + last - first
        pieces.append(Piece(begin, stop, last, is_sparse(last - position, last)))
        position = last
    return tuple(pieces)


def split(
    starts: Sequence[int],
    lengths: Sequence[int],
    prefilling: Sequence[bool],
    chunk: int,
    is_sparse: Callable[[int, int], bool],
) -> tuple[list[Prompt], list[int]]:
    """The rows of a step: prompts with a sparse piece, and all others.

    Args:
        starts: where each row's tokens begin in the step, and the end of the last: one more than there are rows.
        lengths: tokens of each request so far, those of the step included.
        prefilling: whether the step began within the request's prompt.
    """
    prompts, others = [], []
    for row, (start, end) in enumerate(pairwise(starts)):
        pieces = cut(start, end, lengths[row], chunk, is_sparse) if prefilling[row] and end > start else ()
        if any(piece.sparse for piece in pieces):
            prompts.append(Prompt(row, start, end, lengths[row], pieces))
        else:
            others.append(row)
    return prompts, others
