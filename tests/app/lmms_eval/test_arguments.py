"""The arguments of ``--model_args``, and a task's generation arguments."""

from __future__ import annotations

import re
from typing import Any

import pytest

from zipvl import ZipVLConfig
from zipvl.lmms_eval import decoding as eval_decoding
from zipvl.lmms_eval.arguments import parse
from zipvl.lmms_eval.decoding import Until, cut, decoding


def test_defaults() -> None:
    arguments = parse({"pretrained": "some/model", "batch_size": "4", "max_batch_size": 64})
    assert arguments.zipvl == ZipVLConfig() and arguments.method == "zipvl" and arguments.batch_size == 4


def test_every_field_of_the_configuration_is_an_argument() -> None:
    given = {"tau": 1, "ratio": 0.5, "num_recent": 128, "num_random": 0, "seed": 3, "keep_recent": 2, "min_tokens": 5}
    given |= {"all_queries": True, "cache": "full", "dense_below": 0, "layers": "1-3", "max_ratio": 0.5}
    given |= {"local_window": 64, "num_sinks": 4, "dense_first_layers": 1, "keep_text": False, "text_prompts": "sparse"}
    arguments = parse({"pretrained": "some/model", **given})
    assert arguments.zipvl == ZipVLConfig(**given | {"layers": (1, 2, 3)})
    assert parse({"pretrained": "m", "layers": "0+4"}).zipvl.layers == (0, 4)
    assert parse({"pretrained": "m", "layers": 2}).zipvl.layers == (2,)
    assert parse({"pretrained": "m", "skip_mlp_layers": "1+3"}).zipvl.skip_mlp_layers == (1, 3)
    assert parse({"pretrained": "m", "high_bits": 8}).zipvl.high_bits == (8, 8)
    assert parse({"pretrained": "m", "low_bits": "4+2"}).zipvl.low_bits == (4, 2)
    with pytest.raises(ValueError, match=r"ZipVLConfig: low_bits must be 2, 4 or 8, .*, got '4\+x'"):
        parse({"pretrained": "m", "low_bits": "4+x"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tua": 0.9}, "zipvl: unknown model argument 'tua' for method=zipvl; did you mean 'tau'? known: all_queries"),
        ({"pretrained": None, "xyz": 1}, "zipvl: unknown model argument 'xyz' for method=zipvl; known: "),
        (
            {"method": "fastvlm"},
            "zipvl: method must be one of zipvl, dense, fastv, pyramiddrop, visionzip, aim, variant, got",
        ),
        ({"method": "dense", "tau": 0.9}, "zipvl: tau is an argument of method=zipvl, but method=dense was asked for"),
        ({"tau": 1.5}, "ZipVLConfig: tau must be in (0, 1], got 1.5"),
        ({"cache": "some"}, "ZipVLConfig: cache must be one of"),
        (
            {"skip_mlp_layers": "half"},
            "zipvl: skip_mlp_layers must be a range such as 0-5 or a list such as 0+2+4, got 'half'",
        ),
        ({"layers": "first"}, "zipvl: layers must be a range such as 0-5 or a list such as 0+2+4, got 'first'"),
        ({"batch_size": "auto"}, "zipvl: batch_size must be an integer of at least 1, got 'auto'"),
        ({"batch_size": 0}, "zipvl: batch_size must be an integer of at least 1, got 0"),
        ({"max_frames_num": 0.5}, "zipvl: max_frames_num must be an integer of at least 1, got 0.5"),
        ({"video": "gif"}, "zipvl: video must be one of auto, video, images, got 'gif'"),
        ({"dtype": "int8"}, "zipvl: dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        ({"trust_remote_code": "yes"}, "zipvl: trust_remote_code must be True or False, got 'yes'"),
        ({"stats": "/no/such/folder/x.json"}, "zipvl: stats must be a file in an existing directory, got"),
        (
            {"device": "cpu", "device_map": "auto"},
            "zipvl: device must be left out where device_map is given, got 'cpu'",
        ),
    ],
)
def test_a_wrong_argument_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse({"pretrained": "some/model"} | given)


def test_no_model() -> None:
    with pytest.raises(ValueError, match="the model argument 'pretrained' is missing"):
        parse({"tau": 0.9})


GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@pytest.mark.parametrize(
    ("options", "expected", "stops"),
    [
        (None, GREEDY | {"max_new_tokens": 1024}, ()),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, GREEDY, ()),
        ({"max_gen_toks": 16, "until": ["ASSISTANT:", ""]}, GREEDY, ("ASSISTANT:",)),
        ({"max_new_tokens": 16, "until": "\n\n", "image_aspect_ratio": "pad"}, GREEDY, ("\n\n",)),
        (
            {"max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9, "num_beams": 3, "repetition_penalty": 1.1},
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_beams": 3, "repetition_penalty": 1.1},
            (),
        ),
        ({"max_new_tokens": 16, "do_sample": True}, {"do_sample": True, "temperature": None}, ()),
    ],
)
def test_generation_arguments(options: Any, expected: dict[str, Any], stops: tuple[str, ...]) -> None:
    before = dict(options or {})
    arguments, found = decoding(options)
    assert found == stops and (options or {}) == before  # the task's own dictionary is left as it was
    assert {name: arguments[name] for name in expected} == expected
    assert arguments["max_new_tokens"] == (16 if options else 1024)


def test_an_unknown_generation_argument_is_left_out_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_decoding, "_told", set())
    with pytest.warns(UserWarning, match="generation argument 'visual_cot' is not known and left out"):
        arguments, _ = decoding({"visual_cot": True})
    assert "visual_cot" not in arguments
    decoding({"visual_cot": True})  # warnings are errors in none of the tests, but this one is not repeated
    assert eval_decoding._told == {"visual_cot"}


@pytest.mark.parametrize(("name", "value"), [("max_new_tokens", -1), ("temperature", -0.5)])
def test_generation_arguments_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"generation argument {name} must be .*, got {value}"):
        decoding({name: value})


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [(" 482 \n", (), "482"), ("482\n\nQ: x", ("\n\n",), "482"), ("ab", ("b", "a"), ""), ("ab", ("c",), "ab")],
)
def test_cut(text: str, stops: tuple[str, ...], expected: str) -> None:
    assert cut(text, stops) == expected


def test_until_sees_a_stop_text_that_spans_tokens_and_forgets_the_prompt() -> None:
    import torch

    class Letters:
        def decode(self, row: Any, skip_special_tokens: bool) -> str:
            return "".join(map(chr, row.tolist()))

    until = Until(Letters(), ("ab",))
    rows = [torch.tensor([[ord(c) for c in row] for row in rows]) for rows in (("abx", "xxx"), ("abxa", "xxxy"))]
    assert until(rows[0], None).tolist() == [False, False]  # "ab" stands in the prompt alone
    assert until(rows[1], None).tolist() == [False, False]
    assert until(torch.cat([rows[1], torch.tensor([[ord("b")], [ord("b")]])], 1), None).tolist() == [True, False]
