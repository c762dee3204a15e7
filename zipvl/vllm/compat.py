"""What differs between the versions of vLLM that ``versions`` lists: 0.26 lacks what is named here, 0.32 has it."""

from __future__ import annotations

import inspect
from dataclasses import fields
from functools import wraps
from typing import Any


def let_backends_customize_specs() -> None:
    """vLLM 0.26 does not ask a backend for its ``customize_spec``. Afterwards its attention layers do."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionBackend

    made = Attention.get_kv_cache_spec
    if hasattr(AttentionBackend, "customize_spec") or hasattr(made, "by_zipvl"):
        return

    @wraps(made)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = made(self, vllm_config)
        customize = getattr(self.attn_backend, "customize_spec", None)
        return spec if spec is None or customize is None else customize(spec)

    get_kv_cache_spec.by_zipvl = True  # type: ignore[attr-defined]
    Attention.get_kv_cache_spec = get_kv_cache_spec


def replaced(common: Any, **changes: Any) -> Any:
    """``CommonAttentionMetadata`` with the changes to those fields that this version has."""
    known = {field.name for field in fields(common)}
    return common.replace(**{name: value for name, value in changes.items() if name in known})


def accepted(function: Any, **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that this version's ``function`` takes."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}


def tells_cut_prompts(vllm_config: Any) -> bool:
    """Whether the scheduler says how long a prompt is before it gives blocks to a part of it: see ``Admissions``."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    asked = inspect.signature(FullAttentionManager.get_num_blocks_to_allocate).parameters
    return "prefill_end" in asked or vllm_config.scheduler_config.scheduler_reserve_full_isl


class Admissions:
    """How many tokens a request's first step must have for its prompt to be whole.

    vLLM 0.32 says it in every call of ``get_num_blocks_to_allocate``. 0.26 asks first whether the whole request fits,
    by a call that says so, and then for the step: the first call is remembered.
    """

    def __init__(self) -> None:
        self._whole: dict[str, int] = {}

    def whole(self, request_id: str, num_tokens_main_model: int, said: dict[str, Any]) -> int:
        """Tokens of the prompt. ``said``: the call's keywords."""
        if "prefill_end" in said:
            return int(said["prefill_end"])
        if said.get("apply_admission_cap", False):
            self._whole[request_id] = num_tokens_main_model
        return self._whole.get(request_id, 0)

    def forget(self, request_id: str) -> None:
        self._whole.pop(request_id, None)
