"""The model as an empty shell (configuration, tokenizer, processor) and a vectorised way through its real modules.

`build_model` and `build_processor` make transformers' own `LlavaNextForConditionalGeneration` and `LlavaNextProcessor`.
Training and the reference evaluation walk through those same modules, but for a whole batch of equal pages at once and
with an attention function of the caller's choice: `pixel_values_from_pages`, `vision_features`, `pack_features`,
`prompt_embeddings`, `run_text_layers`, `next_token_logits`. A test holds them equal to the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from pages import CHARACTERS, PAGE_SIDE, PATCH
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q `[B, Hq, n, D]`, k and v `[B, Hkv, n, D]`, rotated) -> `[B, Hq, n, D]`."""

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
PAD, BOS, EOS, UNK, IMAGE = range(len(SPECIAL_TOKENS))
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *map(chr, range(32, 127))])}
"""Special tokens, then one token for each printable ASCII character."""
CHARACTER_IDS = [VOCABULARY[c] for c in CHARACTERS]
"""Token of each drawable character, in the order of `pages.CHARACTERS`."""

TILE_SIDE = 224
"""Tiles of a new model; everything else asks the model's configuration (`tile_side_of`)."""
IMAGE_MEAN, IMAGE_STD = 0.88, 0.25
"""Grey of the paper, and a spread that brings the ink to about -2 .. -3."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}{{ '?' + message['content'] + '=' }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}<image>{% endfor %}?"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}={% endif %}"
    "{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)


def grid_pinpoints(tile_side: int) -> list[list[int]]:
    """Heights and widths that an image may be tiled at: up to a whole page, more than one tile."""
    sides = range(tile_side, PAGE_SIDE + 1, tile_side)
    return [[height, width] for height in sides for width in sides if height + width > 2 * tile_side]


def tile_side_of(model: LlavaNextForConditionalGeneration) -> int:
    """Side in pixels of the tiles a model was made for."""
    return int(model.config.vision_config.image_size)


def build_config(tile_side: int = TILE_SIDE) -> LlavaNextConfig:
    """CLIP tower of 4 layers, 192 wide, over square tiles; Llama of 6 layers, 256 wide, 4 query, 2 KV heads of 64."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=tile_side,
        patch_size=PATCH,
        projection_dim=192,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=grid_pinpoints(tile_side),
        image_seq_length=(tile_side // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def build_model(seed: int = 0, tile_side: int = TILE_SIDE) -> LlavaNextForConditionalGeneration:
    """The untrained model in float32. Layers start as PyTorch initialises them, which learns faster here than 0.02."""
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(build_config(tile_side)).float()
    position_embedding = model.model.vision_tower.get_submodule(_tower_prefix(model) + "embeddings.position_embedding")
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)) and module is not position_embedding:
            module.reset_parameters()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=8, do_sample=False
    )
    return model


def build_processor(tile_side: int = TILE_SIDE) -> LlavaNextProcessor:
    """Processor of the model: any-resolution tiles, one token for each printable ASCII character."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile_side},
        crop_size={"height": tile_side, "width": tile_side},
        image_grid_pinpoints=grid_pinpoints(tile_side),
        resample=2,  # bilinear
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    )
    return LlavaNextProcessor(
        image_processor,
        fast_tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save_folder(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """Writes everything `from_pretrained` needs, weights in bfloat16; the given model stays as it is."""
    shipped = LlavaNextForConditionalGeneration(model.config)
    shipped.load_state_dict(model.state_dict())
    shipped.generation_config = model.generation_config
    shipped.to(torch.bfloat16).save_pretrained(folder)
    build_processor(tile_side_of(model)).save_pretrained(folder)


def _tower_prefix(model: LlavaNextForConditionalGeneration) -> str:
    """Where the vision tower keeps its parts; transformers before 5.6 wraps them once more."""
    return "vision_model." if hasattr(model.model.vision_tower, "vision_model") else ""


def pixel_values_from_pages(pages: Tensor, tile_side: int, base_view: bool = True) -> Tensor:
    """What the processor makes of square pages: uint8 `[B, S, S]` -> float32 `[B, tiles, 3, s, s]`.

    `s` is the tile's side, or S if that is smaller. The base view (the whole page shrunk to a tile) comes first if
    asked for, then the tiles in raster order.
    """
    batch, side, _ = pages.shape
    tile_side = min(side, tile_side)
    across = side // tile_side
    page = pages.float()
    tiles = page.view(batch, across, tile_side, across, tile_side).transpose(2, 3).flatten(1, 2)
    if base_view:
        small = F.interpolate(page[:, None], size=(tile_side, tile_side), mode="bilinear", antialias=True)
        tiles = torch.cat([small.round().clamp(0, 255), tiles], 1)
    normalised = (tiles / 255 - IMAGE_MEAN) / IMAGE_STD
    return normalised[:, :, None].expand(-1, -1, 3, -1, -1)


def encoder_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """One layer of the vision tower, `[n, tokens, 192]` -> the same; a function so that it can be compiled once."""
    return layer(hidden, attention_mask=None)


def vision_features(
    model: LlavaNextForConditionalGeneration, pixel_values: Tensor, layer_function: Callable = encoder_layer
) -> Tensor:
    """Last hidden states of the vision tower without the CLS token, `[n, 3, s, s]` -> `[n, (s / 14)**2, 192]`.

    Tiles smaller than the model's use the top left part of the position embeddings (first training stages).
    """
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    across = pixel_values.shape[-1] // PATCH
    patches = pixel_values.unflatten(-1, (across, PATCH)).unflatten(
        -3, (across, PATCH)
    )  # [n, 3, rows, 14, columns, 14]
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    patches = F.linear(patches, tower.embeddings.patch_embedding.weight.flatten(1))
    full = tile_side_of(model) // PATCH
    places = torch.arange(full**2, device=patches.device).view(full, full)[:across, :across]
    places = torch.cat([places.new_zeros(1), 1 + places.reshape(-1)])
    cls = tower.embeddings.class_embedding.expand(patches.shape[0], 1, -1).to(patches.dtype)
    hidden = torch.cat([cls, patches], 1) + tower.embeddings.position_embedding(places)
    hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers:
        hidden = layer_function(layer, hidden)
    return hidden[:, 1:]


def tiles_to_raster(tiles: Tensor) -> Tensor:
    """Square tiles in raster order to one grid, `[B, t * t, w * w, d]` -> `[B, t * w, t * w, d]`."""
    batch, count, patches, width = tiles.shape
    across, side = round(count**0.5), round(patches**0.5)
    grid = tiles.view(batch, across, across, side, side, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, across * side, across * side, width)


def pack_features(model: LlavaNextForConditionalGeneration, features: Tensor, base_view: bool = True) -> Tensor:
    """Projected visual tokens in LLaVA-NeXT's order, `[B, tiles, patches, 192]` -> `[B, visual tokens, 256]`.

    Base view first, then the rows of the page, each followed by the newline embedding: 256 + 48 * 49 = 2,608 tokens
    for a page of 672 px in tiles of 224 px.
    """
    projected = model.model.multi_modal_projector(features)
    grid = tiles_to_raster(projected[:, int(base_view) :])
    newline = model.model.image_newline.to(grid.dtype).expand(*grid.shape[:2], 1, -1)
    rows = torch.cat([grid, newline], 2).flatten(1, 2)
    return torch.cat([projected[:, 0], rows], 1) if base_view else rows


def prompt_embeddings(model: LlavaNextForConditionalGeneration, visual: Tensor, text_ids: Tensor) -> Tensor:
    """BOS, visual tokens `[B, n, 256]`, text `[B, t]` -> `[B, 1 + n + t, 256]`."""
    embed = model.get_input_embeddings()
    bos = embed(torch.full_like(text_ids[:, :1], BOS))
    return torch.cat([bos, visual.to(bos.dtype), embed(text_ids)], 1)


def attention_inputs(layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First half of a text layer: `[B, n, 256]` -> rotated q `[B, 4, n, 64]` and k, v `[B, 2, n, 64]`."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    heads = (*hidden.shape[:2], -1, attention.head_dim)
    q = attention.q_proj(normed).view(heads).transpose(1, 2)
    k = attention.k_proj(normed).view(heads).transpose(1, 2)
    v = attention.v_proj(normed).view(heads).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q.to(v.dtype), k.to(v.dtype), v


def attention_outputs(layer: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    """Second half of a text layer: residual `[B, n, 256]`, attention output `[B, 4, n, 64]` -> `[B, n, 256]`."""
    hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def run_text_layers(
    model: LlavaNextForConditionalGeneration,
    hidden: Tensor,
    attention: Attention,
    first_position: int = 0,
    layer_functions: tuple[Callable, Callable] = (attention_inputs, attention_outputs),
) -> Tensor:
    """The text layers with any attention function, `[B, n, 256]` -> `[B, n, 256]` before the last norm."""
    text = model.model.language_model
    positions = first_position + torch.arange(hidden.shape[1], device=hidden.device)[None]
    cos, sin = text.rotary_emb(hidden, positions)
    before, after = layer_functions
    for i, layer in enumerate(text.layers):
        q, k, v = before(layer, hidden, cos, sin)
        hidden = after(layer, hidden, attention(i, q, k, v))
    return hidden


def next_token_logits(model: LlavaNextForConditionalGeneration, hidden: Tensor) -> Tensor:
    """`[B, n, 256]` -> `[B, n, vocabulary]`."""
    return model.lm_head(model.model.language_model.norm(hidden))
