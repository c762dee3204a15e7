"""The lmms-eval model, request by request: held against ``generate`` of the same model."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from lmms_eval.api.instance import Instance
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history
from PIL import Image

import zipvl
from zipvl import baselines
from zipvl.app.cache_bytes import cache_bytes
from zipvl.lmms_eval import manifest, plugin

from .conftest import HAS_LMMS_EVAL

TASK, SPLIT = "pages", "test"
NEW = {"max_new_tokens": 5, "temperature": 0}
Docs = list[dict[str, Any]]


@pytest.fixture(scope="module")
def docs(pages: list[Image.Image]) -> Docs:
    return [{"page": page, "question": f"K{number}"} for number, page in enumerate(pages)]


PAPER = "keep_text=False,local_window=0,num_sinks=0,text_prompts=sparse,cache=drop"  # ZipVLConfig.paper()


def make(folder: Path, docs: Docs, arguments: str = "", simple: bool = False, **extra: Any) -> Any:
    """The model as lmms-eval makes it."""
    cls = plugin.ZipVLSimple if simple else plugin.ZipVL
    where = "" if "device_map" in arguments else ",device=cpu"
    text = f"pretrained={folder},dtype=float32{where}" + (f",{arguments}" if arguments else "")
    model = cls.create_from_arg_string(text, {"batch_size": 1, "max_batch_size": None, "device": None} | extra)
    model.task_dict[TASK] = {SPLIT: docs}
    return model


def to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": doc["page"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def request(kind: str, *arguments: Any, task: str = TASK) -> Any:
    return Instance(kind, arguments, 0, {"task": task, "doc_id": 0, "repeats": 1})


def ask(number: int, options: dict[str, Any] = NEW, messages: Any = to_messages) -> Any:
    return request("generate_until", "", messages, options, number, TASK, SPLIT)


def plain(model: Any, doc: dict[str, Any], method: Any = None, **options: Any) -> tuple[str, Any]:
    """The answer of transformers alone, and its output."""
    content = [{"type": "image", "image": doc["page"]}, {"type": "text", "text": doc["question"]}]
    inputs = model.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with method or nullcontext():
        arguments = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True} | options
        output = model.model.generate(**inputs, **arguments)
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    return model.processor.decode(new, skip_special_tokens=True), output


def test_manifest_names_classes_of_the_right_kind() -> None:
    made = manifest()
    assert made.model_id == "zipvl"
    assert made.chat_class_path == "zipvl.lmms_eval.plugin.ZipVL" and not plugin.ZipVL.is_simple
    assert made.simple_class_path == "zipvl.lmms_eval.plugin.ZipVLSimple" and plugin.ZipVLSimple.is_simple


@pytest.mark.skipif(not HAS_LMMS_EVAL, reason="lmms-eval is not installed: its registry cannot be asked")
def test_lmms_evals_registry_takes_the_manifest() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("zipvl") is plugin.ZipVL
    assert registry.get_model_class("zipvl", force_simple=True) is plugin.ZipVLSimple


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("method", ["dense", "zipvl"])
def test_answers_are_those_of_generate(llava_next: Path, docs: Docs, method: str, batch_size: int) -> None:
    keeps = "ratio=0.4,cache=drop" if method == "zipvl" else ""
    model = make(llava_next, docs, f"method={method},{keeps}".rstrip(","), batch_size=batch_size)
    order = [2, 0, 3, 1]
    answers = model.generate_until([ask(number) for number in order])
    lengths = set()
    for number, answer in zip(order, answers, strict=True):
        sparse = zipvl.sparse(model.model, ratio=0.4) if method == "zipvl" else None
        text, output = plain(model, docs[number], sparse)
        assert answer.text == text.strip()
        assert answer.token_counts.input_tokens == output.sequences.shape[1] - 5
        assert answer.token_counts.output_tokens == 5
        lengths.add(answer.token_counts.input_tokens)
    assert len(lengths) > 1 and len({answer.text for answer in answers}) > 1  # rows of a batch were padded


def test_a_simple_task_gets_the_same_answers(llava_next: Path, docs: Docs) -> None:
    chat, simple = make(llava_next, docs, "ratio=0.4"), make(llava_next, docs, "ratio=0.4", simple=True)
    for number, doc in enumerate(docs[:2]):
        for text in (doc["question"], f"<image>{doc['question']}"):
            arguments = (text, NEW, lambda doc: [doc["page"]], number, TASK, SPLIT)
            (answer,) = simple.generate_until([request("generate_until", *arguments)])
            assert answer.text == chat.generate_until([ask(number)])[0].text


def test_requests_of_other_settings_do_not_share_a_batch(llava_next: Path, docs: Docs) -> None:
    model = make(llava_next, docs, "method=dense", batch_size=4)
    counts = [
        answer.token_counts.output_tokens
        for answer in model.generate_until([ask(0), ask(1, NEW | {"max_new_tokens": 2}), ask(2), ask(3)])
    ]
    assert counts == [5, 2, 5, 5]


def test_a_batch_may_mix_prompts_with_and_without_images(llava_next: Path, docs: Docs) -> None:
    def text_alone(doc: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "KQ"}]

    model = make(llava_next, docs, "method=dense", batch_size=3)
    answers = model.generate_until([ask(0), ask(1, messages=text_alone), ask(2)])
    assert [answer.token_counts.input_tokens for answer in answers][1] == 2
    assert answers[0].text == plain(model, docs[0])[0].strip() and answers[2].text == plain(model, docs[2])[0].strip()


def test_until_cuts_the_answer_and_ends_it(llava_next: Path, docs: Docs) -> None:
    model = make(llava_next, docs, "method=dense")
    whole, _ = plain(model, docs[0], max_new_tokens=12)
    stop = whole[4:6]
    (answer,) = model.generate_until([ask(0, {"max_new_tokens": 12, "until": [stop, "never said"]})])
    assert answer.text == whole[: whole.index(stop)].strip()
    assert answer.token_counts.output_tokens == whole.index(stop) + len(stop)  # one token a character


def test_sampling_is_asked_for_by_a_temperature(llava_next: Path, docs: Docs) -> None:
    model = make(llava_next, docs, "method=dense")
    greedy = model.generate_until([ask(0)])[0].text
    torch.manual_seed(0)
    said = {model.generate_until([ask(0, {"max_new_tokens": 5, "temperature": 5.0})])[0].text for _ in range(4)}
    assert len(said) > 1
    assert (
        model.generate_until([ask(0, {"max_new_tokens": 5, "temperature": 5.0, "do_sample": False})])[0].text == greedy
    )


def test_beams(llava_next: Path, docs: Docs) -> None:
    model = make(llava_next, docs, "ratio=0.4")
    (answer,) = model.generate_until([ask(0, NEW | {"num_beams": 2})])
    assert answer.text == plain(model, docs[0], zipvl.sparse(model.model, ratio=0.4), num_beams=2)[0].strip()


def test_the_meter_counts_what_the_method_kept(
    llava_next: Path, docs: Docs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(llava_next, docs, f"{PAPER},ratio=0.4,stats={tmp_path / 'stats.json'}")
    model.generate_until([ask(number) for number in range(3)])
    ratios, held, full = [], [], []
    for doc in docs[:3]:
        sparse = zipvl.sparse(model.model, zipvl.ZipVLConfig.paper(ratio=0.4))
        with sparse as stats:
            _, output = plain(model, doc)
        ratios.append(stats.mean_ratio)
        held.append(cache_bytes(output.past_key_values))
        full.append(stats.full_cache_bytes)
    model.clean()
    assert not hasattr(model, "model")  # lmms-eval's own clean ran
    written = json.loads((tmp_path / "stats.json").read_text())
    task = written["tasks"][TASK]
    assert written["method"] == "zipvl" and written["settings"]["zipvl"]["ratio"] == 0.4
    assert task["questions"] == task["sparse_questions"] == 3
    assert task["mean_ratio"] == pytest.approx(sum(ratios) / 3) and 0.4 <= task["mean_ratio"] < 0.42
    assert task["mean_cache_bytes"] == sum(held) / 3 < task["mean_full_cache_bytes"] == sum(full) / 3
    logged = get_logged_metrics_history()[-1]
    assert logged[f"zipvl_{TASK}_mean_ratio"] == task["mean_ratio"]
    assert logged[f"zipvl_{TASK}_mean_cache_bytes"] == task["mean_cache_bytes"]
    assert f"zipvl: {TASK}: 40.1% of 2" in capsys.readouterr().out


def test_a_dense_run_is_not_passed_off_as_sparse(
    llava_next: Path, docs: Docs, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(llava_next, docs, "dense_below=5000")
    model.generate_until([ask(0)])
    facts = model.meter.facts()["all"]
    assert facts["mean_ratio"] == 1 and facts["sparse_questions"] == 0
    assert facts["mean_cache_bytes"] == pytest.approx(facts["mean_full_cache_bytes"], rel=1e-3)  # bookkeeping
    assert facts["dense_because"] == {"layers 0-2: prompt shorter than dense_below=5000": 1}
    model.clean()
    assert "0 of 1 questions sparse" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["dense", "zipvl"])
def test_loglikelihood_is_that_of_teacher_forcing(llava_next: Path, docs: Docs, method: str) -> None:
    """lmms-eval takes the mean loss and whether the continuation is the greedy one."""
    model = make(llava_next, docs, f"method={method}" + (",tau=1" if method == "zipvl" else ""), simple=True)
    greedy, output = plain(model, docs[0])
    prompt = output.sequences[:, :-5]
    content = [{"type": "image", "image": docs[0]["page"]}, {"type": "text", "text": docs[0]["question"]}]
    inputs = model.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    for continuation in (greedy, "A 7"):
        tokens = torch.tensor([model.tokenizer(continuation)["input_ids"]])
        inputs["input_ids"] = torch.cat([prompt, tokens], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model.model(**inputs).logits[0, prompt.shape[1] - 1 : -1]
        expected = float(torch.nn.functional.cross_entropy(logits, tokens[0]))
        arguments = ("K0", continuation, lambda doc: [doc["page"]], 0, TASK, SPLIT)
        ((loss, is_greedy),) = model.loglikelihood([request("loglikelihood", *arguments)])
        assert loss == pytest.approx(expected, abs=1e-4) and is_greedy == (continuation == greedy)
    ((alone, _),) = model.loglikelihood([request("loglikelihood", "Q", "A 7")])
    assert alone > 0


def test_rounds_follow_the_tasks_own_protocol(llava_next: Path, docs: Docs) -> None:
    """Round n gets the answers so far and what the task noted, until the task says that it is done."""
    seen: list[Any] = []

    def messages(
        doc: dict[str, Any], round_idx: int | None = None, previous_output: Any = None, previous_round_info: Any = None
    ) -> Any:
        if round_idx is None:
            return to_messages(doc)
        seen.append((round_idx, list(previous_output), previous_round_info))
        done = round_idx == 2
        return (None if done else to_messages(docs[round_idx]), done, previous_output, f"note {round_idx}")

    model = make(llava_next, docs, "method=dense")
    arguments = ("", messages, NEW, 0, TASK, SPLIT)
    (answers,) = model.generate_until_multi_round([request("generate_until_multi_round", *arguments)])
    assert answers == [plain(model, docs[number])[0].strip() for number in (0, 1)]
    assert seen == [(1, answers[:1], None), (2, answers, "note 1")]


def test_frames_become_images_where_the_processor_has_no_videos(llava_next: Path, docs: Docs) -> None:
    model = make(llava_next, docs, "method=dense,max_frames_num=2")
    frames = [doc["page"] for doc in docs[:3]]
    doc = {"frames": frames, "question": "K"}
    model.task_dict[TASK] = {SPLIT: [doc]}

    def video(doc: dict[str, Any]) -> list[dict[str, Any]]:
        content = [{"type": "video", "url": [f.resize((112, 112)) for f in doc["frames"]]}]
        return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]

    (answer,) = model.generate_until([ask(0, messages=video)])
    one_page = 64 + 16 * 17
    assert answer.token_counts.input_tokens == 2 * one_page + 1
    with pytest.raises(ValueError, match=r"video=video, but the processor of .* takes no videos"):
        make(llava_next, docs, "video=video").generate_until([ask(0)])


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "visionzip", "aim"])
def test_baselines_run_by_name(llava_next: Path, docs: Docs, name: str) -> None:
    model = make(llava_next, docs, f"method={name}," + ("retain=0.5" if name == "aim" else "keep=0.25"))
    answers = model.generate_until([ask(number) for number in range(2)])
    budgets = []
    for answer, doc in zip(answers, docs, strict=False):
        with getattr(baselines, name)(model.model, **model.arguments.options) as record:
            text, _ = plain(model, doc)
        assert answer.text == text.strip()
        budgets.append(record.budget)
    facts = model.meter.facts()["all"]
    assert facts["mean_ratio"] == pytest.approx(sum(budgets) / 2) and facts["mean_ratio"] < 0.9
    assert facts["sparse_questions"] == 2
    assert 0 < facts["mean_cache_bytes"] < 0.95 * facts["mean_full_cache_bytes"]


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "visionzip", "aim"])
def test_a_baseline_gets_its_budget_on_every_prompt(llava_next: Path, docs: Docs, name: str) -> None:
    budget = {"fastv": 0.8, "pyramiddrop": 0.6, "visionzip": 0.4, "aim": 0.3}[name]
    model = make(llava_next, docs, f"method={name},budget={budget}")
    for number in range(3):
        model.meter.tasks.clear()
        model.generate_until([ask(number)])
        assert model.meter.facts()["all"]["mean_ratio"] == pytest.approx(budget, abs=0.02)  # whole tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("method=fastv,keep=2", "FastV: layer must be at least 1 and keep in"),
        ("method=fastv,keep=0.5,budget=0.7", "budget decides keep of method=fastv: give one or the other"),
        ("method=aim,budget=1.5", "zipvl: budget must be in"),
        ("method=aim,keep=0.5", "unknown model argument 'keep' for method=aim; known: .*budget.*retain"),
        ("method=fastv,tau=0.9", "tau is an argument of method=zipvl, but method=fastv was asked for"),
    ],
)
def test_a_baselines_arguments_are_checked_first(llava_next: Path, docs: Docs, arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(llava_next, docs, arguments)
    with pytest.raises(ValueError, match="batch_size must be 1 with method=fastv, which does not take padded batches"):
        make(llava_next, docs, "method=fastv", batch_size=2)


def test_variants_of_zipvl_run(llava_next: Path, docs: Docs) -> None:
    """Table D's metric pairs; the pair that is ZipVL's own gives ZipVL's answer from as many tokens."""
    own = make(llava_next, docs, f"{PAPER},tau=0.8,dense_below=0")
    answers = {}
    for budget in ("accumulated", "normalized"):
        for rank in ("accumulated", "normalized"):
            model = make(llava_next, docs, f"method=variant,tau=0.8,budget={budget},rank={rank}")
            answers[budget, rank] = model.generate_until([ask(0)])[0].text, model.meter.facts()["all"]["mean_ratio"]
    text = own.generate_until([ask(0)])[0].text
    assert answers["accumulated", "normalized"] == (text, pytest.approx(own.meter.facts()["all"]["mean_ratio"]))
    assert len({ratio for _, ratio in answers.values()}) > 1
    with pytest.raises(ValueError, match="rank must be one of accumulated, normalized, got 'both'"):
        make(llava_next, docs, "method=variant,rank=both")


def test_one_process_a_gpu_or_one_model_over_several(
    llava_next: Path, docs: Docs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin.Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match=r"device_map='auto' spreads one copy .* 2 processes were started"):
        make(llava_next, docs, "device_map=auto")


def test_a_model_without_a_chat_template_is_refused(docs: Docs, tmp_path: Path) -> None:
    from tests.app import tiny

    tiny.save_llava_next(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        make(tmp_path, docs)


def test_the_models_own_attention_is_back_after_each_batch(llava_next: Path, docs: Docs) -> None:
    model = make(llava_next, docs, "ratio=0.3")
    before = model.model.config.get_text_config()._attn_implementation
    model.generate_until([ask(0)])
    assert model.model.config.get_text_config()._attn_implementation == before != "zipvl"
    assert isinstance(model.model, tf.LlavaNextForConditionalGeneration)
