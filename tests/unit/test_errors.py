"""Every mistake a caller can make is an error that names the op, the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from zipvl import ops

from .helpers import KEYWORDS, OPS, sample_tensors

Change = Callable[[Tensor], Tensor]


def narrower(dim: int) -> Change:
    return lambda t: t.narrow(dim, 0, t.shape[dim] - 1).clone()


def unsqueezed(t: Tensor) -> Tensor:
    return t[None]


def every_other_column(t: Tensor) -> Tensor:
    """The values kept, and a last stride of 2."""
    return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2]


def to(dtype: torch.dtype) -> Change:
    return lambda t: t.to(dtype)


def on_meta(t: Tensor) -> Tensor:
    return t.to("meta")


def heads(number: int) -> Change:
    return lambda t: t[:, :1].repeat(1, number, 1, 1)


# In the sample tensors B = 2, N = 40, Hq = 6, Hkv = 2, D = 64.
# (ops that have the argument, argument, change, what the message must say besides op and argument)
TENSOR_MISTAKES: list[tuple[str, str, Change, str]] = [
    (
        "probe_index probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer decode_attn",
        "q",
        unsqueezed,
        r"4 dimensions.*\[1, 2, 6, \d+, 64\]",
    ),
    (
        "probe_index probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer decode_attn",
        "q",
        to(torch.float64),
        "float16, bfloat16.*float32.*float64",
    ),
    (
        "probe_index probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer decode_attn",
        "q",
        to(torch.int32),
        "float16, bfloat16.*float32.*int32",
    ),
    (
        "probe_index probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer decode_attn",
        "q",
        every_other_column,
        "last stride of 1.*got 2",
    ),
    (
        "probe_scores pack_kv pack_paged sparse_attn zipvl_attn zipvl_prefill zipvl_layer",
        "k",
        unsqueezed,
        r"4 dimensions.*\[1, 2, 2, 40, 64\]",
    ),
    (
        "probe_scores pack_kv pack_paged sparse_attn zipvl_attn zipvl_prefill zipvl_layer",
        "k",
        to(torch.float64),
        "float64",
    ),
    (
        "probe_scores pack_kv pack_paged sparse_attn zipvl_attn zipvl_prefill zipvl_layer",
        "k",
        every_other_column,
        "last stride of 1.*got 2",
    ),
    ("probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "k", to(torch.bfloat16), "float32.*bfloat16"),
    ("probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "k", heads(4), "4 heads.*not divide.*6"),
    ("probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "k", heads(12), "12 heads.*not divide.*6"),
    ("probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "k", narrower(0), "2.*got 1"),
    ("probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "k", narrower(3), "64.*got 63"),
    (
        "probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer",
        "q",
        lambda t: torch.cat([t, t[:, :, :1]], dim=2),
        "at most k's 40 tokens.*got 41",
    ),
    (
        "pack_kv pack_paged sparse_attn zipvl_attn zipvl_prefill zipvl_layer",
        "v",
        unsqueezed,
        r"4 dimensions.*\[1, 2, 2, 40, 64\]",
    ),
    ("pack_kv pack_paged sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "v", to(torch.float16), "float32.*float16"),
    (
        "pack_kv pack_paged sparse_attn zipvl_attn zipvl_prefill zipvl_layer",
        "v",
        every_other_column,
        "last stride of 1.*got 2",
    ),
    ("pack_kv pack_paged sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "v", narrower(0), "2.*got 1"),
    ("pack_kv pack_paged sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "v", narrower(1), "2.*got 1"),
    ("pack_kv pack_paged sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "v", narrower(2), "40.*got 39"),
    ("pack_kv pack_paged sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "v", narrower(3), "64.*got 63"),
    ("probe_scores", "probe_index", to(torch.int64), "int32.*int64"),
    ("probe_scores", "probe_index", narrower(0), r"\[2, 8\].*\[1, 8\]"),
    ("probe_scores", "probe_index", unsqueezed, r"2 dimensions.*\[1, 2, 8\]"),
    ("probe_scores", "probe_index", lambda t: t[:, :0], r"at least 1.*\[2, 0\]"),
    ("select_tokens", "budget_score", to(torch.float64), "float32.*float64"),
    ("select_tokens", "budget_score", to(torch.float16), "float32.*float16"),
    ("select_tokens", "budget_score", unsqueezed, r"2 dimensions.*\[1, 2, 40\]"),
    ("select_tokens", "rank_score", to(torch.bfloat16), "float32.*bfloat16"),
    ("select_tokens", "rank_score", narrower(1), r"\[2, 40\].*\[2, 39\]"),
    ("pack_kv pack_paged sparse_attn", "index", to(torch.int64), "int32.*int64"),
    ("pack_kv pack_paged sparse_attn", "index", narrower(1), r"\[2, 40\].*\[2, 39\]"),
    ("pack_kv pack_paged sparse_attn", "index", narrower(0), r"\[2, 40\].*\[1, 40\]"),
    ("pack_kv pack_paged sparse_attn", "count", to(torch.int64), "int32.*int64"),
    ("pack_kv pack_paged sparse_attn", "count", unsqueezed, r"\[2\].*\[1, 2\]"),
    ("pack_kv pack_paged sparse_attn", "count", narrower(0), r"\[2\].*\[1\]"),
    ("pack_paged", "block_table", to(torch.int64), "int32.*int64"),
    ("pack_paged", "block_table", narrower(0), r"\[2, 3\].*\[1, 3\]"),
    ("pack_paged", "block_table", unsqueezed, r"2 dimensions.*\[1, 2, 3\]"),
    ("pack_paged", "block_table", on_meta, "cpu.*meta"),
    ("pack_paged", "k_cache", to(torch.bfloat16), "float32.*bfloat16"),
    ("pack_paged", "k_cache", unsqueezed, r"4 dimensions \[blocks, block_size, Hkv, D\].*\[1, 7, 16, 2, 64\]"),
    ("pack_paged", "k_cache", narrower(2), r"\[7, 16, 2, 64\].*\[7, 16, 1, 64\]"),
    ("pack_paged", "k_cache", every_other_column, "last stride of 1.*got 2"),
    ("pack_paged", "k_cache", on_meta, "cpu.*meta"),
    ("pack_paged", "v_cache", to(torch.float16), "float32.*float16"),
    ("pack_paged", "v_cache", narrower(0), r"\[7, 16, 2, 64\].*\[6, 16, 2, 64\]"),
    ("pack_paged", "v_cache", narrower(1), r"\[7, 16, 2, 64\].*\[7, 15, 2, 64\]"),
    ("pack_paged", "v_cache", every_other_column, "last stride of 1.*got 2"),
    ("pack_paged", "v_cache", on_meta, "cpu.*meta"),
    ("decode_attn", "q", lambda t: t.repeat(1, 1, 3, 1), "1 token.*got 3"),
    ("decode_attn", "k_cache", heads(4), "4 heads.*not divide.*6"),
    ("decode_attn", "k_cache", to(torch.float16), "float32.*float16"),
    ("decode_attn", "k_cache", every_other_column, "last stride of 1.*got 2"),
    ("decode_attn", "v_cache", narrower(2), "40.*got 39"),
    ("decode_attn", "v_cache", to(torch.float16), "float32.*float16"),
    ("decode_attn", "v_cache", every_other_column, "last stride of 1.*got 2"),
    ("decode_attn", "lengths", to(torch.int64), "int32.*int64"),
    ("decode_attn", "lengths", narrower(0), r"\[2\].*\[1\]"),
    ("probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "k", on_meta, "cpu.*meta"),
    ("pack_kv pack_paged sparse_attn zipvl_attn zipvl_prefill zipvl_layer", "v", on_meta, "cpu.*meta"),
    ("probe_scores", "probe_index", on_meta, "cpu.*meta"),
    ("select_tokens", "rank_score", on_meta, "cpu.*meta"),
    ("pack_kv pack_paged sparse_attn", "index", on_meta, "cpu.*meta"),
    ("pack_kv pack_paged sparse_attn", "count", on_meta, "cpu.*meta"),
    ("decode_attn", "lengths", on_meta, "cpu.*meta"),
    ("project_queries project_outputs", "x", unsqueezed, r"3 dimensions.*\[1, 2, 40, \d+\]"),
    ("project_queries project_outputs", "x", to(torch.float64), "float16, bfloat16.*float32.*float64"),
    ("project_queries project_outputs", "x", every_other_column, "last stride of 1.*got 2"),
    ("project_queries project_outputs", "weight", unsqueezed, "2 dimensions"),
    ("project_queries project_outputs", "weight", to(torch.bfloat16), "float32.*bfloat16"),
    ("project_queries project_outputs", "weight", narrower(1), "must have shape"),
    ("project_queries project_outputs", "index", to(torch.int64), "int32.*int64"),
    ("project_queries project_outputs", "index", narrower(0), r"\[2, 40\].*\[1, 40\]"),
    ("project_queries project_outputs", "count", to(torch.int64), "int32.*int64"),
    ("project_queries project_outputs", "count", narrower(0), r"\[2\].*\[1\]"),
    ("project_queries", "bias", narrower(0), r"\[384\].*\[383\]"),
    ("project_queries", "bias", to(torch.float16), "float32.*float16"),
    ("project_queries", "cos", lambda t: t[..., :63], "even head dim that divides.*384.*63"),
    ("project_queries", "cos", lambda t: t[:, :39], r"\[2, 40, 64\].*\[2, 39, 64\]"),
    ("project_queries", "sin", unsqueezed, "3 dimensions"),
    ("project_queries", "sin", to(torch.float16), "float32.*float16"),
    ("project_queries", "sin", every_other_column, "last stride of 1.*got 2"),
    ("project_queries project_outputs", "index", on_meta, "cpu.*meta"),
    ("project_queries project_outputs", "weight", on_meta, "cpu.*meta"),
    ("quantize_kv", "k", unsqueezed, r"4 dimensions.*\[1, 2, 2, 40, 64\]"),
    ("quantize_kv", "k", narrower(2), "39.*got 40"),
    ("quantize_kv", "v", narrower(3), "64.*got 63"),
    ("quantize_kv", "v", to(torch.float16), "float32.*float16"),
    ("quantize_kv", "index", to(torch.int64), "int32.*int64"),
    ("quantize_kv", "count", narrower(0), r"\[2\].*\[1\]"),
    ("decode_attn_quantized", "q", to(torch.float64), "float16, bfloat16.*float32.*float64"),
    ("decode_attn_quantized", "q", narrower(3), "multiple of 32, got 63"),
    ("decode_attn_quantized", "q", lambda t: t.repeat(1, 1, 3, 1), "1 token.*got 3"),
    ("decode_attn_quantized", "high", heads(4), "4 heads.*not divide.*6"),
    ("decode_attn_quantized", "high", to(torch.int32), "uint8.*int32"),
    ("decode_attn_quantized", "high", narrower(3), r"\[2, 2, 2, 5136\].*\[2, 2, 2, 5135\]"),
    ("decode_attn_quantized", "high", lambda t: t[0], "4 dimensions.*got 3"),
    ("decode_attn_quantized", "low", heads(1), r"\[2, 2, 2, 4112\].*\[2, 1, 2, 4112\]"),
    ("decode_attn_quantized", "low", every_other_column, "last stride of 1.*got 2"),
    ("decode_attn_quantized", "low", on_meta, "cpu.*meta"),
    ("decode_attn_quantized", "high_blocks", to(torch.int64), "int32.*int64"),
    ("decode_attn_quantized", "low_blocks", narrower(0), r"\[2\].*\[1\]"),
    ("decode_attn_quantized", "v_factor", to(torch.float16), "float32.*float16"),
    ("decode_attn_quantized", "v_factor", narrower(2), r"\[2, 2, 64\].*\[2, 2, 63\]"),
]

# (ops that have the keyword, keyword, value, what the message must say besides op and keyword)
KEYWORD_MISTAKES: list[tuple[str, str, Any, str]] = [
    *[
        ("select_tokens zipvl_attn zipvl_prefill zipvl_layer", name, value, r"\(0, 1\].*got")
        for name in ("tau", "ratio")
        for value in (0.0, -0.5)
    ],
    *[
        ("select_tokens zipvl_attn zipvl_prefill zipvl_layer", name, 1.5, r"\(0, 1\].*got 1\.5")
        for name in ("tau", "ratio")
    ],
    *[
        ("select_tokens zipvl_attn zipvl_prefill zipvl_layer", name, math.nan, r"\(0, 1\].*got -?nan")
        for name in ("tau", "ratio")
    ],
    *[
        ("select_tokens zipvl_attn zipvl_prefill zipvl_layer", name, math.inf, r"\(0, 1\].*got inf")
        for name in ("tau", "ratio")
    ],
    ("select_tokens zipvl_attn zipvl_prefill zipvl_layer", "min_tokens", -1, "at least 0.*got -1"),
    *[
        ("probe_index zipvl_attn zipvl_prefill zipvl_layer", n, -3, "at least 0.*got -3")
        for n in ("num_recent", "num_random", "seed")
    ],
    ("probe_index zipvl_attn zipvl_prefill zipvl_layer", "num_recent", 2**31, r"below 2\*\*31.*got 2147483648"),
    ("project_queries", "norm_weight", torch.ones(63), r"\[64\].*\[63\]"),
    *[("project_queries", "norm_eps", v, "at least 0.*got") for v in (-1.0, math.nan)],
    ("zipvl_attn zipvl_prefill zipvl_layer", "keep_recent", -2, "at least 0.*got -2"),
    *[
        (
            "probe_scores sparse_attn zipvl_attn zipvl_prefill zipvl_layer decode_attn decode_attn_quantized",
            "scale",
            v,
            "finite.*got",
        )
        for v in (math.nan, math.inf)
    ],
    *[
        ("quantize_kv decode_attn_quantized", name, value, rf"2, 4 or 8, or \[4, 2\] of keys and values, got {got}")
        for name in ("high_bits", "low_bits")
        for value, got in ((0, 0), (3, 3), (16, 16), ([2, 4], r"\[2, 4\]"), ([8, 4], r"\[8, 4\]"), ([4], r"\[4\]"))
    ],
    ("quantize_kv", "v_factor", torch.ones(2, 2, 63), r"\[2, 2, 64\].*\[2, 2, 63\]"),
    ("decode_attn_quantized", "k_recent", torch.ones(2, 2, 5, 64), "together, got k_recent alone"),
    ("decode_attn_quantized", "recent_lengths", torch.ones(2, dtype=torch.int32), "together, got recent_lengths"),
    *[
        (having, mask, wrong, expected)
        for having, mask in (
            (
                "probe_index probe_scores select_tokens sparse_attn zipvl_attn zipvl_prefill zipvl_layer quantize_kv",
                "token_mask",
            ),
            ("select_tokens zipvl_attn zipvl_prefill zipvl_layer", "keep_mask"),
            ("select_tokens zipvl_attn zipvl_prefill zipvl_layer", "extra_mask"),
        )
        for wrong, expected in (
            (torch.ones(2, 40, dtype=torch.uint8), "bool.*uint8"),
            (torch.ones(2, 40), "bool.*float32"),
            (torch.ones(2, 41, dtype=torch.bool), r"\[2, 40\].*\[2, 41\]"),
            (torch.ones(1, 40, dtype=torch.bool), r"\[2, 40\].*\[1, 40\]"),
            (torch.ones(40, dtype=torch.bool), r"\[2, 40\].*\[40\]"),
            (torch.ones(2, 1, 1, 40, dtype=torch.bool), r"\[2, 40\].*\[2, 1, 1, 40\]"),
            (torch.ones(2, 40, dtype=torch.bool, device="meta"), "cpu.*meta"),
        )
    ],
]


ATTENDING = "sparse_attn zipvl_attn zipvl_prefill zipvl_layer"
KEYWORD_MISTAKES += [
    (f"select_tokens {ATTENDING}", "local_window", -1, "at least 0, got -1"),
    (f"select_tokens {ATTENDING}", "num_sinks", -2, "at least 0, got -2"),
    (
        f"select_tokens {ATTENDING}",
        "num_sinks",
        4,
        "num_sinks needs local_window above 0, got num_sinks 4 and local_window 0",
    ),
    *[
        ("select_tokens zipvl_attn zipvl_prefill zipvl_layer", "max_ratio", value, rf"\(0, 1\], got -?{got}")
        for value, got in ((0.0, "0"), (-0.5, "0.5"), (1.5, "1.5"), (math.nan, "nan"), (math.inf, "inf"))
    ],
    *[
        (f"probe_scores {ATTENDING}", "last_key", wrong, expected)
        for wrong, expected in (
            (torch.ones(2, 40, dtype=torch.int64), "int32.*int64"),
            (torch.ones(2, 39, dtype=torch.int32), r"\[2, 40\].*\[2, 39\]"),
            (torch.ones(1, 40, dtype=torch.int32), r"\[2, 40\].*\[1, 40\]"),
            (torch.ones(2, 40, 1, dtype=torch.int32), r"\[2, 40\].*\[2, 40, 1\]"),
            (torch.ones(2, 40, dtype=torch.int32, device="meta"), "cpu.*meta"),
        )
    ],
    ("probe_index", "k", torch.ones(2, 2, 39, 64), "q must have at most k's 39 tokens.*got 40"),
    ("probe_index", "k", torch.ones(1, 2, 40, 64), "q's batch size 2, got 1"),
    ("probe_index", "k", torch.ones(2, 40, 64), r"4 dimensions.*\[2, 40, 64\]"),
    ("probe_index", "k", torch.ones(2, 2, 40, 64, device="meta"), "cpu.*meta"),
]


def assert_error(op: str, argument: str, expected: str, tensors: dict[str, Tensor], keywords: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError) as caught:
        getattr(ops, op)(*tensors.values(), **keywords)
    message = str(caught.value)
    assert f"{op}: " in message, message
    message = message[message.index(f"{op}: ") :].splitlines()[0]
    assert re.search(rf"\b{argument}\b", message), message
    assert re.search(expected, message), message


@pytest.mark.parametrize(
    ("op", "argument", "change", "expected"),
    [
        pytest.param(op, argument, change, expected, id=f"{op}-{argument}-{number}")
        for number, (having, argument, change, expected) in enumerate(TENSOR_MISTAKES)
        for op in having.split()
    ],
)
def test_tensor_mistakes(op: str, argument: str, change: Change, expected: str) -> None:
    tensors = sample_tensors(op)
    tensors[argument] = change(tensors[argument])
    assert_error(op, argument, expected, tensors, {})


@pytest.mark.parametrize(
    ("op", "argument", "value", "expected"),
    [
        pytest.param(op, argument, value, expected, id=f"{op}-{argument}-{number}")
        for number, (having, argument, value, expected) in enumerate(KEYWORD_MISTAKES)
        for op in having.split()
    ],
)
def test_keyword_mistakes(op: str, argument: str, value: Any, expected: str) -> None:
    assert_error(op, argument, expected, sample_tensors(op), {argument: value})


@pytest.mark.parametrize("op", ATTENDING.split())
def test_what_needs_causal(op: str) -> None:
    tensors, backwards = sample_tensors(op), {"causal": False}
    expected = "needs causal=True, got local_window 8 and causal=False"
    assert_error(op, "local_window", expected, tensors, backwards | {"local_window": 8})
    last_key = {"last_key": torch.ones(2, 40, dtype=torch.int32)}
    for name in (op, "probe_scores"):
        given = sample_tensors(name)
        assert_error(name, "last_key", "needs causal=True, got a tensor and causal=False", given, backwards | last_key)
        given["q"] = given["q"][:, :, 1:]
        assert_error(name, "q", "all of k's 40 tokens without causal, got 39 and causal=False", given, backwards)


@pytest.mark.parametrize("op", ATTENDING.split())
def test_last_key_is_as_long_as_the_queries(op: str) -> None:
    tensors = sample_tensors(op)
    tensors["q"] = tensors["q"][:, :, 30:]
    last_key = torch.ones(2, 40, dtype=torch.int32)
    assert_error(op, "last_key", r"\[2, 10\].*\[2, 40\]", tensors, {"last_key": last_key})


@pytest.mark.parametrize("op", ["probe_index", "zipvl_attn", "zipvl_prefill", "zipvl_layer"])
def test_no_probes_at_all(op: str) -> None:
    keywords = {"num_recent": 0, "num_random": 0}
    assert_error(op, r"num_recent \+ num_random", "at least 1.*got 0", sample_tensors(op), keywords)


DIFFERENTIABLE = [
    (op, name) for op in OPS for name, tensor in sample_tensors(op).items() if tensor.dtype.is_floating_point
]


def test_every_op_that_returns_tensors_is_tested() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("zipvl::")}
    assert registered - {"zipvl::explain"} == {f"zipvl::{op}" for op in OPS}


@pytest.mark.parametrize(("op", "argument"), DIFFERENTIABLE)
def test_inference_only(op: str, argument: str) -> None:
    tensors = sample_tensors(op)
    tensors[argument] = tensors[argument].clone().requires_grad_()
    assert_error(op, argument, "requires? grad", tensors, {})
    for no_grad in (torch.no_grad, torch.inference_mode):
        with no_grad():
            got = getattr(ops, op)(*tensors.values())
        assert not any(t.requires_grad for t in ((got,) if isinstance(got, Tensor) else got))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("op", "argument"), DIFFERENTIABLE)
def test_no_forward_mode_either(op: str, argument: str, grad: bool) -> None:
    tensors = sample_tensors(op)
    primal = tensors[argument]

    def call(t: Tensor) -> Any:
        return getattr(ops, op)(*(tensors | {argument: t}).values())

    expected = rf"{op}: {argument} has a tangent, and zipvl is inference only"
    with torch.set_grad_enabled(grad):
        with pytest.raises(RuntimeError, match=expected):
            torch.func.jvp(call, (primal,), (primal,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(primal, primal)
            with pytest.raises(RuntimeError, match=expected):
                call(dual)
            call(primal)
            call(dual.detach())


@pytest.mark.parametrize("name", ["norm_weight", "v_factor", "k_recent"])
def test_keyword_tensors_are_not_differentiable_either(name: str) -> None:
    op = {"norm_weight": "project_queries", "v_factor": "quantize_kv", "k_recent": "decode_attn_quantized"}[name]
    keywords: dict[str, Any] = {
        "norm_weight": {"norm_weight": torch.ones(64)},
        "v_factor": {"v_factor": torch.ones(2, 2, 64)},
        "k_recent": {
            "k_recent": torch.ones(2, 2, 5, 64),
            "v_recent": torch.ones(2, 2, 5, 64),
            "recent_lengths": torch.ones(2, dtype=torch.int32),
        },
    }[name]
    value = keywords[name]
    assert_error(op, name, "requires grad", sample_tensors(op), keywords | {name: value.clone().requires_grad_()})
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, value)
        assert_error(op, name, "has a tangent", sample_tensors(op), keywords | {name: dual})


@pytest.mark.parametrize("fullgraph", [True, False])
def test_no_forward_mode_in_a_compiled_function(fullgraph: bool) -> None:
    tensors = sample_tensors("zipvl_attn")

    def tangent(v: Tensor) -> Tensor:
        return torch.func.jvp(lambda v: ops.zipvl_attn(tensors["q"], tensors["k"], v)[0], (v,), (v,))[1]

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="zipvl_attn: v has a tangent, and zipvl is inference only"):
        torch.compile(tangent, backend="aot_eager", fullgraph=fullgraph)(tensors["v"])


@pytest.mark.parametrize("op", OPS)
def test_torch_ops_check_like_the_wrappers(op: str) -> None:
    """The checks are in the ops: TorchScript and C++ programs meet them too."""
    tensors = sample_tensors(op)
    name, tensor = next(iter(tensors.items()))
    tensors[name] = tensor[None]
    with pytest.raises(RuntimeError, match=f"{op}: {name} must have . dimensions"):
        getattr(torch.ops.zipvl, op)(*tensors.values(), **KEYWORDS[op])
