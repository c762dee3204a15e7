"""Find and load an image-text-to-text model and its processor; say in one line why not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from zipvl.errors import InputError, first_line, shortened
from zipvl.support import support

__all__ = ["Loaded", "default_model", "gpu_problem", "load", "resolve_device", "resolve_dtype", "shipped_pages"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_TIMEOUT_S = 5.0

# What transformers, safetensors and the processors raise for files that are missing, foreign or damaged.
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Loaded:
    """A model ready to be asked.

    Attributes:
        name: folder or hub id it came from.
        model: the model, in evaluation mode, on ``device``.
        processor: its processor, which has a chat template; the tokenizer of a model of text.
        device, dtype: where the model lies and in what.
        notes: what the user should know about the loading, one line each.
    """

    name: str
    model: Any
    processor: Any
    device: torch.device
    dtype: torch.dtype
    notes: tuple[str, ...] = ()


def default_model() -> str:
    """``$ZIPVL_MODEL``, or the tiny model of the checkout that this package lies in (relative if below here)."""
    from_environment = os.environ.get("ZIPVL_MODEL")
    if from_environment:
        return from_environment
    folder = _tiny_model()
    if not (folder / "config.json").is_file():
        raise InputError("model", f"there is no default model at {folder}: pass a folder or hub id, or set ZIPVL_MODEL")
    return str(_from_here(folder))


def shipped_pages() -> Path:
    """The folder of pages of the checkout that this package lies in (relative if below here), for the tiny model."""
    folder = _tiny_model() / "pages"
    if not folder.is_dir():
        raise InputError("data", f"there are no pages at {folder}: pass a folder of pictures or a JSONL file")
    return _from_here(folder)


def _tiny_model() -> Path:
    return Path(__file__).resolve().parents[2] / "models" / "tiny-llava-next"


def _from_here(folder: Path) -> Path:
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that is there and that zipvl's ops run on."""
    if name == "auto":
        return torch.device("cuda" if gpu_problem() is None else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError("device", f"expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError("device", f"expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        problem = gpu_problem()
        if torch.cuda.is_available() and (device.index or 0) >= torch.cuda.device_count():
            problem = f"there are {torch.cuda.device_count()} CUDA devices"
        if problem is not None:
            raise InputError("device", f"{name!r} asked for, but {problem}")
    return device


def gpu_problem() -> str | None:
    """Why zipvl's ops do not run on CUDA devices, or that there are none; ``None`` where they do."""
    if not torch.cuda.is_available():
        return f"this torch ({torch.__version__}) sees no CUDA device"
    import_module("zipvl.ops")
    how = support("zipvl_attn", "cuda")
    return how.reason if how.state == "unavailable" else None


def resolve_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; ``None`` for ``auto``, the checkpoint's own."""
    if name == "auto":
        return None
    if name not in DTYPES:
        raise InputError("dtype", f"expected auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def load(name: str, *, device: str = "auto", dtype: str = "auto", text: bool = False) -> Loaded:
    """Load model and processor from a folder or the hub.

    Cheap things are checked first: device, dtype, whether the model is there, whether it is an image-text-to-text
    model, whether its processor has a chat template; then the weights are read. A hub that does not answer within
    seconds is not retried: the local cache is used, or the error says that it holds nothing.

    Args:
        name: the folder or the hub id; with ``text`` a GGUF file too, which transformers reads with the package gguf.
        device: as for ``resolve_device``.
        dtype: as for ``resolve_dtype``.
        text: no picture will be shown: a causal language model does, whose processor is its tokenizer.

    Raises:
        InputError: one of these things is not so.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    where, kind = resolve_device(device), resolve_dtype(dtype)
    given: dict[str, Any] = {}
    if text and name.endswith(".gguf") and os.path.isfile(name):
        source, given = os.path.dirname(name) or ".", {"gguf_file": os.path.basename(name), "local_files_only": True}
    else:
        source, given["local_files_only"] = _locate(name)
    try:
        config = AutoConfig.from_pretrained(source, **given)
    except _LOAD_ERRORS as error:
        raise _not_loaded(name, "its configuration cannot be read", error) from error
    model_class: Any = AutoModelForImageTextToText
    if type(config) not in model_class._model_mapping:
        if not text or type(config) not in AutoModelForCausalLM._model_mapping:
            expected = (
                "a causal language model or an image-text-to-text model" if text else "an image-text-to-text model"
            )
            raise InputError("model", f"expected {expected}, but {name} is of type {config.model_type!r}")
        model_class = AutoModelForCausalLM
    of_text = model_class is AutoModelForCausalLM
    try:
        processor: Any = (AutoTokenizer if of_text else AutoProcessor).from_pretrained(source, **given)
    except _LOAD_ERRORS as error:
        raise _not_loaded(name, f"its {'tokenizer' if of_text else 'processor'} cannot be loaded", error) from error
    if not text and not getattr(processor, "chat_template", None):
        raise InputError("model", f"the processor of {name} has no chat template, so a question cannot be put to it")
    try:
        loaded: Any = model_class.from_pretrained(
            source, config=config, dtype=kind or "auto", output_loading_info=True, **given
        )
        model, info = loaded
        model = model.to(where).eval()
    except (*_LOAD_ERRORS, SafetensorError) as error:
        raise _not_loaded(name, "its weights cannot be loaded", error) from error
    missing = sorted(info.get("missing_keys", ()))
    notes = (f"{len(missing)} weights are not in the checkpoint and random, {missing[0]} first",) if missing else ()
    return Loaded(name, model, processor, where, model.dtype, notes)


def _locate(name: str) -> tuple[str, bool]:
    """What to hand to ``from_pretrained``, and whether only the local cache may be used."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            raise InputError("model", f"expected a model folder, but {folder} has no config.json")
        return str(folder), True
    if os.path.exists(folder):
        raise InputError("model", f"expected a folder or a hub id, but {folder} is a file")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError("model", f"expected a folder or a hub id, but {shortened(name)!r} is neither") from error
    problem = _hub_problem(name)
    if problem is None:
        return name, False
    if not _is_cached(name):
        raise InputError(
            "model", f"{name} is no folder here, and as a hub id it is not in the local cache and {problem}"
        )
    return name, True


def _hub_problem(name: str) -> str | None:
    """Why the hub cannot serve ``name``; ``None`` where it can. One request, no retries."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids fetching it"
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except GatedRepoError:
        return "the hub gives it only to accounts that were granted access"
    except RepositoryNotFoundError:
        return "the hub has no model of that name that this account may see"
    except HfHubHTTPError as error:
        return f"the hub refuses it ({first_line(error)})"
    except Exception as error:  # each HTTP client behind the hub has its own errors
        return f"the hub is not reachable ({first_line(error)})"
    return None


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _not_loaded(name: str, what: str, error: BaseException) -> InputError:
    return InputError("model", f"{name} does not load, {what}: {first_line(error)}")
