"""Builds zipvl's C++ with CMake. ``pip install --no-build-isolation .`` (or ``-e .``), against the torch that is there.

Environment: ``ZIPVL_CUDA`` (auto, on, off), ``ZIPVL_CUDA_ARCHS`` (default ``80;90a``), ``ZIPVL_BUILD_DIR`` (where CMake
works, default ``build/<python>-<torch>``), ``CUTLASS_DIR`` (CUTLASS, for the CUDA library; default: the package
nvidia-cutlass), ``MAX_JOBS``. Everything else about the package stands in pyproject.toml.

An editable build also makes ``zipvl._plan``, which only tests use, where pybind11 is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Distribution, setup
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


class BinaryDistribution(Distribution):
    """A wheel is of one platform, and ``build`` runs ``build_ext``: CMake knows what is compiled, no list here does."""

    def has_ext_modules(self) -> bool:
        return True


class CMakeBuild(build_ext):
    """One CMake build makes everything that is compiled, and installs it inside the package."""

    def run(self) -> None:
        editable = self.inplace or self.editable_mode
        package = ROOT / "zipvl" if editable else Path(self.build_lib).resolve() / "zipvl"
        plans = "ON" if editable and find_spec("pybind11") is not None else "OFF"
        build = build_directory()
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DZIPVL_PLAN_MODULE={plans}"]
        configure += [
            f"-D{name}={os.environ[name]}"
            for name in ("ZIPVL_CUDA", "ZIPVL_CUDA_ARCHS", "ZIPVL_WERROR", "CUTLASS_DIR")
            if os.environ.get(name)
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        for old in (*package.glob("_plan*.so"), *package.glob("lib/*")):
            old.unlink()  # an earlier build with other settings may have left more than this one makes
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(package), "--strip"], check=True)


setup(distclass=BinaryDistribution, cmdclass={"build_ext": CMakeBuild})
