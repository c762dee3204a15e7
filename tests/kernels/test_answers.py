"""Whole answers on CUDA: generate() by a captured step has eager decoding's tokens, and vision towers SDPA's states."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

tf = pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

import zipvl  # noqa: E402
from tests.kernels.test_generate import GENERATE, make, on_cuda, sparse  # noqa: E402
from tests.models.tiny_models import MULTIMODAL, PAPER, pad_left, text_inputs  # noqa: E402


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


def both(model: Any, inputs: dict[str, torch.Tensor], tokens: int = 60, **settings: Any) -> tuple[Any, Any]:
    """The answer by a graph, after checking that it is the eager one up to rounding, and the statistics."""
    given = {"tau": 0.7} | settings
    with sparse(model, **given, decode="eager"):
        eager = model.generate(**inputs, max_new_tokens=tokens, **GENERATE)
    with sparse(model, **given) as stats:
        found = model.generate(**inputs, max_new_tokens=tokens, **GENERATE)
    same = (eager.sequences == found.sequences)[:, -tokens:].all(dim=0).cumprod(0).sum()  # up to a tie of bfloat16
    assert same >= 5
    a, b = (torch.stack(output.logits)[: int(same)].float() for output in (eager, found))
    assert (a - b).abs().max() <= 0.05 * a.abs().max()
    return found, stats


@pytest.mark.parametrize("cache", ["drop", "full", "quantize"])
def test_a_captured_step_has_the_tokens_of_eager_decoding(cache: str) -> None:
    found, stats = both(make(), on_cuda(text_inputs(1500, 3)), 130, cache=cache)
    (decoding,) = stats.decodings
    assert (decoding.how, decoding.reason) == ("graph", None) and decoding.replayed >= 128
    assert found.past_key_values.get_seq_length() == 1629


def test_a_dense_prompt_and_a_padded_batch() -> None:
    model = make()
    _, stats = both(model, on_cuda(text_inputs(100)))
    assert not stats.active and stats.decodings[0].how == "graph"
    rows = [text_inputs(900, 1), text_inputs(700, 2), text_inputs(300, 3)]
    _, stats = both(model, on_cuda(pad_left(rows)))
    assert stats.active and stats.decodings[0].how == "graph"


def test_float32_and_float16() -> None:
    for dtype in (torch.float32, torch.float16):
        _, stats = both(make(dtype=dtype), on_cuda(text_inputs(600)))
        assert stats.decodings[0].how == "graph"


def test_sampling_is_that_of_eager_decoding() -> None:
    model, inputs, found = make(dtype=torch.float32), on_cuda(text_inputs(600)), []
    for how in ("eager", "auto"):
        torch.manual_seed(0)
        with sparse(model, tau=0.7, decode=how) as stats:
            found.append(model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=5))
    assert stats.decodings[0].how == "graph"
    assert torch.equal(*found)


def test_a_step_that_reads_the_device_is_decoded_eagerly() -> None:
    model, inputs = make(), on_cuda(text_inputs(600))
    handle = model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out * float(out.isfinite().all()))
    with sparse(model, tau=0.7, decode="eager"):
        expected = model.generate(**inputs, max_new_tokens=30, **GENERATE).sequences
    with sparse(model, tau=0.7) as stats:
        found = model.generate(**inputs, max_new_tokens=30, **GENERATE).sequences
    handle.remove()
    assert stats.decodings[0].how == "eager" and "could not be captured" in (stats.decodings[0].reason or "")
    assert torch.equal(found, expected)
    _, stats = both(model, inputs)
    assert stats.decodings[0].how == "graph", "a capture that failed leaves nothing behind"


def test_nothing_leaks_over_answers() -> None:
    model, inputs = make(), on_cuda(text_inputs(600))
    used = []
    for _ in range(20):
        with sparse(model, tau=0.7):
            model.generate(**inputs, max_new_tokens=30, do_sample=False)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert used[-1] == used[3]


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lengths", [[64, 64, 16, 3, 256, 64], [64] * 6, [300]])
def test_windows_of_a_vision_tower(head_dim: int, dtype: torch.dtype, lengths: list[int]) -> None:
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    q, k, v = (torch.randn(1, 4, sum(lengths), head_dim, device="cuda", dtype=dtype) for _ in range(3))
    module = torch.nn.Module()
    windows = zip(*(states.double().split(lengths, dim=2) for states in (q, k, v)), strict=True)
    parts = [sdpa_attention_forward(module, *window, None, scaling=0.3, is_causal=False)[0] for window in windows]
    exact = torch.cat(parts, dim=1)
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    given |= {name: max(lengths) for name in ("max_length_q", "max_length_k")}
    attention = ALL_ATTENTION_FUNCTIONS["zipvl_flash_vision"]
    found, _ = attention(module, q, k, v, None, scaling=0.3, is_causal=False, **given)
    assert found.shape == exact.shape and found.dtype == dtype
    assert (found.double() - exact).abs().max() < (1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_vision_tower_makes_one_call_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MULTIMODAL[name].make().to(torch.bfloat16).cuda()
    inputs = on_cuda(MULTIMODAL[name].inputs(600, 1))
    calls = []
    ordinary = ALL_ATTENTION_FUNCTIONS["zipvl_flash_vision"]

    def counting(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return ordinary(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "zipvl_flash_vision", counting)
    visual = model.model.visual

    def states() -> torch.Tensor:
        found = visual(inputs["pixel_values"].to(torch.bfloat16), grid_thw=inputs["image_grid_thw"])
        found = getattr(found, "last_hidden_state", found)
        return found[0] if isinstance(found, tuple) else found

    before = states()
    with zipvl.sparse(model, PAPER, tau=1.0):
        assert visual.config._attn_implementation == "zipvl_flash_vision"
        after = states()
    with zipvl.sparse(model, PAPER, vision_attention=False):
        assert visual.config._attn_implementation == "sdpa"
    assert visual.config._attn_implementation == "sdpa"
    assert len(calls) == len(visual.blocks)
    assert (before - after).abs().max() <= 0.05 * before.abs().max()
