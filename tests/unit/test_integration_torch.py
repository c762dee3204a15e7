"""The ops in PyTorch's own machinery: opcheck, compile, export, TorchScript, serialised programs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zipvl import ops

from .helpers import KEYWORDS, OPS, REFERENCE, make_ends, make_mask, make_qkv, sample_tensors

LENGTHS = (150, 37, 600, 129)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Schemas
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_schema_wrapper_and_reference_have_one_signature(op: str) -> None:
    def described(function: Any) -> list[tuple[str, bool, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind is inspect.Parameter.KEYWORD_ONLY, p.default) for p in parameters]

    arguments = getattr(torch.ops.zipvl, op).default._schema.arguments

    def default(argument: Any) -> Any:
        value = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        return tuple(value) if isinstance(value, list) else value

    schema = [(a.name, a.kwarg_only, default(a)) for a in arguments]
    assert described(getattr(ops, op)) == described(REFERENCE[op]) == schema
    assert {name: default for name, keyword, default in schema if keyword} == KEYWORDS[op]


def masks_of(op: str) -> list[dict[str, Any]]:
    mask, keep = make_mask("left", 2, 40), torch.rand(2, 40) < 0.2
    window: dict[str, Any] = {"local_window": 5, "num_sinks": 2}
    ends = {"last_key": make_ends(2, 40, 40)}
    gains = {"extra_mask": keep, "max_ratio": 0.5}
    if op == "probe_index":
        return [{}, {"token_mask": mask}, {"k": make_qkv(2, 6, 2, 50, 64)[1]}]
    if op == "probe_scores":
        return [{}, {"token_mask": mask}, ends]
    if op == "select_tokens":
        return [{}, {"token_mask": mask, "keep_mask": keep}, {"ratio": 0.3}, window | gains]
    if op in ("zipvl_attn", "zipvl_layer"):
        return [{}, {"token_mask": mask, "keep_mask": keep}, {"ratio": 0.3}, window | gains | ends]
    if op == "zipvl_prefill":  # packed rows past the count are undefined, so every token is selected
        return [{"tau": 1.0}, {"keep_mask": torch.ones(2, 40, dtype=torch.bool)}, {"tau": 1.0} | window | ends]
    if op == "pack_paged":
        vectors = torch.tensor([[30, 5], [-1, 3]], dtype=torch.int32)
        return [{}, {"capacity": vectors[0]}, {"capacity": vectors[0], "first_slot": vectors[1]}]
    if op == "quantize_kv":
        return [
            {},
            {"high_bits": [8, 8], "low_bits": [4, 4], "v_factor": torch.rand(2, 2, 64) + 0.5, "token_mask": mask},
        ]
    if op == "decode_attn_quantized":
        recent = torch.randn(2, 2, 5, 64)
        lengths = torch.tensor([5, 2], dtype=torch.int32)
        return [{}, {"k_recent": recent, "v_recent": recent, "recent_lengths": lengths, "scale": 0.2}]
    if op == "sparse_attn":
        return [{}, {"all_queries": True, "causal": False, "scale": 0.2}, {"token_mask": mask} | window | ends]
    return [{}]


@pytest.mark.parametrize(
    ("op", "keywords"), [pytest.param(op, kw, id=f"{op}-{i}") for op in OPS for i, kw in enumerate(masks_of(op))]
)
def test_opcheck(op: str, keywords: dict[str, Any]) -> None:
    tensors = tuple(sample_tensors(op).values())
    results = torch.library.opcheck(getattr(torch.ops.zipvl, op).default, tensors, KEYWORDS[op] | keywords)
    assert set(results.values()) == {"SUCCESS"}, results


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------


def layer(q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The one-call op between ordinary operations, as in a model."""
    out, index, count = ops.zipvl_attn(2 * q, k, v, tau=0.8, token_mask=token_mask)
    return out.transpose(1, 2).flatten(2) + 1, index, count


def stages(q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every op once: prefill stage by stage, then a decoding step on the packed cache."""
    probes = ops.probe_index(q, num_recent=16, num_random=16, token_mask=token_mask)
    accumulated, normalized = ops.probe_scores(q, k, probes, token_mask=token_mask)
    index, count = ops.select_tokens(accumulated, normalized, tau=0.8, token_mask=token_mask)
    out = ops.sparse_attn(q, k, v, index, count)
    k_packed, v_packed = ops.pack_kv(k, v, index, count)
    new, lse = ops.decode_attn(q[:, :, -1:], k_packed, v_packed, count)
    quantized = ops.quantize_kv(k, v, index, count, token_mask=token_mask)
    again, _ = ops.decode_attn_quantized(
        q[:, :, -1:], *quantized, k_recent=k, v_recent=v, recent_lengths=torch.zeros_like(count)
    )
    return out, new + again, lse


def chunk(q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the last tokens, with a neighbourhood."""
    how: dict[str, Any] = {"local_window": 16, "num_sinks": 2, "max_ratio": 0.5, "token_mask": token_mask}
    return ops.zipvl_attn(q[:, :, q.shape[2] // 2 :], k, v, tau=0.8, **how)


def arguments(N: int, B: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = make_mask("left", B, N)
    assert mask is not None
    return *make_qkv(B, 6, 2, N, 64, seed=N), mask


@pytest.mark.parametrize("function", [layer, stages, chunk])
@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.slow), "aot_eager"])
def test_compile_without_recompiling(function: Any, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for N in LENGTHS:
            assert same(compiled(*arguments(N)), function(*arguments(N)))


# ---------------------------------------------------------------------------------------------------------------------
# torch.export; AOTInductor is in test_programs.py, which runs its package without Python too
# ---------------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return layer(q, k, v, token_mask)


class Stages(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return stages(q, k, v, token_mask)


def exported(module: nn.Module) -> torch.export.ExportedProgram:
    N = torch.export.Dim("N", min=2, max=2**20)
    shapes = ({2: N}, {2: N}, {2: N}, {1: N})
    return torch.export.export(module, arguments(LENGTHS[0]), dynamic_shapes=shapes)


@pytest.mark.parametrize("module", [Layer(), Stages()], ids=["layer", "stages"])
def test_export_with_a_dynamic_length(module: nn.Module, tmp_path: Path) -> None:
    torch.export.save(exported(module), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    for N in LENGTHS:
        assert same(program(*arguments(N)), module(*arguments(N)))


# ---------------------------------------------------------------------------------------------------------------------
# TorchScript
# ---------------------------------------------------------------------------------------------------------------------


class ScriptedStages(nn.Module):
    """The raw ops with their schemas' defaults, as TorchScript sees them; no zipvl Python is left in the saved file."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probes = torch.ops.zipvl.probe_index(q, num_recent=16, num_random=16, token_mask=token_mask)
        accumulated, normalized = torch.ops.zipvl.probe_scores(q, k, probes, token_mask=token_mask)
        index, count = torch.ops.zipvl.select_tokens(accumulated, normalized, tau=0.8, token_mask=token_mask)
        out = torch.ops.zipvl.sparse_attn(q, k, v, index, count)
        k_packed, v_packed = torch.ops.zipvl.pack_kv(k, v, index, count)
        new, lse = torch.ops.zipvl.decode_attn(q[:, :, -1:], k_packed, v_packed, count)
        high, high_blocks, low, low_blocks, v_factor = torch.ops.zipvl.quantize_kv(
            k, v, index, count, token_mask=token_mask
        )
        again, _ = torch.ops.zipvl.decode_attn_quantized(
            q[:, :, -1:],
            high,
            high_blocks,
            low,
            low_blocks,
            v_factor,
            k_recent=k,
            v_recent=v,
            recent_lengths=torch.zeros_like(count),
        )
        return out, new + again, lse


class ScriptedLayer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, index, count = torch.ops.zipvl.zipvl_attn(2 * q, k, v, tau=0.8, token_mask=token_mask)
        return out.transpose(1, 2).flatten(2) + 1, index, count


@pytest.mark.parametrize(
    ("module", "eager"), [(ScriptedLayer(), layer), (ScriptedStages(), stages)], ids=["layer", "stages"]
)
def test_torchscript_saved_and_run_again(module: nn.Module, eager: Any, tmp_path: Path) -> None:
    torch.jit.script(module).save(tmp_path / "module.pt")
    loaded = torch.jit.load(tmp_path / "module.pt")
    for N in LENGTHS:
        assert same(loaded(*arguments(N)), eager(*arguments(N)))
