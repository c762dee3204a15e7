"""project_queries and project_outputs on CUDA, and attention modules that use them, against whole projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.unit.helpers import DTYPES, assert_accurate, double, logit_rounding, make_selection, selected_mask
from tests.unit.test_projections import projection, widened
from zipvl import ops, reference

from .test_ops import cuda, no_host_sync, poison_free_memory

# B, N, C, Hq, D: head dims that kernels take and one they do not, rows that are not whole vectors, real sizes; more
# places than a chunk of the product has, 4,096 or an eighth: a chunk ends within a batch row, and is larger than one.
SHAPES = [(1, 300, 512, 4, 64), (3, 777, 3584, 28, 128), (2, 130, 96, 3, 96), (2, 65, 40, 2, 6), (3, 90, 36, 2, 16),
          (1, 40000, 64, 2, 32), (7, 1500, 64, 2, 32)]  # fmt: skip


def chosen_of(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """A selection with another number of tokens in each row (none in the second) and a mask of it."""
    index, count = make_selection(shape[0], shape[1])
    count[1:2] = 0
    return index, count, selected_mask(index, count)


def sum_rounding(x: Tensor, weight: Tensor) -> float:
    """One float32 rounding of the largest partial sum there can be: libraries differ in the order of theirs."""
    return logit_rounding(x, weight, scale=1.0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_queries(shape: tuple[int, ...], dtype: torch.dtype, bias: bool, norm: bool) -> None:
    tensors, keywords = projection(*shape, dtype, bias, norm)
    index, count, chosen = chosen_of(shape)
    wide, wide_keywords = widened(tensors, keywords)
    exact = reference.project_queries(*wide, index, count, **wide_keywords)
    on_gpu = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in keywords.items()}
    arguments = cuda(*tensors, index, count)
    baseline = reference.project_queries(*arguments, **on_gpu).cpu()
    poison_free_memory()
    with no_host_sync():
        some = ops.project_queries(*arguments, **on_gpu)
        every = ops.project_queries(*arguments[:-1], **on_gpu)
    assert some.transpose(1, 2).is_contiguous()
    for actual in (some, every):
        rows = (q.transpose(1, 2)[chosen] for q in (actual.cpu(), exact, baseline))
        assert_accurate(*rows, floor=sum_rounding(*tensors[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, N, C, H, D = shape
    x, weight = torch.randn(B, N, H * D).to(dtype), (torch.randn(C, H * D) * (H * D) ** -0.5).to(dtype)
    index, count, chosen = chosen_of(shape)
    arguments = cuda(x.masked_fill(~chosen[..., None], torch.nan), weight, index, count)
    poison_free_memory()
    with no_host_sync():
        out = ops.project_outputs(*arguments)
    exact = reference.project_outputs(*double(x, weight), index, count)
    baseline = reference.project_outputs(*cuda(x, weight, index, count)).cpu()
    assert_accurate(out.cpu(), exact, baseline, floor=sum_rounding(x, weight))
    assert bool((out.cpu()[~chosen] == 0).all())


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9 if torch.cuda.is_available() else True, reason="Hopper")
def test_bits_of_whole_products() -> None:
    """What was seen to hold on Hopper in bfloat16 at a 7B model's sizes, so that a change shows: without bias and norm
    the chosen rows are the whole product's, bit for bit."""
    x, weight = (torch.randn(*size, device="cuda").bfloat16() for size in ((1, 4096, 3584), (3584, 3584)))
    cos, sin = torch.ones(1, 4096, 128, device="cuda").bfloat16(), torch.zeros(1, 4096, 128, device="cuda").bfloat16()
    index, count = cuda(*make_selection(1, 4096, 0.25))
    T = index[0, : int(count)].long()
    whole = F.linear(x, weight)
    queries = ops.project_queries(x, weight, None, cos, sin, index, count).transpose(1, 2).flatten(2)
    assert torch.equal(queries[0, T], whole[0, T])
    assert torch.equal(ops.project_outputs(x, weight, index, count)[0, T], whole[0, T])


def test_garbage_in_index_and_count() -> None:
    x, weight = (torch.randn(*size, device="cuda").bfloat16() for size in ((2, 300, 64), (128, 64)))
    index = torch.randint(-(2**31), 2**31 - 1, (2, 300), dtype=torch.int32, device="cuda")
    table = torch.randn(2, 300, 64, device="cuda").bfloat16()
    for count in (2**31 - 1, -(2**31)):
        counts = torch.full((2,), count, dtype=torch.int32, device="cuda")
        ops.project_queries(x, weight, None, table, table, index, counts)
        assert not bool(ops.project_outputs(x, weight, index.abs().clamp(min=300), counts).any())
    torch.cuda.synchronize()


@pytest.mark.parametrize("tokens", [400, 3000])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_attention_modules_give_what_whole_projections_do(family: str, tokens: int) -> None:
    transformers = pytest.importorskip("transformers")
    import zipvl

    config = getattr(transformers, f"{family}Config")(
        vocab_size=200, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = getattr(transformers, f"{family}ForCausalLM")(config).to("cuda", torch.bfloat16).eval()
    inputs = torch.randint(0, 200, (1, tokens), device="cuda")
    found = {}
    with torch.no_grad():
        for skip in (False, True):
            settings = zipvl.ZipVLConfig.paper(dense_below=256, ratio=0.3, skip_projections=skip, layers=(0,))
            with zipvl.sparse(model, settings, record_index=True) as stats:
                last = model.model(inputs).last_hidden_state[0, -1].float()
            index = stats.layers[0].index
            assert index is not None and len(index[0]) == -(-3 * tokens // 10)
            found[skip] = (last, set(index[0].tolist()))
    (whole, whole_index), (skipped, skipped_index) = found[False], found[True]
    assert len(whole_index & skipped_index) >= 0.98 * len(whole_index), "only roundings at the cut change sides"
    assert (whole - skipped).abs().max() <= 2**-5 * whole.abs().max(), "a few roundings of bfloat16"
