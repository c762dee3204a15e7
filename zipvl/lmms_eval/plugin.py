"""ZipVL, and the methods it is compared with, as a model of lmms-eval.

``lmms-eval --model zipvl --model_args pretrained=...,tau=0.975,cache=drop --tasks chartqa``. lmms-eval finds this
module through the entry point ``lmms_eval.models``; docs/lmms_eval.md has the arguments and the paper's tables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from zipvl.app.loading import resolve_device, resolve_dtype
from zipvl.lmms_eval import methods
from zipvl.lmms_eval.arguments import parse
from zipvl.lmms_eval.decoding import Forced, Until, cut, decoding
from zipvl.lmms_eval.meter import Meter, Tally, full_cache_bytes, held_cache_bytes
from zipvl.lmms_eval.prompts import Prompt, collate, from_context, from_messages
from zipvl.transformers import cache_names

__all__ = ["ZipVL", "ZipVLSimple"]


class ZipVL(lmms):
    """An image-text-to-text model of transformers under one method, asked through its chat template.

    Args:
        model_args: see ``zipvl.lmms_eval.arguments.Arguments``; lmms-eval adds ``batch_size`` and ``device``.
    """

    is_simple = False

    def __init__(self, **model_args: Any) -> None:
        super().__init__()
        self.arguments = parse(model_args)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._method = methods.load(self.arguments.method, self.arguments.options, self.arguments.zipvl)
        self.model, self.processor = self._load()
        self.meter = Meter(self.arguments.method, asdict(self.arguments))

    def _load(self) -> tuple[Any, Any]:
        """Model and processor: one copy a process, or one copy over several GPUs by ``device_map``."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        args = self.arguments
        if args.device_map is not None and self._world_size > 1:
            raise ValueError(
                f"zipvl: device_map={args.device_map!r} spreads one copy of the model over all GPUs, but "
                f"{self._world_size} processes were started, each with its own copy: use one or the other"
            )
        source: dict[str, Any] = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
        pixels = {name: value for name in ("min_pixels", "max_pixels") if (value := getattr(args, name)) is not None}
        processor = AutoProcessor.from_pretrained(args.pretrained, **source, **pixels)
        if not getattr(processor, "chat_template", None):
            raise ValueError(f"zipvl: the processor of {args.pretrained} has no chat template")
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if args.attn_implementation is not None:
            source["attn_implementation"] = args.attn_implementation
        if args.device_map is not None:
            source["device_map"] = args.device_map
        model: Any = AutoModelForImageTextToText.from_pretrained(
            args.pretrained, dtype=resolve_dtype(args.dtype) or "auto", **source
        )
        if args.device_map is None:
            alone = self._world_size == 1
            model.to(resolve_device(args.device or "auto") if alone else self.accelerator.device)
        model.eval()
        return model, processor

    # What lmms-eval reads

    @property
    def batch_size(self) -> int:
        """Questions answered together."""
        return self.arguments.batch_size

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.model.device

    @property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer

    @property
    def chat_template(self) -> Any:
        """The processor's."""
        return self.processor.chat_template

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id

    # What lmms-eval asks for

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answers in the order of the requests."""
        answers: list[GenerationResult | None] = [None] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc=f"{self.arguments.method} answering") as bar:
            for places in self._batches(requests):
                batch = [requests[place] for place in places]
                prompts = [self._prompt(request) for request in batch]
                options, task = self._options(batch[0]), _task(batch[0])
                for place, answer, request in zip(places, self._answer(task, prompts, options), batch, strict=True):
                    answers[place] = answer
                    self.cache_hook.add_partial("generate_until", (request.args[0], options), answer.text)
                    bar.update(1)
        return [answer for answer in answers if answer is not None]

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """Each request's answers, round after round; every round reads its whole prompt."""
        conversations = []
        for request in tqdm(requests, disable=self.rank != 0, desc=f"{self.arguments.method} answering"):
            _, doc_to_messages, options, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            answers: list[str] = []
            messages, info = doc_to_messages(doc), None
            while messages is not None:
                (answer,) = self._answer(task, [self._from_messages(messages)], options)
                answers.append(answer.text)
                payload = doc_to_messages(
                    doc, round_idx=len(answers), previous_output=list(answers), previous_round_info=info
                )
                if not (isinstance(payload, tuple) and len(payload) == 4):
                    break
                messages, done, _, info = payload
                messages = None if done else messages
            conversations.append(answers)
        return conversations

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """For each request the mean negative log-likelihood of its continuation, as lmms-eval's own models return
        (its multiple choice takes the smallest), and whether greedy decoding would have said it."""
        return [self._score(request) for request in tqdm(requests, disable=self.rank != 0, desc="scoring")]

    def clean(self) -> None:
        """The end of a run: what was kept goes beside the scores, and the model's memory is given back."""
        self._report()
        super().clean()

    # How

    def _prompt(self, request: Any) -> Prompt:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return self._from_messages(doc_to_messages(self.task_dict[task][split][doc_id]))

    def _from_messages(self, messages: list[dict[str, Any]]) -> Prompt:
        return from_messages(messages, **self._media)

    @property
    def _media(self) -> dict[str, Any]:
        args = self.arguments
        knows = getattr(self.processor, "video_processor", None) is not None
        if args.video == "video" and not knows:
            raise ValueError(f"zipvl: video=video, but the processor of {args.pretrained} takes no videos")
        as_video = args.video == "video" or (args.video == "auto" and knows)
        return {"frames": args.max_frames_num, "as_video": as_video, "system_prompt": args.system_prompt}

    @staticmethod
    def _options(request: Any) -> dict[str, Any]:
        """The request's generation arguments."""
        return request.args[2]

    def _batches(self, requests: list[Any]) -> Iterator[list[int]]:
        """Places of requests that can be answered together: of one task, with the same generation arguments."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            key = json.dumps([_task(request), self._options(request)], sort_keys=True, default=str)
            groups.setdefault(key, []).append(place)
        for places in groups.values():
            yield from (places[i : i + self.batch_size] for i in range(0, len(places), self.batch_size))

    def _answer(self, task: str, prompts: list[Prompt], options: dict[str, Any]) -> list[GenerationResult]:
        """The answers to one batch; prompts with different kinds of media are run apart."""
        answers: dict[int, GenerationResult] = {}
        for media in dict.fromkeys(prompt.media for prompt in prompts):
            places = [place for place, prompt in enumerate(prompts) if prompt.media == media]
            answers |= zip(places, self._generate(task, [prompts[p] for p in places], options), strict=True)
        return [answers[place] for place in range(len(prompts))]

    def _generate(self, task: str, prompts: list[Prompt], options: dict[str, Any]) -> list[GenerationResult]:
        arguments, stops = decoding(options)
        until = Until(self.tokenizer, stops)
        inputs, output = self._run(task, prompts, **arguments, stopping_criteria=[until] if stops else None)
        read, length = inputs["attention_mask"].sum(-1).tolist(), inputs["input_ids"].shape[1]
        results = []
        for tokens, row in zip(read, output.sequences[:, length:], strict=True):
            text = self.processor.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            written = int((row != self.tokenizer.pad_token_id).sum())
            counts = TokenCounts(input_tokens=int(tokens), output_tokens=written)
            results.append(GenerationResult(cut(text, stops), counts))
        return results

    def _score(self, request: Any) -> tuple[float, bool]:
        raise NotImplementedError("zipvl: log-likelihood tasks need lmms-eval's --force_simple")

    def _loss(self, task: str, prompt: Prompt, continuation: str) -> tuple[float, bool]:
        """Mean negative log-likelihood of ``continuation`` after ``prompt``, and whether it is the greedy one.

        The continuation is decoded token by token as an answer would be, from the cache that the method left.
        """
        tokens = self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ValueError(f"zipvl: loglikelihood: the continuation {continuation!r} has no tokens")
        _, output = self._run(
            task,
            [prompt],
            do_sample=False,
            max_new_tokens=len(tokens),
            min_new_tokens=len(tokens),
            output_logits=True,
            logits_processor=[Forced(tokens)],
        )
        logits = torch.cat(list(output.logits)).float()
        wanted = torch.tensor(tokens, device=logits.device)
        return float(torch.nn.functional.cross_entropy(logits, wanted)), bool((logits.argmax(-1) == wanted).all())

    def _run(self, task: str, prompts: list[Prompt], **arguments: Any) -> tuple[Any, Any]:
        """One ``generate`` under the method, counted: the inputs, and transformers' output."""
        inputs = collate(self.processor, prompts).to(self.device, dtype=self.model.dtype)
        with torch.inference_mode(), self._method(self.model, inputs) as kept:
            start = time.perf_counter()
            output = self.model.generate(
                **inputs,
                **arguments,
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                return_dict_in_generate=True,
            )
            written = (output.sequences[:, inputs["input_ids"].shape[1] :] != self.tokenizer.pad_token_id).sum(-1)
            new_tokens = int(written.sum())  # waits for the device
            seconds = time.perf_counter() - start
        rows = len(prompts)
        held = held_cache_bytes(cache_names.of_output(output))
        seen = output.sequences.shape[1] - 1  # the last token is never fed back
        full = full_cache_bytes(
            self.model.config, rows * arguments.get("num_beams", 1), seen, self.model.dtype.itemsize
        )
        facts = kept()
        tally = Tally(
            questions=rows,
            sparse=rows if facts.active else 0,
            prompt_tokens=int(inputs["attention_mask"].sum()),
            new_tokens=new_tokens,
            ratio=facts.ratio * rows,
            cache_bytes=held or 0,
            full_cache_bytes=0 if held is None else full,
            unmeasured=rows if held is None else 0,
            seconds=seconds,
        )
        tally.dense_because.update(facts.dense_because)
        self.meter.add(task, tally)
        return inputs, output

    def _report(self) -> None:
        """Adds up what the processes counted, prints it, and hands it to lmms-eval's results and to ``stats``."""
        if self._world_size > 1:
            self.meter.merge(gather_object([self.meter.tasks]))
        if not self.accelerator.is_main_process:
            return
        for line in self.meter.lines():
            print(line, flush=True)
        total = self.meter.total()
        log_metrics(
            total_elapsed_time=total.seconds,
            total_gen_tokens=total.new_tokens,
            avg_speed=total.new_tokens / total.seconds if total.seconds else 0.0,
            additional_metrics=self.meter.numbers() | {"total_requests": total.questions},
        )
        if self.arguments.stats is not None:
            self.meter.write(self.arguments.stats)


class ZipVLSimple(ZipVL):
    """The same for tasks in lmms-eval's simple form: a text and a list of visuals (``--force_simple``)."""

    is_simple = True

    def _prompt(self, request: Any) -> Prompt:
        context, _, doc_to_visual, doc_id, task, split = request.args
        return self._from_context(context, doc_to_visual(self.task_dict[task][split][doc_id]))

    def _from_context(self, context: str, visuals: list[Any] | None) -> Prompt:
        return from_context(context, visuals, **self._media)

    @staticmethod
    def _options(request: Any) -> dict[str, Any]:
        return request.args[1]

    def _score(self, request: Any) -> tuple[float, bool]:
        if len(request.args) == 2:  # a choice without its question, for mutual information
            context, continuation = request.args
            return self._loss(request.task_name, self._from_context(context, None), continuation)
        context, continuation, doc_to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        if callable(continuation):
            continuation = continuation(doc)
        return self._loss(task, self._from_context(context, doc_to_visual(doc)), str(continuation))

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """Not in this form: the chat form of the task has it."""
        raise NotImplementedError("zipvl: tasks of several rounds run in their chat form: leave out --force_simple")


def _task(request: Any) -> str:
    """The name of the task that a request belongs to."""
    return str(request.args[-2])
