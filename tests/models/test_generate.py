"""``generate()`` with a ``ZipVLCache``, each way of it against the oracle or against a run that must agree with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import zipvl
from tests.models.oracle import oracle
from tests.models.tiny_models import PAPER, SPARSE, build, ids, make_llama, pad_left, text_inputs

GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}


def logits_of(output: Any) -> torch.Tensor:
    return torch.stack(output.logits, dim=1)


def kept_of(stats: Any) -> dict[int, torch.Tensor]:
    return {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}


def repeated(tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """A prompt that repeats itself, so that prompt lookup finds something to propose."""
    return {"input_ids": ids(20, seed).repeat(1, tokens // 20)}


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_a_thousand_tokens_stay_right(cache: str) -> None:
    model, inputs = make_llama(num_hidden_layers=2), text_inputs(300, 3)
    with zipvl.sparse(model, PAPER, tau=0.7, cache=cache, record_index=True) as stats:
        output = model.generate(**inputs, max_new_tokens=1000, **GENERATE)
    assert output.past_key_values.get_seq_length() == 1299
    with oracle(model, kept_of(stats), 300, full=cache == "full"):
        expected = model(output.sequences, use_cache=False).logits
    torch.testing.assert_close(logits_of(output)[0], expected[0, 299:-1], **TOLERANCE)


def test_sampling_gives_the_tokens_of_the_distribution_that_the_oracle_has() -> None:
    model, inputs = make_llama(), text_inputs(300, 3)
    sampling: dict[str, Any] = {**GENERATE, "do_sample": True, "temperature": 0.8, "top_k": 20, "max_new_tokens": 12}
    with zipvl.sparse(model, PAPER, tau=0.7, record_index=True) as stats:
        torch.manual_seed(5)
        output = model.generate(**inputs, **sampling)
        torch.manual_seed(5)
        again = model.generate(**inputs, **sampling)
        torch.manual_seed(6)
        other = model.generate(**inputs, **sampling)
    assert torch.equal(output.sequences, again.sequences)
    assert not torch.equal(output.sequences, other.sequences)
    with oracle(model, kept_of(stats), 300):
        expected = model(output.sequences, use_cache=False).logits[0, 299:-1]
    torch.testing.assert_close(logits_of(output)[0], expected, **TOLERANCE)
    torch.manual_seed(5)
    for step in range(12):
        top, token = (expected[step] / 0.8).topk(20)
        drawn = torch.multinomial(torch.full((200,), -torch.inf).scatter(0, token, top).softmax(-1)[None], 1)
        assert drawn.item() == output.sequences[0, 300 + step]


@pytest.mark.parametrize("lookup", [{"prompt_lookup_num_tokens": 4}, {"prompt_lookup_num_tokens": 1}])
def test_prompt_lookup_gives_the_tokens_of_greedy_decoding(lookup: dict[str, int]) -> None:
    model, inputs = make_llama(), repeated(400, 3)
    with zipvl.sparse(model, PAPER, tau=0.7) as stats:
        plain = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        kept = [layer.kept for layer in stats.layers.values()]
        assisted = model.generate(**inputs, max_new_tokens=30, do_sample=False, **lookup)
        assert [layer.kept for layer in stats.layers.values()] == kept
        assert stats.layers[0].prompt == 400
    assert torch.equal(assisted, plain)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("same", [True, False], ids=["an assistant that guesses right", "one that guesses wrong"])
def test_an_assistant_gives_the_tokens_of_greedy_decoding(name: str, same: bool) -> None:
    model, inputs = SPARSE[name].make(), text_inputs(300, 4)
    assistant = build(type(model), model.config, seed=0 if same else 1)
    assistant.config = type(model.config)(**model.config.to_dict())
    crops = 0

    with zipvl.sparse(model, PAPER, tau=0.7) as stats:
        plain = model.generate(**inputs, max_new_tokens=24, **GENERATE)
        cache = zipvl.ZipVLCache(model, zipvl.ZipVLConfig.paper(tau=0.7))
        crop = cache.crop

        def counting(tokens: int) -> None:
            nonlocal crops
            crops += tokens < 0
            crop(tokens)

        cache.crop = counting  # type: ignore[method-assign]
        assisted = model.generate(
            **inputs, max_new_tokens=24, assistant_model=assistant, past_key_values=cache, **GENERATE
        )
        assert stats.active
    assert torch.equal(assisted.sequences, plain.sequences)
    torch.testing.assert_close(logits_of(assisted), logits_of(plain), **TOLERANCE)
    assert same or crops > 0


def test_assisted_generation_of_a_short_prompt_is_dense() -> None:
    model, inputs = make_llama(), repeated(100, 3)
    dense = model.generate(**inputs, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3)
    with zipvl.sparse(model, PAPER, tau=0.5):
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3), dense
        )


def test_what_assisted_generation_cannot_do_is_an_error_before_anything_runs() -> None:
    model, inputs = make_llama(), text_inputs(300)
    ran = []
    model.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with zipvl.sparse(model, PAPER):
        with pytest.raises(ValueError, match="assistant_early_exit"):
            model.generate(**inputs, max_new_tokens=4, assistant_early_exit=2)
        model._supports_logits_to_keep = lambda: False
        with pytest.raises(ValueError, match="takes no logits_to_keep"):
            model.generate(**inputs, max_new_tokens=4, prompt_lookup_num_tokens=2)
    assert not ran


def test_a_padded_batch_is_its_rows_alone() -> None:
    model, rows = make_llama(), [text_inputs(330, 1), text_inputs(280, 2), text_inputs(100, 3)]
    with zipvl.sparse(model, PAPER, tau=0.7):
        together = model.generate(**pad_left(rows), max_new_tokens=70, **GENERATE)
        for b, row in enumerate(rows):
            alone = model.generate(**row, max_new_tokens=70, **GENERATE)
            torch.testing.assert_close(logits_of(together)[b], logits_of(alone)[0], **TOLERANCE)
            assert torch.equal(together.sequences[b, -70:], alone.sequences[0, -70:])


def test_three_turns() -> None:
    model, text = make_llama(), text_inputs(300, 3)["input_ids"]
    with zipvl.sparse(model, PAPER, tau=0.7, record_index=True) as stats:
        output = model.generate(text, max_new_tokens=5, **GENERATE)
        kept = kept_of(stats)
        for seed in (8, 9):
            text = torch.cat([output.sequences, ids(35, seed)], dim=1)
            output = model.generate(text, max_new_tokens=5, past_key_values=output.past_key_values, **GENERATE)
    with oracle(model, kept, 300):
        expected = model(output.sequences, use_cache=False).logits
    torch.testing.assert_close(logits_of(output)[0], expected[0, text.shape[1] - 1 : -1], **TOLERANCE)


def test_a_generation_config_object_works_too() -> None:
    model, inputs = make_llama(), text_inputs(300, 3)
    with zipvl.sparse(model, PAPER, tau=0.7):
        given = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(model.generate(**inputs, generation_config=config), given)
