"""A LLaVA-NeXT of six layers with random weights, and the settings every test here shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

IMAGE = 90
ROW_ENDS, IMAGE_TOKENS = 7, 49 + 7 * 15  # a base view of 7 x 7; two tiles in 7 rows of 14, each with a row end


@pytest.fixture(scope="session")
def model() -> Any:
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=4
    )
    text = tf.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    config = tf.LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28]],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    made = tf.LlavaNextForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    made.lm_head.weight.data[IMAGE] = 0  # so that the image token is never generated
    return made.eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Two prompts of three text tokens, an image and four text tokens."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(2, 80, (2, 7), generator=generator)
    ids = torch.cat([text[:, :3], torch.full((2, IMAGE_TOKENS), IMAGE), text[:, 3:]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 3, 28, 28, generator=generator),
        "image_sizes": torch.tensor([[28, 56]] * 2),
    }
