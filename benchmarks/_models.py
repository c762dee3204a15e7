"""Decoders with random weights in the shape of real ones, built through transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

__all__ = ["QWEN2_7B", "SMOKE", "Shape", "build"]


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
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(shape.config(longest), dtype=dtype, attn_implementation="sdpa")
    return model.eval()
