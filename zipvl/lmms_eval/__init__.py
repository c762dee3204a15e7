"""The plug-in of lmms-eval, which finds it through the entry point ``lmms_eval.models``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What the entry point hands to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest  # which looks for entry points when it is imported

    plugin = f"{__name__}.plugin"
    return ModelManifest(model_id="zipvl", chat_class_path=f"{plugin}.ZipVL", simple_class_path=f"{plugin}.ZipVLSimple")
