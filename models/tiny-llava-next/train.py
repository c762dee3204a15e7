"""Trains tiny-llava-next from nothing on one GPU and saves the whole model folder.

Stages (`STAGES`): the vision tower alone with a character loss; questions about small pages with few entries; larger
pages with more; then a last stage that makes attention concentrate and survive ZipVL's token selection, mostly by
training on that selection itself (`Trainer.plan`). Every stage before the last ends when the model passes it, or the
run with it if it takes too long; the last takes the seconds that are left. Random numbers come from the step number.

    python train.py train --seconds 780                  # the whole run; the folder is saved every 45 seconds
    python train.py train --start . --out new            # from the shipped weights, if from nothing a stage is stuck
    python train.py train --finish new --out newer       # once more through the end of the last stage
    python train.py train --resume checkpoints/last.pt   # go on from there
    python train.py evaluate --pages 300                 # dense and sparse exact match, in plain PyTorch
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from network import (
    CHARACTER_IDS,
    EOS,
    TILE_SIDE,
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
    tile_side_of,
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
from sparse_attention import DecodingAttention, TrainingAttention, probe_scores, row_entropy
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration

CHECKPOINT = Path(__file__).parent / "checkpoints/last.pt"
QUESTION_LENGTH, ANSWER_LENGTH = 8, 4
"""Tokens of `?KQ=482<eos>`, and how many of them are answered: three digits and the end."""
CHARACTER_LOSS_WEIGHT, BLANK_WEIGHT = 0.3, 0.05
STUCK_SECONDS = 200
"""A stage of the curriculum that takes longer has failed and ends the run."""
TARGET_TAU, TARGET_RATIO = 0.975, 0.375
OTHER_TAUS = (0.955, 0.99)
"""A third of the batches that select by tau take another tau from this range."""
LATE = 0.5
"""From this part of the last stage on most batches select by tau."""
FINISH_RATE, FINISH_ENTROPY_WEIGHT = 5e-4, 0.003
"""With `--finish`: where the learning rate and the entropy weight begin."""
DENSE_SHARE, LATE_DENSE_SHARE = 0.3, 0.2
"""Share of the last stage's batches that are dense, with eight questions."""
TAU_SHARE, LATE_TAU_SHARE = 0.5, 0.9
"""Of the others, the share that selects by tau."""
LOWEST_RATIO = 0.15
ENTROPY_WEIGHT, ENTROPY_BOUNDS = 0.002, (0.0003, 0.03)
FIRST_TARGET, TARGET_REACHED = 0.7, 0.35
"""The ratio that the entropy weight is steered to falls from 0.7 to `TARGET_RATIO` over 35% of the last stage."""
CONTROL_GAIN, CONTROL_STEP, CONTROL_POWER, MOST_EXCESS = 0.1, 0.03, 3.0, 2.5
ENOUGH, PLENTY = 0.12, 0.25
"""A layer that keeps less than 12% has no entropy in the loss, one that keeps more than 25% its full share."""
NOTE_EVERY, LOG_SECONDS, SAVE_SECONDS = 25, 8, 45
TRAINING_PROBES, PROBE_SEED = 500_000_000, 1
"""Added to a step's seed for the probes of that step; the seed of the probes in evaluation."""


@dataclass(frozen=True)
class Stage:
    """kind: 'characters' (vision only), 'answers' or 'sparsity'. A stage before the last ends once the mean over the
    last 25 steps reaches `passed` (not before `least_steps`), or after `most_seconds`."""

    kind: str
    entries: tuple[int, ...]
    side: int
    batch: int
    passed: float
    peak_rate: float = 1e-3
    least_steps: int = 50
    most_seconds: float = math.inf

    @property
    def name(self) -> str:
        return f"{self.kind} {'/'.join(map(str, self.entries))} @{self.side}"


STAGES = (
    Stage("characters", (8,), 224, 120, 0.90),
    Stage("answers", (3,), 168, 240, 0.85),
    Stage("answers", (4,), 168, 240, 0.85),
    Stage("answers", (8,), 224, 240, 0.85),
    Stage("answers", (24,), 448, 96, 0.85),
    Stage("answers", (24,), 672, 48, 0.90),
    Stage("answers", (64,), 672, 48, 0.985, most_seconds=130),
    Stage("sparsity", (8, 16, 24, 32, 48, 64), 672, 48, math.inf, peak_rate=8e-4),
)
"""Batches with one question, in the last stage, have a third more pages."""


@dataclass(frozen=True)
class Plan:
    """How a step's attention selects tokens: by a share for each layer, by tau, or (neither) not at all."""

    ratios: list[float] | None = None
    tau: float | None = None

    @property
    def name(self) -> str:
        """Under which name the step's exact match is noted."""
        if self.tau is not None:
            return "right_tau" if self.tau == TARGET_TAU else "right_other_tau"
        return "right" if self.ratios is None else "right_ratios"


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
    """One step's loss and what it was made of; `right` is the share of characters or answers that were right.

    shares: of prompt tokens kept, `[B, layers]`, if tau decided them.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    right: Tensor
    shares: Tensor | None = None


@cache
def character_table(device: torch.device) -> Tensor:
    """The token of each character index, copied to the device once: a copy in each step would wait for the GPU."""
    return torch.tensor([*CHARACTER_IDS, VOCABULARY[" "]], device=device)


def question_ids(questions: Tensor) -> Tensor:
    """Tokens of `?KQ=482<eos>` for each question, one after the other: `[B, n, 6]` characters -> `[B, 8 * n]`."""
    table = character_table(questions.device)
    letters, digits = table[questions[..., :2]], table[questions[..., 3:]]

    def constant(token: int) -> Tensor:
        return torch.full_like(letters[..., :1], token)

    parts = [constant(VOCABULARY["?"]), letters, constant(VOCABULARY["="]), digits, constant(EOS)]
    return torch.cat(parts, -1).flatten(1)


def make_batch(stage: Stage, tile_side: int, seed: int, pages: int, questions: int, device: torch.device) -> Batch:
    """Draws a training batch; the seed fixes it (for one kind of device)."""
    generator = training_generator(seed, device)
    entries = random.Random(seed).choice(stage.entries)
    layout = random_layout(pages, entries, stage.side, tile_side, generator)
    base_view = stage.side == PAGE_SIDE
    grid, base = stage.side // PATCH, tile_side // PATCH
    return Batch(
        pixel_values_from_pages(draw(layout, generator), tile_side, base_view),
        patch_labels(layout),
        question_ids(choose_questions(layout, min(questions, entries), generator)),
        base_view,
        grid * (grid + 1) + base_view * base**2,
    )


class Learner(nn.Module):
    """The model, the character head that only training needs, and how a batch turns into a loss."""

    def __init__(self, seed: int, compiled: bool, tile_side: int = TILE_SIDE) -> None:
        super().__init__()
        self.model = build_model(seed, tile_side)
        self.character_head = nn.Linear(self.model.config.vision_config.hidden_size, 2 * (BLANK + 1))
        self.with_characters = True
        weight = torch.ones(BLANK + 1)
        weight[BLANK] = BLANK_WEIGHT
        self.register_buffer("character_weight", weight, persistent=False)
        functions = (encoder_layer, attention_inputs, attention_outputs, probe_scores, row_entropy)
        if compiled:
            torch._dynamo.config.recompile_limit = 32  # past it a function would silently run uncompiled
            functions = tuple(torch.compile(function, dynamic=True) for function in functions)
        self.vision_layer, self.text_layer, self.attention_functions = functions[0], functions[1:3], functions[3:]

    def start_from(self, folder: Path) -> None:
        """Takes the weights of a model folder, whose tiles may be larger: it keeps their top left positions."""
        start = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        weights = start.state_dict()
        name = next(name for name in weights if name.endswith("position_embedding.weight"))
        full, side = (tile_side_of(model) // PATCH for model in (start, self.model))
        top_left = weights[name][1:].view(full, full, -1)[:side, :side].flatten(0, 1)
        self.model.load_state_dict(weights | {name: torch.cat([weights[name][:1], top_left])})

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
        """Loss of the answer tokens given those before, and which answers have every token right, `[B, questions]`."""
        visual = pack_features(self.model, features, batch.base_view)
        hidden = prompt_embeddings(self.model, visual, batch.ids[:, :-1])
        hidden = run_text_layers(self.model, hidden, attention, layer_functions=self.text_layer)[:, 1 + batch.visual :]
        hidden = F.pad(hidden, (0, 0, 0, 1)).unflatten(1, (-1, QUESTION_LENGTH))[:, :, ANSWER_LENGTH - 1 : -1]
        targets = batch.ids.unflatten(1, (-1, QUESTION_LENGTH))[:, :, ANSWER_LENGTH:]
        logits = next_token_logits(self.model, hidden).float()  # [B, questions, 4, vocabulary]
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
        return loss, (logits.argmax(-1) == targets).all(-1).float()

    def forward(self, batch: Batch, kind: str, attention: TrainingAttention, entropy_weights: Tensor) -> Measured:
        """entropy_weights: of each layer's mean entropy, `[layers]`."""
        features = self.features(batch)
        if kind == "characters":
            characters, named = self.character_loss(features, batch)
            return Measured(characters, {"characters": characters}, named)
        answers, right = self.answer_loss(features, batch, attention)
        loss, parts = answers, {"answers": answers}
        if self.with_characters:
            characters, _ = self.character_loss(features, batch)
            loss, parts["characters"] = loss + CHARACTER_LOSS_WEIGHT * characters, characters
        if right.shape[1] > 1:
            parts["right_first"] = right[:, 0].mean()  # later questions may be answered by elimination
        if attention.with_entropy:
            entropies = torch.stack(attention.entropies)
            parts["entropy"] = entropies.mean()
            loss = loss + (entropy_weights * entropies).mean()
        return Measured(loss, parts, right.mean(), torch.stack(attention.shares, 1) if attention.shares else None)


@dataclass
class Kept:
    """Shares of prompt tokens that `TARGET_TAU` kept in each layer when last noted: mean, and the most in any row."""

    mean: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Mean over the layers."""
        return sum(self.mean) / len(self.mean)


class Trainer:
    """The loop over the stages: learning rate, optimizer, entropy control, checkpoints and log.

    Nothing is read back from the GPU in a step; every 25 steps `note` reads what they measured, all at once.
    """

    def __init__(self, out: Path, checkpoint: Path, seed: int, compiled: bool, seconds: float, smoke: bool) -> None:
        self.out, self.checkpoint, self.seed, self.budget = out, checkpoint, seed, seconds
        self.smoke_steps = 2 if smoke else None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.learner = Learner(seed, compiled).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.learner.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=self.device.type == "cuda"
        )
        self.step, self.stage_index, self.stage_step, self.seconds, self.stage_start = 0, 0, 0, 0.0, 0.0
        self.entropy_weight = ENTROPY_WEIGHT
        self.finishing = False
        self.kept = Kept()
        self.layer_weights = self.weights_of_layers()
        self.unread: dict[str, list[Tensor]] = {}
        self.unread_shares: list[Tensor] = []
        self.numbers: dict[str, float] = {}
        self.logged = -math.inf

    def finish(self, folder: Path) -> None:
        """Goes once more through the end of the last stage with a folder's weights.

        The rate begins at `FINISH_RATE`, most batches select by tau, and there is no character loss: the head that it
        needs is not in the folder, and a new one would disturb the vision tower.
        """
        self.learner.start_from(folder)
        self.stage_index, self.entropy_weight = len(STAGES) - 1, FINISH_ENTROPY_WEIGHT
        self.set_finishing(True)
        self.layer_weights = self.weights_of_layers()

    def set_finishing(self, finishing: bool) -> None:
        self.finishing, self.learner.with_characters = finishing, not finishing

    @property
    def stage(self) -> Stage:
        return STAGES[self.stage_index]

    @property
    def last_stage(self) -> bool:
        return self.stage_index + 1 == len(STAGES)

    @property
    def progress(self) -> float:
        """How much of the current stage's time is over; 0 where it has no limit."""
        if self.smoke_steps:
            return self.stage_step / (self.smoke_steps * (6 if self.last_stage else 1))
        limit = self.budget - self.stage_start if self.last_stage else self.stage.most_seconds
        return min(1.0, (self.seconds - self.stage_start) / limit)

    def learning_rate(self) -> float:
        """Constant in the curriculum, falling to 30% in a stage of limited time; in the last a cosine to nearly 0."""
        peak, done = FINISH_RATE if self.finishing else self.stage.peak_rate, self.progress
        if self.last_stage:
            return peak * min(1, (self.stage_step + 1) / 100) * max(0.01, math.cos(math.pi / 2 * done))
        return peak * min(1, (self.step + 1) / 200) * (1 - 0.7 * done)

    def plan(self, chance: random.Random) -> Plan:
        """How this step selects tokens.

        In the last stage: dense; by tau, as it will be evaluated; or by shares, half of them near what `TARGET_TAU`
        kept when last noted, the others from U(low, 1), low falling from 0.6 to `LOWEST_RATIO` by mid-stage.
        """
        late = self.finishing or self.progress >= LATE
        if not self.last_stage or chance.random() < (LATE_DENSE_SHARE if late else DENSE_SHARE):
            return Plan()
        if chance.random() < (LATE_TAU_SHARE if late else TAU_SHARE):
            return Plan(tau=TARGET_TAU if chance.random() < 2 / 3 else chance.uniform(*OTHER_TAUS))
        if self.kept.mean and chance.random() < 0.5:
            return Plan([round(min(1.0, share * math.exp(chance.uniform(-0.4, 0.6))), 2) for share in self.kept.mean])
        low = LOWEST_RATIO + (0.6 - LOWEST_RATIO) * max(0.0, 1 - 2 * self.progress)
        return Plan([round(chance.uniform(low, 1), 1) for _ in range(len(self.layer_weights))])

    def limits(self, plan: Plan) -> list[float] | None:
        """For each layer a share that no row is likely to need at `TARGET_TAU`; None where there is no telling."""
        if plan.tau != TARGET_TAU or not self.kept.most:
            return None
        return [min(1.0, 1.2 * share + 0.05) for share in self.kept.most]

    def train_step(self) -> None:
        """Draws one batch and learns from it."""
        seed = self.seed + self.step
        plan = self.plan(random.Random(f"plan {seed}"))
        dense = plan == Plan()
        pages = 2 if self.smoke_steps else self.stage.batch if dense else self.stage.batch * 4 // 3
        tile_side = tile_side_of(self.learner.model)
        batch = make_batch(self.stage, tile_side, seed, pages, 8 if dense else 1, self.device)
        attention = TrainingAttention(
            batch.prompt,
            training_generator(TRAINING_PROBES + seed, self.device),
            ratios=plan.ratios,
            tau=plan.tau,
            limits=self.limits(plan),
            with_entropy=self.last_stage,
            functions=self.learner.attention_functions,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast(self.device.type, torch.bfloat16):
            measured = self.learner(batch, self.stage.kind, attention, self.layer_weights)
        self.optimizer.zero_grad(set_to_none=True)
        measured.loss.backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.stage_step += 1
        for name, value in {**measured.parts, plan.name: measured.right}.items():
            self.unread.setdefault(name, []).append(value.detach())
        if plan.tau == TARGET_TAU and measured.shares is not None:
            self.unread_shares.append(measured.shares)

    def note(self) -> None:
        """Reads back the means of what was measured since the last note, and steers the entropy."""
        names = list(self.unread)
        means = [torch.stack(values).float().mean()[None] for values in self.unread.values()]
        if self.unread_shares:
            shares = torch.cat(self.unread_shares)
            means += [shares.mean(0), shares.amax(0)]
        numbers = torch.cat(means).tolist()
        self.numbers |= dict(zip(names, numbers, strict=False))
        if self.unread_shares:
            layers = len(self.layer_weights)
            self.kept = Kept(numbers[-2 * layers : -layers], numbers[-layers:])
            self.control_entropy()
        self.unread.clear()
        self.unread_shares.clear()

    def target_ratio(self) -> float:
        """What `TARGET_TAU` should keep by now."""
        reached = 1.0 if self.finishing else min(1.0, self.progress / TARGET_REACHED)
        return FIRST_TARGET * (TARGET_RATIO / FIRST_TARGET) ** reached

    def control_entropy(self) -> None:
        """Steers the entropy weight, slowly, so that `TARGET_TAU` keeps what it should."""
        move = CONTROL_GAIN * math.log(self.kept.ratio / self.target_ratio())
        self.entropy_weight *= math.exp(max(-CONTROL_STEP, min(CONTROL_STEP, move)))
        self.entropy_weight = max(ENTROPY_BOUNDS[0], min(ENTROPY_BOUNDS[1], self.entropy_weight))
        self.layer_weights = self.weights_of_layers()

    def weights_of_layers(self) -> Tensor:
        """The entropy weight of each layer: more while too much is kept, less and then none where little is kept."""
        layers = self.learner.model.config.text_config.num_hidden_layers
        weights = [self.entropy_weight] * layers
        if self.kept.mean:
            excess = max(0.1, min(MOST_EXCESS, (self.kept.ratio / self.target_ratio()) ** CONTROL_POWER))
            floors = [max(0.0, min(1.0, (share - ENOUGH) / (PLENTY - ENOUGH))) for share in self.kept.mean]
            weights = [self.entropy_weight * excess * floor for floor in floors]
        return torch.tensor(weights, device=self.device)

    def log(self) -> None:
        line: dict[str, object] = {"step": self.step, "seconds": round(self.seconds), "stage": self.stage.name}
        line |= {name: round(value, 4) for name, value in self.numbers.items()}
        if self.kept.mean:
            line |= {"kept": round(self.kept.ratio, 3), "target": round(self.target_ratio(), 3)}
            line |= {"layers": [round(share, 2) for share in self.kept.mean], "weight": round(self.entropy_weight, 5)}
        line["rate"] = round(self.learning_rate(), 6)
        print(" ".join(f"{key} {value}" for key, value in line.items()), flush=True)
        with (self.checkpoint.parent / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        self.logged = self.seconds

    def stage_over(self) -> bool:
        """Whether to go on to the next stage."""
        if self.progress >= 1 or self.last_stage:
            return self.progress >= 1
        return self.numbers.get("right", 0.0) >= self.stage.passed and self.stage_step >= self.stage.least_steps

    def check_stuck(self) -> None:
        """Ends the run if a stage without a time limit is not passed in `STUCK_SECONDS`."""
        limited = self.last_stage or self.stage.most_seconds < math.inf
        if not limited and self.seconds - self.stage_start > STUCK_SECONDS:
            raise SystemExit(f"stage {self.stage.name} is stuck at {self.numbers['right']:.3f} of {self.stage.passed}")

    def run(self) -> None:
        """Trains until the last stage is over, or `seconds` have gone by in an earlier one, and saves."""
        start, saved = time.time() - self.seconds, self.seconds
        note_every = 2 if self.smoke_steps else NOTE_EVERY
        while self.seconds < self.budget:
            self.train_step()
            self.seconds = time.time() - start
            if self.stage_step % note_every == 0:
                self.note()
                over = self.stage_over()
                if over or self.seconds - self.logged > LOG_SECONDS:
                    self.log()
                if over and self.last_stage:
                    break
                if over:
                    self.stage_index, self.stage_step, self.stage_start = self.stage_index + 1, 0, self.seconds
                    self.numbers.clear()
                else:
                    self.check_stuck()
            if self.seconds - saved > SAVE_SECONDS:
                self.save()
                saved = self.seconds
        if self.unread:
            self.note()
            self.log()
        self.save()

    def save(self) -> None:
        """Writes the model folder and, for resuming, the checkpoint."""
        save_folder(self.learner.model, self.out)
        names = ("step", "stage_index", "stage_step", "seconds", "stage_start", "entropy_weight", "finishing")
        state = {"learner": self.learner.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["progress"] = {name: getattr(self, name) for name in names}
        partial = self.checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def resume(self, file: Path) -> None:
        """Goes on from a checkpoint."""
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        self.set_finishing(self.finishing)


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
        pixel_values = pixel_values_from_pages(images, tile_side_of(model)).to(model.dtype)
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
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint to write, with the optimizer; log.jsonl beside it.")] = (
        CHECKPOINT
    ),
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to go on from.")] = None,
    start: Annotated[Path | None, typer.Option(help="Model folder whose weights to begin with.")] = None,
    finish: Annotated[Path | None, typer.Option(help="Model folder whose last stage to end once more.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for all stages; the last takes what the others leave.")] = 780,
    seed: int = 0,
    compiled: bool = torch.cuda.is_available(),
    smoke: Annotated[bool, typer.Option(help="A few steps of each stage with two pages.")] = False,
) -> None:
    """Runs all stages and writes the model folder."""
    torch.set_float32_matmul_precision("high")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(out, checkpoint, seed, compiled, math.inf if smoke else seconds, smoke)
    if resume:
        trainer.resume(resume)
    elif finish:
        trainer.finish(finish)
    elif start:
        trainer.learner.start_from(start)
        trainer.stage_index = 1  # the vision tower alone has nothing left to learn
    parameters = sum(p.numel() for p in trainer.learner.model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {trainer.device}, stage {trainer.stage.name}", flush=True)
    trainer.run()


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
    held_out = held_out_pages(pages, tile_side_of(model))
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
