"""zipvl calibrate on tiny random models: what is measured, what is written, what is resumed, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image, ImageDraw
from typer.testing import Result

from zipvl import ZipVLConfig
from zipvl.app.calibrate import measure
from zipvl.app.calibrate.journal import Journal
from zipvl.app.calibrate.measure import Measurer, Reference, compare
from zipvl.app.calibrate.samples import digest, read
from zipvl.app.loading import load
from zipvl.errors import InputError

from . import tiny
from .test_errors import refused

Zipvl = Callable[..., Result]
SAFE, LOSSY = "tau 1, window 32, full", "tau 0.3, drop"
FIELDS = {"text_prompts": "dense", "dense_below": 256}
PAGES = 8


def draw_page(path: Path, text: str, size: tuple[int, int] = (100, 130)) -> None:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((20, 50), text, fill="black")
    image.save(path)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of one size with questions of several lengths."""
    folder = tmp_path_factory.mktemp("calibration-pages")
    for number in range(PAGES):
        draw_page(folder / f"{number}.png", f"KQ {100 + 7 * number}")
        (folder / f"{number}.json").write_text(json.dumps({"question": "K" * (1 + number % 3)}))
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of text."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tiny.text_config()).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def calibrate(zipvl: Zipvl, llava_next: Path, pages: Path, tmp_path: Path) -> Zipvl:
    """Calibrates with few tokens; what is found goes to ``tmp_path / "zipvl.json"``."""
    output = tmp_path / "zipvl.json"
    return lambda *args, model=llava_next, data=pages: zipvl(
        *("calibrate", "--model", model, "--data", data, "--output", output, "--max-new-tokens", 4, *args)
    )


def measurer(loaded: Any, samples: Any, folder: Path, batch: int = 1) -> Measurer:
    return Measurer(loaded, samples, FIELDS, folder, max_new_tokens=4, batch=batch, seconds=1e9)


# ---------------------------------------------------------------------------------------------------------------------
# What is found
# ---------------------------------------------------------------------------------------------------------------------


def test_a_setting_is_found_written_and_used(calibrate, zipvl, llava_next, page, tmp_path) -> None:
    done = calibrate("--max-loss", "50%", "--setting", SAFE, "--setting", LOSSY)
    assert done.exit_code == 0, done.output
    assert f"{SAFE}, text kept loses at most" in " ".join(done.stdout.split())
    written = json.loads((tmp_path / "zipvl.json").read_text())
    about, config = written["calibration"], ZipVLConfig.load(tmp_path / "zipvl.json")
    assert (about["setting"], about["loss"]) == (f"{SAFE}, text kept", "share of answers that are lost")
    assert about["reported"]["lost"] == 0 and about["reported"]["upper"] <= about["bound"] == 0.5
    assert about["samples"] | {"shortest": 0} == {"all": PAGES, "tune": 2, "report": 6, "seed": 0, "shortest": 0}
    assert about["data"]["sha256"] == digest(read(Path(about["data"]["path"])))
    assert about["device"]["type"] == "cpu" and about["versions"]["transformers"] == tf.__version__ and about["date"]
    dropped = {row["setting"]: row["dropped"] for row in about["candidates"]}
    assert dropped[f"{SAFE}, text kept"] is None and dropped[f"{LOSSY}, text kept"] is not None
    assert all(about["reported"]["costs"][what]["here"] > 0 for what in ("first_s", "total_s", "cache_bytes"))
    assert config == ZipVLConfig.paper(
        tau=1,
        local_window=32,
        num_sinks=4,
        cache="full",
        keep_text=True,
        text_prompts="dense",
        dense_below=config.dense_below,
    )
    assert 256 < config.dense_below == about["samples"]["shortest"]
    with Image.open(tmp_path / "zipvl.png") as plot:
        assert plot.width > 400

    asked = ("--image", page, "--question", "K", "--model", llava_next, "--config", tmp_path / "zipvl.json")
    ran = zipvl("run", *asked, "--json", "--max-new-tokens", 2, "--seed", 5)
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["config"] == json.loads(json.dumps(vars(config) | {"seed": 5}))
    inspected = zipvl("inspect", *asked, "--output", tmp_path / "page.html", "--max-new-tokens", 2)
    assert inspected.exit_code == 0 and "100%" in inspected.stdout, inspected.output


def test_where_nothing_holds_nothing_is_written(calibrate, tmp_path) -> None:
    done = calibrate("--max-loss", "50%", "--setting", LOSSY)
    assert done.exit_code == 1 and "No setting was shown to lose at most 50%" in done.stdout
    assert not (tmp_path / "zipvl.json").exists() and (tmp_path / "zipvl.png").exists()


def test_few_samples_say_what_they_can_show(calibrate) -> None:
    done = calibrate("--setting", SAFE, "--json")
    facts = json.loads(done.stdout)
    assert done.exit_code == 0 and facts["max_loss"] == 0.01 and facts["needed_samples"] == 299
    assert 0.3 < facts["bound"] < 0.4
    shown = calibrate("--setting", SAFE)
    assert "7 samples to report on show a loss of 34.82% at best; 1% needs 299" in " ".join(shown.stdout.split())


def test_prompts_of_text_are_held_to_their_next_tokens(calibrate, llama, tmp_path) -> None:
    data = tmp_path / "prompts.jsonl"
    prompts = [f"Prompt {number}: " + f"{number} and {number + 1} are numbers; " * 12 for number in range(6)]
    data.write_text("\n\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    done = calibrate("--max-loss", "60%", "--setting", SAFE, "--setting", LOSSY, "--json", model=llama, data=data)
    assert done.exit_code == 0, done.output
    facts, config = json.loads(done.stdout), ZipVLConfig.load(tmp_path / "zipvl.json")
    assert facts["loss"] == "share of next tokens that differ" and facts["setting"] == SAFE
    assert config.text_prompts == "sparse" and not config.keep_text and facts["dense_right"] is None
    lossy = next(row for row in facts["candidates"] if row["setting"] == LOSSY)
    assert lossy["loss"] == pytest.approx(1 - lossy["same"]) and lossy["kl"] > 0.01


def test_for_vllm_nothing_is_written_that_it_cannot_follow(calibrate, tmp_path) -> None:
    from zipvl.vllm.options import Options

    done = calibrate("--max-loss", "50%", "--setting", SAFE, "--engine", "vllm")
    assert done.exit_code == 0, done.output
    options = Options.read({"config": str(tmp_path / "zipvl.json"), "seed": 3})
    assert options.config == ZipVLConfig.load(tmp_path / "zipvl.json", seed=3, low_bits=options.config.low_bits)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def test_a_batch_is_its_samples_alone(llava_next, pages, tmp_path) -> None:
    loaded, samples, places = load(str(llava_next), device="cpu"), read(pages), range(4)
    for name in ("dense", LOSSY):
        alone = measurer(loaded, samples, tmp_path / "1").losses(name, places)
        together = measurer(loaded, samples, tmp_path / "4", batch=4).losses(name, places)
        for one, other in zip(alone, together, strict=True):
            assert one["exact"] == other["exact"] and one["same"] == other["same"]
            assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-5)


def test_an_answer_that_dense_attention_does_not_give_is_not_lost(llava_next, pages, tmp_path) -> None:
    loaded, plain = load(str(llava_next), device="cpu"), read(pages)[:3]
    found = measurer(loaded, plain, tmp_path / "plain")
    lines = found.losses(LOSSY, range(3))
    assert [line["loss"] for line in lines] == [float(not line["exact"]) for line in lines] and not lines[0]["exact"]
    said = loaded.processor.decode(Reference.load(found._path(0)).tokens, skip_special_tokens=True).strip()
    from dataclasses import replace

    answers = [("other words",), (), (said.upper(), "more")]
    known = [replace(plain[0], answers=answer, digest=str(i)) for i, answer in enumerate(answers)]
    assert [line["loss"] for line in measurer(loaded, known, tmp_path / "known").losses(LOSSY, range(3))] == [
        0.0,
        1.0,
        1.0,
    ]


def test_a_comparison_is_of_probabilities(llava_next) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 400, generator=draw) * 3
    reference = Reference.of(logits.argmax(-1), logits)
    same, kl, exact = compare(reference, logits)
    assert (same, exact) == (1.0, True) and kl == pytest.approx(0, abs=1e-6)
    other = logits + 0.5 * torch.randn(5, 400, generator=draw)
    other[2] = -other[2]
    same, kl, exact = compare(reference, other)
    whole = (
        (logits.double().log_softmax(-1).exp() * (logits.double().log_softmax(-1) - other.double().log_softmax(-1)))
        .sum(-1)
        .mean()
    )
    assert not exact and same <= 0.8 and kl == pytest.approx(float(whole), rel=0.02) and kl <= float(whole) + 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


def test_an_interruption_loses_nothing(calibrate, tmp_path, monkeypatch) -> None:
    whole, calls = Measurer._along, []

    def interrupted(self: Measurer, name: str, places: list[int]) -> Any:
        calls.append((name, places))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(self, name, places)

    monkeypatch.setattr(Measurer, "_along", interrupted)
    options = ("--max-loss", "50%", "--setting", SAFE)
    stopped = calibrate(*options)
    work = tmp_path / "zipvl-calibration"
    assert stopped.exit_code == 130 and f"goes on from {work}" in " ".join(stopped.stderr.split())
    lines = (work / "samples.jsonl").read_text().splitlines()
    with (work / "samples.jsonl").open("a") as file:
        file.write(lines[0][:40])  # a line cut short
    assert calibrate(*options).exit_code == 0
    measured = calls[:3] + calls[4:]
    assert len({str(call) for call in measured}) == len(measured) == PAGES
    before = len((work / "samples.jsonl").read_text().splitlines())
    monkeypatch.setattr(measure, "prepare", lambda *_: pytest.fail("nothing is to be measured"))
    assert calibrate(*options).exit_code == 0
    assert len((work / "samples.jsonl").read_text().splitlines()) == before


def test_what_was_measured_earlier_takes_no_time(llava_next, pages, tmp_path) -> None:
    loaded, samples = load(str(llava_next), device="cpu"), read(pages)
    before = measurer(loaded, samples, tmp_path)
    taken = sum(line["seconds"] for line in before.losses("dense", range(4)))
    after = Measurer(loaded, samples, FIELDS, tmp_path, max_new_tokens=4, batch=1, seconds=100)
    assert after.seconds_left() == pytest.approx(100 + taken, abs=10)
    after.losses("dense", range(4))
    assert after.seconds_left() <= 100


def test_a_journal_holds_what_its_origin_measured(calibrate, tmp_path) -> None:
    work = tmp_path / "zipvl-calibration"
    assert calibrate("--max-loss", "50%", "--setting", SAFE).exit_code == 0
    assert Journal(work / "samples.jsonl", {"code": "other"}).every() == []
    line = json.loads((work / "samples.jsonl").read_text().splitlines()[0])
    assert len(Journal(work / "samples.jsonl", line["origin"]).every()) > PAGES


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--max-loss", "0"], ["--max-loss: expected a share above 0% and below 100%", "got '0'"]),
        (["--max-loss", "150%"], ["--max-loss:", "got '150%'"]),
        (["--max-loss", "nan"], ["--max-loss:", "got 'nan'"]),
        (["--max-loss", "little"], ["--max-loss:", "got 'little'"]),
        (["--confidence", "100%"], ["--confidence: expected a share"]),
        (["--goal", "speed"], ["--goal: expected ttft, memory, answer, got 'speed'"]),
        (["--engine", "ollama"], ["--engine: expected transformers or vllm, got 'ollama'"]),
        (["--minutes", "0"], ["--minutes: must be above 0, got 0"]),
        (["--minutes", "nan"], ["--minutes: must be above 0, got nan"]),
        (["--batch-size", "0"], ["--batch-size: must be at least 1, got 0"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens: must be at least 1, got 0"]),
        (["--setting", "tau 3"], ["--setting: 'tau 3' in 'tau 3, text kept' is none of"]),
        (["--setting", "dense"], ["--setting: expected a sparse setting, got 'dense"]),
        (["--setting", "full, stored 0.5"], ["--setting: cache_ratio must be None"]),
        (["--setting", "quantize", "--engine", "vllm"], ["--setting: expected one that vLLM can follow"]),
        (["--plot", "plot.txt"], ["--plot: expected a file name ending in .png, .svg, .pdf, got plot.txt"]),
        (["--plot", "nowhere/plot.png"], ["--plot: expected a file in an existing directory"]),
        (["--question", " "], ["--question: expected a question"]),
        (["--device", "abacus"], ["--device: expected"]),
    ],
)
def test_options(calibrate, options, parts) -> None:
    refused(calibrate(*options), *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"image": "0.png"}\n{"picture": "1.png"}', ['expected "image" or "prompt" in line 2 of', "got 'picture'"]),
        ('{"image": "0.png"}\n{"image": 3}', ['expected "image" to be a path in line 2 of', "got 3"]),
        ('{"image": "0.png"}\n\n{"image": "none.png"}', ["line 3 of", "none.png does not exist"]),
        ('{"image": "0.png"}\n{"image": "notes.png"}', ["line 2 of", "expected a readable picture, but"]),
        (
            '{"image": "0.png"}\n{"image": "1.png", "question": 3}',
            ['expected "question" to be a text in line 2', "got 3"],
        ),
        (
            '{"image": "0.png"}\n{"image": "1.png", "answer": [3]}',
            ['expected "answer" to be a text or a list', "got [3]"],
        ),
        ('{"image": "0.png"}\n[1]', ["expected a JSON object in line 2 of", "got list"]),
        ('{"image": "0.png"}\n{', ["expected a JSON object in line 2 of", "got none: "]),
        ('{"image": "0.png"}\n{"image": "0.png"}', ["at least 2 different samples, got 1"]),
        ('{"prompt": " "}', ['expected "image" or "prompt" in line 1']),
        ("", ["expected a JSONL file of samples with at least 2 different samples, got 0"]),
        (b'{"prompt": "caf\xe9"}', ["expected UTF-8, but", "has another byte at 15"]),
    ],
)
def test_data(calibrate, tmp_path, content, parts) -> None:
    draw_page(tmp_path / "0.png", "a")
    draw_page(tmp_path / "1.png", "b")
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "data.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(calibrate(data=tmp_path / "data.jsonl"), "--data: ", *parts)


def test_folders(zipvl, calibrate, llava_next, tmp_path) -> None:
    refused(
        calibrate(data=tmp_path / "none"), "--data: expected a folder of pictures or a JSONL file, but", "not exist"
    )
    refused(calibrate(data=tmp_path), "--data: expected a folder of pictures with at least 2 different samples, got 0")
    refused(zipvl("calibrate", "--model", llava_next), "--data: expected a folder or a JSONL file: the shipped pages")


def test_models_and_prompts_that_stay_dense(calibrate, llama, tmp_path) -> None:
    data = tmp_path / "short.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"Prompt {number}"}) for number in range(3)))
    refused(
        calibrate(model=llama, data=data), "--data: ZipVL was dense throughout under", "shorter than dense_below=256"
    )
    refused(calibrate(model=llama), "--model: expected an image-text-to-text model, but", "'llama'")
    folder = tmp_path / "mistral"
    config = tiny.text_config().to_dict()
    sliding = tf.MistralConfig(
        **{k: v for k, v in config.items() if k not in ("model_type", "architectures")}, sliding_window=16
    )
    tf.MistralForCausalLM(sliding).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    data.write_text("\n".join(json.dumps({"prompt": f"{number}" * 400}) for number in range(3)))
    refused(calibrate(model=folder, data=data), "--model: ", "sliding-window attention")


def test_configurations(zipvl, page, llava_next, tmp_path) -> None:
    asked = ("run", "--image", page, "--question", "K", "--model", llava_next, "--config")
    refused(zipvl(*asked, tmp_path / "none.json"), "--config: path must be a file, got")
    (tmp_path / "bad.json").write_text('{"config": {"tau": 2}}')
    refused(zipvl(*asked, tmp_path / "bad.json"), "--config: tau must be in (0, 1], got 2")
    (tmp_path / "bad.json").write_text('{"config": {"tua": 0.5}}')
    refused(zipvl(*asked, tmp_path / "bad.json"), "--config: path must name fields of ZipVLConfig, got tua")


def test_reading_is_the_librarys_too(tmp_path) -> None:
    with pytest.raises(InputError, match="--data: expected a folder of pictures or a JSONL file"):
        read(tmp_path / "none")


def test_a_model_that_cannot_be_sparse(zipvl: Zipvl, tmp_path: Path) -> None:
    model = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=128, state_size=4))
    model.save_pretrained(tmp_path / "mamba")
    tiny.tokenizer().save_pretrained(tmp_path / "mamba")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "K"}\n{"prompt": "Q"}\n')
    options = ["--model", tmp_path / "mamba", "--data", tmp_path / "prompts.jsonl", "--device", "cpu"]
    refused(zipvl("calibrate", *options), "--model: MambaForCausalLM has no attention layers")
