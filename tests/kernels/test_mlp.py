"""MLPs for selected tokens alone on a GPU: whole MLPs with zeros elsewhere, no host read, captured and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zipvl

transformers = pytest.importorskip("transformers")

from zipvl.transformers import mlp  # noqa: E402
from zipvl.transformers.products import counts_rows  # noqa: E402

from .test_ops import no_host_sync, poison_free_memory  # noqa: E402
from .test_pipelines import PAPER, agree, captured, make_model, prompt  # noqa: E402

BF16 = torch.bfloat16


def make_mlp(family: str, hidden: int, inner: int, dtype: torch.dtype) -> nn.Module:
    """An MLP of transformers, with biases where it has any."""
    module = __import__(f"transformers.models.{family.lower()}.modeling_{family.lower()}", fromlist=["x"])
    bias = {"mlp_bias": True} if family == "Llama" else {}
    config = getattr(transformers, f"{family}Config")(hidden_size=hidden, intermediate_size=inner, **bias)
    made: nn.Module = getattr(module, f"{family}MLP")(config).to("cuda", dtype)
    return made


def make_rows(batch: int, tokens: int, share: float, most: int | None) -> mlp.Rows:
    """Another number of tokens in each row of the batch, none in the second; at most ``most``."""
    mask = torch.rand(batch, tokens, device="cuda") < share
    mask[1:2] = False
    return mlp.Rows(mask if most is None else mask & (mask.cumsum(1) <= most), most)


def assert_rows(found: Tensor, module: nn.Module, x: Tensor, mask: Tensor) -> None:
    """Two roundings of the dtype from the whole MLP, and float32 sums in another order; exact zeros elsewhere."""
    whole = type(module).forward(module, x).float()
    terms = sum(module.down_proj.weight.shape)  # of the sums of both products
    bound = 4 * torch.finfo(x.dtype).eps + 2 * terms**0.5 * torch.finfo(torch.float32).eps
    assert not bool(found[~mask].any())
    if bool(mask.any()):
        error = (found.float() - whole)[mask].abs().max() / whole.abs().max()
        assert error <= bound, float(error)


@pytest.mark.parametrize("most", [None, 200])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 700, 256, 384), (3, 5000, 128, 320), (2, 600, 3584, 18944)], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_rows_of_an_mlp(
    family: str, shape: tuple[int, ...], dtype: torch.dtype, share: float, most: int | None
) -> None:
    """By products that count their rows where there are such, else by as many rows as are enough."""
    torch.backends.cuda.matmul.allow_tf32 = False
    batch, tokens, hidden, inner = shape
    module, x = make_mlp(family, hidden, inner, dtype), torch.randn(batch, tokens, hidden, device="cuda").to(dtype)
    rows, passed = make_rows(batch, tokens, share, most), mlp.Passed()
    ours = mlp.SparseMLP(module, 0, passed)
    with torch.no_grad():
        assert mlp.can_count(module, None, x) == counts_rows(x.device, dtype)
        passed.begin()
        for wait in (False, True):  # libraries are set up the first time
            passed.put(0, rows)
            poison_free_memory()
            if wait:
                with no_host_sync():
                    found = ours(x)
            else:
                found = ours(x)
        assert passed.left() == [] and found.shape == x.shape
        assert_rows(found, module, x, rows.mask)


def test_a_captured_mlp_is_told_another_selection() -> None:
    module, x = make_mlp("Qwen2", 256, 384, BF16), torch.randn(2, 6000, 256, device="cuda").to(BF16)
    rows, passed = make_rows(2, 6000, 0.4, None), mlp.Passed()
    ours = mlp.SparseMLP(module, 0, passed)

    def run() -> Tensor:
        passed.begin()
        passed.put(0, rows)
        found: Tensor = ours(x)
        return found

    with torch.no_grad():
        graph, out = captured(run)
        for share in (0.1, 0.9, 0.0, 1.0):
            rows.mask.copy_(make_rows(2, 6000, share, None).mask)
            graph.replay()
            torch.cuda.synchronize()
            assert_rows(out, module, x, rows.mask)


def make_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=200, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192, initializer_range=0.2, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).to("cuda", BF16).eval()
    model.set_experts_implementation("grouped_mm")
    return model


@pytest.mark.parametrize("kept", [{"ratio": 0.4}, {"tau": 0.6}, {"ratio": 0.4, "local_window": 64}], ids=str)
@pytest.mark.parametrize("make", [make_model, make_moe])
def test_a_prefill_is_that_of_whole_mlps_with_zeros(make: Any, kept: dict[str, float]) -> None:
    """Only the last layer's MLP skips, so that nothing selects otherwise; and no layer waits."""
    model, tokens = make(), prompt(3000)
    found = {}
    with torch.no_grad():
        for layers in ((), (1,)):
            settings = PAPER.replace(**kept, dense_below=256, skip_mlp_layers=layers)
            with zipvl.sparse(model, settings, record_index=True) as stats:
                model(tokens)
                with no_host_sync():
                    logits = model(tokens).logits
            index = stats.layers[1].index
            assert index is not None
            chosen = torch.zeros(3000, dtype=torch.bool, device="cuda")
            chosen[index[0].cuda()] = True
            if not layers:  # the same by hand
                last = model.model.layers[1].mlp
                handle = last.register_forward_hook(lambda _, args, out, chosen=chosen: out * chosen[:, None])
                with zipvl.sparse(model, settings):
                    logits = model(tokens).logits
                handle.remove()
            else:
                assert stats.layers[1].mlp_tokens == stats.layers[1].kept == [int(chosen.sum())]
            found[layers] = logits
    agree(found[(1,)], found[()])


@pytest.mark.parametrize("make", [make_model, make_moe])
def test_a_prefill_in_a_cuda_graph(make: Any) -> None:
    model, tokens = make(), prompt(3000)
    with torch.no_grad(), zipvl.sparse(model, PAPER, dense_below=256, tau=0.6, skip_mlp_layers=(1,)):
        graph, output = captured(lambda: model(tokens, use_cache=False, logits_to_keep=1))
        for seed in (1, 2):
            tokens.copy_(prompt(3000, seed))
            graph.replay()
            torch.cuda.synchronize()
            agree(output.logits, model(tokens, use_cache=False, logits_to_keep=1).logits)


@pytest.mark.parametrize(("dynamic", "kept"), [(True, {"ratio": 0.4}), (False, {"tau": 0.6})])
def test_compiled_whole(dynamic: bool, kept: dict[str, float]) -> None:
    torch._dynamo.reset()
    model = make_model(layers=1)  # the compiler's time grows with them
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    with torch.no_grad(), zipvl.sparse(model, PAPER, dense_below=256, **kept, skip_mlp_layers=(0,)) as stats:
        for tokens in (7000, 8100) if dynamic else (3000,):
            actual = compiled(prompt(tokens), logits_to_keep=1).logits
            assert stats.layers[0].mlp_tokens == stats.layers[0].kept
            agree(actual, model(prompt(tokens), logits_to_keep=1).logits)


def test_generate_replays_whole_mlps() -> None:
    """Decoded tokens run whole MLPs, captured or step by step: the same logits as long as their tokens are the same."""
    model, tokens, how = make_model(), prompt(3000), {"do_sample": False, "max_new_tokens": 24}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    found = []
    with torch.no_grad():
        for decode in ("graph", "eager"):
            settings = PAPER.replace(ratio=0.4, dense_below=256, skip_mlp_layers=(0, 1), decode=decode)
            with zipvl.sparse(model, settings) as stats:
                found.append(model.generate(tokens, **how))
            assert stats.decodings[-1].how == decode and stats.layers[0].mlp_tokens == [1200]
    same = (found[0].sequences == found[1].sequences)[0, 3000:].int().cumprod(0)
    steps = min(int(same.sum()) + 1, 24)
    assert steps >= 4
    agree(*(torch.cat(output.logits[:steps]) for output in found))
