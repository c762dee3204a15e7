"""Models on a GPU that is not the current one, spread over two by their layers, and by their heads (NCCL)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

tf = pytest.importorskip("transformers")

import zipvl  # noqa: E402
from tests.models.tensor_parallel import CONFIGS, NEW_TOKENS, RANKS, alone, spread  # noqa: E402
from tests.models.tiny_models import PAPER, TEXT, ids  # noqa: E402
from tests.unit.test_scores_over_ranks import check as check_ranks  # noqa: E402
from zipvl.transformers import DecodeGraph  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
LAYERS, TOKENS = 4, 1500
CACHES = ("drop", "quantize", "full")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def make() -> Any:
    """A bfloat16 model on the CPU, of a shape that the kernels take."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "head_dim": 128, "num_hidden_layers": LAYERS, "initializer_range": 0.05}
    model = tf.LlamaForCausalLM._from_config(tf.LlamaConfig(**TEXT | shape), dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def answer(model: Any, prompt: Tensor, cache: str) -> dict[str, Any]:
    """What a sparse generation gives, on the host."""
    with zipvl.sparse(model, PAPER, tau=0.7, dense_below=256, cache=cache) as stats:
        output = model.generate(
            prompt, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return {
            "tokens": output.sequences.tolist(),
            "logits": torch.stack([each.cpu() for each in output.logits]),
            "kept": [layer.kept for layer in stats.layers.values()],
            "bytes": output.past_key_values.cache_bytes,
        }


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit: the same kernels on GPUs of one kind."""
    assert all(0 < kept[0] < TOKENS for kept in expected["kept"])
    assert {name: value for name, value in found.items() if name != "logits"} == {
        name: value for name, value in expected.items() if name != "logits"
    }
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert torch.equal(found["logits"], expected["logits"])


@pytest.mark.parametrize("cache", CACHES)
def test_on_a_device_that_is_not_the_current_one(cache: str) -> None:
    model, prompt = make(), ids(TOKENS, 1)
    expected = answer(model.to("cuda:0"), prompt.to("cuda:0"), cache)
    same(answer(model.to("cuda:1"), prompt.to("cuda:1"), cache), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_layers_on_two_devices(cache: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, prompt = make(), ids(TOKENS, 1).to("cuda:0")
    expected = answer(model.to("cuda:0"), prompt, cache)
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    device_map |= {f"model.layers.{i}": 2 * i // LAYERS for i in range(LAYERS)}
    spread_out = accelerate.dispatch_model(model, device_map=device_map)
    devices = [str(layer.self_attn.q_proj.weight.device) for layer in model.model.layers]
    assert devices == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    same(answer(spread_out, prompt, cache), expected)
    with zipvl.sparse(spread_out, PAPER, tau=0.7, dense_below=256, cache=cache):
        filled = spread_out(prompt).past_key_values
        with pytest.raises(ValueError, match=r"a CUDA graph is of one GPU, the layers .* are on cuda:0, cuda:1"):
            DecodeGraph(spread_out, filled, steps=2)


@pytest.mark.parametrize("cache", CACHES)
def test_a_decode_graph_on_a_device_that_is_not_the_current_one(cache: str) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # torch's own stream for captures is now one of the first GPU
        torch.zeros(1, device="cuda:0")
    model, prompt = make().to("cuda:1"), ids(TOKENS, 1).to("cuda:1")
    with zipvl.sparse(model, PAPER, tau=0.7, dense_below=256, cache=cache):
        plain, replayed = (model(prompt, logits_to_keep=1) for _ in range(2))
        token = plain.logits.argmax(-1)
        step = DecodeGraph(model, replayed.past_key_values, steps=4)
        for _ in range(4):
            expected = model(token, past_key_values=plain.past_key_values).logits
            assert (step(token) - expected).abs().max() <= 0.05 * expected.abs().max()
            token = expected.argmax(-1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of a model whose heads are spread over two GPUs found."""
    return spread(make(), ids(TOKENS, 1), tmp_path_factory.mktemp("tensor_parallel"))


def test_ranks_have_their_heads_and_agree(found: list[dict[str, Any]]) -> None:
    assert [rank["device"] for rank in found] == ["cuda:0", "cuda:1"]
    rows = make().model.layers[0].self_attn.q_proj.weight.shape[0]
    assert [rank["query_rows"] for rank in found] == [rows // RANKS] * RANKS
    for name in CONFIGS:
        assert found[0][name]["tokens"] == found[1][name]["tokens"]
        assert found[0][name]["logits"] == found[1][name]["logits"]


@pytest.mark.parametrize("name", ["tau 1", "ratio", "tau"])
def test_heads_on_two_devices_are_the_model_on_one(name: str, found: list[dict[str, Any]]) -> None:
    """Up to bfloat16's rounding of sums that two GPUs take apart, and tokens at the cut that it moves."""
    model, prompt = make().to("cuda:0"), ids(TOKENS, 1).to("cuda:0")
    expected = alone(model, prompt, CONFIGS[name])[0].float().cpu()
    actual = torch.tensor(found[0][name]["logits"])
    assert (actual - expected).norm() <= 0.05 * expected.norm()


def test_scores_over_nccl_select_alike(tmp_path: Path) -> None:
    """Two processes with a GPU and half of the heads each, as under vLLM's tensor parallelism."""
    check_ranks(tmp_path, "cuda")
