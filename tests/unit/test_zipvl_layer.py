"""zipvl_layer: the layer in one call, from queries or from hidden states, with projections, scores and packing."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zipvl import ops, reference

from .helpers import (
    MASKS,
    all_tokens,
    assert_accurate,
    assert_selection_within_rounding,
    make_mask,
    make_qkv,
    output_floor,
    same_dtype_attention,
    score_floor,
    selected_mask,
    tolerance,
)

KINDS = {"plain": (False, False), "bias": (True, False), "norm": (False, True), "both": (True, True)}
FEW = {"num_recent": 16, "num_random": 16}


def make_hidden(
    B: int, N: int, Hq: int, D: int, dtype: torch.dtype = torch.float32, kind: str = "plain", C: int = 48
) -> dict[str, Tensor]:
    """``hidden [B, N, C]`` and the query projection of a layer."""
    bias, norm = KINDS[kind]
    angle = torch.randn(1 if B == 2 else B, N, D // 2).repeat(1, 1, 2)
    given = {
        "hidden": torch.randn(B, N, C),
        "q_weight": 1.5 * torch.randn(Hq * D, C) * C**-0.5,
        "cos": angle.cos(),
        "sin": angle.sin(),
    }
    given |= {"q_bias": torch.randn(Hq * D)} if bias else {}
    given |= {"q_norm_weight": torch.rand(D) + 0.5} if norm else {}
    return {name: tensor.to(dtype) for name, tensor in given.items()}


def projected(given: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The queries of every token in ``dtype``, by the reference."""
    wide = {name: tensor.to(dtype) for name, tensor in given.items()}
    B, N, _ = wide["hidden"].shape
    names = ("hidden", "q_weight", "q_bias", "cos", "sin")
    return reference.project_queries(
        *(wide.get(name) for name in names),  # type: ignore[arg-type]
        *all_tokens(B, N),
        norm_weight=wide.get("q_norm_weight"),
    )


def check(given: dict[str, Tensor], k: Tensor, v: Tensor, **keywords: Any) -> None:
    """The layer from hidden states: the selection against that of exact scores, up to rounding; the output against that
    of the op's own selection; the packed rows."""
    B, _, N, _ = k.shape
    token_mask, o_weight = keywords.get("token_mask"), keywords.get("o_weight")
    how = {name: keywords[name] for name in ("scale", "causal") if name in keywords}
    all_queries = keywords.get("all_queries", False)
    out, index, count, k_packed, v_packed = ops.zipvl_layer(None, k, v, **given, **keywords, **FEW)
    exact_q, q = projected(given, torch.float64), projected(given, k.dtype)

    probes = reference.probe_index(k, **FEW, token_mask=token_mask)
    exact = reference.probe_scores(exact_q, k.double(), probes, **how, token_mask=token_mask)
    rounded = reference.probe_scores(q, k, probes, **how, token_mask=token_mask)
    scale = keywords.get("scale")
    errors = [tolerance(e, r, torch.float32, score_floor(q, k, e, scale)) for e, r in zip(exact, rounded, strict=True)]
    real = torch.ones(B, N, dtype=torch.bool) if token_mask is None else token_mask
    keep = real & (real.flip(1).cumsum(dim=1).flip(1) <= keywords.get("keep_recent", 1))
    if "keep_mask" in keywords:
        keep |= keywords["keep_mask"] & real
    assert_selection_within_rounding(
        index,
        count,
        exact,
        (errors[0], errors[1]),
        tau=keywords.get("tau", 0.975),
        ratio=keywords.get("ratio"),
        keep_mask=keep,
        token_mask=token_mask,
    )

    exact_out = reference.sparse_attn(exact_q, k.double(), v.double(), index, count, **how, all_queries=all_queries)
    baseline = same_dtype_attention(q, k, v, index, count, **how, all_queries=all_queries)
    exact_out, baseline = (t.masked_fill(~real[:, None, :, None], 0) for t in (exact_out, baseline))
    floor = output_floor(q, k, v, scale)
    if o_weight is None:
        assert out.transpose(1, 2).is_contiguous()
        out = out.transpose(1, 2).flatten(2)
    exact_out, baseline = (t.transpose(1, 2).flatten(2) for t in (exact_out, baseline))
    if o_weight is not None:
        exact_out, baseline = F.linear(exact_out, o_weight.double()), F.linear(baseline, o_weight)
        floor *= float(o_weight.float().abs().sum(dim=1).max())
    assert out.dtype == k.dtype
    assert_accurate(out, exact_out, baseline, floor)
    computed = real if all_queries else selected_mask(index, count)
    assert bool((out[~computed] == 0).all())

    if not keywords.get("pack", False):
        assert k_packed.shape == v_packed.shape == (0,) and k_packed.dtype == v_packed.dtype == k.dtype
        return
    expected = reference.pack_kv(k, v, index, count)
    for packed, source, wanted in zip((k_packed, v_packed), (k, v), expected, strict=True):
        assert packed.shape == source.shape and packed.is_contiguous() and packed.dtype == source.dtype
        for b, kept in enumerate(count.tolist()):
            assert torch.equal(packed[b, :, :kept], wanted[b, :, :kept])


# ---------------------------------------------------------------------------------------------------------------------
# Queries given: the other layer ops, bit for bit
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_queries_it_is_zipvl_attn_and_zipvl_prefill(dtype: torch.dtype, all_queries: bool, mask: str) -> None:
    q, k, v = make_qkv(3, 6, 2, 160, 64, dtype)
    keywords: dict[str, Any] = {"tau": 0.8, "all_queries": all_queries, "token_mask": make_mask(mask, 3, 160)}
    keywords |= {"keep_mask": torch.rand(3, 160) < 0.1, "keep_recent": 3, "scale": 0.2, "seed": 5}
    plain = ops.zipvl_layer(q, k, v, **keywords)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], ops.zipvl_attn(q, k, v, **keywords), strict=True))
    assert plain[3].shape == plain[4].shape == (0,)
    packing, prefill = ops.zipvl_layer(q, k, v, **keywords, pack=True), ops.zipvl_prefill(q, k, v, **keywords)
    assert all(torch.equal(a, b) for a, b in zip(packing[:3], prefill[:3], strict=True))
    for ours, theirs in zip(packing[3:], prefill[3:], strict=True):
        for b, kept in enumerate(plain[2].tolist()):
            assert torch.equal(ours[b, :, :kept], theirs[b, :, :kept])


# ---------------------------------------------------------------------------------------------------------------------
# Hidden states
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projects_queries(dtype: torch.dtype, all_queries: bool, kind: str) -> None:
    _, k, v = make_qkv(2, 6, 2, 150, 64, dtype)
    check(make_hidden(2, 150, 6, 64, dtype, kind), k, v, tau=0.7, all_queries=all_queries)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "keywords",
    [
        {"tau": 0.8, "pack": True},
        {"ratio": 0.3, "all_queries": True},
        {"ratio": 0.2, "causal": False, "scale": 0.3, "keep_recent": 5},
    ],
    ids=str,
)
def test_masks_and_modes(keywords: dict[str, Any], mask: str) -> None:
    B, N = 3, 120
    _, k, v = make_qkv(B, 4, 2, N, 32)
    masks = {"keep_mask": torch.rand(B, N) < 0.1, "token_mask": make_mask(mask, B, N)}
    check(make_hidden(B, N, 4, 32, kind="norm"), k, v, **keywords, **masks)


@pytest.mark.parametrize("mask", ["none", "left", "inner"])
@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projects_outputs(dtype: torch.dtype, all_queries: bool, mask: str) -> None:
    B, N = 3, 130
    _, k, v = make_qkv(B, 4, 2, N, 64, dtype)
    o_weight = (torch.randn(40, 4 * 64) / 16).to(dtype)
    options = {"ratio": 0.3, "all_queries": all_queries, "token_mask": make_mask(mask, B, N), "pack": True}
    check(make_hidden(B, N, 4, 64, dtype, "bias"), k, v, o_weight=o_weight, **options)


def test_outputs_of_given_queries_are_projected_too() -> None:
    q, k, v = make_qkv(2, 4, 2, 90, 64)
    o_weight = torch.randn(24, 4 * 64) / 16
    out, index, count, _, _ = ops.zipvl_layer(q, k, v, o_weight=o_weight, ratio=0.4)
    attended, *selection = ops.zipvl_attn(q, k, v, ratio=0.4)
    assert torch.equal(index, selection[0]) and torch.equal(count, selection[1])
    torch.testing.assert_close(out, ops.project_outputs(attended.transpose(1, 2).flatten(2), o_weight, *selection))


def test_hidden_states_of_other_tokens_are_not_read() -> None:
    """With given scores no probe is drawn, so NaN outside ``T`` does no harm."""
    B, N = 2, 100
    _, k, v = make_qkv(B, 4, 2, N, 64)
    given, scores = make_hidden(B, N, 4, 64), {"budget_score": torch.rand(B, N), "rank_score": torch.rand(B, N)}
    clean = ops.zipvl_layer(None, k, v, **given, **scores, ratio=0.3)
    outside = ~selected_mask(clean[1], clean[2])
    given["hidden"] = given["hidden"].masked_fill(outside[..., None], torch.nan)
    dirty = ops.zipvl_layer(None, k, v, **given, **scores, ratio=0.3)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_a_strided_hidden_state() -> None:
    _, k, v = make_qkv(2, 4, 2, 80, 64)
    given = make_hidden(2, 80, 4, 64)
    wide = torch.full((2, 80, 60), torch.nan)
    wide[:, :, 4:52] = given["hidden"]
    expected = ops.zipvl_layer(None, k, v, **given, ratio=0.3)
    actual = ops.zipvl_layer(None, k, v, **given | {"hidden": wide[:, :, 4:52]}, ratio=0.3)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


# ---------------------------------------------------------------------------------------------------------------------
# Given scores
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("limit", [{"tau": 0.4}, {"ratio": 0.25}], ids=str)
def test_given_scores_select(limit: dict[str, float], mask: str) -> None:
    """As ``select_tokens`` does with the last tokens in the keep set; the probes' number has no say."""
    B, N = 3, 110
    q, k, v = make_qkv(B, 4, 2, N, 64)
    budget, rank, token_mask = torch.rand(B, N), torch.rand(B, N), make_mask(mask, B, N)
    real = torch.ones(B, N, dtype=torch.bool) if token_mask is None else token_mask
    kept = torch.rand(B, N) < 0.1
    keep = real & (kept | (real.flip(1).cumsum(1).flip(1) <= 4))
    index, count = ops.select_tokens(budget, rank, **limit, keep_mask=keep, token_mask=token_mask)
    keywords = {"keep_recent": 4, "keep_mask": kept, "token_mask": token_mask, "num_recent": 1, "num_random": 0}
    scores = {"budget_score": budget, "rank_score": rank}
    actual = ops.zipvl_layer(q, k, v, **scores, **limit, **keywords)
    assert torch.equal(actual[1], index) and torch.equal(actual[2], count)
    assert torch.equal(actual[0], ops.sparse_attn(q, k, v, index, count))


def test_bad_scores_select_every_real_token() -> None:
    q, k, v = make_qkv(2, 4, 2, 60, 64)
    scores, mask = torch.rand(2, 60), make_mask("left", 2, 60)
    assert mask is not None
    scores[0, 50] = math.nan
    _, index, count, _, _ = ops.zipvl_layer(q, k, v, budget_score=scores, rank_score=scores, ratio=0.2, token_mask=mask)
    assert torch.equal(selected_mask(index, count)[0], mask[0]) and count[1] < mask[1].sum()


# ---------------------------------------------------------------------------------------------------------------------
# Empty inputs, tracing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
def test_empty(B: int, N: int, projects: bool) -> None:
    q, k, v = make_qkv(B, 4, 2, N, 64)
    o_weight = torch.randn(24, 4 * 64)
    given = make_hidden(B, N, 4, 64) | {"o_weight": o_weight} if projects else {}
    out, index, count, *packed = ops.zipvl_layer(None if projects else q, k, v, **given, pack=True)
    assert out.shape == ((B, N, 24) if projects else (B, 4, N, 64))
    assert index.shape == (B, N) and count.tolist() == [0] * B
    assert all(p.shape == (B, 2, N, 64) for p in packed)


def variants(N: int) -> list[tuple[Tensor | None, dict[str, Any]]]:
    """``q`` and keywords that every way of tracing meets; every token is selected where packed rows are compared."""
    q, _, _ = make_qkv(2, 6, 2, N, 64)
    given, o_weight = make_hidden(2, N, 6, 64, kind="both"), torch.randn(40, 6 * 64) / 20
    return [
        (q, {"o_weight": o_weight, "ratio": 0.3}),
        (None, {**given, "ratio": 0.3, "token_mask": make_mask("left", 2, N)}),
        (None, {**given, "o_weight": o_weight, "tau": 1.0, "pack": True}),
        (q, {"budget_score": torch.rand(2, N), "rank_score": torch.rand(2, N), "all_queries": True}),
    ]


@pytest.mark.parametrize("variant", range(4))
def test_opcheck_and_meta(variant: int) -> None:
    q, keywords = variants(40)[variant]
    _, k, v = make_qkv(2, 6, 2, 40, 64)
    results = torch.library.opcheck(torch.ops.zipvl.zipvl_layer.default, (q, k, v), keywords)
    assert set(results.values()) == {"SUCCESS"}, results
    real = ops.zipvl_layer(q, k, v, **keywords)
    on_meta = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in keywords.items()}
    meta = ops.zipvl_layer(None if q is None else q.to("meta"), k.to("meta"), v.to("meta"), **on_meta)
    for real_one, meta_one in zip(real, meta, strict=True):
        assert real_one.shape == meta_one.shape and real_one.dtype == meta_one.dtype
        assert real_one.stride() == meta_one.stride()


class Layer(torch.nn.Module):
    """A layer from hidden states as TorchScript and the compiler see it."""

    def forward(
        self, hidden: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor, o_weight: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, _, count, _, _ = torch.ops.zipvl.zipvl_layer(
            None, k, v, hidden=hidden, q_weight=q_weight, cos=cos, sin=sin, o_weight=o_weight, ratio=0.3
        )
        return out + 1, count


def layer_arguments(N: int) -> tuple[Tensor, ...]:
    _, k, v = make_qkv(2, 6, 2, N, 64, seed=N)
    given = make_hidden(2, N, 6, 64)
    return *(given[name] for name in ("hidden", "q_weight", "cos", "sin")), torch.randn(40, 6 * 64) / 20, k, v


def test_one_graph_for_every_length(tmp_path: Path) -> None:
    """Compiled, exported and scripted, each once, at three lengths."""
    torch._dynamo.reset()
    eager = Layer()
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend="aot_eager")
    N = torch.export.Dim("N", min=2, max=2**20)
    shapes = ({1: N}, {}, {1: N}, {1: N}, {}, {2: N}, {2: N})
    exported = torch.export.export(eager, layer_arguments(70), dynamic_shapes=shapes).module()
    torch.jit.script(eager).save(tmp_path / "layer.pt")
    scripted = torch.jit.load(tmp_path / "layer.pt")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (70, 41, 130):
            arguments = layer_arguments(tokens)
            expected = eager(*arguments)
            for run in (compiled, exported, scripted):
                assert all(torch.equal(a, e) for a, e in zip(run(*arguments), expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Errors of the arguments that other layer ops do not have
# ---------------------------------------------------------------------------------------------------------------------


def without(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


# (what changes of a call from hidden states, argument that the message names, what it must say besides)
MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"q": torch.randn(2, 6, 40, 64)}, "hidden", r"\bq\b"),
    (without("hidden", "q_weight", "cos", "sin"), "hidden", r"\bq\b"),
    (without("q_weight"), "q_weight", "hidden"),
    (without("cos"), "cos", "hidden"),
    (without("sin"), "sin", "hidden"),
    ({"hidden": torch.randn(2, 41, 48)}, "hidden", "40 tokens.*got 41"),
    ({"hidden": torch.randn(1, 2, 40, 48)}, "hidden", r"3 dimensions.*\[1, 2, 40, 48\]"),
    ({"hidden": torch.randn(2, 40, 96)[..., ::2]}, "hidden", "last stride of 1.*got 2"),
    ({"q_weight": torch.randn(384, 47)}, "q_weight", "48.*47"),
    ({"q_weight": torch.randn(383, 48)}, "q_weight", "64.*383"),
    ({"q_weight": torch.randn(384, 48).half()}, "q_weight", "float32.*float16"),
    ({"q_weight": torch.randn(384, 48, device="meta")}, "q_weight", "cpu.*meta"),
    ({"q_bias": torch.randn(383)}, "q_bias", r"\[384\].*\[383\]"),
    ({"q_bias": torch.randn(384).half()}, "q_bias", "float32.*float16"),
    ({"q_norm_weight": torch.randn(63)}, "q_norm_weight", r"\[64\].*\[63\]"),
    ({"q_norm_eps": -1.0}, "q_norm_eps", "at least 0.*got"),
    ({"q_norm_eps": math.nan}, "q_norm_eps", "at least 0.*got"),
    ({"cos": torch.randn(2, 39, 64)}, "cos", "40.*39"),
    ({"cos": torch.randn(2, 40, 62), "sin": torch.randn(2, 40, 62)}, "cos", "64.*62"),
    ({"sin": torch.randn(2, 40, 64).half()}, "sin", "float32.*float16"),
    ({"sin": torch.randn(40, 64)}, "sin", r"3 dimensions.*\[40, 64\]"),
    ({"o_weight": torch.randn(8, 383)}, "o_weight", "384.*383"),
    ({"o_weight": torch.randn(8, 384).half()}, "o_weight", "float32.*float16"),
    ({"o_weight": torch.randn(384)}, "o_weight", r"2 dimensions.*\[384\]"),
    ({"budget_score": torch.rand(2, 40)}, "budget_score", "rank_score"),
    ({"rank_score": torch.rand(2, 40)}, "rank_score", "budget_score"),
    ({"budget_score": torch.rand(2, 39), "rank_score": torch.rand(2, 40)}, "budget_score", r"\[2, 40\].*\[2, 39\]"),
    ({"budget_score": torch.rand(2, 40), "rank_score": torch.rand(1, 40)}, "rank_score", r"\[2, 40\].*\[1, 40\]"),
    ({"budget_score": torch.rand(2, 40).double(), "rank_score": torch.rand(2, 40)}, "budget_score", "float32.*float64"),
    ({"budget_score": torch.rand(2, 40), "rank_score": torch.rand(2, 40).half()}, "rank_score", "float32.*float16"),
]


@pytest.mark.parametrize(("changes", "argument", "expected"), MISTAKES)
def test_mistakes(changes: dict[str, Any], argument: str, expected: str) -> None:
    _, k, v = make_qkv(2, 6, 2, 40, 64)
    call = {"q": None, "k": k, "v": v, **make_hidden(2, 40, 6, 64), **changes}
    with pytest.raises(RuntimeError) as caught:
        ops.zipvl_layer(**call)
    message = str(caught.value)
    assert "zipvl_layer: " in message, message
    message = message[message.index("zipvl_layer: ") :].splitlines()[0]
    assert re.search(rf"\b{argument}\b", message) and re.search(expected, message), message


@pytest.mark.parametrize("name", ["hidden", "q_weight", "q_bias", "q_norm_weight", "cos", "sin", "o_weight"])
def test_inference_only(name: str) -> None:
    _, k, v = make_qkv(2, 6, 2, 40, 64)
    given = make_hidden(2, 40, 6, 64, kind="both") | {"o_weight": torch.randn(8, 384)}
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"zipvl_layer: {name} requires grad"):
        ops.zipvl_layer(None, k, v, **given)
    with torch.no_grad():
        assert not ops.zipvl_layer(None, k, v, **given)[0].requires_grad
