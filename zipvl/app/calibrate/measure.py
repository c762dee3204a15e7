"""What a setting loses and takes on samples: dense attention answers once, every setting is led along its answers."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from zipvl.app.cache_bytes import cache_bytes
from zipvl.app.calibrate import settings
from zipvl.app.calibrate.journal import Journal, Line, code_digest
from zipvl.app.calibrate.samples import Sample
from zipvl.app.images import load_image
from zipvl.app.loading import Loaded
from zipvl.app.machine import device_description, versions
from zipvl.app.run import FirstToken, attention, prepare, reasons_for_dense
from zipvl.app.timing import synchronize
from zipvl.errors import InputError, first_line
from zipvl.transformers import cache_names

__all__ = ["TOP", "Measurer", "Reference", "compare", "weights_digest"]

TOP = 256
"""Tokens whose probability under dense attention is kept; the others count as one."""
FORMAT = 1
"""Of a line: raised when a line would say something else."""


@dataclass(frozen=True)
class Reference:
    """What dense attention answers.

    Attributes:
        tokens: ``[T]`` int64, the end of the answer among them.
        index, log_probs: ``[T, K]`` int64 and float32, the likeliest tokens at each place.
    """

    tokens: Tensor
    index: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, tokens: Tensor, logits: Tensor) -> Reference:
        """From an answer ``[T]`` and the logits ``[T, V]`` that gave it."""
        top = logits.float().log_softmax(-1).topk(min(TOP, logits.shape[-1]), dim=-1)
        return cls(tokens.cpu(), top.indices.cpu(), top.values.cpu())

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        partial = path.with_name(f"{path.stem}-{os.getpid()}.npz")
        np.savez(
            partial,
            tokens=self.tokens.numpy().astype(np.int32),
            index=self.index.numpy().astype(np.int32),
            log_probs=self.log_probs.numpy(),
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Reference:
        with np.load(path) as file:
            tokens, index = (torch.from_numpy(file[name].astype(np.int64)) for name in ("tokens", "index"))
            return cls(tokens, index, torch.from_numpy(file["log_probs"]))


def compare(reference: Reference, logits: Tensor) -> tuple[float, float, bool]:
    """How far logits ``[T, V]`` along an answer are from dense attention's.

    Returns:
        the share of places where the likeliest token is the answer's; the KL divergence from dense attention in nats a
        token, all tokens but the ``TOP`` likeliest taken as one, which makes it no larger; whether greedy decoding
        gives the same answer.
    """
    same = logits.argmax(-1).cpu() == reference.tokens
    dense = reference.log_probs.double()
    other = logits.double().log_softmax(-1).gather(-1, reference.index.to(logits.device)).cpu()
    rests = [(1 - values.exp().sum(-1)).clamp(min=1e-12) for values in (dense, other)]
    kl = (dense.exp() * (dense - other)).sum(-1) + rests[0] * (rests[0] / rests[1]).log()
    return float(same.double().mean()), max(0.0, float(kl.mean())), bool(same.all())


def weights_digest(model: Any) -> str:
    """16 digits of the names, shapes and first 1,024 numbers of all parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        head = tensor.detach().flatten()[:1024].float().cpu().numpy()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + head.tobytes())
    return found.hexdigest()[:16]


class Measurer:
    """One model on samples, measured once each: what is in ``folder`` is not measured again.

    Args:
        loaded: the model.
        samples: named by their places from now on.
        fields: those of every candidate's configuration that its name does not say.
        folder: of the results: a line a sample, and dense attention's answers.
        max_new_tokens: longest answer.
        batch: prompts whose losses are measured together, where they have the same shapes.
        seconds: that measuring may take from now on.
        tick: called after every sample that was measured, with their number.
    """

    def __init__(
        self,
        loaded: Loaded,
        samples: list[Sample],
        fields: dict[str, Any],
        folder: Path,
        *,
        max_new_tokens: int,
        batch: int,
        seconds: float,
        tick: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.loaded, self.samples, self.fields, self.folder = loaded, samples, fields, folder
        self.model = loaded.model
        self.max_new_tokens, self.batch, self.tick = max_new_tokens, batch, tick
        self.by_tokens = not any(sample.image or sample.answers for sample in samples)
        """Whether the loss of a sample is its share of next tokens that differ, not whether its answer is lost."""
        self.weights = weights_digest(loaded.model)
        self.origin = {
            "format": FORMAT,
            "code": code_digest(),
            "weights": self.weights,
            "device": device_description(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "versions": versions(),
            "fields": fields,
            "max_new_tokens": max_new_tokens,
            "batch": batch,
            "by_tokens": self.by_tokens,
        }
        self.journal = Journal(folder / "samples.jsonl", self.origin)
        self._mark = hashlib.sha256(repr(sorted(self.origin.items(), key=str)).encode()).hexdigest()[:8]
        self._until = time.monotonic() + seconds
        self._earlier = {_key(line): float(line["seconds"]) for line in self.journal.every()}
        self._warm: set[str] = set()
        ends = self.model.generation_config.eos_token_id
        self._ends = torch.tensor([] if ends is None else ends, dtype=torch.long).flatten()
        padding = (self.model.generation_config.pad_token_id, *self._ends.tolist(), 0)
        self._padding: int = next(token for token in padding if token is not None)

    def config(self, name: str) -> Any:
        """The configuration of a setting; None: dense."""
        return settings.config(name, **self.fields)

    def seconds_left(self) -> float:
        """Of the time that measuring may take, and what was measured earlier and not asked for yet took."""
        return self._until - time.monotonic() + sum(self._earlier.values())

    def losses(self, name: str, places: Sequence[int]) -> list[Line]:
        """A line a sample: ``loss`` in [0, 1]; ``same``, ``kl`` and ``exact`` as of ``compare``; ``kept``, share of the
        prompt's tokens, mean over layers; ``seconds``. Of dense attention ``prompt``, its tokens, and ``right``.

        Raises:
            InputError: the setting was dense throughout, or the model cannot be sparse.
        """
        missing = [place for place in places if not self._is_measured(name, place)]
        if name != settings.DENSE:
            self.losses(settings.DENSE, missing)
        for group in self._groups(missing):
            started = time.perf_counter()
            found = self._dense(group) if name == settings.DENSE else self._along(name, group)
            seconds = (time.perf_counter() - started) / len(group)
            for place, line in zip(group, found, strict=True):
                self.journal.add("loss", name, self.samples[place].digest, **line, seconds=seconds)
            self._warm.add(name)
            self.tick(len(group))
        lines = [self._line("loss", name, place) for place in places]
        if lines and name != settings.DENSE and not any(line["sparse"] for line in lines):
            reason = "; ".join(lines[0]["dense_because"])
            option = "data" if "dense_below" in reason else "model"
            raise InputError(
                option, f"ZipVL was dense throughout under {name!r}, so there is nothing to choose: {reason}"
            )
        return lines

    def costs(self, names: Sequence[str], places: Sequence[int]) -> dict[str, list[Line]]:
        """What the answer took, by setting, dense among them: ``first_s`` and ``total_s``, seconds to the first and to
        the last token, ``cache_bytes`` at the end. One prompt at a time, all settings in turn, so that what else runs
        on this machine meets them alike; as many tokens as dense attention's answer has."""
        wanted = (settings.DENSE, *names)
        self.losses(settings.DENSE, places)
        for place in places:
            for name in wanted:
                if self.journal.get("cost", name, self.samples[place].digest) is None:
                    self.journal.add("cost", name, self.samples[place].digest, **self._cost(name, place))
                    self.tick(1)
        return {name: [self._line("cost", name, place) for place in places] for name in wanted}

    def shortest(self, places: Sequence[int]) -> int:
        """Tokens of the shortest prompt among samples that were measured."""
        return min(int(line["prompt"]) for line in self.losses(settings.DENSE, places))

    # How

    def _is_measured(self, name: str, place: int) -> bool:
        line = self.journal.get("loss", name, self.samples[place].digest)
        return line is not None and (name != settings.DENSE or self._path(place).exists())

    def _line(self, measure: str, name: str, place: int) -> Line:
        line = self.journal.get(measure, name, self.samples[place].digest)
        assert line is not None
        self._earlier.pop(_key(line), None)
        return line

    def _path(self, place: int) -> Path:
        return self.folder / "dense" / f"{self._mark}-{self.samples[place].digest}.npz"

    def _groups(self, places: Sequence[int]) -> Iterator[list[int]]:
        yield from (list(places[start : start + self.batch]) for start in range(0, len(places), self.batch))

    def _dense(self, places: list[int]) -> list[Line]:
        found = []
        for group, inputs in self._prompts(places):
            output = self._generate(inputs, settings.DENSE)
            answers = output.sequences[:, inputs["input_ids"].shape[1] :].cpu()
            for row, place in enumerate(group):
                ended = torch.isin(answers[row], self._ends).nonzero()
                tokens = answers[row, : int(ended[0]) + 1 if len(ended) else None]
                logits = torch.stack([step[row] for step in output.logits[: len(tokens)]])
                self._path(place).parent.mkdir(parents=True, exist_ok=True)
                Reference.of(tokens, logits).save(self._path(place))
                prompt, right = int(inputs["attention_mask"][row].sum()), self._is_right(place, tokens)
                found.append(
                    {"loss": 0.0, "same": 1.0, "kl": 0.0, "exact": True, "kept": 1.0}
                    | {"prompt": prompt, "right": right}
                )
        return found

    def _along(self, name: str, places: list[int]) -> list[Line]:
        found = []
        for group, inputs in self._prompts(places):
            references = [Reference.load(self._path(place)) for place in group]
            with attention(self.model, self.config(name), record_index=False) as stats:
                output = self._generate(inputs, name, [reference.tokens.tolist() for reference in references])
            facts: Line = {"kept": stats.mean_ratio, "sparse": stats.active}
            if not stats.active:
                facts["dense_because"] = reasons_for_dense(stats)
            for row, (place, reference) in enumerate(zip(group, references, strict=True)):
                logits = torch.stack([step[row] for step in output.logits[: len(reference.tokens)]])
                same, kl, exact = compare(reference, logits)
                loss = 1 - same if self.by_tokens else float(self._is_lost(name, place, exact))
                found.append({"loss": loss, "same": same, "kl": kl, "exact": exact} | facts)
        return found

    def _is_lost(self, name: str, place: int, exact: bool) -> bool:
        """Whether an answer that was right is not any more; of samples without answers, whether it is another one."""
        if exact or not self.samples[place].answers:
            return not exact
        if not self._line("loss", settings.DENSE, place)["right"]:
            return False
        ((_, inputs),) = self._prompts([place])
        with attention(self.model, self.config(name), record_index=False):
            output = self._generate(inputs, name)
        return not self._is_right(place, output.sequences[0, inputs["input_ids"].shape[1] :])

    def _is_right(self, place: int, tokens: Tensor) -> bool | None:
        """Whether an answer is one of the sample's; None: it has none."""
        answers = self.samples[place].answers
        said = self.loaded.processor.decode(tokens, skip_special_tokens=True).strip().casefold()
        return said in [answer.strip().casefold() for answer in answers] if answers else None

    def _cost(self, name: str, place: int) -> Line:
        begun = time.perf_counter()
        ((_, inputs),) = self._prompts([place])
        tokens = Reference.load(self._path(place)).tokens.tolist()
        with attention(self.model, self.config(name), record_index=False):
            if name not in self._warm:
                self._generate(inputs, name, [tokens])
                self._warm.add(name)
            with FirstToken.of(self.model) as first:
                synchronize(self.model.device)
                started = time.perf_counter()
                output = self._generate(inputs, name, [tokens], first)
                synchronize(self.model.device)
                total = time.perf_counter() - started
        held = cache_bytes(cache_names.of_output(output))
        facts: Line = {"first_s": first.time - started, "total_s": total, "cache_bytes": held or 0}
        return facts | {"seconds": time.perf_counter() - begun}

    def _prompts(self, places: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """The inputs of samples, padded on the left: together where the shapes of all else are the same."""
        rows = [(place, self._inputs(self.samples[place])) for place in places]
        while rows:
            like = _shapes(rows[0][1])
            together = [row for row in rows if _shapes(row[1]) == like]
            rows = [row for row in rows if _shapes(row[1]) != like]
            yield [place for place, _ in together], self._stacked([inputs for _, inputs in together])

    def _inputs(self, sample: Sample) -> dict[str, Tensor]:
        processor = self.loaded.processor
        if sample.image is not None:
            try:
                return dict(prepare(processor, load_image(sample.image), sample.text, self.model))
            except InputError as error:
                raise InputError("data", f"{sample.name}: {str(error).partition(': ')[2]}") from error
        try:
            given = getattr(processor, "tokenizer", processor)(sample.text, return_tensors="pt")
        except Exception as error:  # each tokenizer stumbles over other texts in its own way
            raise InputError("data", f"{sample.name}: the model's tokenizer rejects it: {first_line(error)}") from error
        ids = given["input_ids"].to(self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _stacked(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if len(rows) == 1:
            return rows[0]
        length = max(row["input_ids"].shape[1] for row in rows)
        found = {}
        for name, first in rows[0].items():
            tensors = [row[name] for row in rows]
            if first.shape == rows[0]["input_ids"].shape:
                value = self._padding if name == "input_ids" else 0
                tensors = [torch.nn.functional.pad(t, (length - t.shape[1], 0), value=value) for t in tensors]
            found[name] = torch.cat(tensors)
        return found

    @torch.inference_mode()
    def _generate(
        self,
        inputs: dict[str, Tensor],
        name: str,
        answers: list[list[int]] | None = None,
        first: FirstToken | None = None,
    ) -> Any:
        """Greedy answers, or ``answers``, with the logits of every token before any of ``generate``'s own rules."""
        forced = {} if answers is None else {"logits_processor": [_Forced(answers, self._padding)]}
        return self.model.generate(
            **inputs,
            **forced,
            max_new_tokens=self.max_new_tokens if answers is None else max(map(len, answers)),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=first is None,
            pad_token_id=self._padding,
            streamer=first,
        )


def _key(line: Line) -> tuple[str, str, str]:
    return line["measure"], line["setting"], line["sample"]


class _Forced(LogitsProcessor):
    """Makes ``generate`` write ``answers``, a token a step, whatever the model would have written."""

    def __init__(self, answers: list[list[int]], padding: int) -> None:
        self.answers, self.padding, self.step = answers, padding, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores [B, V]`` with all but the next token of each row at minus infinity."""
        step = self.step
        tokens = [answer[step] if step < len(answer) else self.padding for answer in self.answers]
        self.step += 1
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)


def _shapes(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What must be the same in prompts that run together: all but the lengths of texts."""
    text = inputs["input_ids"].shape
    return {name: None if tensor.shape == text else tuple(tensor.shape[1:]) for name, tensor in inputs.items()}
