"""Builds zipvl's C++ with CMake. ``pip install --no-build-isolation .`` (or ``-e .``), against the torch that is there.

Environment: ``ZIPVL_CUDA`` (auto, on, off), ``ZIPVL_CUDA_ARCHS`` (default ``80;90a``), ``ZIPVL_BUILD_DIR`` (where CMake
works, default ``build/<python>-<torch>``), ``CUTLASS_DIR`` (CUTLASS, for the CUDA library; default: the package
nvidia-cutlass), ``MAX_JOBS``, ``ZIPVL_LABEL`` (off, on: ``+cpu`` or ``+cu130`` behind the version, by ``ZIPVL_CUDA``).
Everything else about the package stands in pyproject.toml.

A wheel is tagged ``py3-none``: its libraries need no Python, and serve every torch from 2.10 within a CUDA major.

An editable build also makes ``zipvl._plan``, which only tests use, where pybind11 is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

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


def local_version(cuda: str, nvcc: str | None) -> str:
    """The label behind the version of a wheel that lies beside wheels of other builds, as torch's own have it.

    Args:
        cuda: ``ZIPVL_CUDA``, which must be on or off here: the version is known before CMake looks for a compiler.
        nvcc: the output of ``nvcc --version``, None where there is none.

    Raises:
        SystemExit: ``cuda`` is neither, or is on and ``nvcc`` names no release.
    """
    if cuda == "off":
        return "+cpu"
    if cuda != "on":
        sys.exit(f"zipvl: ZIPVL_LABEL=on needs ZIPVL_CUDA=on or ZIPVL_CUDA=off, got ZIPVL_CUDA={cuda}")
    release = re.search(r"release (\d+)\.(\d+)", nvcc or "")
    if release is None:
        sys.exit(f"zipvl: ZIPVL_LABEL=on with ZIPVL_CUDA=on needs an nvcc that tells its release, got {nvcc!r}")
    return f"+cu{release[1]}{release[2]}"


def nvcc_version() -> str | None:
    """The output of ``nvcc --version`` of the compiler that CMake takes, None where there is none."""
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout if found else None


def label() -> str:
    """The label that the environment asks for, by default none."""
    asked = os.environ.get("ZIPVL_LABEL") or "off"
    if asked not in ("on", "off"):
        sys.exit(f"zipvl: ZIPVL_LABEL must be on or off, got {asked!r}")
    return local_version(os.environ.get("ZIPVL_CUDA") or "auto", nvcc_version()) if asked == "on" else ""


class LabelledInfo(egg_info):
    """The version with its label. A source distribution's setup.cfg, which setuptools writes, says otherwise."""

    def finalize_options(self) -> None:
        self.tag_build = label()
        super().finalize_options()


class BinaryDistribution(Distribution):
    """A wheel is of one platform, and ``build`` runs ``build_ext``: CMake knows what is compiled, no list here does."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """A wheel of one platform and any Python: the op libraries are no extension modules."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


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


if __name__ == "__main__":
    commands = {"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel, "egg_info": LabelledInfo}
    setup(distclass=BinaryDistribution, cmdclass=commands)
