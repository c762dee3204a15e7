"""generate() decodes by replays of a captured step, and says so; tokens are those of eager decoding.

A CPU has no graphs, so a stand-in for the capture runs the step again at each replay, on the tensors that the step was
captured on. The cache says that it has seen as many tokens as at the capture, as a captured step would believe, and the
host's counts are put back after it. It replaces ``Captured._capture``, which is private.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

import zipvl
from tests.models.tiny_models import PAPER, SPARSE, ids, make_gemma3_text, make_llama, pad_left, text_inputs
from zipvl.transformers import decode

GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TOLERANCE = {"atol": 2e-3, "rtol": 2e-3}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are captured on the CPU; how many could be replayed of each capture."""
    found: list[int] = []

    def capture(self: decode.Captured, step: Callable[[], Any], warm_up: bool) -> tuple[Callable[[], None], Any]:
        found.append(self.left)
        lengths = [[tensor.clone() for tensor in layer.storage()] for layer in self._layers]
        seen = [layer.get_seq_length() for layer in self._layers]
        result = step()
        for layer, kept in zip(self._layers, lengths, strict=True):  # captured, not run
            for tensor, before in zip(layer.storage(), kept, strict=True):
                tensor.copy_(before)

        def replay() -> None:
            counts = [layer.counts() for layer in self._layers]
            for layer, (_, longest), then in zip(self._layers, counts, seen, strict=True):
                layer.withdraw(then, longest)
            again = step()
            for layer, before in zip(self._layers, counts, strict=True):
                layer.withdraw(*before)
            result.last_hidden_state.copy_(again.last_hidden_state)

        return replay, result

    monkeypatch.setattr(decode.Captured, "_capture", capture)
    monkeypatch.setattr(decode, "DEVICES", ("cpu",))
    return found


def both(model: Any, inputs: dict[str, Any], tokens: int = 40, config: dict[str, Any] | None = None) -> Any:
    """The answer by replays after checking that it is the eager one, and the statistics."""
    given = {"tau": 0.7, "dense_below": 256} | (config or {})
    with zipvl.sparse(model, PAPER, **given, decode="eager") as stats:
        eager = model.generate(**inputs, max_new_tokens=tokens, **GENERATE)
    assert [(d.how, d.reason) for d in stats.decodings] == [("eager", 'ZipVLConfig.decode is "eager"')]
    with zipvl.sparse(model, PAPER, **given) as stats:
        replayed = model.generate(**inputs, max_new_tokens=tokens, **GENERATE)
    assert torch.equal(replayed.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(replayed.logits), torch.stack(eager.logits), **TOLERANCE)
    return replayed, stats


@pytest.mark.parametrize("name", SPARSE)
def test_tokens_are_those_of_eager_decoding(name: str, captures: list[int]) -> None:
    model, inputs = SPARSE[name].make(), SPARSE[name].inputs(300, 1)
    _, stats = both(model, inputs)
    (decoding,) = stats.decodings
    if name == "gemma3_text":
        assert (decoding.how, captures) == ("eager", [])
        assert decoding.reason == "layer 0's cache is a DynamicSlidingWindowLayer"
    else:
        assert (decoding.how, decoding.reason, decoding.replayed) == ("graph", None, 38)
        assert len(captures) == 1
        assert "decoded by graph" in stats.summary()
        assert stats.to_dict()["decodings"] == [{"how": "graph", "reason": None, "replayed": 38}]


@pytest.mark.parametrize("cache", ["drop", "full", "quantize"])
def test_every_cache_mode(cache: Any, captures: list[int]) -> None:
    """Long enough that a quantised cache compresses its newest tokens between replays."""
    model, inputs = make_llama(head_dim=32), text_inputs(300)
    output, stats = both(model, inputs, 130, {"cache": cache, "num_sinks": 4})
    assert stats.decodings[0].how == "graph"
    assert output.past_key_values.get_seq_length() == 429


def test_a_cache_with_a_budget_of_its_own(captures: list[int]) -> None:
    """A prompt, and a batch with a row that stays dense."""
    config: dict[str, Any] = {"cache_ratio": 0.3, "local_window": 24}
    output, stats = both(make_llama(), text_inputs(300), config=config)
    assert (stats.decodings[0].how, stats.layers[0].stored) == ("graph", [90])
    assert output.past_key_values.layers[0].packed.lengths.tolist() == [90 + 39]
    _, stats = both(make_llama(), pad_left([text_inputs(330, 1), text_inputs(100, 3)]), config=config)
    assert (stats.decodings[0].how, stats.layers[0].stored) == ("graph", [99, 100])


@pytest.mark.parametrize("cache", ["full", "quantize"])
def test_compiled_steps(cache: Any, captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A few graphs serve answers behind caches of any size, in blocks of their own."""
    made: list[Any] = []

    def counting(graph: Any, example: Any) -> Any:
        made.append(graph)
        return torch._dynamo.lookup_backend("eager")(graph, example)

    torch._dynamo.reset()
    monkeypatch.setattr(decode, "BACKEND", counting)
    config = {"cache": cache, "num_sinks": 4, "decode_compile": True}
    model = make_llama(head_dim=32)
    counts = []
    for length in (300, 340, 300, 340):
        _, stats = both(model, text_inputs(length), 18, config)
        assert stats.decodings[0].how == "graph"
        counts.append(len(made))
    assert 1 <= counts[1] <= 4
    assert counts[1] == counts[3]
    written = [n for graph in made for n in graph.graph.nodes if str(n.target) in ("scatter_", "scatter")]
    assert all(n.args[0].meta["example_value"].dim() < 4 for n in written), "a compiler copies the cache for it"
    torch._dynamo.reset()


def test_a_step_that_does_not_compile_is_decoded_as_it_is(captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, example: Any) -> Any:
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    monkeypatch.setattr(decode, "BACKEND", broken)
    model = make_llama()
    with zipvl.sparse(model, PAPER, tau=0.7, dense_below=256, decode="eager"):
        eager = model.generate(**text_inputs(300), max_new_tokens=18, do_sample=False)
    with zipvl.sparse(model, PAPER, tau=0.7, dense_below=256, decode_compile=True) as stats:
        found = model.generate(**text_inputs(300), max_new_tokens=18, do_sample=False)
    assert torch.equal(found, eager)
    assert stats.decodings[0].how == "eager" and "no compiler here" in str(stats.decodings[0].reason)


def test_room_runs_out(captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "ROOM", 20)
    _, stats = both(make_llama(), text_inputs(300), 70)
    assert len(captures) == 4 and captures[0] == 20
    assert stats.decodings[0].replayed == 68


def test_a_dense_prompt_is_packed_whole(captures: list[int]) -> None:
    output, stats = both(make_llama(), text_inputs(100))
    assert stats.layers[0].reason == "prompt shorter than dense_below=256"
    assert stats.decodings[0].how == "graph"
    assert output.past_key_values.layers[0].packed.lengths.tolist() == [139]


def test_padded_batches_and_rows_that_end_early(captures: list[int]) -> None:
    model, rows = make_llama(), [text_inputs(330, 1), text_inputs(280, 2), text_inputs(100, 3)]
    _, stats = both(model, pad_left(rows))
    assert stats.decodings[0].how == "graph"
    alone = [both(model, row)[0].sequences[0, -40:] for row in rows]
    with zipvl.sparse(model, PAPER, tau=0.7, dense_below=256) as stats:
        first = alone[0].tolist()
        last = max(i for i in range(25) if first.index(first[i]) == i and all(first[i] not in row for row in alone[1:]))
        together = model.generate(**pad_left(rows), max_new_tokens=40, do_sample=False, eos_token_id=first[last])
    assert stats.decodings[0].how == "graph"
    assert 0 < last and torch.equal(together[0, 330 : 331 + last], alone[0][: last + 1])
    assert not together[0, 331 + last :].any(), "padding"
    assert all(torch.equal(together[row, 330:], alone[row]) for row in (1, 2))


def test_sampling_processors_and_streamers(captures: list[int]) -> None:
    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None: ...

    model, inputs, found = make_llama(), text_inputs(300), []
    for how in ("eager", "auto"):
        torch.manual_seed(3)
        streamer = Streamer()
        with zipvl.sparse(model, PAPER, tau=0.7, decode=how) as stats:
            output = model.generate(
                **inputs,
                max_new_tokens=40,
                do_sample=True,
                temperature=0.7,
                repetition_penalty=1.3,
                streamer=streamer,
            )
        assert streamer.tokens == output[0].tolist()
        found.append(output)
    assert stats.decodings[0].how == "graph"
    assert torch.equal(*found)


def test_more_turns(captures: list[int]) -> None:
    model, found = make_llama(), []
    for how in ("eager", "auto"):
        with zipvl.sparse(model, PAPER, tau=0.7, decode=how) as stats:
            output = model.generate(**text_inputs(300), max_new_tokens=30, **GENERATE)
            for seed in (8, 9):
                text = torch.cat([output.sequences, ids(35, seed)], dim=1)
                output = model.generate(text, max_new_tokens=30, past_key_values=output.past_key_values, **GENERATE)
        found.append(output.sequences)
    assert [decoding.how for decoding in stats.decodings] == ["graph"] * 3
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"num_beams": 2}, "beam search changes the cache between steps"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation changes the cache between steps"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states or attentions are asked for"),
        ({"max_new_tokens": 8}, "7 tokens to come do not pay for the capture"),
    ],
)
def test_what_decodes_eagerly_says_why(given: dict[str, Any], reason: str, captures: list[int]) -> None:
    model, inputs = make_llama(), text_inputs(300)
    with zipvl.sparse(model, PAPER, tau=0.7) as stats:
        model.generate(**inputs, **({"max_new_tokens": 30, "do_sample": False} | given))
    (decoding,) = stats.decodings
    assert decoding.how == "eager" and reason in (decoding.reason or "")
    assert captures == []


def test_few_tokens_where_a_graph_is_asked_for(captures: list[int]) -> None:
    model = make_llama()
    with zipvl.sparse(model, PAPER, tau=0.7, decode="graph") as stats:
        model.generate(**text_inputs(300), max_new_tokens=4, do_sample=False)
    assert stats.decodings[0].replayed == 2


def test_a_step_that_cannot_be_captured_is_decoded_eagerly(
    captures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make_llama(), text_inputs(300)
    expected, _ = both(model, inputs)

    def fail(self: decode.Captured, step: Callable[[], Any], warm_up: bool) -> Any:
        self._layers[0].update(*(torch.zeros(1, 2, 1, 16) for _ in range(2)))  # half-way through a step
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(decode.Captured, "_capture", fail)
    with zipvl.sparse(model, PAPER, tau=0.7, dense_below=256) as stats:
        output = model.generate(**inputs, max_new_tokens=40, **GENERATE)
    assert torch.equal(output.sequences, expected.sequences)
    assert stats.decodings[0].reason == (
        "the step could not be captured: operation not permitted when stream is capturing"
    )


def test_configured_models_and_forwards_of_ones_own(captures: list[int]) -> None:
    model, inputs = make_llama(), text_inputs(300)
    stats = zipvl.configure(model, zipvl.ZipVLConfig.paper(tau=0.7))
    config = GenerationConfig(max_new_tokens=30, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    output = model.generate(**inputs, generation_config=config)
    assert [decoding.how for decoding in stats.decodings] == ["graph"]
    expected = model(ids(1, 5), past_key_values=output.past_key_values).logits
    output.past_key_values.crop(-1)
    assert torch.equal(model(ids(1, 5), past_key_values=output.past_key_values).logits, expected)
    assert len(captures) == 1


def test_a_decoder_that_is_given_no_positions(captures: list[int]) -> None:
    """It would count them on the host, where a captured step stands still."""
    model, inputs = make_llama(), text_inputs(300)
    expected, _ = both(model, inputs)
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True
    )
    output, stats = both(model, inputs)
    assert stats.decodings[0].how == "graph"
    assert torch.equal(output.sequences, expected.sequences)


def test_arguments_that_no_captured_step_can_follow(captures: list[int]) -> None:
    model, inputs = make_llama(), text_inputs(300)
    model.model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {"extra": [1]}), with_kwargs=True)
    _, stats = both(model, inputs)
    assert stats.decodings[0].reason == "the decoder is given extra, which no captured step can follow"
    assert captures == []


def test_not_on_a_gpu() -> None:
    model = make_gemma3_text()
    with zipvl.sparse(model, PAPER, tau=0.7) as stats:
        model.generate(**text_inputs(300), max_new_tokens=20, do_sample=False)
    assert stats.decodings[0].reason == "not on a GPU"
