"""The fakes promise what the ops deliver: shapes, dtypes and strides, with sizes that stay symbolic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from zipvl import ops

from .helpers import OPS, make_qkv, sample_tensors


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def keywords_of(op: str, N: int) -> dict[str, Any]:
    masks = {"token_mask": torch.ones(2, N, dtype=torch.bool)}
    keeping = ("select_tokens", "zipvl_attn", "zipvl_prefill", "zipvl_layer")
    if op in keeping:
        masks["keep_mask"] = torch.zeros(2, N, dtype=torch.bool)
    return masks if op in ("probe_index", "probe_scores", "sparse_attn", *keeping) else {}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("N", [0, 1, 40])
@pytest.mark.parametrize("op", OPS)
def test_meta_outputs_are_the_real_ones(op: str, N: int, masked: bool) -> None:
    tensors = sample_tensors(op, N=N) if N > 0 or not op.startswith("decode_attn") else sample_tensors(op, N=1)
    keywords = keywords_of(op, N) if masked else {}
    real = as_tuple(getattr(ops, op)(*tensors.values(), **keywords))
    meta = as_tuple(
        getattr(ops, op)(*[t.to("meta") for t in tensors.values()], **{n: m.to("meta") for n, m in keywords.items()})
    )
    assert len(real) == len(meta)
    for real_one, meta_one in zip(real, meta, strict=True):
        assert (real_one.shape, real_one.dtype, real_one.stride()) == (
            meta_one.shape,
            meta_one.dtype,
            meta_one.stride(),
        )


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize(
    "op", ["probe_index", "probe_scores", "sparse_attn", "zipvl_attn", "zipvl_prefill", "zipvl_layer"]
)
def test_queries_of_the_last_tokens(op: str, n: int) -> None:
    tensors = sample_tensors(op)
    tensors["q"] = tensors["q"][:, :, 40 - n :]
    ends = {"last_key": torch.arange(n, dtype=torch.int32).repeat(2, 1)}
    keywords: dict[str, Any] = {"token_mask": torch.ones(2, 40, dtype=torch.bool)} | ends
    if op == "probe_index":
        keywords = {"k": sample_tensors("probe_scores")["k"]}
    elif op != "probe_scores":
        keywords |= {"local_window": 5, "num_sinks": 2}
    if op.startswith("zipvl"):
        keywords |= {"extra_mask": torch.zeros(2, 40, dtype=torch.bool), "max_ratio": 0.5}
    real = as_tuple(getattr(ops, op)(*tensors.values(), **keywords))
    on_meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in keywords.items()}
    meta = as_tuple(getattr(ops, op)(*[t.to("meta") for t in tensors.values()], **on_meta))
    for real_one, meta_one in zip(real, meta, strict=True):
        assert (real_one.shape, real_one.dtype, real_one.stride()) == (
            meta_one.shape,
            meta_one.dtype,
            meta_one.stride(),
        )


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "fused", "sliced"])
def test_attention_outputs_are_bnhd_whatever_the_input(layout: str) -> None:
    q, k, v = make_qkv(2, 6, 2, 30, 64, torch.bfloat16, layout)
    expected = (30 * 6 * 64, 64, 6 * 64, 1)
    for device in ("cpu", "meta"):
        out, index, count = ops.zipvl_attn(q.to(device), k.to(device), v.to(device))
        assert out.stride() == expected and out.dtype == torch.bfloat16
        again = ops.sparse_attn(q.to(device), k.to(device), v.to(device), index, count)
        assert again.stride() == expected and again.dtype == torch.bfloat16
        new, lse = ops.decode_attn(q[:, :, -1:].to(device), k.to(device), v.to(device), count)
        assert new.transpose(1, 2).is_contiguous() and new.dtype == torch.bfloat16 and lse.dtype == torch.float32


@pytest.mark.parametrize("op", OPS)
def test_sizes_stay_symbolic(op: str) -> None:
    """Sizes of the batch and of the tokens are symbols, come out as expressions in them, and no guard fixes them."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    B, N = 3, 41

    def fake(t: Tensor) -> Tensor:
        dynamic = [DimDynamic.DYNAMIC if size in (B, N) else DimDynamic.STATIC for size in t.shape]
        return mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))

    tensors = sample_tensors(op, B=B, N=N)
    fakes = [fake(t) for t in tensors.values()]
    with mode:
        outputs = as_tuple(getattr(ops, op)(*fakes))
    fixed = {str(symbol): value for symbol, value in environment.replacements.items() if value.is_number}
    assert not fixed, "sizes were specialised"
    real = as_tuple(getattr(ops, op)(*tensors.values()))
    for output, real_one in zip(outputs, real, strict=True):
        for dim, (size, real_size) in enumerate(zip(output.shape, real_one.shape, strict=True)):
            blocks = output.dtype == torch.uint8 and dim == 2  # made of N
            assert isinstance(size, torch.SymInt) == (real_size in (B, N) or blocks)
        assert output.dtype == real_one.dtype
        assert [int(size) for size in output.shape] == list(real_one.shape)
        assert [int(stride) for stride in output.stride()] == list(real_one.stride())
