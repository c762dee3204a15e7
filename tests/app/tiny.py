"""Tiny random image-text-to-text models with processors, saved as folders that the command line can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

SIDE, PATCH = 56, 7  # one view: 8 x 8 patches
GRID = SIDE // PATCH
IMAGE_TOKEN = 3
PAPER = ("--no-keep-text", "--local-window", "0", "--num-sinks", "0", "--cache", "drop")
"""Options of the paper's method, under which ``--ratio`` is what a layer keeps."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def tokenizer() -> Any:
    """One token a printable character."""
    vocab = {name: number for number, name in enumerate(["<pad>", "<eos>", "<unk>", "<image>"])}
    vocab |= {chr(code): len(vocab) + code - 32 for code in range(32, 127)}
    tokens = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokens.decoder = decoders.Fuse()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def text_config(head_dim: int = 16) -> tf.LlamaConfig:
    """Three layers, 4 query heads and 2 key/value heads."""
    return tf.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=4096,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
    )


def vision_config() -> tf.CLIPVisionConfig:
    """One layer."""
    return tf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )


def save_llava_next(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, head_dim: int = 16) -> None:
    """LLaVA-NeXT: a base view of 64 patches and up to 2 x 2 tiles of 64."""
    pinpoints = [[2 * SIDE, 2 * SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints
    )
    _save(
        folder,
        tf.LlavaNextForConditionalGeneration,
        tf.LlavaNextConfig(
            vision_config=vision_config(),
            text_config=text_config(head_dim),
            image_token_id=IMAGE_TOKEN,
            image_grid_pinpoints=pinpoints,
            vision_feature_layer=-1,
        ),
        tf.LlavaNextProcessor(
            images,
            tokenizer(),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=chat_template,
        ),
    )


def save_llava(folder: Path) -> None:
    """LLaVA 1.5: the page's central square as 64 patches."""
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    _save(
        folder,
        tf.LlavaForConditionalGeneration,
        tf.LlavaConfig(
            vision_config=vision_config(),
            text_config=text_config(),
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=-1,
        ),
        tf.LlavaProcessor(
            images,
            tokenizer(),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        ),
    )


def _save(folder: Path, cls: Any, config: Any, processor: Any) -> None:
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)
    processor.save_pretrained(folder)
