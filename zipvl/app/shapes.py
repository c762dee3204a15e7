"""Models with random weights in published shapes, and prompts that fit them. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

__all__ = ["QWEN2_5_VL_3B", "QWEN2_5_VL_7B", "TINY", "Inputs", "Shape"]

IMAGE, VIDEO, VISION_START, VISION_END = 3, 4, 1, 2
FIRST_WORD = 10
"""Token ids of this and after mean nothing to any model here."""
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
QUESTION_TOKENS = 20

QWEN2_7B_TEXT: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131200,
}
TINY_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 32,
}
TINY_TOWER: dict[str, Any] = {
    "out_hidden_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "depth": 4,
    "num_heads": 2,
}

Inputs = dict[str, torch.Tensor]


def with_weights(cls: Any, config: Any, device: torch.device | str) -> Any:
    """A model of transformers' class ``cls`` with random weights, made on ``device``: bfloat16 on a GPU (and on
    ``meta``, where there are no weights), float32 on the CPU."""
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        return cls._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def text_inputs(model: Any, tokens: int, batch: int = 1) -> Inputs:
    """Random tokens for ``generate()``: ``input_ids`` and ``attention_mask`` ``[batch, tokens]``."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(FIRST_WORD, vocabulary, (batch, tokens), device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def of_patches(token: int, grid: tuple[int, int, int], patch: int) -> tuple[list[int], Inputs]:
    """One image or video for models that merge 2 x 2 patches.

    Args:
        token: ``IMAGE`` or ``VIDEO``.
        grid: times, rows and columns of patches.
        patch: side of a patch, in pixels.

    Returns:
        Token ids, and random pixels ``[patches, 3 * 2 * patch * patch]`` with their grid.
    """
    frames, rows, columns = grid
    tokens = [VISION_START] + [token] * (frames * rows * columns // 4) + [VISION_END]
    pixels = torch.randn(frames * rows * columns, 3 * 2 * patch * patch)
    of_what = "video" if token == VIDEO else "image"
    name = "pixel_values_videos" if token == VIDEO else "pixel_values"
    return tokens, {name: pixels, f"{of_what}_grid_thw": torch.tensor([grid])}


def with_question(visual: list[int], given: Inputs, device: torch.device | str, batch: int = 1) -> Inputs:
    """The inputs of ``generate()`` for visual tokens and a question of ``QUESTION_TOKENS`` tokens behind them.

    Args:
        visual: token ids.
        given: pixels and their sizes, of one row.
        device: of the inputs.
        batch: rows, of equal content.
    """
    ids = torch.tensor([[*visual, *range(FIRST_WORD, FIRST_WORD + QUESTION_TOKENS)]] * batch, device=device)
    given = {name: x.repeat(batch, *[1] * (x.dim() - 1)).to(device) for name, x in given.items()}
    types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return given | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}


@dataclass(frozen=True)
class Shape:
    """A published model of Qwen2.5-VL's kind, or a tiny one.

    Args:
        name: the published model's.
        fields: of transformers' ``Qwen2_5_VLConfig``.
        page: rows and columns of patches of a page, which takes a quarter as many tokens.
    """

    name: str
    fields: dict[str, Any]
    page: tuple[int, int] = (128, 128)

    def config(self) -> Any:
        """transformers' configuration."""
        return transformers.Qwen2_5_VLConfig(**self.fields)

    def make(self, device: torch.device | str) -> Any:
        """The model with random weights on ``device``."""
        return with_weights(transformers.Qwen2_5_VLForConditionalGeneration, self.config(), device)

    def weight_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        return sum(weight.nbytes for weight in self.make("meta").parameters())

    def page_inputs(self, model: Any) -> Inputs:
        """A page of random pixels and a short question."""
        torch.manual_seed(0)
        visual, given = of_patches(IMAGE, (1, *self.page), model.config.vision_config.patch_size)
        return with_question(visual, given, model.device)


def _qwen2_5_vl(text: dict[str, Any], tower: dict[str, Any], sections: list[int], **fields: Any) -> dict[str, Any]:
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": sections}}
    return TOKENS | {"text_config": text | rope, "vision_config": tower} | fields


_TOWER = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32}
QWEN2_5_VL_7B = Shape(
    "Qwen2.5-VL-7B", _qwen2_5_vl(QWEN2_7B_TEXT, _TOWER | {"out_hidden_size": 3584}, sections=[16, 24, 24])
)
QWEN2_5_VL_3B = Shape(
    "Qwen2.5-VL-3B",
    _qwen2_5_vl(
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 131200,
        },
        _TOWER | {"out_hidden_size": 2048},
        sections=[16, 24, 24],
        tie_word_embeddings=True,
    ),
)
TINY_VL = _qwen2_5_vl(TINY_TEXT | {"max_position_embeddings": 131200}, TINY_TOWER | {"depth": 8}, sections=[4, 6, 6])
TINY = Shape("a tiny model", TINY_VL, page=(32, 32))
