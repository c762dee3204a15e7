"""project_queries and project_outputs: what linear layers give for the chosen rows, and nothing of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zipvl import ops, reference

from .helpers import DTYPES, assert_accurate, double, make_selection, selected_mask

SHAPES = [(1, 37, 24, 4, 16), (3, 130, 64, 3, 32), (2, 65, 40, 2, 6)]  # B, N, C, Hq, D


def projection(
    B: int, N: int, C: int, H: int, D: int, dtype: torch.dtype, bias: bool, norm: bool
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """x, weight, bias, cos, sin of a query projection, and its norm."""
    angle = torch.randn(1 if B == 2 else B, N, D // 2).repeat(1, 1, 2)
    tensors: list[Tensor | None] = [
        torch.randn(B, N, C),
        torch.randn(H * D, C) * C**-0.5,
        torch.randn(H * D) if bias else None,
        angle.cos(),
        angle.sin(),
    ]
    keywords = {"norm_weight": torch.randn(D).to(dtype), "norm_eps": 1e-5} if norm else {}
    return [None if t is None else t.to(dtype) for t in tensors], keywords


def widened(tensors: list[Tensor | None], keywords: dict[str, Any]) -> tuple[list[Tensor | None], dict[str, Any]]:
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in keywords.items()}
    return [None if t is None else t.double() for t in tensors], wide


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_of_the_chosen(shape: tuple[int, ...], dtype: torch.dtype, bias: bool, norm: bool) -> None:
    tensors, keywords = projection(*shape, dtype, bias, norm)
    index, count = make_selection(shape[0], shape[1])
    wide, wide_keywords = widened(tensors, keywords)
    exact = reference.project_queries(*wide, index, count, **wide_keywords)
    baseline = reference.project_queries(*tensors, index, count, **keywords)
    actual = ops.project_queries(*tensors, index, count, **keywords)
    assert actual.transpose(1, 2).is_contiguous()
    chosen = selected_mask(index, count)
    assert_accurate(*(q.transpose(1, 2)[chosen] for q in (actual, exact, baseline)), floor=0.0)


def test_without_a_count_every_place_is_a_row() -> None:
    tensors, _ = projection(2, 50, 24, 4, 16, torch.float32, True, False)
    index = torch.tensor([[3, 49, -1, 7], [0, 50, 2**30, 11]], dtype=torch.int32)
    q = ops.project_queries(*tensors, index)
    expected = reference.project_queries(*tensors, index)
    for b, rows in enumerate(([3, 49, 7], [0, 11])):
        torch.testing.assert_close(q[b][:, rows], expected[b][:, rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_of_the_chosen_and_zeros(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 130, 48).to(dtype), (torch.randn(20, 48) / 7).to(dtype)
    index, count = make_selection(3, 130)
    count[1] = 0
    chosen = selected_mask(index, count)
    poisoned = x.masked_fill(~chosen[..., None], torch.nan)
    exact = reference.project_outputs(*double(x, weight), index, count)
    out = ops.project_outputs(poisoned, weight, index, count)
    assert_accurate(out, exact, F.linear(x, weight) * chosen[..., None], floor=0.0)
    assert bool((out[~chosen] == 0).all())


def test_counts_and_positions_out_of_range() -> None:
    x, weight = torch.randn(2, 30, 16), torch.randn(8, 16)
    index = torch.randint(-5, 40, (2, 30), dtype=torch.int32)
    for count in (torch.tensor([99, -3]), torch.tensor([30, 0])):
        out = ops.project_outputs(x, weight, index, count.int())
        torch.testing.assert_close(out, reference.project_outputs(x, weight, index, count.int()))


def test_a_strided_input() -> None:
    wide = torch.randn(2, 40, 100)
    index, count = make_selection(2, 40)
    weight = torch.randn(8, 48)
    out = ops.project_outputs(wide[:, :, 4:52], weight, index, count)
    torch.testing.assert_close(out, ops.project_outputs(wide[:, :, 4:52].contiguous(), weight, index, count))
