"""Machine code of every kernel in built CUDA files: recorded, and compared with an earlier record.

A step that must not change machine code (a new facade over the same instructions, a rename, a move) is held to it::

    python tools/kernel_text.py record build/before.json FILE...     # before the change: libzipvl_cuda.so or *.cu.o
    python tools/kernel_text.py compare build/before.json FILE...    # after it, built by the same nvcc

Kernels are matched by name and architecture, and renamed ones by their bytes. Needs cuobjdump, no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

_TEXT = ".text."


def cuobjdump() -> str:
    """The tool's path: on the PATH, or of the package nvidia-cuda-cuobjdump."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    found = shutil.which("cuobjdump") or (str(packaged[-1]) if packaged else None)
    if found is None:
        sys.exit("cuobjdump is not on the PATH: pip install nvidia-cuda-cuobjdump")
    return found


def sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a little-endian ELF64 file by name."""
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, number, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, offset + i * size) for i in range(number)]
    strings = headers[names][4]
    found = {}
    for name, _, _, _, begin, length in headers:
        end = elf.index(b"\0", strings + name)
        found[elf[strings + name : end].decode()] = elf[begin : begin + length]
    return found


def texts(files: list[Path]) -> dict[str, dict[str, str]]:
    """``{architecture: {kernel: sha256 of its machine code}}`` of built files."""
    tool, found = cuobjdump(), dict[str, dict[str, str]]()
    for file in files:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([tool, "-xelf", "all", str(file.resolve())], cwd=folder, check=True, capture_output=True)
            for cubin in sorted(Path(folder).glob("*.cubin")):
                arch = next(part for part in cubin.name.split(".") if part.startswith("sm_"))
                for name, code in sections(cubin.read_bytes()).items():
                    if name.startswith(_TEXT):
                        found.setdefault(arch, {})[name.removeprefix(_TEXT)] = hashlib.sha256(code).hexdigest()
    return found


def compare(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """A line for every kernel whose machine code is not the same, once renames are matched by bytes."""
    differences = []
    for arch in sorted(before.keys() | after.keys()):
        old, new = before.get(arch, {}), after.get(arch, {})
        changed = [name for name in old.keys() & new.keys() if old[name] != new[name]]
        differences += [f"{arch} changed: {name}" for name in sorted(changed)]
        gone, come = old.keys() - new.keys(), new.keys() - old.keys()
        unmatched = Counter(old[name] for name in gone)
        for name in sorted(come):
            if unmatched[new[name]] > 0:
                unmatched[new[name]] -= 1
            else:
                differences.append(f"{arch} new: {name}")
        for name in sorted(gone):
            if unmatched[old[name]] > 0:
                unmatched[old[name]] -= 1
                differences.append(f"{arch} gone: {name}")
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("record", "compare"))
    parser.add_argument("record", type=Path, help="the record, a JSON file")
    parser.add_argument("files", type=Path, nargs="+", help="libraries or object files with device code")
    given = parser.parse_args()
    now = texts(given.files)
    kernels = sum(map(len, now.values()))
    if kernels == 0:
        sys.exit("kernel_text: no kernels in these files")
    if given.step == "record":
        given.record.parent.mkdir(parents=True, exist_ok=True)
        given.record.write_text(json.dumps(now, indent=1, sort_keys=True))
        print(f"kernel_text: {kernels} kernels recorded in {given.record}")
        return
    differences = compare(json.loads(given.record.read_text()), now)
    print("\n".join(differences))
    if differences:
        sys.exit(f"kernel_text: {len(differences)} of {kernels} kernels differ from {given.record}")
    print(f"kernel_text: {kernels} kernels, each the same byte for byte as in {given.record}")


if __name__ == "__main__":
    main()
