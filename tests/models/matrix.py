"""Every model that transformers' auto mappings name, as a tiny random one: what zipvl makes of it, and whether it is
right.

``python -m tests.models.matrix docs/models.md`` examines all of them and writes the page (``make models``); names of
classes behind it examine those alone and write their rows anew.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import configuration_auto, modeling_auto

import zipvl
from tests.models.tiny_configs import FIRST_SPECIAL, shrink
from zipvl.transformers import cache_names
from zipvl.transformers.target import find

MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image and text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}
TOKENS, NEW, SECONDS = 300, 3, 120
GENERATE: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
PAPER = zipvl.ZipVLConfig.paper(dense_below=0)
_ORACLE = "zipvl_test_kept"


@dataclass
class Row:
    """What became of one model.

    Args:
        verdict: ``sparse``, ``dense``, ``refused``, ``not built`` or ``wrong``.
        reason: of layers that are dense, of the refusal, or why there is no tiny model of it.
        sparse, layers: how many layers were sparse, and of how many there are statistics.
        wrong: checks that failed.
    """

    model: str
    kind: str
    verdict: str = "not built"
    reason: str = ""
    sparse: int = 0
    layers: int = 0
    wrong: list[str] = field(default_factory=list)


def entries() -> dict[str, tuple[str, str]]:
    """Class names of all models, each with its model type and the kind of its mapping."""
    found: dict[str, tuple[str, str]] = {}
    for kind, mapping in MAPPINGS.items():
        for model_type, names in getattr(modeling_auto, mapping, {}).items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, (model_type, kind))
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def examine(name: str) -> Row:
    """Builds a tiny model of class ``name`` and tries all that zipvl does with it."""
    model_type, kind = entries()[name]
    row = Row(name, kind)
    with torch.no_grad(), warnings.catch_warnings(), _alarm():
        warnings.simplefilter("ignore")
        try:
            for head_dim in (32, 128):  # some models ask for rotary sections of a given size
                model, problem = _build(name, model_type, head_dim)
                if problem is None:
                    break
            row.reason = problem or ""
            if model is not None and problem is None:
                _try_all(model, row)
        except TimeoutError:
            row.reason = row.reason or f"takes more than {SECONDS} s"
    gc.collect()
    return row


def _build(name: str, model_type: str, head_dim: int) -> tuple[Any, str | None]:
    """A model that runs densely and decodes; or why there is none."""
    try:
        kind = getattr(tf, name).config_class or configuration_auto.CONFIG_MAPPING[model_type]
        config = kind(**shrink(kind(), head_dim))
        if getattr(config, "is_encoder_decoder", False):
            return None, "an encoder-decoder"
        torch.manual_seed(0)
        model = getattr(tf, name)._from_config(config, dtype=torch.float32).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=1.2 / module.weight.shape[1] ** 0.5)
    except TimeoutError:
        raise
    except (Exception, SystemExit) as error:
        return None, f"no tiny configuration: {_line(error)}"
    if not model.can_generate():
        return model, "it has no generate()"
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    try:
        model(**_prompt(TOKENS, 1))
        model.generate(**_prompt(TOKENS, 1), **GENERATE)
    except TimeoutError:
        raise
    except Exception as error:
        return model, f"a text prompt does not run without zipvl: {_line(error)}"
    return model, None


def _try_all(model: Any, row: Row) -> None:
    """Fills in ``row``."""
    prompt, config = _prompt(TOKENS, 1), PAPER
    dense, tokens = model(**prompt).logits, model.generate(**prompt, **GENERATE)
    refused = _refused(model, config)
    if refused is not None and 'use cache="full"' in str(refused):
        config = PAPER.replace(cache="full")
        refused = _refused(model, config)
    refused = refused or _unreached(model, config, prompt)
    if refused is not None:
        row.verdict, row.reason = "refused", _line(refused)
        if not str(refused).lower().startswith("zipvl"):
            row.wrong.append("the refusal is not zipvl's")
            row.verdict = "wrong"
        return
    exact = config.replace(tau=1.0)
    checks = {
        "tau 1": lambda: _same(_run(model, exact, prompt, row), dense),
        "generate": lambda: torch.equal(_generated(model, exact, prompt), tokens),
        "kept tokens": lambda: _as_masked(model, config.replace(tau=0.9), prompt),
        "a padded batch": lambda: _batch(model, exact),
        "a second turn": lambda: _second_turn(model, exact),
        "quantize": lambda: _quantized(model, prompt),
    }
    for name, check in checks.items():
        try:
            if not check():
                row.wrong.append(name)
        except TimeoutError:
            row.wrong.append(f"{name}: takes more than {SECONDS} s")
            break
        except Exception as error:
            row.wrong.append(f"{name}: {_line(error)}")
    row.verdict = "wrong" if row.wrong else "sparse" if row.sparse else "dense"
    if config.cache == "full":
        row.reason = "; ".join(filter(None, (row.reason, 'cache="full" alone')))


def _refused(model: Any, config: zipvl.ZipVLConfig) -> Exception | None:
    """The error that a block of ``config`` begins with; None: there is none."""
    try:
        with zipvl.sparse(model, config):
            return None
    except ValueError as error:
        return error


def _unreached(model: Any, config: zipvl.ZipVLConfig, prompt: dict[str, torch.Tensor]) -> Exception | None:
    """The error behind a prompt whose keyword arguments the model did not hand on to its attention; None: it did."""
    try:
        with zipvl.sparse(model, config):
            model(**prompt)
    except RuntimeError as error:
        return error if "do not hand keyword arguments on" in str(error) else None
    except Exception:
        return None  # which the checks meet again
    return None


def _run(model: Any, config: zipvl.ZipVLConfig, prompt: dict[str, torch.Tensor], row: Row) -> torch.Tensor:
    """Logits; writes what the layers were."""
    with zipvl.sparse(model, config) as stats:
        logits: torch.Tensor = model(**prompt).logits
    row.layers = len(stats.layers)
    row.sparse = sum(layer.mode == "sparse" for layer in stats.layers.values())
    row.reason = "; ".join(sorted({layer.reason for layer in stats.layers.values() if layer.reason}))
    return logits


def _generated(model: Any, config: zipvl.ZipVLConfig, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    with zipvl.sparse(model, config):
        tokens: torch.Tensor = model.generate(**prompt, **GENERATE)
    return tokens


def _as_masked(model: Any, config: zipvl.ZipVLConfig, prompt: dict[str, torch.Tensor]) -> bool:
    """Whether decoding gives the logits of one dense forward in which dropped tokens are masked. Of a model that
    decodes without a cache, whose steps are prompts of their own, or otherwise than one forward computes without zipvl
    too, the prompt alone."""
    with zipvl.sparse(model, config, record_index=True) as stats:
        prefill = model(**prompt).logits[:, -1:]
        kept = {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}
        tokens, logits = _decoded(model, prompt)
        cached = all(layer.tokens == [TOKENS] for layer in stats.layers.values())
    if not kept:
        return True
    cached = cached and _same(*_twice(model, prompt))
    with _kept_alone(model, kept, full=config.cache == "full"):
        expected = _in_one(model, tokens)
    return _same(prefill, expected[:, :1]) and (not cached or _same(logits, expected))


def _twice(model: Any, prompt: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of new tokens by decoding, and by one forward."""
    tokens, logits = _decoded(model, prompt)
    return logits, _in_one(model, tokens)


def _decoded(model: Any, prompt: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``[1, TOKENS + NEW]`` tokens and the ``[1, NEW, vocabulary]`` logits of the new ones."""
    output = model.generate(**prompt, **GENERATE, return_dict_in_generate=True, output_logits=True)
    return output.sequences, torch.stack(output.logits, dim=1)


def _in_one(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits that one forward gives for the new ones of ``tokens``."""
    whole = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    logits: torch.Tensor = model(**whole, use_cache=False).logits[:, TOKENS - 1 : -1]
    return logits


def _batch(model: Any, config: zipvl.ZipVLConfig) -> bool:
    """Whether a batch padded on the left gives the tokens of dense attention."""
    short, long = _prompt(TOKENS - 30, 2), _prompt(TOKENS, 3)
    batch = {k: torch.cat([torch.nn.functional.pad(short[k], (30, 0)), long[k]]) for k in long}
    return torch.equal(_generated(model, config, batch), model.generate(**batch, **GENERATE))


def _second_turn(model: Any, config: zipvl.ZipVLConfig) -> bool:
    """Whether tokens behind a prompt give the logits of dense attention."""
    first, more = _prompt(TOKENS, 1), _prompt(5, 4)["input_ids"]
    name = cache_names.name_for(type(model).forward)

    def turns() -> Any:
        output = model(**first, use_cache=True)
        past = cache_names.of_output(output)
        return None if past is None else model(input_ids=more, use_cache=True, **{name: past}).logits

    try:
        expected = turns()
    except Exception:  # without zipvl
        return True
    if expected is None:
        return True
    with zipvl.sparse(model, config):
        return _same(turns(), expected)


def _quantized(model: Any, prompt: dict[str, torch.Tensor]) -> bool:
    """Whether a quantised cache decodes, or is refused by us."""
    try:
        tokens = _generated(model, PAPER.replace(cache="quantize", tau=0.9), prompt)
    except ValueError as error:
        return any(reason in str(error) for reason in ("head dimension", 'use cache="full"'))
    return tokens.shape[1] == TOKENS + NEW


@contextmanager
def _kept_alone(model: Any, kept: dict[int, torch.Tensor], *, full: bool) -> Iterator[None]:
    """In layers of ``kept`` of the prompt these tokens alone are seen, by later tokens too unless the cache is
    ``full``, and its other rows are 0. SDPA otherwise."""
    config_objects = find(model).configs

    def attention(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: Any, **given: Any
    ) -> tuple[torch.Tensor, None]:
        index = getattr(module, "layer_idx", None)
        if index not in kept or not getattr(module, "is_causal", False):
            return sdpa_attention_forward(module, q, k, v, attention_mask, **given)
        alive = torch.arange(q.shape[2]) >= TOKENS
        alive[kept[index]] = True
        whole = torch.arange(q.shape[2])[:, None] >= TOKENS if full else torch.tensor(False)
        causal = torch.ones(q.shape[2], q.shape[2]).tril().bool() & (alive | whole)
        out, _ = sdpa_attention_forward(module, q, k, v, causal[None, None].expand(q.shape[0], -1, -1, -1), **given)
        return out * alive[:, None, None], None

    before = [config._attn_implementation_internal for config in config_objects]
    AttentionInterface.register(_ORACLE, attention)
    AttentionMaskInterface.register(_ORACLE, sdpa_mask)
    try:
        for config in config_objects:
            config._attn_implementation_internal = _ORACLE
        yield
    finally:
        for config, implementation in zip(config_objects, before, strict=True):
            config._attn_implementation_internal = implementation
        del ALL_ATTENTION_FUNCTIONS._global_mapping[_ORACLE]


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to rounding, which layers of random weights amplify."""
    return bool((found - expected).abs().max() <= 2e-3 * max(1.0, float(expected.abs().max())))


def _prompt(tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """One prompt of text."""
    ids = torch.randint(3, FIRST_SPECIAL - 10, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if not text.lower().startswith("zipvl") else text


@contextmanager
def _alarm() -> Iterator[None]:
    """Raises ``TimeoutError`` after ``SECONDS`` of the processor."""

    def ring(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


INTRODUCTION = """# Models

Written by `make models`: every model that transformers {version} maps to causal language models, image-text-to-text
models and multimodal ones, as a tiny random model, with a prompt of {tokens} tokens of text. A model is *sparse* if
layers of it were, and at `tau=1` its logits and tokens are those of its own attention, also in a padded batch and in a
second turn; at `tau=0.9` decoding behind a `drop` cache gives the logits of one dense forward in which the dropped
tokens are masked; and a quantised cache decodes. Models that say `cache="full"` alone were tried with it, because their
cache holds latents. A model is *dense* if no layer can be sparse, for the reason given, and
right all the same. *Refused* models are an error at the start of the block, or behind the first prompt where that
alone tells. The others could not be tried: there is no
tiny model of them here that runs without zipvl. Images are not part of this run; [transformers.md](transformers.md)
says what is tested with them.

{counts}
"""


def page(rows: list[Row]) -> str:
    """docs/models.md."""
    counts = Counter(row.verdict for row in rows)
    listed = ", ".join(
        f"{counts[verdict]} {verdict}" for verdict in ("sparse", "dense", "refused", "not built", "wrong")
    )
    parts = [INTRODUCTION.format(version=tf.__version__, tokens=TOKENS, counts=f"{len(rows)} models: {listed}.")]
    for verdict in ("wrong", "sparse", "dense", "refused", "not built"):
        chosen = [row for row in rows if row.verdict == verdict]
        if chosen:
            parts.append(f"## {verdict.capitalize()}\n\n| model | sparse layers | reason |\n|---|---|---|")
            parts[-1] += "".join(
                f"\n| {row.model} | {f'{row.sparse} of {row.layers}' if row.layers else ''} | {_cell(row)} |"
                for row in chosen
            )
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _cell(row: Row) -> str:
    return "; ".join(row.wrong or [row.reason]).replace("|", "\\|").replace("<", "&lt;")


def rows_of(text: str) -> dict[str, Row]:
    """The rows of a page."""
    found: dict[str, Row] = {}
    for section in text.split("\n## ")[1:]:
        verdict = section.split("\n")[0].lower()
        for line in section.split("\n")[4:]:
            if not line.startswith("| "):
                continue
            name, layers, words = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:4])
            words = words.replace("&lt;", "<").replace("\\|", "|")
            row = found[name] = Row(name, entries()[name][1], verdict, words)
            if verdict == "wrong":
                row.reason, row.wrong = "", words.split("; ")
            if layers:
                row.sparse, row.layers = (int(number) for number in layers.split(" of "))
    return found


def main(path: str, *names: str) -> int:
    """Examines these models, or all, and writes the page; how many are wrong."""
    torch.set_num_threads(1)  # products this small
    rows = rows_of(Path(path).read_text()) if names else {}
    for name in names or entries():
        row = rows[name] = examine(name)
        print(f"{name}: {row.verdict} {row.wrong or row.reason}", flush=True)
        if len(rows) == len(entries()):
            Path(path).write_text(page([rows[name] for name in entries()]))
    return sum(row.verdict == "wrong" for row in rows.values())


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main(*sys.argv[1:]))
