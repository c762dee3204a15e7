"""Which tokens are visual, what becomes of text beside them, and prompts without any."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers as tf

import zipvl
from tests.models.oracle import chunk_masks, masked
from tests.models.tiny_models import (
    IMAGE,
    MULTIMODAL,
    PAPER,
    TEXT,
    VIDEO,
    VISION_END,
    VISION_START,
    build,
    llava_next_inputs,
    make_llama,
    make_llava_next,
    make_qwen2_5_vl,
    pad_left,
    text_inputs,
)
from zipvl.transformers.reasons import TEXT as NO_VISUAL
from zipvl.transformers.visual import Visual, visual_ids

GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
GENERATE |= {"suppress_tokens": [IMAGE, VISION_START, VISION_END, VIDEO]}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}
KEEPING: dict[str, Any] = {"tau": 0.5, "local_window": 0, "num_sinks": 0}


def logits_of(output: Any) -> torch.Tensor:
    return torch.stack(output.logits, dim=1)


def modes(stats: zipvl.Stats) -> set[tuple[str, str | None]]:
    return {(layer.mode, layer.reason) for layer in stats.layers.values()}


def text_of(inputs: dict[str, torch.Tensor]) -> set[int]:
    """Positions of a prompt's text, of one row."""
    return set((inputs["input_ids"][0] != IMAGE).nonzero()[:, 0].tolist())


def test_the_ids_of_visual_tokens() -> None:
    assert visual_ids(make_llava_next().config) == (IMAGE,)
    assert visual_ids(make_qwen2_5_vl().config) == (IMAGE, VIDEO)
    assert visual_ids(make_llama().config) == ()
    assert visual_ids(tf.MllamaConfig()) == (), "a token that only says that there is an image"


# Text kept


@pytest.mark.parametrize("cache", ["drop", "full"])
@pytest.mark.parametrize("name", MULTIMODAL)
def test_text_is_kept_beside_images(name: str, cache: Any) -> None:
    family = MULTIMODAL[name]
    model, inputs = family.make(), family.inputs(300, 1)
    prompt, text = inputs["input_ids"].shape[1], text_of(inputs)
    with zipvl.sparse(model, cache=cache, record_index=True, **KEEPING) as stats:
        output = model.generate(**inputs, max_new_tokens=5, **GENERATE)
    masks = {}
    for i, layer in stats.layers.items():
        assert layer.index is not None and set(layer.index[0].tolist()) > text, "and some of the image"
        assert layer.kept[0] < prompt
        masks[i] = chunk_masks(prompt + 5, [(prompt, layer.index[0])], drop=cache == "drop")
    whole = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 5))
    with masked(model, masks):
        expected = model(input_ids=output.sequences, **whole, use_cache=False).logits
    torch.testing.assert_close(logits_of(output)[0], expected[0, prompt - 1 : -1], **TOLERANCE)


def test_or_it_is_not() -> None:
    model, inputs = make_llava_next(), llava_next_inputs(300)
    with zipvl.sparse(model, keep_text=False, record_index=True, **KEEPING) as stats:
        model(**inputs)
    assert stats.active
    for layer in stats.layers.values():
        assert layer.index is not None and not set(layer.index[0].tolist()) >= text_of(inputs)


def test_without_hooks_of_ours_on_the_inner_model() -> None:
    """The inner model alone is called: it sees input ids as well as the outer one."""
    model, inputs = make_llava_next(), llava_next_inputs(300)
    with zipvl.sparse(model, record_index=True, **KEEPING) as stats:
        model.model(**inputs)
    assert stats.active and stats.layers[0].index is not None
    assert set(stats.layers[0].index[0].tolist()) > text_of(inputs)


class TakesNoMore(tf.LlavaNextForConditionalGeneration):
    """A model whose code does not come with transformers, and hands on what it knows."""

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, image_sizes=None):  # type: ignore
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, image_sizes=image_sizes
        )


class PassesNoneOn(TakesNoMore):
    """And whose inner model takes no more either."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = NoneInside


class NoneInside(tf.LlavaNextModel):
    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, image_sizes=None, **_):  # type: ignore
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, image_sizes=image_sizes
        )


def test_ids_reach_the_decoder_from_whichever_model_hands_keywords_on() -> None:
    inputs, plain = llava_next_inputs(300), make_llava_next()
    with zipvl.sparse(plain, record_index=True, **KEEPING) as expected:
        plain(**inputs)
    for kind, arrives in ((TakesNoMore, True), (PassesNoneOn, False)):
        model = build(kind, plain.config)
        model.load_state_dict(plain.state_dict())
        with warnings.catch_warnings(), zipvl.sparse(model, record_index=True, **KEEPING) as stats:
            warnings.simplefilter("ignore")
            model(**inputs)
        if arrives:
            assert [x.index[0].tolist() for x in stats.layers.values()] == [  # type: ignore[index]
                x.index[0].tolist()
                for x in expected.layers.values()  # type: ignore[index]
            ]
        else:
            assert modes(stats) == {("dense", NO_VISUAL)}
        with zipvl.sparse(model, visual_mask=inputs["input_ids"] == IMAGE, record_index=True, **KEEPING) as stats:
            model(**inputs)
        assert stats.layers[0].index is not None and expected.layers[0].index is not None
        assert torch.equal(stats.layers[0].index[0], expected.layers[0].index[0]), "they can be named"


# Prompts of text


@pytest.mark.parametrize("make", [make_llama, make_llava_next])
def test_a_prompt_of_text_stays_dense_and_says_so_once(make: Any) -> None:
    model, inputs = make(), text_inputs(300)
    dense = model(**inputs).logits
    expected = model.generate(**inputs, max_new_tokens=4, **GENERATE)
    with warnings.catch_warnings(record=True) as caught, zipvl.sparse(model, tau=0.5) as stats:
        warnings.simplefilter("always")
        assert torch.equal(model(**inputs).logits, dense)
        output = model.generate(**inputs, max_new_tokens=4, **GENERATE)
    assert modes(stats) == {("dense", NO_VISUAL)} and stats.prefills == 2
    assert torch.equal(output.sequences, expected.sequences)
    told = [str(w.message) for w in caught if "zipvl" in str(w.message)]
    assert len(told) == 1 and 'text_prompts="sparse"' in told[0] and "visual_mask" in told[0]


@pytest.mark.parametrize("make", [make_llama, make_llava_next])
def test_unless_it_is_asked_for(make: Any) -> None:
    model, inputs = make(), text_inputs(300)
    with warnings.catch_warnings(), zipvl.sparse(model, tau=0.5, local_window=8, text_prompts="sparse") as stats:
        warnings.simplefilter("error")
        model(**inputs)
    assert modes(stats) == {("sparse", None)} and stats.mean_ratio < 1


@pytest.mark.parametrize("door", ["sparse", "configure", "cache"])
@pytest.mark.parametrize(("make", "tau"), [(make_llama, 0.97), (make_llava_next, 0.9)])
def test_models_whose_visual_tokens_are_unknown_keep_more(make: Any, tau: float, door: str) -> None:
    inputs, config = text_inputs(300), zipvl.ZipVLConfig(text_prompts="sparse", local_window=8)

    def kept(given: zipvl.ZipVLConfig) -> list[float]:
        model = make()
        if door == "sparse":
            with zipvl.sparse(model, given) as stats:
                model(**inputs)
        else:
            stats = zipvl.configure(model, given)
            model(**inputs, past_key_values=zipvl.ZipVLCache(model, given) if door == "cache" else None)
        return [layer.ratio for layer in stats.layers.values()]

    assert kept(config) == kept(config.replace(tau=tau)) != kept(config.replace(tau=0.87 + 0.97 - tau))


def test_a_mask_of_visual_tokens_says_that_there_are_some() -> None:
    model, inputs, ratios = make_llama(), text_inputs(300), []
    how: dict[str, Any] = {"visual_mask": inputs["input_ids"] > 50, "keep_text": False, "local_window": 8}
    for given in ({}, {"tau": 0.9}):
        with zipvl.sparse(model, **how, **given) as stats:
            model(**inputs)
        ratios.append(stats.mean_ratio)
    assert ratios[0] == ratios[1] < 1


def test_a_short_prompt_of_text_is_just_short() -> None:
    model = make_llama()
    with warnings.catch_warnings(), zipvl.sparse(model) as stats:
        warnings.simplefilter("error")
        model(**text_inputs(200))
    assert modes(stats) == {("dense", "prompt shorter than dense_below=256")}


@pytest.mark.parametrize("cache", ["drop", "full"])
@pytest.mark.parametrize("keep_text", [True, False])
@pytest.mark.parametrize("window", [0, 16])
def test_rows_of_text_beside_rows_with_images(cache: Any, keep_text: bool, window: int) -> None:
    model = make_llava_next()
    with_image, text = llava_next_inputs(300, 1), text_inputs(420, 2)
    rows = [{key: with_image[key] for key in ("input_ids", "attention_mask")}, text]
    batch = pad_left(rows) | {key: with_image[key] for key in ("pixel_values", "image_sizes")}
    settings: dict[str, Any] = KEEPING | {"cache": cache, "keep_text": keep_text, "local_window": window}
    dense = model.generate(**text, max_new_tokens=5, **GENERATE)
    with zipvl.sparse(model, **settings) as stats:
        together = model.generate(**batch, max_new_tokens=5, **GENERATE)
        kept = [layer.kept for layer in stats.layers.values()]
        alone = model.generate(**with_image, max_new_tokens=5, **GENERATE)
    assert [layer.kept[0] for layer in stats.layers.values()] == [row[0] for row in kept]
    assert {row[1] for row in kept} == {420} and all(row[0] < 460 for row in kept)
    torch.testing.assert_close(logits_of(together)[0], logits_of(alone)[0], **TOLERANCE)
    torch.testing.assert_close(logits_of(together)[1], logits_of(dense)[0], **TOLERANCE)


def test_a_turn_of_text_behind_an_image_is_no_prompt_of_text() -> None:
    """The cache remembers; beams that swap rows and copies of rows do not confuse it."""
    model, inputs = make_llava_next(), llava_next_inputs(300)
    turn = text_inputs(200, 5)["input_ids"]
    with zipvl.sparse(model, record_index=True, **KEEPING) as stats:
        output = model.generate(**inputs, max_new_tokens=4, **GENERATE)
        first = stats.layers[0]
        whole = torch.cat([output.sequences, turn], dim=1)
        model.generate(whole, past_key_values=output.past_key_values, max_new_tokens=4, **GENERATE)
    assert stats.layers[0] is not first and stats.layers[0].mode == "sparse"


def test_the_cache_remembers_by_row() -> None:
    cache = zipvl.ZipVLCache(make_llama(), PAPER)
    cache.visual = torch.tensor([[True, False], [False, False]])
    cache.batch_repeat_interleave(2)
    assert cache.visual.any(-1).tolist() == [True, True, False, False]
    cache.reorder_cache(torch.tensor([2, 0, 1, 3]))  # type: ignore[arg-type]
    assert cache.visual.any(-1).tolist() == [False, True, True, False]
    cache.batch_select_indices(torch.tensor([0, 1]))
    assert cache.visual.any(-1).tolist() == [False, True]


def test_visual_tokens_so_far() -> None:
    before, new = torch.tensor([[True], [False], [False]]), torch.tensor([[False, True], [False, True], [False, False]])
    visual = Visual(new, before, seen=3)
    assert visual.kind() == "mixed" and visual.rows(new.device).tolist() == [True, True, False]
    known = visual.of(5, new.device)
    assert known is not None and known.tolist()[:2] == [[1, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert Visual(None, before, 3).kind() == "mixed" and Visual(None, before[:1], 3).kind() == "visual"
    assert Visual(new[2:], before[2:], 3).kind() == "text" and Visual().kind() == "text"
    assert Visual(None, before, 0).kind() == "text", "the cache was emptied or cropped since"


def test_beams() -> None:
    model, inputs = make_llava_next(), llava_next_inputs(300)
    with zipvl.sparse(model, tau=1.0) as stats:
        found = model.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False)
    assert stats.active
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False))


# What the caller says


def embedded(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


def test_embeddings_are_text_unless_the_caller_knows_better() -> None:
    model = make_llama()
    inputs = embedded(model, text_inputs(300))
    mask = torch.zeros(1, 300, dtype=torch.bool)
    mask[0, 50:200] = True
    with zipvl.sparse(model, **KEEPING) as stats, pytest.warns(UserWarning, match="visual_mask="):
        model(**inputs)
    assert modes(stats) == {("dense", NO_VISUAL)}
    found = []
    asked = []

    def which(ids: Any, embeds: Any) -> torch.Tensor:
        asked.append((ids, embeds.shape))
        return mask

    for given in (mask, which):
        with zipvl.sparse(model, visual_mask=given, record_index=True, **KEEPING) as stats:
            found.append(model.generate(**inputs, max_new_tokens=4, do_sample=False))
        assert modes(stats) == {("sparse", None)}
        assert all(set(layer.index[0].tolist()) >= {*range(50), *range(200, 300)} for layer in stats.layers.values())  # type: ignore[index]
    assert torch.equal(*found) and asked == [(None, (1, 300, 64))], "once a forward, not for decoded tokens"
    stats = zipvl.configure(model, zipvl.ZipVLConfig(**KEEPING), visual_mask=mask)
    model(**inputs)
    assert modes(stats) == {("sparse", None)}
    zipvl.configure(model, None)


def test_the_caller_overrules_ids_and_may_name_none() -> None:
    model, inputs = make_llava_next(), llava_next_inputs(300)
    with zipvl.sparse(model, visual_mask=lambda ids, embeds: None, **KEEPING) as stats, pytest.warns(UserWarning):
        model(**inputs)
    assert modes(stats) == {("dense", NO_VISUAL)}
    with zipvl.sparse(model, visual_mask=lambda ids, embeds: ids == IMAGE, **KEEPING) as stats:
        model(**inputs)
    assert modes(stats) == {("sparse", None)}


def test_a_prompt_that_generate_repeats() -> None:
    model, mask = make_llama(), torch.ones(1, 300, dtype=torch.bool)
    with zipvl.sparse(model, visual_mask=mask, **KEEPING) as stats:
        model.generate(**text_inputs(300), num_return_sequences=2, do_sample=True, max_new_tokens=3)
    assert stats.layers[0].tokens == [300, 300] and modes(stats) == {("sparse", None)}


@pytest.mark.parametrize("bad", [1, "all", torch.ones(300, dtype=torch.bool), torch.ones(1, 300)])
def test_masks_that_are_none(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"visual_mask must be a bool tensor \[B, N\] or a function, got"):
        zipvl.configure(make_llama(), PAPER, visual_mask=bad)


@pytest.mark.parametrize("bad", [torch.ones(3, 300, dtype=torch.bool), lambda ids, embeds: torch.ones(1, 300)])
def test_masks_of_another_prompt(bad: Any) -> None:
    model, batch = make_llama(), pad_left([text_inputs(300, 1), text_inputs(300, 2)])
    with zipvl.sparse(model, visual_mask=bad), pytest.raises(ValueError, match=r"must give a bool tensor \[2, 300\]"):
        model(**batch)


# Ways to run


def test_copies_see_visual_tokens_too() -> None:
    model, inputs = make_llava_next(), llava_next_inputs(300)
    zipvl.configure(model, zipvl.ZipVLConfig(**KEEPING))
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = model(**inputs).logits
    for twin in twins:
        assert torch.equal(twin(**inputs).logits, expected)
    zipvl.configure(model, None)
    assert not torch.equal(model(**inputs).logits, expected)
    assert not model._forward_pre_hooks and not model.model._forward_pre_hooks


def test_threads_do_not_mix_up_their_prompts() -> None:
    model = make_llava_next()
    prompts = [llava_next_inputs(300, seed) for seed in range(2)] + [text_inputs(465, 7), llava_next_inputs(300, 9)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipvl.sparse(model, **KEEPING):
            expected = [model(**prompt).logits for prompt in prompts]
            found: list[Any] = [None] * len(prompts)

            def work(i: int) -> None:
                with torch.no_grad():
                    for _ in range(4):
                        found[i] = model(**prompts[i]).logits

            threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("images", [True, False])
def test_compiled_it_is_decided_on_the_device(images: bool) -> None:
    """A text model that has an image token: one graph, whatever the prompt is."""
    model = build(tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT | {"num_hidden_layers": 2}))
    model.config.image_token_id = IMAGE
    inputs = text_inputs(300)
    if images:
        inputs["input_ids"][:, 20:180] = IMAGE
    with warnings.catch_warnings(), zipvl.sparse(model, **KEEPING) as stats:
        warnings.simplefilter("ignore")
        expected = model(**inputs).logits
        kept = [layer.kept for layer in stats.layers.values()]
        torch._dynamo.reset()
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
        assert modes(stats) == {("sparse", None)}
        assert [layer.kept for layer in stats.layers.values()] == kept and (kept[0] == [300]) == (not images)
    torch.testing.assert_close(found, expected, **TOLERANCE)
