"""``zipvl bench``: one layer, the first token and a whole answer on this machine, dense and with ZipVL, timed."""

from __future__ import annotations

import gc
import platform
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import zipvl
from zipvl import ops
from zipvl.app.run import attention, prepare, reasons_for_dense
from zipvl.app.shapes import QWEN2_5_VL_3B, QWEN2_5_VL_7B, TINY, Inputs, Shape, text_inputs
from zipvl.app.timing import Budget, Times, generate, measure
from zipvl.support import why_not

if TYPE_CHECKING:
    from PIL import Image

    from zipvl.app.loading import Loaded
    from zipvl.config import ZipVLConfig
    from zipvl.stats import Stats

__all__ = ["Bench", "Plan", "Row", "Subject", "absent_subject", "loaded_subject", "random_subject"]

GIB = 2**30
LAYER_REPEATS, LAYER_SPAN_S = 7, 0.02
MODEL_REPEATS = 3
QUESTION = "What does this page say?"
FILLER = "The committee read the report of the year before and asked for the figures of every quarter. "

_BACKENDS = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "FlashAttention",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient attention",
    SDPBackend.MATH: "PyTorch's math",
}


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        lengths: tokens of the layer's rows.
        text: tokens of the text prompt.
        new: new tokens of an answer.
    """

    lengths: tuple[int, ...] = (4096, 32768, 131072)
    text: int = 32768
    new: int = 64


ON_GPU = Plan()
ON_CPU = Plan(lengths=(1024, 2048, 4096), text=2048, new=16)


@dataclass
class Row:
    """One line of the table.

    Args:
        part: ``layer``, ``first token`` or ``answer``.
        name: which of its rows.
        dense, zipvl: times of both sides.
        dense_by: the backend of ``scaled_dot_product_attention`` behind ``dense``, of a layer.
        notes: what else to know.
        not_run: why nothing was measured; None where something was, or is to come.
    """

    part: str
    name: str
    dense: Times = field(default_factory=Times)
    zipvl: Times = field(default_factory=Times)
    dense_by: str | None = None
    notes: list[str] = field(default_factory=list)
    not_run: str | None = None

    @property
    def measured(self) -> bool:
        """Whether either side has a time."""
        return any(side.seconds is not None for side in (self.dense, self.zipvl))

    @property
    def speedup(self) -> float | None:
        """How many times as fast as dense ZipVL is; None unless both ran after a warm-up."""
        dense, sparse = self.dense, self.zipvl
        if not (dense.runs and sparse.runs and dense.seconds and sparse.seconds):
            return None
        return dense.seconds / sparse.seconds

    def facts(self) -> dict[str, Any]:
        """Ready for JSON."""
        sides = {name: asdict(side) | {"seconds": side.seconds, "how": side.how} for name, side in self.sides()}
        return asdict(self) | sides | {"speedup": self.speedup}

    def sides(self) -> tuple[tuple[str, Times], ...]:
        """Both, by name."""
        return ("dense", self.dense), ("zipvl", self.zipvl)


@dataclass
class Subject:
    """The model whose answers are timed, and whose heads the layer has.

    Args:
        title: its name, and what is random about it.
        config: of its text model.
        dtype: of its weights and of the layer.
        make: makes or hands out the model; called once.
        page: the inputs of its page prompt.
        text: the inputs of its text prompt of so many tokens.
        weights: bytes that ``make`` will take; 0 where the model is there, or nobody counts.
        choice: why this one; None where it was given.
        random: whether its weights are.
    """

    title: str
    config: Any
    dtype: torch.dtype
    make: Callable[[], Any]
    page: Callable[[Any], Inputs]
    text: Callable[[Any, int], Inputs]
    weights: int = 0
    choice: str | None = None
    random: bool = True

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, head dim."""
        query = self.config.num_attention_heads
        head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // query
        return query, getattr(self.config, "num_key_value_heads", None) or query, head_dim

    def working_bytes(self, tokens: int) -> int:
        """About what a dense prefill of ``tokens`` takes beside the weights: cache, states, MLP, and a GiB."""
        _, kv_heads, head_dim = self.heads
        hidden = self.config.hidden_size
        mlp = getattr(self.config, "intermediate_size", None) or 4 * hidden
        cache = 2 * self.config.num_hidden_layers * kv_heads * head_dim
        return tokens * (cache + 3 * mlp + 8 * hidden) * self.dtype.itemsize + GIB


def random_subject(device: torch.device) -> Subject:
    """Random weights in the largest shape that fits the free memory of ``device``; a tiny one on the CPU."""
    if device.type == "cpu":
        return _random(TINY, device, torch.float32, "a tiny shape, because this is the CPU")
    free = _free_bytes(device)
    for shape in (QWEN2_5_VL_7B, QWEN2_5_VL_3B):
        subject = _random(shape, device, torch.bfloat16, f"chosen by {free / GIB:.0f} GiB of free memory")
        subject.weights = shape.weight_bytes()
        if subject.weights + subject.working_bytes(ON_GPU.text) <= free:
            break
    return subject


def absent_subject() -> Subject:
    """What would be measured on a GPU, where there is none."""
    return _random(QWEN2_5_VL_7B, torch.device("cuda"), torch.bfloat16, "or a smaller one, by free memory")


def _random(shape: Shape, device: torch.device, dtype: torch.dtype, choice: str) -> Subject:
    def make() -> Any:
        model = shape.make(device)
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        return model

    title = "a tiny model, random weights" if shape is TINY else f"{shape.name}'s shape, random weights"
    config = shape.config().get_text_config()
    return Subject(title, config, dtype, make, shape.page_inputs, text_inputs, choice=choice)


def loaded_subject(loaded: Loaded, image: Image.Image, config: ZipVLConfig) -> Subject:
    """The user's own model, asked about a page of theirs; the text prompt is filler.

    Raises:
        InputError: ZipVL refuses the model, or its processor the page.
    """
    model, processor = loaded.model, loaded.processor
    with attention(model, config, record_index=False):
        page = prepare(processor, image, QUESTION, model)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None  # answers of one length

    def text(model: Any, tokens: int) -> Inputs:
        words = getattr(processor, "tokenizer", processor)(FILLER, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([(words * (tokens // len(words) + 1))[:tokens]], device=model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Subject(
        loaded.name,
        model.config.get_text_config(),
        model.dtype,
        lambda: model,
        lambda model: page,
        text,
        random=False,
    )


class Bench:
    """The rows of one run, filled one after the other.

    Args:
        subject: the model.
        config: ZipVL's settings, with an imposed ratio.
        device: where all of it runs.
        budget: seconds; a row that does not fit is not run.
        say: told what comes next.
        refused: why nothing can run at all; None where it can.
        plan: how much is measured; None: what suits ``device``.
    """

    def __init__(
        self,
        subject: Subject,
        config: ZipVLConfig,
        device: torch.device,
        budget: Budget,
        say: Callable[[str], None],
        *,
        refused: str | None = None,
        plan: Plan | None = None,
    ) -> None:
        self.subject, self.config, self.device = subject, config, device
        self.budget, self._say, self._refused = budget, say, refused
        self.plan = plan = plan or (ON_CPU if device.type == "cpu" and refused is None else ON_GPU)
        self.interrupted = False
        window = f"window of {config.local_window}"
        self._layers = {
            tokens: (Row("layer", f"{tokens:,} tokens, no window"), Row("layer", f"{tokens:,} tokens, {window}"))
            for tokens in plan.lengths
        }
        self._first_page, self._first_text = (
            Row("first token", "a page"),
            Row("first token", f"text, {plan.text:,} tokens"),
        )
        self._answer = Row("answer", f"a page + {plan.new} new tokens")
        self.rows = [row for pair in self._layers.values() for row in pair]
        self.rows += [self._first_page, self._first_text, self._answer]
        self._model: Any = None
        self._last_layer: tuple[int, float] | None = None  # tokens, seconds of one call of every side

    def run(self) -> None:
        """Measures what fits. Ctrl-C ends it, and what was measured stays."""
        try:
            if self._refused is None:
                with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                    for tokens in self.plan.lengths:
                        self._run_layer(tokens)
                    self._run_models()
        except KeyboardInterrupt:
            self.interrupted = True
        for row in self.rows:
            if row.not_run is None and not row.measured:
                row.not_run = self._refused or self._why(row) or "interrupted"

    def _why(self, row: Row) -> str:
        """Why no side of ``row`` has a time; empty where none failed."""
        failed = {side.failed for _, side in row.sides()} - {None}
        reasons = (self._no_time() if reason == "time" else f"memory: {reason}" for reason in failed)
        return "; ".join(sorted(reasons))

    def _no_time(self, needed: float = 0.0) -> str:
        wanted = f"about {needed:,.0f} s needed, " if needed else ""
        return f"time: {wanted}{self.budget.left:,.0f} s of {self.budget.total:g} left"

    def _no_memory(self, needed: int) -> str | None:
        """Why ``needed`` bytes are too many here; None where they are not, or where nobody counts them."""
        if self.device.type == "cpu" or needed <= (free := _free_bytes(self.device)):
            return None
        return f"memory: about {needed / GIB:.1f} GiB needed, {free / GIB:.1f} free"

    def _run_layer(self, tokens: int) -> None:
        rows = self._layers[tokens]
        query, kv, head_dim = self.subject.heads
        reason = self._not_native()
        reason = reason or self._no_memory(3 * (query + kv) * head_dim * tokens * self.subject.dtype.itemsize)
        if reason is None and self._last_layer is not None:
            before, took = self._last_layer
            needed = 2 * took * (tokens / before) ** 2  # a warm-up and a run; ZipVL's part grows less
            reason = self._no_time(needed) if needed > self.budget.left else None
        if reason is not None:
            for row in rows:
                row.not_run = reason
            return
        self._say(f"one layer, {tokens:,} tokens")
        try:
            with torch.inference_mode():
                self._measure_layer(tokens, rows)
        except torch.OutOfMemoryError:
            for row in rows:
                row.not_run = "memory: out of memory"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure_layer(self, tokens: int, rows: tuple[Row, Row]) -> None:
        query, kv, head_dim = self.subject.heads
        torch.manual_seed(0)
        q, k, v = (  # views of [1, N, H, D], as a model passes them
            torch.randn(1, tokens, heads, head_dim, device=self.device, dtype=self.subject.dtype).transpose(1, 2)
            for heads in (query, kv, kv)
        )
        plain = self.config.replace(local_window=0, num_sinks=0)
        # What scaled_dot_product_attention itself asks.
        backend = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True))
        chosen = _BACKENDS.get(backend, backend.name)

        def dense() -> None:
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def cudnn() -> None:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                dense()

        sides: dict[str, Callable[[], Any]] = {
            "dense": dense,
            "no window": lambda: ops.zipvl_attn(q, k, v, **plain.attention_kwargs()),
            "window": lambda: ops.zipvl_attn(q, k, v, **self.config.attention_kwargs()),
        }
        if self.device.type == "cuda" and backend is not SDPBackend.CUDNN_ATTENTION and _runs(cudnn):
            sides["cudnn"] = cudnn
        times = {name: Times() for name in sides}
        for row, side in zip(rows, ("no window", "window"), strict=True):
            row.dense, row.zipvl = times["dense"], times[side]
        try:
            measure(sides, times, self.budget, self.device, repeats=LAYER_REPEATS, span=LAYER_SPAN_S)
        finally:  # after Ctrl-C too
            _choose_dense(rows, times, chosen)
        self._last_layer = tokens, sum(side.seconds or 0.0 for side in times.values())

    def _not_native(self) -> str | None:
        """Why the layer has no kernel of its own here; None where it has."""
        reason = why_not("zipvl_attn", self.device, self.subject.dtype, self.subject.heads[2])
        return reason and f"op not native here: {reason}"

    def _run_models(self) -> None:
        rows = self.rows[-3:]
        reason = self._not_native() or self._no_memory(self.subject.weights + self.subject.working_bytes(0))
        reason = reason or (self._no_time() if self.budget.left == 0 else None)
        if reason is None:
            self._say(f"making {self.subject.title}" if self.subject.random else "reading the page")
            try:
                self._model = self.subject.make()
                page = self.subject.page(self._model)
            except torch.OutOfMemoryError:
                reason = "memory: out of memory where the model was made"
        if reason is not None:
            for row in rows:
                row.not_run = reason
            return
        tokens = page["input_ids"].shape[1]
        self._first_page.name = f"a page, {tokens:,} tokens"
        self._run_answer(self._first_page, lambda: page, tokens, 1)
        self._run_answer(self._answer, lambda: page, tokens, self.plan.new)
        self._run_answer(self._first_text, lambda: self.subject.text(self._model, self.plan.text), self.plan.text, 1)

    def _run_answer(self, row: Row, prompt: Callable[[], Inputs], tokens: int, new: int) -> None:
        longest = getattr(self.subject.config, "max_position_embeddings", None)
        if longest is not None and tokens + new - 1 > longest:
            row.not_run = f"the model takes {longest:,} tokens at most"
            return
        row.not_run = self._no_memory(self.subject.working_bytes(tokens))
        if row.not_run is not None:
            return
        self._say(f"{row.part}, {row.name}")
        inputs, last = prompt(), list[Any]()

        def sparse() -> None:
            with attention(self._model, self.config, record_index=False) as stats:
                generate(self._model, inputs, new, num_beams=1)
            last[:] = [stats]

        sides = {"dense": lambda: generate(self._model, inputs, new, num_beams=1), "zipvl": sparse}
        try:
            measure(sides, dict(row.sides()), self.budget, self.device, repeats=MODEL_REPEATS)
        finally:  # after Ctrl-C too
            if last:
                row.notes += _notes(last[0], new)

    def facts(self) -> dict[str, Any]:
        """Everything ``zipvl bench`` reports, ready for JSON."""
        query, kv, head_dim = self.subject.heads
        return {
            "device": str(self.device),
            "device_name": _name(self.device),
            "versions": {"zipvl": zipvl.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
            | {"transformers": transformers.__version__, "python": platform.python_version()},
            "model": self.subject.title,
            "random_weights": self.subject.random,
            "chosen": self.subject.choice,
            "dtype": str(self.subject.dtype).removeprefix("torch."),
            "heads": {"query": query, "key_value": kv, "dim": head_dim},
            "config": asdict(self.config),
            "budget_s": self.budget.total,
            "used_s": self.budget.used,
            "interrupted": self.interrupted,
            "rows": [row.facts() for row in self.rows],
        }


def _choose_dense(rows: tuple[Row, Row], times: dict[str, Times], chosen: str) -> None:
    """The faster of PyTorch's own choice and cuDNN is what ZipVL is compared with; the other one is a note."""
    dense, cudnn = times["dense"], times.get("cudnn", Times())
    for row in rows:
        row.dense_by = chosen
        if dense.seconds is None and cudnn.seconds is not None:
            row.dense, row.dense_by = cudnn, "cuDNN"
            row.notes.append(f"{chosen}, PyTorch's choice: {dense.how}")
        elif dense.runs and cudnn.runs and dense.seconds and cudnn.seconds:
            other = f"{chosen}, PyTorch's choice, takes {1e3 * dense.seconds:,.3f} ms"
            if cudnn.seconds < dense.seconds:
                row.dense, row.dense_by = cudnn, "cuDNN"
            else:
                other = f"cuDNN takes {1e3 * cudnn.seconds:,.3f} ms"
            row.notes.append(other)


def _notes(stats: Stats, new: int) -> list[str]:
    """What ZipVL did: the share it kept, or why it was dense; how it decoded."""
    notes = [f"kept {stats.mean_ratio:.0%}"] if stats.active else ["ZipVL stayed dense"]
    notes += [f"dense: {reason}" for reason in reasons_for_dense(stats)]
    if new > 1 and stats.decodings:
        decoding = stats.decodings[-1]
        how = f"by {decoding.replayed} replays of a CUDA graph" if decoding.replayed else "step by step"
        notes.append(f"decoded {how}" + (f" ({decoding.reason})" if decoding.reason else ""))
    return notes


def _runs(side: Callable[[], Any]) -> bool:
    """Whether a backend takes its inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says of each backend why not
        try:
            side()
        except RuntimeError:  # "No available kernel", or out of memory
            return False
    return True


def _free_bytes(device: torch.device) -> int:
    """Free memory of a GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
