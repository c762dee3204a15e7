"""Tiny random models of each family, and inputs for them, built from configurations alone (nothing is downloaded)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf

from zipvl import ZipVLConfig

VOCAB = 200
IMAGE = 190  # the image placeholder token
VISION_START, VISION_END, VIDEO = 191, 192, 193
PAD, EOS = 0, 199

PAPER = ZipVLConfig.paper()
"""What the tests of the paper's method start from: most prompts here are text, which is dense by default."""

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


@dataclass
class Family:
    """One kind of model.

    Args:
        make: a new random model.
        inputs: for one prompt of text with an image in it, given the number of text tokens and a seed.
        layers: indices of the layers that can be sparse.
        batched: further inputs that are concatenated, not padded, to batch prompts.
    """

    make: Callable[[], Any]
    inputs: Callable[[int, int], dict[str, torch.Tensor]]
    layers: list[int] = field(default_factory=lambda: [0, 1, 2])


def build(cls: Any, config: Any, seed: int = 0, attention: str = "sdpa") -> Any:
    """A random model in float32 on the CPU, ready for inference."""
    torch.manual_seed(seed)
    model = cls._from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def ids(tokens: int, seed: int) -> torch.Tensor:
    """``[1, tokens]`` random text tokens."""
    return torch.randint(2, 180, (1, tokens), generator=torch.Generator().manual_seed(seed))


def text_inputs(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of one prompt of text."""
    input_ids = ids(tokens, seed)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def with_image(tokens: int, seed: int, image: list[int], **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    """A third of the text, the image's tokens, the rest of the text."""
    text = ids(tokens, seed)
    input_ids = torch.cat([text[:, : tokens // 3], torch.tensor([image]), text[:, tokens // 3 :]], dim=1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **extra}


def pixels(seed: int, *shape: int) -> torch.Tensor:
    """Random pixel values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + seed))


def make_llama(**changes: Any) -> Any:
    return build(tf.LlamaForCausalLM, tf.LlamaConfig(**(TEXT | changes)))


def make_mistral() -> Any:
    return build(tf.MistralForCausalLM, tf.MistralConfig(**TEXT, sliding_window=64))


def make_gemma3_text() -> Any:
    return build(tf.Gemma3ForCausalLM, gemma3_text_config())


def gemma3_text_config() -> Any:
    return tf.Gemma3TextConfig(
        **TEXT,
        query_pre_attn_scalar=40,  # not the head dimension: the scale is not the default one
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )


def make_deepseek_v3() -> Any:
    """Multi-head latent attention: the keys' head dimension is not the values'."""
    text = {name: value for name, value in TEXT.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    config = tf.DeepseekV3Config(
        **text,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=3,
    )
    return build(tf.DeepseekV3ForCausalLM, config)


def make_llava_next() -> Any:
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=4
    )
    config = tf.LlavaNextConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28]],
        tie_word_embeddings=False,
    )
    return build(tf.LlavaNextForConditionalGeneration, config)


def llava_next_inputs(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    # 2 tiles of 7 x 7 and their 7 row ends, and 7 x 7 of the whole
    image = [IMAGE] * (7 * (14 + 1) + 49)
    sizes = torch.tensor([[28, 56]])
    return with_image(tokens, seed, image, pixel_values=pixels(seed, 1, 3, 3, 28, 28), image_sizes=sizes)


def make_qwen2_5_vl() -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "in_channels": 3,
    }
    text = {**TEXT, "rope_parameters": MROPE}
    del text["head_dim"]
    config = tf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return build(tf.Qwen2_5_VLForConditionalGeneration, config)


def qwen_inputs(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[1, 16, 20]])  # patches; 2 x 2 of them make a token
    image = [VISION_START, *[IMAGE] * 80, VISION_END]
    inputs = with_image(tokens, seed, image, pixel_values=pixels(seed, 320, 3 * 2 * 4 * 4), image_grid_thw=grid)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs


def make_qwen3_vl() -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 64,
        "in_channels": 3,
    }
    config = tf.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return build(tf.Qwen3VLForConditionalGeneration, config)


def make_internvl() -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [28, 28],
        "patch_size": [2, 2],
    }
    config = tf.InternVLConfig(
        vision_config=vision,
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=49,
        tie_word_embeddings=False,
    )
    return build(tf.InternVLForConditionalGeneration, config)


def internvl_inputs(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return with_image(tokens, seed, [IMAGE] * 98, pixel_values=pixels(seed, 2, 3, 28, 28))


def make_gemma3() -> Any:
    vision = tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    config = tf.Gemma3Config(
        text_config=gemma3_text_config(),
        vision_config=vision,
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )
    return build(tf.Gemma3ForConditionalGeneration, config)


def gemma3_inputs(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    inputs = with_image(
        tokens, seed, [VISION_START, *[IMAGE] * 16, VISION_END], pixel_values=pixels(seed, 1, 3, 32, 32)
    )
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


def gemma4_text(**changes: Any) -> dict[str, Any]:
    """Sliding and full layers by turns, whose head dimensions differ; no layer has another's keys and values."""
    text = TEXT | {"num_hidden_layers": 4, "head_dim": 32, "global_head_dim": 64, "sliding_window": 64}
    text |= {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB}
    text |= changes
    return text | {"layer_types": ["sliding_attention", "full_attention"] * (text["num_hidden_layers"] // 2)}


def gemma4_shared_text(**changes: Any) -> dict[str, Any]:
    """As Gemma 4 E2B and E4B: the last four layers attend to the keys and values of the second and third."""
    return gemma4_text(num_hidden_layers=8, num_kv_shared_layers=4, **changes)


def make_gemma4(**changes: Any) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2}
    return _gemma4("Gemma4", vision | {"position_embedding_size": 64}, **changes)


def make_gemma4_unified(**changes: Any) -> Any:
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 64}
    return _gemma4("Gemma4Unified", vision | {"output_proj_dims": 64}, **changes)


def _gemma4(kind: str, vision: dict[str, Any], **changes: Any) -> Any:
    text = gemma4_text(**({"use_bidirectional_attention": "vision"} | changes))
    if kind == "Gemma4Unified":
        text = {name: value for name, value in text.items() if "per_layer_input" not in name}
    config = getattr(tf, f"{kind}Config")(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        image_token_id=IMAGE,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
        video_token_id=VIDEO,
        audio_token_id=194,
        tie_word_embeddings=False,
    )
    return build(getattr(tf, f"{kind}ForConditionalGeneration"), config)


def gemma4_inputs(tokens: int, seed: int = 0, *, side: int = 8, size: int = 48) -> dict[str, torch.Tensor]:
    """An image of 16 tokens, of ``side * side`` patches of ``size`` numbers."""
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1)
    image = {"pixel_values": pixels(seed, 1, side * side, size), "image_position_ids": places.reshape(1, -1, 2)}
    inputs = with_image(tokens, seed, [VISION_START, *[IMAGE] * 16, VISION_END], **image)
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def gemma4_unified_inputs(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return gemma4_inputs(tokens, seed, side=4, size=192)


def make_llama4(**changes: Any) -> Any:
    """Layers that attend within chunks, and a last one that does not."""
    text = TEXT | {"num_hidden_layers": 4, "attention_chunk_size": 128, "intermediate_size_mlp": 96}
    text |= {"num_local_experts": 2, "num_experts_per_tok": 1} | changes
    return build(tf.Llama4ForCausalLM, tf.Llama4TextConfig(**text))


MULTIMODAL = {
    "llava_next": Family(make_llava_next, llava_next_inputs),
    "qwen2_5_vl": Family(make_qwen2_5_vl, qwen_inputs),
    "qwen3_vl": Family(make_qwen3_vl, qwen_inputs),
    "internvl": Family(make_internvl, internvl_inputs),
}
TEXT_ONLY = {
    "llama": Family(make_llama, text_inputs),
    "gemma3_text": Family(make_gemma3_text, text_inputs, layers=[1, 2]),
}
SPARSE = MULTIMODAL | TEXT_ONLY
"""The families whose prompts can be sparse. Gemma 3 with images is dense, Mistral all sliding window."""


def pad_left(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of prompts, padded on the left."""
    width = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, torch.Tensor] = {}
    for name in rows[0]:
        if name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            fill = PAD
            parts = [torch.nn.functional.pad(row[name], (width - row[name].shape[1], 0), value=fill) for row in rows]
        else:
            parts = [row[name] for row in rows]
        batch[name] = torch.cat(parts)
    return batch
