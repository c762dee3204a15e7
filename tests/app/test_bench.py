"""``zipvl bench``: rows that are measured, rows that are not and say why, and what the command does with both."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from zipvl import ZipVLConfig
from zipvl.app import bench
from zipvl.app.bench import Bench, Plan, Row
from zipvl.app.shapes import QWEN2_5_VL_3B, QWEN2_5_VL_7B
from zipvl.app.timing import Budget, Times, measure

from .test_errors import refused

Zipvl = Callable[..., Result]
CPU = torch.device("cpu")
PLAN = Plan(lengths=(256, 512), text=700, new=3)
CONFIG = ZipVLConfig(ratio=0.25, text_prompts="sparse")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that take a fraction of a second, two rounds."""
    monkeypatch.setattr(bench, "ON_CPU", PLAN)
    monkeypatch.setattr(bench, "LAYER_REPEATS", 2)
    monkeypatch.setattr(bench, "LAYER_SPAN_S", 0.0)
    monkeypatch.setattr(bench, "MODEL_REPEATS", 2)


def made(budget_s: float = 600.0, **given: Any) -> Bench:
    run = Bench(bench.random_subject(CPU), CONFIG, CPU, Budget(budget_s), lambda what: None, **given)
    run.run()
    return run


def timed(sides: dict[str, Callable[[], Any]], budget_s: float = 600.0, **given: Any) -> dict[str, Times]:
    times = {name: Times() for name in sides}
    measure(sides, times, Budget(budget_s), CPU, **{"repeats": 3, **given})
    return times


def test_a_warm_up_and_rounds_in_turn() -> None:
    calls: list[str] = []
    times = timed({name: lambda name=name: calls.append(name) for name in ("a", "b")})
    assert "".join(calls) == "ab" * 4
    assert [times[name].how for name in "ab"] == ["median of 3"] * 2
    assert times["a"].seconds == statistics.median(times["a"].runs)


def test_short_runs_are_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr("zipvl.app.timing.seconds", lambda run, device: (run(), 0.25)[1])
    times = timed({"a": lambda: calls.append(0)}, repeats=2, span=1.0)
    assert len(calls) == 2 + 2 * 4, "a warm-up, an estimate, and two runs of a second"
    assert times["a"].runs == [0.25 / 4] * 2


def test_the_budget_ends_rounds_and_warm_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("zipvl.app.timing.time.monotonic", lambda: now[0])
    monkeypatch.setattr("zipvl.app.timing.time.perf_counter", lambda: now[0])

    def second() -> None:
        now[0] += 1.0

    assert timed({"a": second, "b": second}, budget_s=100)["b"].how == "median of 3"
    assert timed({"a": second, "b": second}, budget_s=100, patience=3)["b"].how == "median of 2"
    times = timed({"a": second, "b": second}, budget_s=5)
    assert (times["a"].how, times["b"].how, times["b"].seconds) == ("once", "once", 1.0)
    times = timed({"a": second, "b": second}, budget_s=3)
    assert times["a"].how == "once, cold" and times["a"].seconds == 1.0
    times = timed({"a": second, "b": second}, budget_s=1)
    assert times["a"].how == "once, cold" and times["b"].how == "not run: time" and times["b"].seconds is None


def test_a_side_out_of_memory_leaves_the_other() -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("no room")

    row = Row("answer", "a page", *timed({"dense": full, "zipvl": lambda: None}).values())
    assert row.dense.how == "not run: out of memory" and row.zipvl.how == "median of 3"
    assert row.measured and row.speedup is None


def test_no_factor_from_cold_runs() -> None:
    assert Row("layer", "", Times(cold=2.0), Times(cold=1.0)).speedup is None
    assert Row("layer", "", Times(2.0, [1.0]), Times(1.0, [0.5])).speedup == 2.0


@pytest.mark.parametrize(
    ("dense", "cudnn", "by", "note"),
    [
        (Times(1.0, [0.5]), Times(1.0, [0.25]), "cuDNN", "FlashAttention, PyTorch's choice, takes 500.000 ms"),
        (Times(1.0, [0.25]), Times(1.0, [0.5]), "FlashAttention", "cuDNN takes 500.000 ms"),
        (Times(failed="out of memory"), Times(1.0, [0.5]), "cuDNN", "FlashAttention, PyTorch's choice: not run: out"),
        (Times(1.0), Times(0.5), "FlashAttention", ""),
    ],
)
def test_the_faster_dense_attention_counts(dense: Times, cudnn: Times, by: str, note: str) -> None:
    rows = Row("layer", "", dense), Row("layer", "", dense)
    bench._choose_dense(rows, {"dense": dense, "cudnn": cudnn}, "FlashAttention")
    for row in rows:
        assert row.dense_by == by and row.dense is (cudnn if by == "cuDNN" else dense)
        assert "".join(row.notes).startswith(note) and len(row.notes) == bool(note)


def test_every_row() -> None:
    run = made()
    assert [row.not_run for row in run.rows] == [None] * 7
    names = [f"{row.part}: {row.name}" for row in run.rows]
    assert names == [
        "layer: 256 tokens, no window",
        "layer: 256 tokens, window of 512",
        "layer: 512 tokens, no window",
        "layer: 512 tokens, window of 512",
        "first token: a page, 278 tokens",
        "first token: text, 700 tokens",
        "answer: a page + 3 new tokens",
    ]
    for row in run.rows:
        assert row.dense.how == row.zipvl.how == "median of 2"
        assert row.speedup == pytest.approx(statistics.median(row.dense.runs) / statistics.median(row.zipvl.runs))
    assert {row.dense_by for row in run.rows[:4]} == {"FlashAttention"} and run.rows[0].dense is run.rows[1].dense
    # A quarter, the window's last 512 tokens and the sinks: all of 278, and some three quarters of 700.
    share = run.rows[5].notes[0].removeprefix("kept ").removesuffix("%")
    assert run.rows[4].notes == ["kept 100%"] and 73 <= int(share) <= 99
    assert run.rows[6].notes == ["kept 100%", "decoded step by step (not on a GPU)"]


def test_rows_that_take_too_long() -> None:
    run = made(budget_s=1e-6)
    assert {row.not_run for row in run.rows} == {"time: 0 s of 1e-06 left"}
    run = Bench(bench.random_subject(CPU), CONFIG, CPU, Budget(600), lambda what: None, plan=Plan((256, 2**27)))
    run._run_models = lambda: None  # the layers alone
    run.run()
    assert run.rows[1].measured and (run.rows[2].not_run or "").startswith("time: about ")


def test_rows_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "why_not", lambda *given: "head dim 33")
    assert {row.not_run for row in made().rows} == {"op not native here: head dim 33"}


@pytest.mark.parametrize(
    ("free_gib", "name", "needs"), [(80, "Qwen2.5-VL-7B", 24), (20, "Qwen2.5-VL-3B", 13), (4, "Qwen2.5-VL-3B", 13)]
)
def test_the_shape_fits_the_free_memory(free_gib: int, name: str, needs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_free_bytes", lambda device: free_gib * bench.GIB)
    gpu = torch.device("cuda")
    subject = bench.random_subject(gpu)
    assert subject.title == f"{name}'s shape, random weights"
    assert subject.choice == f"chosen by {free_gib} GiB of free memory"
    assert (subject.weights + subject.working_bytes(32768)) / bench.GIB == pytest.approx(needs, abs=1)
    run = Bench(subject, CONFIG, gpu, Budget(600), lambda what: None)
    reason = run._no_memory(subject.weights + subject.working_bytes(32768))
    assert reason is None if free_gib > needs else (reason or "").startswith("memory: about ")


def test_shapes_are_the_published_ones() -> None:
    """16.58 and 7.51 GB are the sizes of their checkpoints in bfloat16."""
    assert QWEN2_5_VL_7B.weight_bytes() == 2 * 8_292_166_656
    assert QWEN2_5_VL_3B.weight_bytes() == 2 * 3_754_622_976


def test_the_command_on_a_cpu(zipvl: Zipvl, tmp_path: Path) -> None:
    result = zipvl("bench", "--device", "cpu", "--ratio", "0.5", "--json", tmp_path / "bench.json")
    assert result.exit_code == 0 and result.stderr == "", result.output
    shown = " ".join(result.stdout.split())
    for part in ("tiny", "one layer", "first token", "answer", "window of 512", "imposed (--ratio 0.5", "x │",
                 "nothing about a GPU", "of --budget-s 120"):  # fmt: skip
        assert part in shown, part
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert facts["device"] == "cpu" and facts["random_weights"] and facts["config"]["ratio"] == 0.5
    assert facts["heads"] == {"query": 4, "key_value": 2, "dim": 32} and facts["dtype"] == "float32"
    assert [row["part"] for row in facts["rows"]] == ["layer"] * 4 + ["first token"] * 2 + ["answer"]
    for row in facts["rows"]:
        assert row["dense"]["seconds"] == pytest.approx(statistics.median(row["dense"]["runs"])) and not row["not_run"]


def test_without_a_gpu(zipvl: Zipvl, page: Path, llava_next: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipvl.app.loading.gpu_problem", lambda: "there is none")
    monkeypatch.setenv("COLUMNS", "200")
    result = zipvl("bench")
    assert result.exit_code == 1 and result.stderr == ""
    assert result.stdout.count("not run: no GPU") == 9 and "No GPU: there is none. --device cpu" in result.stdout
    assert "131,072 tokens" in result.stdout and "nothing about a GPU" not in result.stdout
    refused(zipvl("bench", "--model", llava_next, "--image", page), "--device: there is none; --device cpu times")


def test_ctrl_c_keeps_what_was_measured(zipvl: Zipvl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    generate = bench.generate

    def interrupt(*given: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:  # both warm-ups of the first row and a run of one side are done
            raise KeyboardInterrupt
        return generate(*given, **more)

    monkeypatch.setattr(bench, "generate", interrupt)
    result = zipvl("bench", "--device", "cpu", "--json", tmp_path / "bench.json")
    assert result.exit_code == 130 and "Interrupted" in result.stdout
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert facts["interrupted"]
    *layers, page, text, answer = facts["rows"]
    assert all(row["speedup"] > 0 for row in layers)
    assert (page["dense"]["how"], page["zipvl"]["how"], page["speedup"]) == ("once", "once, cold", None)
    assert text["not_run"] == answer["not_run"] == "interrupted"


def test_a_model_of_ones_own(
    zipvl: Zipvl, page: Path, llava_next: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["bench", "--device", "cpu", "--model", llava_next, "--image", page, "--json", tmp_path / "bench.json"]
    result = zipvl(*given)
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert facts["model"] == str(llava_next) and not facts["random_weights"]
    assert facts["heads"] == {"query": 4, "key_value": 2, "dim": 16}
    assert [row["not_run"] for row in facts["rows"]] == [None] * 7
    assert "zipvl run shows what share tau keeps" in " ".join(result.stdout.split())
    monkeypatch.setattr(bench, "ON_CPU", Plan(lengths=(), text=4097, new=3))
    zipvl(*given)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["not_run"] for row in rows] == [None, "the model takes 4,096 tokens at most", None]


def test_a_refusal_of_the_model_comes_first(
    zipvl: Zipvl, page: Path, llava_next: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("zipvl.sparse: this one is an encoder-decoder")

    monkeypatch.setattr("zipvl.sparse", refuse)
    result = zipvl("bench", "--device", "cpu", "--model", llava_next, "--image", page)
    refused(result, "--model: ZipVL cannot run this model: zipvl.sparse: this one is an encoder-decoder")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--ratio", "0"], "--ratio: must be in (0, 1], got 0.0"),
        (["--ratio", "1.5"], "--ratio: must be in (0, 1], got 1.5"),
        (["--budget-s", "0"], "--budget-s: expected a number of seconds above 0, got 0"),
        (["--budget-s", "nan"], "--budget-s: expected a number of seconds above 0, got nan"),
        (["--budget-s", "soon"], "'--budget-s'"),
        (["--device", "abacus"], "--device: expected auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "cuda:99"], "--device: 'cuda:99' asked for, but"),
        (["--image", "page.png"], "--image: expected --model beside it"),
        (["--model", "some/model"], "--model: expected --image beside it"),
        (["--model", "some/model", "--image", "none.png"], "--image: expected a picture file"),
        (["--json", "/"], "--json: expected a file name, but / is a directory"),
        (["--json", "none/bench.json"], "--json: expected a file in an existing directory"),
    ],
    ids=lambda value: "=".join(value[-2:]) if isinstance(value, list) else "",
)
def test_mistakes(zipvl: Zipvl, options: list[str], part: str) -> None:
    refused(zipvl("bench", *options), part)
