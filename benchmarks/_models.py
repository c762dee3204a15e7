"""Models with random weights in the shape of real ones, built through transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

from zipvl.app.shapes import (
    IMAGE,
    QWEN2_5_VL_7B,
    QWEN2_7B_TEXT,
    TINY,
    TINY_TEXT,
    TINY_TOWER,
    TOKENS,
    VIDEO,
    Inputs,
    of_patches,
    text_inputs,
    with_question,
    with_weights,
)

__all__ = ["MODELS", "QWEN2_7B", "SMOKE", "Inputs", "Model", "Shape", "build"]


@dataclass(frozen=True)
class Shape:
    """A decoder of Qwen2's kind."""

    layers: int = 28
    hidden: int = 3584
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    mlp: int = 18944
    vocab: int = 152064

    def config(self, longest: int) -> Qwen2Config:
        """transformers' configuration for prompts of up to ``longest`` tokens."""
        return Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=longest,
            rope_theta=1e6,
            tie_word_embeddings=False,
        )


QWEN2_7B = Shape()
"""LongVA-7B's language model."""
SMOKE = Shape(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, mlp=192, vocab=128)


def build(shape: Shape, longest: int, device: str) -> Qwen2ForCausalLM:
    """A model with random weights, made on ``device``: bfloat16 on a GPU, float32 elsewhere."""
    model: Qwen2ForCausalLM = with_weights(Qwen2ForCausalLM, shape.config(longest), device)
    return model


def _page_of_tiles(pages: int) -> tuple[list[int], Inputs]:
    """A picture of 672 x 672 in LLaVA-NeXT: four tiles and the whole, each of 576 tokens, and a new line a row."""
    sizes = torch.tensor([[672, 672]] * pages)
    return [IMAGE] * (pages * (576 + 48 * 49)), {"pixel_values": torch.randn(pages, 5, 3, 336, 336),
                                                 "image_sizes": sizes}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A shape by name.

    Args:
        name: the published model's.
        cls: transformers' class.
        config: its configuration's class.
        fields: of the configuration.
        smoke: what a tiny one of the same kind changes, by sub-configuration ("" for the configuration itself).
        patch: of the vision tower that merges 2 x 2 patches, in pixels; 0: LLaVA-NeXT's tiles; None: text alone.
    """

    name: str
    cls: str
    config: str
    fields: dict[str, Any]
    smoke: dict[str, dict[str, Any]] = field(default_factory=dict)
    patch: int | None = None

    def make(self, device: str, *, smoke: bool = False) -> Any:
        """The model with random weights on ``device``."""
        fields: dict[str, Any] = dict(self.fields)
        if smoke:
            for part, changes in self.smoke.items():
                fields = fields | (changes if not part else {part: fields[part] | changes})
        config = getattr(transformers, self.config)(**fields)
        return with_weights(getattr(transformers, self.cls), config, device)

    def inputs(self, model: Any, *, tokens: int, pages: int, frames: int, batch: int, smoke: bool) -> Inputs:
        """What ``generate()`` is given.

        Args:
            model: it is for.
            tokens: of text, random ones.
            pages: images of 4,096 visual tokens (LLaVA-NeXT: 2,928) before a short question; 0: none.
            frames: of a video, 196 visual tokens for each two, before the question; 0: none.
            batch: rows, of equal content.
            smoke: images of 64 tokens.
        """
        torch.manual_seed(0)
        if not pages and not frames:
            return text_inputs(model, tokens, batch)
        if self.patch is None:
            raise ValueError(f"{self.name} sees no images")
        if self.patch == 0:
            visual, given = _page_of_tiles(pages)
        elif frames:
            visual, given = of_patches(VIDEO, (frames // 2, 4, 4) if smoke else (frames // 2, 28, 28), self.patch)
        else:
            visual, given = of_patches(IMAGE, (1, 16, 16) if smoke else (1, 128, 128), self.patch)
            visual, given = visual * pages, {name: x.repeat(pages, 1) for name, x in given.items()}
        inputs = with_question(visual, given, model.device, batch)
        if not self.patch:
            del inputs["mm_token_type_ids"]
        return inputs


def _llava_next(name: str, **text: Any) -> Model:
    text_config = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096} | text
    tower = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14}
    tower |= {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "projection_dim": 768}
    fields = {"text_config": text_config, "vision_config": tower, "image_token_index": IMAGE}
    tiny_tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    return Model(
        name,
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        fields,
        {"text_config": TINY_TEXT, "vision_config": tiny_tower},
        patch=0,
    )


MODELS = {
    model.name: model
    for model in (
        Model("Qwen2-7B", "Qwen2ForCausalLM", "Qwen2Config", QWEN2_7B_TEXT | {"rope_theta": 1e6}, {"": TINY_TEXT}),
        Model(
            QWEN2_5_VL_7B.name,
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            QWEN2_5_VL_7B.fields,
            {part: TINY.fields[part] for part in ("text_config", "vision_config")},
            patch=14,
        ),
        Model(
            "Qwen3-VL-8B",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLConfig",
            TOKENS
            | {
                "text_config": {
                    "hidden_size": 4096,
                    "intermediate_size": 12288,
                    "num_hidden_layers": 36,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 8,
                    "head_dim": 128,
                    "vocab_size": 151936,
                    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
                },
                "vision_config": {"out_hidden_size": 4096},
            },
            {
                "text_config": TINY_TEXT
                | {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True}},
                "vision_config": TINY_TOWER | {"deepstack_visual_indexes": [0, 1]},
            },
            patch=16,
        ),
        _llava_next(
            "LLaVA-NeXT-7B",
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
        ),
        _llava_next("LLaVA-NeXT-Qwen2-7B", model_type="qwen2", **QWEN2_7B_TEXT, rope_theta=1e6),
        _llava_next(
            "LLaVA-NeXT-13B",
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
        ),
        Model(
            "Qwen3-30B-A3B",
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            {
                "hidden_size": 2048,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "vocab_size": 151936,
                "max_position_embeddings": 131200,
            },
            {"": TINY_TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}},
        ),
        Model(
            "Qwen3.5-9B",
            "Qwen3_5ForCausalLM",
            "Qwen3_5TextConfig",
            {"max_position_embeddings": 131200},
            {
                "": TINY_TEXT
                | {
                    "num_hidden_layers": 4,
                    "linear_num_key_heads": 2,
                    "linear_num_value_heads": 4,
                    "linear_key_head_dim": 32,
                    "linear_value_head_dim": 32,
                }
            },
        ),
    )
}
"""The shapes of whole answers. LongVA-7B's decoder is Qwen2-7B's, and LLaVA-NeXT-Qwen2-7B has that behind LLaVA-NeXT's
tiles; Qwen3.5's has one layer of full attention in four."""
