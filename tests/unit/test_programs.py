"""The programs of examples/cpp, built by g++ alone: TorchScript and AOTInductor with zipvl's ops, without Python."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zipvl  # noqa: F401  (its ops)
from tests.programs import build, run

from .test_integration_torch import LENGTHS, layer, same, stages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the programs with"),
]


@pytest.fixture(scope="session")
def program(built: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str], Path]:
    """Builds a program of examples/cpp, once each."""
    return lambda name: built(f"program-{name}", lambda folder: build(name, folder)) / name


class Layer(nn.Module):
    """One layer between ordinary operations, with a mask; the raw ops, as TorchScript sees them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, index, count = torch.ops.zipvl.zipvl_attn(2 * q, k, v, tau=0.8, token_mask=token_mask)
        keys, values = torch.ops.zipvl.pack_kv(k, v, index, count)
        step, lse = torch.ops.zipvl.decode_attn(q[:, :, -1:], keys, values, count)
        return out.transpose(1, 2).flatten(2) + 1, step, lse


class Ops(nn.Module):
    """The ops one after the other, and the one-call op."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> tuple[Tensor, ...]:
        return *stages(q, k, v, token_mask), *layer(q, k, v, token_mask)


def inputs(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, heads, tokens, 64, generator=generator) for heads in (6, 2, 2))
    return [q, k, v, torch.rand(2, tokens, generator=generator) < 0.9]


def check(program: Path, model: Path, folder: Path, eager: Callable[..., tuple[Tensor, ...]]) -> None:
    """The program's outputs are those of eager mode, for a length that the model was not made with too."""
    for tokens in (150, 611):
        done = run(program, model, inputs(tokens), folder)
        assert done.returncode == 0, done.stderr
        found, expected = torch.load(folder / "outputs.pt"), eager(*inputs(tokens))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_torchscript(program: Callable[[str], Path], tmp_path: Path) -> None:
    torch.jit.script(Layer()).save(tmp_path / "layer.pt")
    check(program("run_scripted"), tmp_path / "layer.pt", tmp_path, Layer())


def test_a_mistake_arrives_as_the_ops_message(program: Callable[[str], Path], tmp_path: Path) -> None:
    torch.jit.script(Layer()).save(tmp_path / "layer.pt")
    q, k, v, mask = inputs(150)
    done = run(program("run_scripted"), tmp_path / "layer.pt", [q, k[:, :, :149], v, mask], tmp_path)
    assert done.returncode == 1 and "zipvl_attn: v must have k's tokens 149, got 150" in done.stderr
    assert run(program("run_scripted"), tmp_path / "none.pt", [q], tmp_path).returncode == 1


def test_aot_inductor(program: Callable[[str], Path], tmp_path: Path) -> None:
    """In one package, which Python and C++ run."""
    N = torch.export.Dim("N", min=2, max=2**20)
    exported = torch.export.export(Ops(), tuple(inputs(150)), dynamic_shapes=({2: N}, {2: N}, {2: N}, {1: N}))
    model = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "ops.pt2"))
    package = torch._inductor.aoti_load_package(model)
    for tokens in LENGTHS:
        assert same(package(*inputs(tokens)), Ops()(*inputs(tokens)))
    check(program("run_package"), Path(model), tmp_path, Ops())
