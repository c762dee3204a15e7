"""tiny-llava-next inside vLLM: its files as vLLM names them, its prompts, and an engine in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-llava-next"
NAMES = ("demo", "dense")  # pages
TEXT = [1 + (i * i * 7 + i) % 60 for i in range(900)]  # ids of a text that means nothing
TOKENS = 2613  # of a prompt
WHOLE = {"enable_prefix_caching": False, "max_num_batched_tokens": 4200}  # a prompt is one step
PAPER = {"tau": 0.975, "local_window": 0, "num_sinks": 0}


def served_copy(folder: Path) -> Path:
    """A copy of the model in ``folder`` whose vision tower has the names that vLLM's CLIP expects."""
    from safetensors.torch import load_file, save_file

    for path in MODEL.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder / path.name)
    weights = load_file(MODEL / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def text_copy(folder: Path) -> Path:
    """The language model of tiny-llava-next alone in ``folder``."""
    from safetensors.torch import load_file, save_file

    whole = json.loads((MODEL / "config.json").read_text())
    text = whole["text_config"] | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(text))
    whole_weights = load_file(MODEL / "model.safetensors")
    prefix = "language_model."
    weights = {name[len(prefix) :]: tensor for name, tensor in whole_weights.items() if name.startswith(prefix)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_copy(folder: Path) -> Path:
    """A decoder of Qwen2's kind with head dim 128 in ``folder``: random, with sharp attention and unlike logits."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=512, hidden_size=512, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, rope_theta=1e6, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(config, dtype=torch.float32)
    gains = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 3.0}
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            tensor = torch.zeros_like(tensor)
        elif tensor.dim() == 2:
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            tensor = torch.randn_like(tensor) * (1.0 if "embed" in name else gain * tensor.shape[1] ** -0.5)
        weights[name] = tensor.bfloat16().contiguous()
    config.architectures, config.dtype = ["Qwen2ForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def page(name: str) -> tuple[Image.Image, str, str]:
    """A page of the model's folder, the label that is asked for, and the answer."""
    asked = json.loads((MODEL / "pages" / f"{name}.json").read_text())
    return Image.open(MODEL / "pages" / f"{name}.png"), asked["question"], asked["answer"]


def prompt(name: str) -> dict[str, Any]:
    """A page as vLLM takes it: the ids that the chat template gives."""
    image, label, _ = page(name)
    return {"prompt": f"<bos><image>?{label}=", "multi_modal_data": {"image": image}}


def engine(folder: Path, options: dict[str, Any] | None, **settings: Any) -> Any:
    """An engine in this process: float32, eager, with these options of zipvl, or None for vLLM as it is."""
    from vllm import LLM

    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {"image": 1},
        "disable_log_stats": True,
    }
    if options is not None:
        given["additional_config"] = {"zipvl": options}
    return LLM(str(folder), **(given | settings))


def answers(engine: Any, names: tuple[str, ...] = NAMES, tokens: int = 12, one_by_one: bool = True) -> list[list[int]]:
    """Tokens that follow each page, past the end of the answer too."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [prompt(name) for name in names]
    batches = [[p] for p in prompts] if one_by_one else [prompts]
    done = [out for batch in batches for out in engine.generate(batch, sampling, use_tqdm=False)]
    return [list(out.outputs[0].token_ids) for out in done]
