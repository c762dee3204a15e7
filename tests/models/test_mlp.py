"""MLPs for selected tokens alone (``ZipVLConfig.skip_mlp_layers``): the whole MLP with the other rows made zero."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import zipvl
from tests.models.oracle import chunk_masks, masked, oracle
from tests.models.test_chunks import step_by_step
from tests.models.tiny_models import (
    PAPER,
    SPARSE,
    TEXT,
    build,
    ids,
    make_gemma3_text,
    make_llama,
    make_qwen2_5_vl,
    pad_left,
    qwen_inputs,
    text_inputs,
)
from zipvl import policy
from zipvl.transformers import configure, mlp

NEW = 4
GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}  # logits reach 10; layers of random weights amplify rounding


def make(name: str, **changes: Any) -> Any:
    return build(getattr(tf, f"{name}ForCausalLM"), getattr(tf, f"{name}Config")(**(TEXT | changes)))


def make_qwen2(**changes: Any) -> Any:
    return make("Qwen2", **changes)


def make_qwen3_moe() -> Any:
    """Experts in layers 0 and 2, an ordinary MLP between them."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return make("Qwen3Moe", **experts, mlp_only_layers=[1])


def make_mixtral() -> Any:
    return make("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None)


def make_llama_with_biases() -> Any:
    """Biases that are not zero: the MLP of a row of zeros is not zero."""
    model = make_llama(mlp_bias=True)
    for layer in model.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            nn.init.normal_(part.bias)
    return model


def make_olmoe() -> Any:
    return make("Olmoe", num_experts=4, num_experts_per_tok=2)


def make_llama4() -> Any:
    """Experts in layers 0 and 2, which return rows in one sequence and a router's scores beside them."""
    types = {"no_rope_layers": [1, 1, 1], "layer_types": ["full_attention"] * 3, "moe_layers": [0, 2]}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96}
    return build(tf.Llama4ForCausalLM, tf.Llama4TextConfig(**TEXT, **types, **experts, use_qk_norm=False))


TEXT_MODELS = {
    "llama": make_llama,
    "llama with biases": make_llama_with_biases,
    "qwen2": make_qwen2,
    "qwen3_moe": make_qwen3_moe,
    "mixtral": make_mixtral,
    "olmoe": make_olmoe,
    "llama4": make_llama4,
    "gemma3": make_gemma3_text,  # layer 0 slides; a norm behind the MLP
    "gpt2": lambda: build(tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=200, n_embd=64, n_head=4, n_layer=3)),
}


def layers_of(model: Any) -> Any:
    decoder = model.get_decoder()
    decoder = getattr(decoder, "model", decoder)
    return decoder.h if hasattr(decoder, "h") else decoder.layers


@contextmanager
def zeroed(model: Any, kept: dict[int, torch.Tensor]) -> Iterator[None]:
    """Makes whole MLPs give 0 for tokens that are not in ``kept``: ``[N]`` or ``[B, N]`` bool of each layer."""

    def zero(mask: torch.Tensor) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> Any:
            states, *others = output if isinstance(output, tuple) else (output,)
            states = states.view(args[0].shape) * mask.view(-1, mask.shape[-1], 1)
            return (states, *others) if others else states

        return hook

    mlps = {i: getattr(layer, "mlp", None) or layer.feed_forward for i, layer in enumerate(layers_of(model))}
    handles = [mlps[i].register_forward_hook(zero(mask)) for i, mask in kept.items()]
    yield
    for handle in handles:
        handle.remove()


def alive(index: torch.Tensor, tokens: int, prompt: int) -> torch.Tensor:
    """``[tokens]`` bool: the tokens ``index`` of the prompt, and those behind it."""
    mask = torch.arange(tokens) >= prompt
    mask[index] = True
    return mask


@contextmanager
def as_on_a_device(monkeypatch: pytest.MonkeyPatch, counts: bool) -> Iterator[list[str]]:
    """What a GPU runs, without host reads; what is not written is NaN. Yields which way each MLP went."""
    ways = []

    def way(name: str) -> None:
        plain: Any = getattr(mlp, name) if name == "_counted" else getattr(mlp.SparseMLP, name)
        owner: Any = mlp if name == "_counted" else mlp.SparseMLP

        def noted(*args: Any) -> Any:
            ways.append(name)
            with NoReads():
                return plain(*args)

        patch.setattr(owner, name, noted)

    with monkeypatch.context() as patch:
        patch.setattr(mlp, "is_tracing", lambda _: True)
        patch.setattr(mlp, "counts_rows", lambda *_: counts)
        patch.setattr(mlp, "_in_vectors", lambda *_: True)
        way("_counted")
        way("_enough")
        torch.use_deterministic_algorithms(True)
        try:
            yield ways
        finally:
            torch.use_deterministic_algorithms(False)


class NoReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Nothing is read back, and no shape depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


# Against the whole MLP with rows made zero


@pytest.mark.parametrize("kept", [{"tau": 0.7}, {"ratio": 0.3}, {"tau": 0.7, "local_window": 8}], ids=str)
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_the_others_keep_their_residual(name: str, kept: dict[str, Any]) -> None:
    model, inputs = TEXT_MODELS[name](), text_inputs(300, 3)
    settings = {"dense_below": 0, "cache": "full", "record_index": True, "skip_mlp_layers": (2, 1)}
    with zipvl.sparse(model, PAPER, **kept, **settings) as stats:
        logits = model(**inputs).logits
        counts = [stats.layers[i].mlp_tokens for i in range(3)]
        index = {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}
        output = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    assert counts == [None, [len(index[1])], [len(index[2])]] and len(index[1]) < 300
    assert all(int(index[i][-1]) == 299 for i in (1, 2)), "the last token makes the first new one"
    if kept.get("local_window"):
        masks = {i: chunk_masks(300 + NEW, [(300, index[i])], window=8) for i in index}
        if name == "gemma3":
            every = torch.ones(300 + NEW, dtype=torch.bool)
            masks[0] = (every.repeat(300 + NEW, 1).tril().triu(1 - 64), every)
        attends: Any = masked(model, masks)
    else:
        attends = oracle(model, index, 300, full=True)
    with attends, zeroed(model, {i: alive(index[i], 300 + NEW, 300) for i in (1, 2)}):
        expected = model(output.sequences, use_cache=False).logits
    torch.testing.assert_close(logits[0], expected[0, :300], **TOLERANCE)
    torch.testing.assert_close(torch.stack(output.logits, 1)[0], expected[0, 299:-1], **TOLERANCE)


@pytest.mark.parametrize("cache", ["drop", "full"])
@pytest.mark.parametrize("keep_text", [False, True])
def test_with_an_image(keep_text: bool, cache: str) -> None:
    model, inputs = make_qwen2_5_vl(), qwen_inputs(250, 3)
    prompt = inputs["input_ids"].shape[1]
    settings = {"keep_text": keep_text, "cache": cache, "tau": 0.6, "skip_mlp_layers": (0, 2)}
    with zipvl.sparse(model, PAPER, **settings, record_index=True) as stats:
        output = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    kept = {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}
    assert [stats.layers[i].mlp_tokens for i in range(3)] == [[len(kept[0])], None, [len(kept[2])]]
    assert (len(kept[0]) >= 250) == keep_text and len(kept[0]) < prompt
    whole = dict(inputs, input_ids=output.sequences, attention_mask=torch.ones_like(output.sequences))
    whole["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, NEW))
    masks = {i: alive(kept[i], prompt + NEW, prompt) for i in (0, 2)}
    with oracle(model, kept, prompt, full=cache == "full"), zeroed(model, masks):
        expected = model(**whole, use_cache=False).logits
    torch.testing.assert_close(torch.stack(output.logits, 1)[0], expected[0, prompt - 1 : -1], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_tau_1_is_dense(name: str) -> None:
    model, inputs = TEXT_MODELS[name](), text_inputs(300, 1)
    dense = model(**inputs).logits
    found = []
    for layers in ((), (0, 1, 2)):
        with zipvl.sparse(model, PAPER, tau=1.0, skip_mlp_layers=layers) as stats:
            found.append(model(**inputs).logits)
    assert torch.equal(*found) and stats.layers[2].mlp_tokens == [300]
    torch.testing.assert_close(found[1], dense, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "qwen2_5_vl"])
def test_batch_is_single(name: str) -> None:
    """The last row is shorter than dense_below: its MLPs are whole, alone and in the batch."""
    model = SPARSE[name].make() if name in SPARSE else TEXT_MODELS[name]()
    prompt = SPARSE[name].inputs if name in SPARSE else text_inputs
    rows = [prompt(length, seed) for seed, length in enumerate((330, 300, 40))]
    config = PAPER.replace(tau=0.8, dense_below=256, skip_mlp_layers=(1, 2))
    with zipvl.sparse(model, config) as stats:
        together = model.generate(**pad_left(rows), max_new_tokens=NEW, **GENERATE)
        counts = stats.layers[1].mlp_tokens
        for b, row in enumerate(rows):
            alone = model.generate(**row, max_new_tokens=NEW, **GENERATE)
            assert torch.equal(together.sequences[b, -NEW:], alone.sequences[0, -NEW:])
            torch.testing.assert_close(torch.stack(together.logits, 1)[b], torch.stack(alone.logits, 1)[0], **TOLERANCE)
            real, found = row["input_ids"].shape[1], stats.layers[1].mlp_tokens
            assert counts is not None
            assert (counts[b] == real and found is None) if real < 256 else found == [counts[b]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", ["host", "counted", "enough"])
@pytest.mark.parametrize("kept", [{"tau": 0.7}, {"ratio": 0.3}, {"tau": 0.9, "max_ratio": 0.4}], ids=str)
@pytest.mark.parametrize("name", ["llama with biases", "qwen3_moe", "llama4"])
def test_padded_batches(
    name: str, kept: dict[str, float], way: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host and by both ways of a device, in several chunks. An MLP that does not count runs for as many rows as
    the host knows to be enough."""
    model, inputs = TEXT_MODELS[name](), text_inputs(300, 3)
    batch = {n: t.repeat(2, 1) for n, t in inputs.items()}
    batch["attention_mask"][1, slice(0, 60) if side == "left" else slice(240, 300)] = 0
    monkeypatch.setattr(mlp, "MIN_CHUNK", 100)
    settings: dict[str, Any] = kept | {"dense_below": 0, "record_index": True, "skip_mlp_layers": (1, 2)}
    with zipvl.sparse(model, PAPER, **settings) as stats:
        if way == "host":
            logits = model(**batch, use_cache=False).logits
        else:
            with as_on_a_device(monkeypatch, way == "counted") as ways:
                logits = model(**batch, use_cache=False).logits
            counted = [way == "counted" and name != "llama4" and (name, i) != ("qwen3_moe", 2) for i in (1, 2)]
            assert ways == ["_counted" if c else "_enough" for c in counted]
    index = {i: stats.layers[i].index for i in range(3)}
    for b, real in enumerate((slice(0, 300), slice(60, 300) if side == "left" else slice(0, 240))):
        own = {i: index[i][b] - real.start for i in range(3)}
        length = real.stop - real.start
        assert all(int(own[i][-1]) == length - 1 for i in range(3))
        with oracle(model, own, length), zeroed(model, {i: alive(own[i], length, length) for i in (1, 2)}):
            expected = model(batch["input_ids"][b : b + 1, real], use_cache=False).logits
        torch.testing.assert_close(logits[b, real], expected[0], **TOLERANCE)


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_chunks(cache: Any) -> None:
    """Each chunk's MLPs run for what it selected of its own; a dense chunk's and decoded tokens' are whole."""
    model, input_ids = make_llama(), ids(330, 1)
    config = PAPER.replace(tau=0.7, num_recent=16, num_random=16, dense_below=0, cache=cache, skip_mlp_layers=(1, 2))
    ends = [100, 200, 300, 320, *range(321, 331)]
    logits, picked, _ = step_by_step(model, config, input_ids, ends)
    attention, rows = {}, {}
    for i, chunks in picked.items():
        attention[i] = chunk_masks(330, chunks[:4], drop=cache == "drop")
        rows[i] = attention[i][1]  # without a window the computed rows are the selected ones
    assert 0 < int(rows[1][100:300].sum()) < 200
    with masked(model, attention), zeroed(model, {i: rows[i] for i in (1, 2)}):
        expected = model(input_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_prefill_in_chunks_by_generate() -> None:
    model, input_ids = make_llama(), ids(400, 2)
    config = PAPER.replace(tau=0.7, num_recent=16, num_random=16, dense_below=0, cache="full", skip_mlp_layers=(1,))
    with zipvl.sparse(model, config) as stats:
        output = model.generate(input_ids, max_new_tokens=NEW, prefill_chunk_size=100, **GENERATE)
    assert stats.layers[1].mlp_tokens is not None and stats.layers[1].mlp_tokens[0] < 100
    logits, _, _ = step_by_step(model, config, output.sequences, [100, 200, 300, 400, *range(401, 404)])
    torch.testing.assert_close(torch.stack(output.logits, 1), logits[:, 399:], **TOLERANCE)


def test_assisted_generation_is_plain_generation() -> None:
    """Guesses behind the prompt run whole MLPs, as decoded tokens do."""
    model, inputs = make_llama(), text_inputs(300, 1)
    inputs = {n: torch.cat([t, t[:, -40:]], dim=1) for n, t in inputs.items()}  # so that a lookup finds something
    with zipvl.sparse(model, PAPER, ratio=0.4, skip_mlp_layers=(1, 2)) as stats:
        plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        stats.reset()
        assisted = model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, assisted)
    assert stats.layers[1].kept == [136] and stats.layers[1].mlp_tokens == [139]


# On a device


@pytest.mark.parametrize("way", ["counted", "enough"])
def test_scores_that_are_not_finite_hide_nothing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a row selects every token, more than the host expects. It stays not finite, and takes no place of
    another."""
    model, inputs = make_llama(), text_inputs(300, 1)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).repeat(2, 1, 1)
    embedded[0, 10] = torch.nan
    config = PAPER.replace(ratio=0.25, skip_mlp_layers=(1, 2))
    assert policy.max_selected(config, 300, 256, False) == 76
    with zipvl.sparse(model, config) as stats, as_on_a_device(monkeypatch, way == "counted") as ways:
        logits = model(inputs_embeds=embedded).logits
        alone = model(**inputs).logits
    assert len(ways) == 4 and stats.layers[1].kept == [75]
    assert bool(logits[0, 10:].isnan().all())
    torch.testing.assert_close(logits[1], alone[0], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_chunks_on_a_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, input_ids = TEXT_MODELS[name](), ids(300, 1)
    config = PAPER.replace(
        ratio=0.4, num_recent=16, num_random=16, dense_below=0, cache="full", skip_mlp_layers=(0, 1, 2)
    )
    expected, _, _ = step_by_step(model, config, input_ids, [100, 200, 300])
    for counts in (False, True):
        with as_on_a_device(monkeypatch, counts) as ways:
            found, _, _ = step_by_step(model, config, input_ids, [100, 200, 300])
        assert len(ways) == 9
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_model", "dynamic", "kept"), [(make_llama, True, {"ratio": 0.25}), (make_qwen2, False, {"tau": 0.6})]
)
def test_one_graph_is_the_eager_model(make_model: Any, dynamic: bool, kept: dict[str, float]) -> None:
    torch._dynamo.reset()
    model = make_model(num_hidden_layers=2)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="eager")
    with zipvl.sparse(model, PAPER.replace(**kept, dense_below=50, skip_mlp_layers=(1,))) as stats:
        for inputs in (text_inputs(300), masked_inputs(300, 30), text_inputs(417)):
            stats.reset()
            expected = model(**inputs)
            counts = [stats.layers[i].mlp_tokens for i in range(2)]
            stats.reset()
            actual = compiled(**inputs)
            real = inputs["attention_mask"].bool()
            torch.testing.assert_close(actual.logits[real], expected.logits[real], **TOLERANCE)
            assert [stats.layers[i].mlp_tokens for i in range(2)] == counts and counts[0] is None
            token = torch.tensor([[5]])
            steps = [model(token, past_key_values=o.past_key_values).logits for o in (actual, expected)]
            torch.testing.assert_close(*steps, **TOLERANCE)
        if dynamic:
            with torch._dynamo.config.patch(error_on_recompile=True):
                compiled(**text_inputs(512))
    dense = compiled(**text_inputs(300)).logits
    torch.testing.assert_close(dense, model(**text_inputs(300)).logits, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [{"ratio": 0.25}, {"tau": 0.6}], ids=str)
def test_a_graph_whose_products_count(kept: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, as on Hopper, in the eager model's chunks: the same bits, and one graph for every length."""
    torch._dynamo.reset()
    monkeypatch.setattr(mlp, "counts_rows", lambda *_: True)
    monkeypatch.setattr(mlp, "MIN_CHUNK", 1)
    model = make_qwen2().bfloat16()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with zipvl.sparse(model, PAPER.replace(**kept, dense_below=50, skip_mlp_layers=(1, 2))):
        for number, tokens in enumerate((300, 417, 512)):
            with torch._dynamo.config.patch(error_on_recompile=number > 1):
                actual = compiled(**text_inputs(tokens), use_cache=False).logits
            with as_on_a_device(monkeypatch, counts=True) as ways:
                expected = model(**text_inputs(tokens), use_cache=False).logits
            assert ways == ["_counted", "_counted"]
            assert torch.equal(actual, expected)


def masked_inputs(tokens: int, padding: int) -> dict[str, torch.Tensor]:
    inputs = text_inputs(tokens)
    inputs["attention_mask"][:, :padding] = 0
    return inputs


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("kept", [{"tau": 0.7}, {"ratio": 0.3}], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe"])
def test_experts_that_leave_out_what_no_one_asked_for(
    name: str, kept: dict[str, float], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grouped product ends on the device with the selected rows; other implementations compute what they are
    given."""
    model, inputs = TEXT_MODELS[name](), text_inputs(300, 3)
    model.set_experts_implementation(implementation)
    ends: list[int] = []
    plain = nn.functional.grouped_mm

    def noted(*args: Any, offs: torch.Tensor) -> torch.Tensor:
        ends.append(int(offs[-1]))
        return plain(*args, offs=offs)

    with zipvl.sparse(model, PAPER, **kept, skip_mlp_layers=(2,)) as stats:
        expected = model(**inputs).logits
        selected = stats.layers[2].mlp_tokens
        with monkeypatch.context() as patch:
            patch.setattr(mlp, "is_tracing", lambda _: True)
            patch.setattr(nn.functional, "grouped_mm", noted)
            found = model(**inputs).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert selected is not None and selected[0] < 300
    assert ends[-2:] == ([2 * selected[0]] * 2 if implementation == "grouped_mm" else []), "two experts a token"


# Where it applies


@pytest.mark.parametrize(
    "settings",
    [
        {"skip_mlp_layers": ()},
        {"dense_below": 301},
        {"text_prompts": "dense"},
        {"layers": (0,)},
        {"dense_first_layers": 2},
    ],
    ids=str,
)
def test_elsewhere_mlps_are_whole(settings: dict[str, Any]) -> None:
    model, seen = make_llama(), []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    with zipvl.sparse(model, PAPER, **({"ratio": 0.5, "skip_mlp_layers": (1,)} | settings)) as stats:
        output = model(**text_inputs(300))
        model(torch.tensor([[7]]), past_key_values=output.past_key_values)
    assert seen == [300, 1] and stats.layers[1].mlp_tokens is None
    assert all(entry["mlp_tokens"] is None for entry in stats.to_dict()["layers"]) and "MLP" not in stats.summary()


def test_statistics_say_for_how_many() -> None:
    model = make_llama()
    with zipvl.sparse(model, PAPER, ratio=0.5, skip_mlp_layers=(1,)) as stats:
        model(**text_inputs(300))
    assert "layer   1 sparse kept [150] of [300], MLP of [150]" in stats.summary()
    assert [layer["mlp_tokens"] for layer in stats.to_dict()["layers"]] == [None, [150], None]
    assert copy.deepcopy(stats).layers[1].mlp_tokens == [150]


def own_forward(model: Any) -> list[bool]:
    return ["forward" in vars(layer.mlp) for layer in model.model.layers]


def test_nothing_is_left_behind() -> None:
    model, inputs = make_llama(), text_inputs(300)
    before = model(**inputs).logits
    with zipvl.sparse(model, PAPER, skip_mlp_layers=(0, 1)):
        assert own_forward(model) == [True, True, False]
        with zipvl.sparse(model, PAPER, skip_mlp_layers=(2,)):
            assert own_forward(model) == [True] * 3
            model(**inputs)
        assert own_forward(model) == [True, True, False]
    assert own_forward(model) == [False] * 3
    with pytest.raises(KeyError), zipvl.sparse(model, PAPER, skip_mlp_layers=(0,)):
        raise KeyError
    assert own_forward(model) == [False] * 3
    assert torch.equal(model(**inputs).logits, before)


def test_a_forward_that_is_there_already_stays() -> None:
    model, inputs, shapes = make_llama(), text_inputs(300), []
    layer = model.model.layers[1].mlp

    def other(hidden_states: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(hidden_states.shape))
        return type(layer).forward(layer, hidden_states)

    layer.forward = other
    with zipvl.sparse(model, PAPER, ratio=0.5, skip_mlp_layers=(1,)):
        model(**inputs)
    assert layer.__dict__["forward"] is other and shapes == [(1, 150, 64)]


def test_configure_and_copies() -> None:
    model, inputs = make_llama(), text_inputs(300)
    before = model(**inputs).logits
    stats = configure(model, PAPER.replace(ratio=0.5, skip_mlp_layers=(1,)))
    sparse = model(**inputs).logits
    twin = copy.deepcopy(model)
    assert stats.layers[1].mlp_tokens == [150] and not torch.allclose(sparse, before, atol=1e-2)
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.parameters():
            parameter.zero_()
    assert torch.equal(twin(**inputs).logits, sparse), "the copy runs MLPs of its own"
    with zipvl.sparse(twin, PAPER, ratio=0.5, skip_mlp_layers=(2,)):
        assert own_forward(twin) == [False, True, True]
    assert own_forward(twin) == [False, True, False]
    configure(twin, None)
    assert own_forward(twin) == [False] * 3 and torch.equal(twin(**inputs).logits, before)


def test_a_caches_own_configuration_counts() -> None:
    model, inputs = make_llama(), text_inputs(300)
    own = PAPER.replace(ratio=0.5, skip_mlp_layers=(0,))
    with zipvl.sparse(model, PAPER, ratio=0.5, skip_mlp_layers=(1,)) as stats:
        model(**inputs, past_key_values=zipvl.ZipVLCache(model.config, own))
        assert [stats.layers[i].mlp_tokens for i in range(3)] == [[150], None, None]
        inside = model(**inputs, past_key_values=zipvl.ZipVLCache(model, own)).logits
        model(**inputs)
        assert [stats.layers[i].mlp_tokens for i in range(3)] == [None, [150], None]
    assert own_forward(model) == [True, False, False], "the model reads caches of this kind from now on"
    model.set_attn_implementation("zipvl")
    assert torch.equal(model(**inputs, past_key_values=zipvl.ZipVLCache(model, own)).logits, inside)
    with pytest.raises(ValueError, match=r"skip_mlp_layers names \[3\]"):
        zipvl.ZipVLCache(model, own.replace(skip_mlp_layers=(3,)))


def test_an_error_leaves_nothing_for_the_next_forward() -> None:
    model, inputs = make_llama(), text_inputs(300)

    def fail(*_: Any) -> None:
        raise KeyError

    with zipvl.sparse(model, PAPER, ratio=0.5, skip_mlp_layers=(1,)) as stats:
        handle = model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(**inputs)
        handle.remove()
        model(**text_inputs(200))  # dense: shorter than dense_below
        assert stats.layers[1].mode == "dense"


def test_threads_share_a_block() -> None:
    model, found = make_llama(), dict[int, torch.Tensor]()
    lengths = (300, 340, 380, 420)
    with zipvl.sparse(model, PAPER, ratio=0.5, skip_mlp_layers=(1, 2)):
        alone = {n: model(**text_inputs(n)).logits for n in lengths}

        def run(tokens: int) -> None:
            with torch.no_grad():
                for _ in range(3):
                    found[tokens] = model(**text_inputs(tokens)).logits

        threads = [threading.Thread(target=run, args=(n,)) for n in lengths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[n], alone[n]) for n in lengths)


# Errors


@pytest.mark.parametrize(
    ("make_model", "words"),
    [
        (lambda: make("Phi"), "PhiDecoderLayer computes attention and MLP side by side.*a parallel block"),
        (lambda: make("Cohere"), "CohereDecoderLayer computes attention and MLP side by side"),
        (lambda: make("GPTNeoX"), "GPTNeoXLayer computes attention and MLP side by side"),
        (lambda: make("OPT", ffn_dim=96, word_embed_proj_dim=64), "no MLP beside its attention"),
        (lambda: make("GraniteMoeShared", shared_intermediate_size=32), ".* has shared_mlp beside its attention"),
    ],
    ids=["phi", "cohere", "gpt_neox", "opt", "granite"],
)
def test_refused_at_the_start_of_the_block(make_model: Any, words: str) -> None:
    model = make_model()
    named = f"zipvl.sparse: ZipVLConfig.skip_mlp_layers names layer 1 of .*, whose MLP cannot run for .*: {words}"
    with pytest.raises(ValueError, match=named), zipvl.sparse(model, PAPER, skip_mlp_layers=(1,)):
        raise AssertionError
    with pytest.raises(ValueError, match="skip_mlp_layers names layer 1"):
        configure(model, PAPER.replace(skip_mlp_layers=(1,)))
    with zipvl.sparse(model, PAPER):
        pass


def test_layers_that_do_not_exist_or_are_never_sparse() -> None:
    words = (
        r"ZipVLConfig.skip_mlp_layers names \[3, 9\], which LlamaModel does not have .*; those that can: \[0, 1, 2\]"
    )
    with pytest.raises(ValueError, match=words), zipvl.sparse(make_llama(), skip_mlp_layers=(9, 1, 3)):
        pass
    with pytest.raises(ValueError, match=r"names \[0\].*those that can: \[1, 2\]"):
        configure(make_gemma3_text(), PAPER.replace(skip_mlp_layers=(0,)))


def test_an_mlp_that_two_layers_share() -> None:
    model = make_llama()
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with pytest.raises(ValueError, match=r"layer 2 of LlamaModel.*: it shares its MLP with another layer"):
        configure(model, PAPER.replace(skip_mlp_layers=(1, 2)))


def test_an_mlp_that_is_not_called_or_given_other_states() -> None:
    model, inputs = make_llama(), text_inputs(300)
    ordinary = model.model.layers[1].mlp
    with zipvl.sparse(model, PAPER, ratio=0.5, skip_mlp_layers=(1,)):
        model.model.layers[1].mlp = nn.Identity()
        with pytest.raises(RuntimeError, match=r"skip_mlp_layers names \[1\], whose MLPs were not called"):
            model(**inputs)
        model.model.layers[1].mlp = ordinary
        ordinary.register_forward_pre_hook(lambda module, args: (args[0][:, 1:],))
        with pytest.raises(RuntimeError, match=r"names layer 1, whose LlamaMLP was given hidden states \[1, 299, 64\]"):
            model(**inputs)
