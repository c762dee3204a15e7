"""Tiny configurations of any model of transformers: the defaults of its class, shrunk by the names of their fields."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

HEADS, KV, VOCAB = 4, 2, 1024
FIRST_SPECIAL = 900
"""Ids of image tokens and the like begin behind it; prompts of text hold smaller ones."""

_LAYERS = (
    r"num_hidden_layers|n_layers?|depth|num_layers|layers|(num_)?(en|de)coder_layers|conf_num_hidden_layers"
    r"|num_(en|de)coder_layers"
)
_HIDDEN = (
    r"hidden_size|d_model|n_embd|emb(ed)?_dim|embedding_(size|dim)|dim_model_base|lru_width|decoder_dim|patch_embed_hidden_size"
    r"|(out|text|encoder|decoder|mm|backbone|audio|vision|projector|image_text|merged|downsample|projection|thinker)_hidden_size"
    r"|attention_hidden_size|(projection|projection_hidden|output)_dim|word_embed_proj_dim|projector_(in|out)put_dim"
    r"|(output|input)_embedding_size|vision_output_dim|adapter_(in|out)_dim|adapter_input_size|audio_output_dim"
)
_HEADS = (
    r"(num_|n_)?heads?|n_head|(swa_|conf_)?num_(encoder_|decoder_|sliding_)?attention_heads|(en|de)coder_attention_heads"
    r"|attention_heads|resampler_n_heads"
)
_KV = r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_global_key_value_heads"
_HEAD_DIM = r"(?!qk_rope).*(?<![a-z])(head_dim|d_kv|kv_channels|headdim|d_head|head_size|dim_head)"
_WIDTH = (
    r".*(intermediate_size|ffn_dim|dim_ff|mlp_dim|n_inner|ffn_hidden_size|feed_forward_size|share_expert_dim).*|d_?ff"
)
_LENGTH = (
    r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|max_target_positions|seq_len|context_length"
    r"|model_max_length"
)
_VISION = re.compile(
    r"vision|vit|image|vq|audio|sam|former|perceiver|speech|encoder_config|acoustic|video|visual|codec|mm_"
)

_NUMBERS: list[tuple[str, Callable[[str, int], int]]] = [
    (_WIDTH, lambda k, v: 64 if "moe" in k or "expert" in k else 128),
    (r"(num|n_routed|num_local|moe_num)_experts", lambda k, v: min(v, 4)),
    (r"num_experts_per_tok(en)?|moe_(topk|k|top_k)|top_k_experts", lambda k, v: min(v, 2)),
    (r"n_group|topk_group|num_expert_group|n_expert_groups", lambda k, v: 1),
    (
        r"(n|moe_num|num)_shared_experts|first_k_dense_replace|num_dense_layers|moe_layer_start_index",
        lambda k, v: min(v, 1),
    ),
    (r"sliding_window(_size)?|attention_window_size|local_attention_window_len|index_topk", lambda k, v: 64),
    (r"attention_chunk_size", lambda k, v: 128),
    (r"(q|kv|o)_lora_rank", lambda k, v: 32),
    (r"mamba_(n|num)_heads", lambda k, v: 8),
    (r"mamba_d_ssm", lambda k, v: 256),
    (r"linear_num_(value_)?heads|index_n_heads", lambda k, v: 4),
    (r"linear_num_key_heads|num_kv_shared_layers", lambda k, v: min(v, 2)),
    (r"qk_rope_head_dim|hidden_size_per_layer_input", lambda k, v: min(v, 16)),
    (r"pad_token_id", lambda k, v: 0),
    (r"bos_token_id", lambda k, v: 1),
    (r"eos_token_id", lambda k, v: 2),
    (r"vision_feature_layer", lambda k, v: min(v, -1)),
]
"""Numbers by the names of their fields, the first that matches; sizes of heads and layers come before."""


def shrink(config: Any, head_dim: int = 32) -> dict[str, Any]:
    """Arguments for a tiny configuration of the kind of ``config``, which has the defaults of its class."""
    return _Shrinking(head_dim).of(config, text=True)


class _Shrinking:
    """One configuration and those within it, whose special tokens have different ids."""

    def __init__(self, head_dim: int, layers: int = 4) -> None:
        self.head_dim, self.hidden, self.layers, self.last_id = head_dim, HEADS * head_dim, layers, FIRST_SPECIAL

    def of(self, config: Any, *, text: bool) -> dict[str, Any]:
        fields = {k: v for k in sorted(_fields(type(config))) if (v := _value(config, k)) is not _MISSING}
        depth = [v for k, v in fields.items() if re.fullmatch(_LAYERS, k) and _is_int(v)]
        heads = [v for k, v in fields.items() if re.fullmatch(_HEADS, k) and _is_int(v)]
        types = next((fields[k] for k in ("layer_types", "layers_block_type", "block_types") if fields.get(k)), None)
        chosen = list(range(self.layers if text else 2))
        if text and isinstance(types, (list, tuple)) and (not depth or len(types) == depth[-1]):
            chosen = _of_each_type(types, self.layers)
        given: dict[str, Any] = {}
        for k, v in fields.items():
            if isinstance(v, PretrainedConfig):
                inner = self.of(v, text=text and not _VISION.search(k))
                given[k] = _own_defaults(v) | inner | {"model_type": v.model_type}
            elif text and isinstance(v, (list, tuple)) and depth and len(v) == depth[-1]:
                given[k] = [v[i] for i in chosen]
            else:
                new = self._field(k, v, config, text=text, layers=len(chosen), heads=heads)
                if new is not _MISSING:
                    given[k] = new
        return given

    def _field(self, k: str, v: Any, config: Any, *, text: bool, layers: int, heads: list[int]) -> Any:
        """The value of one field; ``_MISSING``: the default stays."""
        if k == "rope_parameters" and isinstance(v, dict):
            return _rope(v, self.head_dim, config)
        if k == "mrope_section" and isinstance(v, (list, tuple)):
            return _sections(v, self.head_dim)
        if k == "head_dim" and v is None and text:
            return self.head_dim
        if k in ("fullatt_block_indexes", "deepstack_visual_indexes", "global_attn_indexes"):
            return [1]
        if k == "eos_token_id" and isinstance(v, (list, tuple)):
            return 2
        if k == "initializer_range":
            return 0.05
        patch = getattr(config, "patch_size", None)
        patch = patch[0] if isinstance(patch, (list, tuple)) else patch
        if k == "image_size" and not text and isinstance(patch, int):
            return [patch * 8] * 2 if isinstance(v, (list, tuple)) else patch * 8
        if not _is_int(v) or k in ("qk_head_dim", "feature_layer"):
            return _MISSING
        for pattern, number in (
            (_LAYERS, layers),
            (_HIDDEN, self.hidden),
            (_HEADS, HEADS),
            (_KV, HEADS if v in heads else min(v, KV)),
            (_HEAD_DIM, self.head_dim),
            (r"(.*_)?vocab_size(_per_layer_input)?", VOCAB if text or v > 5000 else v),
            (_LENGTH, 4096 if text else v),
        ):
            if re.fullmatch(pattern, k):
                return number
        for pattern, shrunk in _NUMBERS:
            if re.fullmatch(pattern, k):
                return shrunk(k, v)
        if re.search(r"token_id$|token_index$", k):
            self.last_id += 1
            return self.last_id
        return _MISSING


_MISSING: Any = object()


def _is_int(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


def _value(config: Any, k: str) -> Any:
    try:
        return getattr(config, k)
    except Exception:  # an attribute that differs by layer, or is made of others
        return _MISSING


def _fields(cls: Any) -> set[str]:
    named = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    named |= set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs", "args"}
    return named - {"per_layer_config", "mtp_per_layer_config", "hidden_sizes", "transformers_version"}


def _own_defaults(config: Any) -> dict[str, Any]:
    """Plain values of a nested default that are not its class's."""
    try:
        base = type(config)()
    except Exception:  # a class without defaults
        return {}
    given = {}
    for k in _fields(type(config)):
        v, default = _value(config, k), _value(base, k)
        if isinstance(v, (int, float, str, bool)) and v != default:
            given[k] = v
    return given


def _of_each_type(types: Any, layers: int) -> list[int]:
    """Indices of layers that hold every type, as many as there are types at least."""
    first = list({str(kind): i for i, kind in reversed(list(enumerate(types)))}.values())[::-1]
    return (first * layers)[: max(layers, len(first))]


def _sections(v: Any, dim: int) -> list[int]:
    """Sections of a rotary embedding, scaled to ``dim`` channels."""
    scaled = [max(1, round(x * (dim // 2) / sum(v))) for x in v]
    return [scaled[0] + dim // 2 - sum(scaled), *scaled[1:]]


def _rope(v: dict[str, Any], head_dim: int, config: Any) -> dict[str, Any]:
    """Parameters of a rotary embedding, scaled to a head dimension."""
    v = copy.deepcopy(v)
    if any(isinstance(x, dict) for x in v.values()):
        return {k: _rope(x, head_dim, config) if isinstance(x, dict) else x for k, x in v.items()}
    part = v.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if "mrope_section" in v:
        v["mrope_section"] = _sections(v["mrope_section"], int(head_dim * part))
    if v.get("rope_type") in ("longrope", "su"):
        v = {"rope_type": "default", "rope_theta": v.get("rope_theta", 1e4)}
    return v
