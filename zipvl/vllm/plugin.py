"""The entry point: run by vLLM in its front end, in the engine and in every worker, and more than once."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any

from zipvl.vllm import compat, startup, versions
from zipvl.vllm.options import KEY, Options


def register() -> None:
    """Makes the backend known to vLLM, and has every configuration that asks for it checked when it is made.

    A server that does not ask for zipvl is not changed, whatever its version.

    Raises:
        ImportError: vLLM is not what it was in the tested range, and asks for nothing by now: its configuration or its
            registry of backends is not where it was.
    """
    import vllm
    from vllm.config import VllmConfig

    _check_configurations(VllmConfig)
    if versions.problem(vllm.__version__) is None:
        _register_backend()


def asked(vllm_config: Any) -> Options | None:
    """The options that a configuration of vLLM has, with the ``tau`` that they mean for its model, or None.

    Raises:
        ValueError: they are wrong; the message names which.
    """
    extra = vllm_config.additional_config
    given = extra.get(KEY) if isinstance(extra, dict) else None
    if given is None:
        return None
    options = Options.read(given)
    visual = bool(getattr(vllm_config.model_config, "is_multimodal_model", False))
    return replace(options, config=options.config.for_model(visual=visual))


def _register_backend() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        # The CPU platform takes no backend by name, but the path of an override.
        register_backend(AttentionBackendEnum.CPU_ATTN, "zipvl.vllm.cpu.ZipVLBackend")
    elif current_platform.is_cuda():
        register_backend(AttentionBackendEnum.CUSTOM, "zipvl.vllm.cuda.ZipVLBackend")


def _check_configurations(config_class: Any) -> None:
    """Checks follow ``VllmConfig.__post_init__``: the one place that every server passes, in the front end first."""
    made = config_class.__post_init__
    if getattr(made, "by_zipvl", False):
        return

    @wraps(made)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if (options := asked(self)) is not None:
            _prepare(self, options)

    checked.by_zipvl = True  # type: ignore[attr-defined]
    config_class.__post_init__ = checked


def _prepare(vllm_config: Any, options: Options) -> None:
    """Refuses what cannot work, and chooses the backend where the user chose none."""
    import vllm
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    if (problem := versions.problem(vllm.__version__)) is not None:
        raise ValueError(f"zipvl: {problem}")
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise ValueError(f"zipvl runs on CPUs and on NVIDIA's GPUs, not on vLLM's {current_platform.device_name}")
    if getattr(vllm_config.model_config, "is_submodel_config", False):
        return
    startup.refuse(vllm_config, options)
    if options.drops and not compat.tells_cut_prompts(vllm_config):
        raise ValueError(
            'zipvl cannot act in this server:\n  - --no-scheduler-reserve-full-isl with cache="drop": this vLLM then '
            "does not tell a cut prompt from a whole one. Leave it out"
        )
    if current_platform.is_cuda():
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        chosen = vllm_config.attention_config.backend
        if chosen not in (None, AttentionBackendEnum.CUSTOM):
            raise ValueError(
                f"zipvl cannot act in this server:\n  - --attention-backend {chosen.name}: zipvl is a backend itself, "
                "CUSTOM. Leave it out"
            )
        if getattr(vllm_config.attention_config, "backend_per_kind", None):
            raise ValueError(
                "zipvl cannot act in this server:\n  - attention_config.backend_per_kind: layers of a kind would go "
                "past zipvl. Leave it out"
            )
        vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    init_logger("vllm.zipvl").info_once("zipvl: %s", options.describe())
