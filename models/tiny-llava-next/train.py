"""Trains tiny-llava-next from nothing on one GPU and saves the whole model folder.

Stages (`STAGES`): the vision tower alone with a character loss; questions about small pages with few entries; larger
pages with more; then a last stage that makes attention concentrate and survive ZipVL's token selection. Every stage
before the last ends when the model passes it. Random numbers come from the step number, so a resumed run sees the pages
it would have seen.

    python train.py train                                # the whole run
    python train.py train --resume checkpoints/last.pt   # go on from there
    python train.py evaluate --pages 300                 # dense and sparse exact match, in plain PyTorch
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from network import (
    CHARACTER_IDS,
    EOS,
    VOCABULARY,
    attention_inputs,
    attention_outputs,
    build_model,
    encoder_layer,
    next_token_logits,
    pack_features,
    pixel_values_from_pages,
    prompt_embeddings,
    run_text_layers,
    save_folder,
    tiles_to_raster,
    vision_features,
)
from pages import (
    BLANK,
    CHARACTERS,
    ENTRY_COUNTS,
    PAGE_SIDE,
    PATCH,
    Page,
    choose_questions,
    draw,
    held_out_pages,
    patch_labels,
    random_layout,
    training_generator,
)
from sparse_attention import DecodingAttention, TrainingAttention
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration

CHECKPOINT = Path(__file__).parent / "checkpoints/last.pt"
QUESTION_LENGTH, ANSWER_LENGTH = 8, 4
"""Tokens of `?KQ=482<eos>`, and how many of them are answered: three digits and the end."""
CHARACTER_LOSS_WEIGHT, BLANK_WEIGHT = 0.3, 0.05
DENSE_SHARE = 0.3
"""Share of the last stage's batches that are dense, with eight questions."""
ENTROPY_WEIGHT, ENTROPY_BOUNDS = 0.003, (0.0001, 0.008)
TARGET_TAU, TARGET_RATIO = 0.975, 0.35
CONTROL_EVERY, CONTROL_FROM, CONTROL_GAIN, CONTROL_STEP = 50, 0.2, 0.15, 0.05
"""Past 20% of a sparsity stage, every 50 steps, the entropy weight moves by at most 5% towards the target ratio."""
SHIPPED_ENTROPY_WEIGHT = 0.00033
"""Where the controller had brought it when the shipped weights were saved."""
LOWEST_RATIO = 0.15
MEASURE_EVERY = 25
CONTROL_SEED, PROBE_SEED = 900_000_000, 1


@dataclass(frozen=True)
class Stage:
    """kind: 'characters' (vision only), 'answers' or 'sparsity'. A stage ends once the mean of its last measurements
    reaches `passed` (not before `least_steps`), or at `most_steps`: then an early stage has failed."""

    kind: str
    entries: tuple[int, ...]
    side: int
    batch: int
    passed: float
    least_steps: int
    most_steps: int
    may_fall_short: bool = False
    peak_rate: float = 1e-3
    first_low: float = 0.6
    """Sparsity: the smallest ratio drawn at the beginning; it falls to `LOWEST_RATIO` by the middle of the stage."""
    seconds: float = math.inf
    """Ends the stage, and shapes its learning rate, if it comes before `most_steps`."""

    @property
    def name(self) -> str:
        return f"{self.kind} {'/'.join(map(str, self.entries))} @{self.side}"


STAGES = (
    Stage("characters", (16,), 336, 64, 0.90, 100, 2500),
    Stage("answers", (3,), 168, 256, 0.85, 100, 6000),
    Stage("answers", (4,), 168, 256, 0.85, 100, 4000),
    Stage("answers", (8,), 336, 128, 0.85, 100, 3000),
    Stage("answers", (24,), 336, 128, 0.85, 100, 3000),
    Stage("answers", (24,), 672, 48, 0.85, 100, 2000),
    Stage("answers", (64,), 672, 48, 0.96, 100, 1200, may_fall_short=True),
    Stage("sparsity", (8, 16, 24, 48, 64), 672, 48, 2.0, 0, 6000, may_fall_short=True, peak_rate=8e-4),
)
FINISH = replace(STAGES[-1], batch=96, most_steps=100_000, peak_rate=5e-4, first_low=0.15)
"""An optional further stage, `--finish-seconds`: larger batches, the smallest ratios from the start."""


@dataclass
class Batch:
    """pixel_values `[B, tiles, 3, s, s]`; labels `[B, patches, 2]`; ids `[B, 8 * questions]`; visual: visual tokens."""

    pixel_values: Tensor
    labels: Tensor
    ids: Tensor
    base_view: bool
    visual: int

    @property
    def prompt(self) -> int:
        """Prompt tokens: BOS, the image, `?KQ=`."""
        return 1 + self.visual + ANSWER_LENGTH


@dataclass
class Measured:
    """One step's loss and what it was made of; `right` is the share of characters or answers that were right."""

    loss: Tensor
    parts: dict[str, Tensor]
    right: Tensor


def question_ids(questions: Tensor) -> Tensor:
    """Tokens of `?KQ=482<eos>` for each question, one after the other: `[B, n, 6]` characters -> `[B, 8 * n]`."""
    table = torch.tensor([*CHARACTER_IDS, VOCABULARY[" "]], device=questions.device)
    letters, digits = table[questions[..., :2]], table[questions[..., 3:]]

    def constant(token: int) -> Tensor:
        return torch.full_like(letters[..., :1], token)

    parts = [constant(VOCABULARY["?"]), letters, constant(VOCABULARY["="]), digits, constant(EOS)]
    return torch.cat(parts, -1).flatten(1)


def make_batch(stage: Stage, seed: int, questions: int, device: torch.device) -> Batch:
    """Draws a training batch; the seed fixes it (for one kind of device)."""
    generator = training_generator(seed, device)
    entries = random.Random(seed).choice(stage.entries)
    layout = random_layout(stage.batch, entries, stage.side, generator)
    base_view = stage.side == PAGE_SIDE
    grid = stage.side // PATCH
    return Batch(
        pixel_values_from_pages(draw(layout, generator), base_view),
        patch_labels(layout),
        question_ids(choose_questions(layout, min(questions, entries), generator)),
        base_view,
        grid * (grid + 1) + base_view * 24 * 24,
    )


class Learner(nn.Module):
    """The model, the character head that only training needs, and how a batch turns into a loss."""

    def __init__(self, seed: int, compiled: bool) -> None:
        super().__init__()
        self.model = build_model(seed)
        self.character_head = nn.Linear(self.model.config.vision_config.hidden_size, 2 * (BLANK + 1))
        weight = torch.ones(BLANK + 1)
        weight[BLANK] = BLANK_WEIGHT
        self.register_buffer("character_weight", weight, persistent=False)
        functions = (encoder_layer, attention_inputs, attention_outputs)
        if compiled:
            functions = tuple(torch.compile(function, dynamic=True) for function in functions)
        self.vision_layer, self.text_layer = functions[0], functions[1:]

    def features(self, batch: Batch) -> Tensor:
        """Vision features of all tiles, `[B, tiles, patches, 192]`."""
        tiles = batch.pixel_values.shape[1]
        return vision_features(self.model, batch.pixel_values.flatten(0, 1), self.vision_layer).unflatten(
            0, (-1, tiles)
        )

    def character_loss(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of naming the characters of each patch, and the share of characters (not blanks) named rightly."""
        grid = tiles_to_raster(features[:, int(batch.base_view) :]).flatten(1, 2)
        logits = self.character_head(grid).float().unflatten(-1, (2, BLANK + 1))
        loss = F.cross_entropy(logits.flatten(0, 2), batch.labels.flatten(), weight=self.character_weight)
        written = batch.labels != BLANK
        right = ((logits.argmax(-1) == batch.labels) & written).sum() / written.sum()
        return loss, right

    def answer_loss(self, features: Tensor, batch: Batch, attention: TrainingAttention) -> tuple[Tensor, Tensor]:
        """Loss of the answer tokens given those before, and the share of questions with every token right."""
        visual = pack_features(self.model, features, batch.base_view)
        hidden = prompt_embeddings(self.model, visual, batch.ids[:, :-1])
        hidden = run_text_layers(self.model, hidden, attention, layer_functions=self.text_layer)[:, 1 + batch.visual :]
        place = torch.arange(1, batch.ids.shape[1], device=hidden.device) % QUESTION_LENGTH
        answered = place >= QUESTION_LENGTH - ANSWER_LENGTH
        logits = next_token_logits(self.model, hidden[:, answered]).float()
        targets = batch.ids[:, 1:][:, answered]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        right = (logits.argmax(-1) == targets).unflatten(1, (-1, ANSWER_LENGTH)).all(-1).float().mean()
        return loss, right

    def forward(self, batch: Batch, kind: str, attention: TrainingAttention, entropy_weight: float) -> Measured:
        features = self.features(batch)
        characters, named = self.character_loss(features, batch)
        if kind == "characters":
            return Measured(characters, {"characters": characters}, named)
        answers, right = self.answer_loss(features, batch, attention)
        loss, parts = answers + CHARACTER_LOSS_WEIGHT * characters, {"answers": answers, "characters": characters}
        if attention.with_entropy:
            parts["entropy"] = attention.entropy()
            loss = loss + entropy_weight * parts["entropy"]
        return Measured(loss, parts, right)


class Trainer:
    """The loop over the stages: learning rate, optimizer, entropy control, checkpoints and log."""

    def __init__(self, stages: tuple[Stage, ...], out: Path, checkpoint: Path, seed: int, compiled: bool) -> None:
        self.stages, self.out, self.checkpoint, self.seed = stages, out, checkpoint, seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.learner = Learner(seed, compiled).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.learner.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=self.device.type == "cuda"
        )
        self.step, self.stage_index, self.stage_step, self.seconds, self.stage_start = 0, 0, 0, 0.0, 0.0
        self.entropy_weight = ENTROPY_WEIGHT
        self.history: dict[str, deque[float]] = {}
        self.tau_ratios: list[float] = []

    @property
    def stage(self) -> Stage:
        return self.stages[self.stage_index]

    @property
    def progress(self) -> float:
        """How much of the current stage is done at most, 1 at its end."""
        return max(self.stage_step / self.stage.most_steps, (self.seconds - self.stage_start) / self.stage.seconds)

    def learning_rate(self) -> float:
        """A slow decay in the curriculum; in a sparsity stage a cosine that falls to nearly nothing."""
        peak = self.stage.peak_rate
        if self.stage.kind == "sparsity":
            return peak * min(1, (self.stage_step + 1) / 100) * max(0.02, math.cos(math.pi / 2 * min(1, self.progress)))
        return peak * min(1, (self.step + 1) / 200) * max(0.3, math.cos(math.pi / 2 * min(1, self.step / 8000)))

    def ratios(self, chance: random.Random) -> list[float] | None:
        """Share of prompt tokens to keep in each layer in this step; None: dense.

        Half the time near what `TARGET_TAU` kept in each layer when last measured, otherwise from U(low, 1).
        """
        if self.stage.kind != "sparsity" or chance.random() < DENSE_SHARE:
            return None
        if self.tau_ratios and chance.random() < 0.5:
            return [round(min(1.0, ratio * math.exp(chance.uniform(-0.4, 0.6))), 2) for ratio in self.tau_ratios]
        low = LOWEST_RATIO + (self.stage.first_low - LOWEST_RATIO) * max(0.0, 1 - 2 * self.progress)
        layers = self.learner.model.config.text_config.num_hidden_layers
        return [round(chance.uniform(low, 1), 1) for _ in range(layers)]

    def train_step(self) -> tuple[Measured, bool]:
        """One batch; also says whether it was sparse."""
        seed = self.seed + self.step
        ratios = self.ratios(random.Random(seed))
        batch = make_batch(self.stage, seed, 1 if ratios else 8, self.device)
        last_stage = self.stage.kind == "sparsity"
        attention = TrainingAttention(batch.prompt, ratios, training_generator(seed, self.device), last_stage)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast(self.device.type, torch.bfloat16):
            measured = self.learner(batch, self.stage.kind, attention, self.entropy_weight)
        self.optimizer.zero_grad(set_to_none=True)
        measured.loss.backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.stage_step += 1
        return measured, ratios is not None

    def control_entropy(self) -> None:
        """Steers the entropy weight so that `TARGET_TAU` keeps `TARGET_RATIO` of the tokens late in training."""
        if self.stage.kind != "sparsity" or self.stage_step % CONTROL_EVERY:
            return
        generator = training_generator(CONTROL_SEED + self.step, self.device)
        batch = make_batch(
            replace(self.stage, batch=min(16, self.stage.batch)), CONTROL_SEED + self.step, 1, self.device
        )
        attention = DecodingAttention(generator, TARGET_TAU)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            visual = pack_features(self.learner.model, self.learner.features(batch))
            run_text_layers(
                self.learner.model,
                prompt_embeddings(self.learner.model, visual, batch.ids[:, :ANSWER_LENGTH]),
                attention,
            )
        self.tau_ratios = [share.mean().item() for share in attention.shares]
        ratio = sum(self.tau_ratios) / len(self.tau_ratios)
        self.remember("ratio", ratio)
        if self.progress >= CONTROL_FROM:
            move = CONTROL_GAIN * (ratio / TARGET_RATIO - 1)
            self.entropy_weight *= math.exp(max(-CONTROL_STEP, min(CONTROL_STEP, move)))
            self.entropy_weight = max(ENTROPY_BOUNDS[0], min(ENTROPY_BOUNDS[1], self.entropy_weight))

    def remember(self, name: str, value: float) -> None:
        self.history.setdefault(name, deque(maxlen=3)).append(value)

    def recent(self, name: str) -> float:
        """Mean of the last measurements of a number, nan before the first."""
        values = self.history.get(name, ())
        return sum(values) / len(values) if values else math.nan

    def note(self, measured: Measured, sparse: bool) -> None:
        """Reads a step's numbers back and logs them now and then."""
        for name, value in measured.parts.items():
            self.remember(name, value.item())
        self.remember("sparse" if sparse else "right", measured.right.item())
        if self.stage_step % (4 * MEASURE_EVERY) == 0:
            self.log()

    def log(self) -> None:
        numbers = {name: round(self.recent(name), 4) for name in self.history}
        if self.stage.kind == "sparsity":
            numbers["weight"] = round(self.entropy_weight, 5)
        line = {"step": self.step, "seconds": round(self.seconds), "stage": self.stage.name, **numbers}
        print(" ".join(f"{key} {value}" for key, value in line.items()), flush=True)
        with (self.checkpoint.parent / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def stage_over(self) -> bool:
        """Whether to go on to the next stage; a stage that failed ends the run."""
        passed = self.recent("right") >= self.stage.passed and len(self.history.get("right", ())) >= 2
        if passed and self.stage_step >= self.stage.least_steps:
            return True
        if self.progress < 1:
            return False
        if not self.stage.may_fall_short:
            raise SystemExit(f"stage {self.stage.name} reached {self.recent('right'):.3f}, not {self.stage.passed}")
        return True

    def run(self, seconds: float) -> bool:
        """Trains until the last stage is over (True) or `seconds` have gone by (False)."""
        start, before, saved = time.time(), self.seconds, time.time()
        while True:
            measured, sparse = self.train_step()
            self.seconds = before + time.time() - start
            self.control_entropy()
            if self.stage_step % MEASURE_EVERY == 0 or self.stage_step == self.stage.most_steps:
                self.note(measured, sparse)
                if self.stage_over():
                    self.log()
                    if self.stage_index + 1 == len(self.stages):
                        self.save()
                        return True
                    self.stage_index, self.stage_step, self.stage_start = self.stage_index + 1, 0, self.seconds
                    self.history.clear()
            if time.time() - saved > 45:
                self.save()
                saved = time.time()
            if time.time() - start > seconds:
                self.save()
                return False

    def save(self) -> None:
        """Writes the checkpoint, a light one of weights alone in bfloat16 (`*.light.pt`), and the model folder."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        progress = {
            name: getattr(self, name)
            for name in ("step", "stage_index", "stage_step", "seconds", "stage_start", "entropy_weight")
        }
        state = {"progress": progress, "learner": self.learner.state_dict()}
        light = {"progress": progress, "learner": {k: v.bfloat16() for k, v in state["learner"].items()}}
        torch.save(light, self.checkpoint.with_suffix(".light.pt"))
        temporary = self.checkpoint.with_suffix(".part")
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, temporary)
        temporary.rename(self.checkpoint)
        save_folder(self.learner.model, self.out)

    def resume(self, file: Path) -> None:
        """Goes on from a checkpoint; from a light one, or a model folder, with a fresh optimizer.

        A folder has no character head and no progress: name the stage to go on with.
        """
        if file.is_dir():
            shipped = LlavaNextForConditionalGeneration.from_pretrained(file, dtype=torch.float32)
            self.learner.model.load_state_dict(shipped.state_dict())
            self.entropy_weight = SHIPPED_ENTROPY_WEIGHT
            return
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.learner.load_state_dict(state["learner"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["progress"].items():
            setattr(self, name, value)


@torch.inference_mode()
def read_pages(
    model: LlavaNextForConditionalGeneration,
    held_out: list[Page],
    tau: float | None = None,
    ratio: float | None = None,
    batch: int = 25,
) -> tuple[list[bool], Tensor]:
    """Answers one question a page by greedy decoding (no teacher forcing), dense or with ZipVL's selection.

    Returns whether each answer was right to the end token, and the mean share of tokens kept in each layer, `[layers]`.
    """
    device = next(model.parameters()).device
    right: list[bool] = []
    shares: list[Tensor] = []
    for start in range(0, len(held_out), batch):
        pages = held_out[start : start + batch]
        images = torch.stack([page.image for page in pages]).to(device)
        prompts = [[VOCABULARY[c] for c in f"?{page.label}="] for page in pages]
        generator = torch.Generator(device).manual_seed(PROBE_SEED + start)
        attention = DecodingAttention(generator, tau, ratio)
        pixel_values = pixel_values_from_pages(images).to(model.dtype)
        features = vision_features(model, pixel_values.flatten(0, 1)).unflatten(0, (len(pages), -1))
        hidden = prompt_embeddings(model, pack_features(model, features), torch.tensor(prompts, device=device))
        position = hidden.shape[1]
        hidden = run_text_layers(model, hidden, attention)
        answer = [next_token_logits(model, hidden[:, -1:]).argmax(-1)]
        while len(answer) < ANSWER_LENGTH:
            hidden = run_text_layers(model, model.get_input_embeddings()(answer[-1]), attention, position)
            answer.append(next_token_logits(model, hidden).argmax(-1))
            position += 1
        wanted = [[CHARACTER_IDS[CHARACTERS.index(digit)] for digit in page.answer] + [EOS] for page in pages]
        right += (torch.cat(answer, 1) == torch.tensor(wanted, device=device)).all(1).tolist()
        shares.append(torch.stack(attention.shares[: len(model.model.language_model.layers)], 1).cpu())
    return right, torch.cat(shares).mean(0)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Model folder to write.")] = Path(__file__).parent,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint file to write.")] = CHECKPOINT,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint or model folder to go on from.")] = None,
    seconds: Annotated[float, typer.Option(help="Stop (and save) after so long.")] = math.inf,
    sparsity_steps: Annotated[int, typer.Option(help="Length of the last stage.")] = STAGES[-1].most_steps,
    finish_seconds: Annotated[float, typer.Option(help="Add the finishing stage, for so long.")] = 0.0,
    first_stage: Annotated[int | None, typer.Option(help="Jump to this stage, for trials.")] = None,
    seed: int = 0,
    compiled: bool = torch.cuda.is_available(),
    smoke: Annotated[bool, typer.Option(help="Every stage for two steps with two pages.")] = False,
) -> None:
    """Runs all stages and writes the model folder."""
    torch.set_float32_matmul_precision("high")
    stages = (*STAGES[:-1], replace(STAGES[-1], most_steps=sparsity_steps))
    if finish_seconds:
        stages = (*stages, replace(FINISH, seconds=finish_seconds))
    if smoke:
        stages = tuple(replace(s, batch=2, most_steps=2, seconds=math.inf, may_fall_short=True) for s in stages)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(stages, out, checkpoint, seed, compiled)
    if resume:
        trainer.resume(resume)
    if first_stage is not None:
        trainer.stage_index, trainer.stage_step, trainer.stage_start = first_stage, 0, trainer.seconds
    parameters = sum(p.numel() for p in trainer.learner.model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {trainer.device}, stage {trainer.stage.name}", flush=True)
    print("finished" if trainer.run(seconds) else "time is up; go on with --resume", flush=True)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Option(help="Model folder.")] = Path(__file__).parent,
    pages: int = 300,
    taus: str = "0.999,0.99,0.985,0.98,0.975,0.97,0.96,0.95,0.9,0.8",
    ratios: str = "0.3,0.2",
    batch: int = 25,
) -> None:
    """Exact match and kept tokens over held-out pages, dense and sparse, in plain PyTorch (bfloat16 on a GPU)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
    held_out = held_out_pages(pages)
    settings: list[dict[str, float]] = [{}]
    settings += [{"tau": float(tau)} for tau in taus.split(",") if tau]
    settings += [{"ratio": float(ratio)} for ratio in ratios.split(",") if ratio]
    for setting in settings:
        started = time.time()
        right, shares = read_pages(model, held_out, **setting, batch=batch)
        by_entries = " ".join(
            f"{n}:{sum(hits) / len(hits):.3f}"
            for n in ENTRY_COUNTS
            if (hits := [ok for ok, page in zip(right, held_out, strict=True) if len(page.entries) == n])
        )
        print(
            f"{setting or 'dense'} exact {sum(right) / len(right):.4f} kept {shares.mean():.3f} "
            f"[{' '.join(f'{s:.2f}' for s in shares.tolist())}] by entries {by_entries} {time.time() - started:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    app()
