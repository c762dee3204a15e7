"""Models with a ``ZipVLCache`` on CUDA: right against the oracle, no host read in a prefill, memory as promised.

``Trimmer`` is watched for how many layers are untrimmed at once, which no result shows.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

tf = pytest.importorskip("transformers")

import zipvl  # noqa: E402
from tests.models.oracle import chunk_masks, masked, oracle  # noqa: E402
from tests.models.tiny_models import IMAGE, PAPER, TEXT, gemma3_inputs, ids, pad_left, text_inputs  # noqa: E402
from zipvl.transformers import DecodeGraph  # noqa: E402

HEADS, HEAD_DIM = 4, 128
QUANTIZES = torch._C._dispatch_has_kernel_for_dispatch_key("zipvl::quantize_kv", "CUDA")
quantized = pytest.mark.skipif(not QUANTIZES, reason="quantize_kv has no CUDA kernel in this build")
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 65536,
    "initializer_range": 0.05,
}
GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def make(layers: int = 3, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**TEXT, **SHAPE, "num_hidden_layers": layers})
    model = tf.LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype).eval().cuda()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def on_cuda(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def sparse(model: Any, **settings: Any) -> Any:
    """``zipvl.sparse``, also where the cost model says that a prompt this short does not pay."""
    return zipvl.sparse(model, PAPER, dense_below=256, **settings)


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Any synchronising copy inside is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_generated_logits_are_those_of_the_kept_tokens(cache: str) -> None:
    model, inputs = make(), on_cuda(text_inputs(1500, 3))
    with sparse(model, tau=0.7, cache=cache, record_index=True) as stats:
        output = model.generate(**inputs, max_new_tokens=80, **GENERATE)
    kept = {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}
    assert len(kept) == 3 and all(len(index) < 1500 for index in kept.values())
    with oracle(model, kept, 1500, full=cache == "full"):
        expected = model(output.sequences, use_cache=False).logits[0, 1499:-1].float()
    found = torch.stack(output.logits, dim=1)[0].float()
    double = model.double()
    with oracle(double, kept, 1500, full=cache == "full"):
        exact = double(output.sequences, use_cache=False).logits[0, 1499:-1].float()
    assert (found - exact).abs().max() <= 3 * (expected - exact).abs().max() + 1e-2


@pytest.mark.parametrize("window", [0, 64])
def test_a_cache_with_a_budget_of_its_own(window: int) -> None:
    model, inputs = make(), on_cuda(text_inputs(1500, 3))
    how: dict[str, Any] = {"local_window": window, "num_sinks": 4}
    with sparse(model, tau=0.7, cache_ratio=0.3, **how, record_index=True) as stats:
        output = model.generate(**inputs, max_new_tokens=80, **GENERATE)
    masks = {}
    for i, layer in stats.layers.items():
        assert layer.index is not None and layer.stored_index is not None
        assert layer.stored == [450] and len(layer.stored_index[0]) == 450
        chunk, stored = [(1500, layer.index[0])], [layer.stored_index[0]]
        seen = chunk_masks(1580, chunk, window=window, sinks=4, drop=True, stored=stored)
        masks[i] = (seen[0].cuda(), seen[1].cuda())
    assert len(masks) == 3
    with masked(model, masks):
        expected = model(output.sequences, use_cache=False).logits[0, 1499:-1].float()
    found, double = torch.stack(output.logits, dim=1)[0].float(), model.double()
    with masked(double, masks):
        exact = double(output.sequences, use_cache=False).logits[0, 1499:-1].float()
    assert (found - exact).abs().max() <= 3 * (expected - exact).abs().max() + 1e-2


@pytest.mark.parametrize("window", [0, 64])
def test_images_whose_tokens_see_each_other(window: int) -> None:
    """Gemma 3: rows end where the model's mask says, also in a padded batch."""
    text = {**TEXT, **SHAPE, "layer_types": ["full_attention"] * 3, "query_pre_attn_scalar": HEAD_DIM}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 32, "patch_size": 4},
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = tf.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval().cuda()
    inputs = on_cuda(pad_left([gemma3_inputs(1500, 1), gemma3_inputs(900, 2)]))
    real = inputs["attention_mask"].bool()
    exact = model.double()(**inputs | {"pixel_values": inputs["pixel_values"].double()}).logits[real].float()
    model.bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    expected = model(**inputs).logits[real].float()
    with sparse(model, tau=1.0, local_window=window) as stats:
        found = model(**inputs).logits[real].float()
    assert stats.active
    assert (found - exact).abs().max() <= 3 * (expected - exact).abs().max() + 1e-2


def against_float64(model: Any, config: zipvl.ZipVLConfig) -> None:
    """Asserts that logits of a padded batch at ``tau=1``, all or the last alone, are as near to float64 as SDPA's."""
    inputs = on_cuda(pad_left([text_inputs(1500, 1), text_inputs(900, 2)]))
    real = inputs["attention_mask"].bool()
    exact = model.double()(**inputs).logits[real].float()
    expected = model.bfloat16()(**inputs).logits[real].float()
    tolerance = 3 * (expected - exact).abs().max() + 1e-2
    with zipvl.sparse(model, config, tau=1.0, dense_below=256) as stats:
        assert (model(**inputs).logits[real].float() - exact).abs().max() <= tolerance
        last = model(**inputs, logits_to_keep=1).logits[:, -1].float()
        model.generate(**inputs, max_new_tokens=4, **GENERATE)
    ends = real.sum(-1).cumsum(0) - 1
    assert stats.active and (last - exact[ends]).abs().max() <= tolerance


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_layers_that_share_keys_and_values(cache: Any, window: int) -> None:
    """Gemma 4 E2B: the last four layers attend to the keys and values of the second and third."""
    text = {**TEXT, **SHAPE, "num_hidden_layers": 8, "num_kv_shared_layers": 4, "sliding_window": 512}
    text |= {"global_head_dim": HEAD_DIM, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 200}
    config = tf.Gemma4TextConfig(**text, layer_types=["sliding_attention", "full_attention"] * 4)
    torch.manual_seed(0)
    model = tf.Gemma4ForCausalLM._from_config(config, attn_implementation="sdpa").eval().cuda()
    model.generation_config.eos_token_id = None
    against_float64(model, PAPER.replace(cache=cache, local_window=window))


@pytest.mark.parametrize("window", [0, 64])
def test_latent_attention(window: int) -> None:
    """DeepSeek-V3: keys of 192 channels and values of 128, which run as 256 where there are kernels."""
    text = {name: value for name, value in {**TEXT, **SHAPE}.items() if name != "head_dim"}
    text |= {"num_key_value_heads": HEADS, "q_lora_rank": 64, "kv_lora_rank": 64, "first_k_dense_replace": 3}
    config = tf.DeepseekV3Config(**text, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
    torch.manual_seed(0)
    model = tf.DeepseekV3ForCausalLM._from_config(config, attn_implementation="sdpa").eval().cuda()
    model.generation_config.eos_token_id = None
    against_float64(model, PAPER.replace(cache="full", local_window=window))


def test_a_padded_batch_is_single() -> None:
    model = make(dtype=torch.float16)
    rows = [text_inputs(1500, 1), text_inputs(900, 2)]
    with sparse(model, tau=0.7) as stats:
        together = model.generate(**on_cuda(pad_left(rows)), max_new_tokens=6, **GENERATE)
        kept = [layer.kept for layer in stats.layers.values()]
        for b, row in enumerate(rows):
            alone = model.generate(**on_cuda(row), max_new_tokens=6, **GENERATE)
            assert [layer.kept[0] for layer in stats.layers.values()] == pytest.approx([k[b] for k in kept], abs=4)
            difference = torch.stack(together.logits, 1)[b] - torch.stack(alone.logits, 1)[0]
            assert difference.abs().max() < 0.1


@pytest.mark.parametrize(
    ("cache", "stored"),
    [("drop", None), ("drop", 0.2), ("full", None), pytest.param("quantize", None, marks=quantized)],
)
def test_a_prefill_reads_nothing_back(cache: str, stored: float | None) -> None:
    model = make(layers=6)
    with sparse(model, ratio=0.25, cache=cache, cache_ratio=stored, num_sinks=4) as stats:
        warm = model(ids(4096, 1).cuda(), logits_to_keep=1)
        del warm
        inputs = ids(4096, 2).cuda()
        with no_host_sync():
            output = model(inputs, logits_to_keep=1)
        assert stats.active
        assert output.past_key_values.get_seq_length() == 4096
        with no_host_sync():
            output = model(inputs[:, :1], past_key_values=output.past_key_values)
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.9, 1.0])
def test_memory_after_and_during_a_prefill(ratio: float) -> None:
    # The allocator hands out a freed block whole if less than 1 MiB would be left of it: these blocks have 16 MiB.
    model, tokens, layers = make(layers=12), 32768, 12
    inputs = ids(tokens, 1).cuda()
    full = layers * 2 * 2 * tokens * HEAD_DIM * 2

    def measure() -> tuple[int, int]:
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        cache = model(inputs, logits_to_keep=1).past_key_values
        torch.cuda.synchronize()
        after, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        del cache
        return after, peak

    measure()
    dense_after, dense_peak = measure()
    assert abs(dense_after - full) < 0.01 * full
    with sparse(model, ratio=ratio):
        measure()
        after, peak = measure()
    assert after <= (ratio + 0.02) * full
    assert peak <= dense_peak + 0.02 * full, (peak, dense_peak, full)


def test_many_layers_are_never_untrimmed_at_once() -> None:
    from zipvl.transformers.storage import LAYERS_BEHIND, Trimmer

    most = 0
    add = Trimmer.add

    def counting(self: Trimmer, *args: Any) -> None:
        nonlocal most
        add(self, *args)
        most = max(most, len(self.waiting))

    model = make(layers=12)
    with pytest.MonkeyPatch.context() as patch, sparse(model, ratio=0.25):
        patch.setattr(Trimmer, "add", counting)
        cache = model(ids(2048, 1).cuda()).past_key_values
    assert 0 < most <= LAYERS_BEHIND
    assert all(layer.packed.keys.shape[2] < 700 for layer in cache.layers)


@pytest.mark.parametrize("cache", ["drop", "full", pytest.param("quantize", marks=quantized)])
def test_a_replayed_step_is_the_step(cache: str) -> None:
    model, tokens = make(layers=4), ids(1500, 1).cuda().repeat(2, 1)
    tokens[1] = tokens[1].roll(700)
    bits = {"high_bits": 8, "low_bits": 8}  # a code that moves by one must not matter
    with sparse(model, tau=0.7, cache=cache, num_sinks=4, **bits):
        plain, replayed = (model(tokens, logits_to_keep=1) for _ in range(2))
        token = plain.logits.argmax(-1)
        step = DecodeGraph(model, replayed.past_key_values, steps=130)
        for _ in range(130):
            expected = model(token, past_key_values=plain.past_key_values).logits
            assert (step(token) - expected).abs().max() <= 0.05 * expected.abs().max()
            token = expected.argmax(-1)
        with pytest.raises(RuntimeError, match="all reserved steps were taken"):
            step(token)
        assert replayed.past_key_values.get_seq_length() == 1630
        after = [model(token, past_key_values=r.past_key_values).logits for r in (plain, replayed)]
        assert (after[0] - after[1]).abs().max() <= 0.05 * after[0].abs().max()


def test_a_dense_prefill_cannot_be_captured() -> None:
    model = make()
    with sparse(model):
        cache = model(ids(100, 1).cuda()).past_key_values
        with pytest.raises(ValueError, match="the prefill of layer 0 was dense"):
            DecodeGraph(model, cache, steps=3)


@quantized
def test_eight_bits_are_nearly_all() -> None:
    model, inputs = make(), on_cuda(text_inputs(1500, 3))
    outputs = []
    for settings in ({"cache": "full"}, {"cache": "quantize", "high_bits": 8, "low_bits": 8}):
        with sparse(model, tau=0.7, **settings):
            cache = model(**inputs, logits_to_keep=1).past_key_values
            tokens = ids(120, 9).cuda()
            logits = [model(token, past_key_values=cache).logits for token in tokens.split(1, 1)]
            outputs.append(torch.cat(logits, 1).float())
    assert (outputs[0] - outputs[1]).abs().max() < 0.05 * outputs[0].abs().max()


@quantized
@pytest.mark.parametrize(("settings", "most"), [({}, 0.22), ({"low_bits": (4, 2), "num_sinks": 4}, 0.27)], ids=str)
def test_a_quantised_cache_takes_what_its_bits_say(settings: dict[str, Any], most: float) -> None:
    model, tokens, layers = make(layers=12), 32768, 12
    full = layers * 2 * 2 * tokens * HEAD_DIM * 2
    with sparse(model, ratio=0.25, cache="quantize", **settings):
        cache = model(ids(tokens, 1).cuda(), logits_to_keep=1).past_key_values
        assert cache.cache_bytes <= most * full
