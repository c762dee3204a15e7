"""Builds zipvl's C++ with CMake. ``pip install --no-build-isolation .`` (or ``-e .``), against the torch that is there.

Environment: ``ZIPVL_CUDA`` (auto, on, off), ``ZIPVL_CUDA_ARCHS`` (default ``80;90a``), ``ZIPVL_BUILD_DIR`` (where CMake
works, default ``build/<python>-<torch>``), ``CUTLASS_DIR`` (CUTLASS, for the CUDA library; default: the package
nvidia-cutlass), ``MAX_JOBS``. Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def build_directory() -> Path:
    """A directory of its own for each interpreter and torch, so that neither meets the other's cache."""
    if "ZIPVL_BUILD_DIR" in os.environ:
        return Path(os.environ["ZIPVL_BUILD_DIR"]).resolve()
    try:
        import torch
    except ImportError:
        sys.exit(
            "zipvl builds against an installed torch: install torch (2.10 or newer) first, "
            "then pip install --no-build-isolation ."
        )
    return ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-torch{torch.__version__}"


class CMakeBuild(build_ext):
    """One CMake build makes the op libraries and the Python module; both land inside the package."""

    def build_extension(self, ext: Extension) -> None:
        packages = [Path(self.build_lib).resolve() / "zipvl"]
        if self.inplace or self.editable_mode:
            packages.append(ROOT / "zipvl")
        build = build_directory()
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [
            f"-D{name}={os.environ[name]}"
            for name in ("ZIPVL_CUDA", "ZIPVL_CUDA_ARCHS", "ZIPVL_WERROR", "CUTLASS_DIR")
            if os.environ.get(name)
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        for package in packages:
            subprocess.run(["cmake", "--install", str(build), "--prefix", str(package), "--strip"], check=True)


setup(ext_modules=[Extension("zipvl._plan", sources=[])], cmdclass={"build_ext": CMakeBuild})
