"""The plug-in of vLLM without vLLM, on CUDA: prompts, decoding in one paged cache, a decoding step in a graph."""

from __future__ import annotations

import torch

from tests.kernels.test_ops import no_host_sync
from tests.unit.test_vllm_paged import Cache, D, H, run_requests
from zipvl.vllm.paged import append, views

Tensor = torch.Tensor


def test_requests_come_and_go() -> None:
    run_requests("cuda")


def attend(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """``q [rows, H, 1, D]`` against the first ``lengths`` slots of each row, over PyTorch."""
    blocks = table.flatten().long()
    k, v = (view.index_select(0, blocks).unflatten(0, table.shape).flatten(1, 2) for view in views(cache, D))
    seen = torch.arange(k.shape[1], device=q.device) < lengths[:, None]
    k, v = (t.masked_fill(~seen[:, :, None, None], 0).transpose(1, 2) for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])


def test_a_decoding_step_in_a_graph() -> None:
    """Lengths of all layers are found before the graph, which appends and attends; no step waits for the device."""
    torch.manual_seed(0)
    cache = Cache(layers=3, blocks=60, block_size=16, rows=4, device="cuda")
    cache.prompt("a", 200, [list(range(0, 200, 3)), [199], list(range(200))], slots=200)
    cache.prompt("b", 90, [[3, 89], list(range(90)), [89]], slots=90)
    requests = ["a", "", "b", ""]
    for name in ("a", "b"):
        cache.tables[name].append(cache.free.pop(0))  # room for the steps below
    table = cache.table(requests)
    seen = torch.zeros(4, dtype=torch.int32, device="cuda")
    begins = torch.arange(5, dtype=torch.int32, device="cuda")
    q, key, value = (torch.randn(4, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def step(lengths: Tensor, places: Tensor) -> list[Tensor]:
        made = []
        for layer in range(cache.layers):
            append(key, value, places[layer], table, begins, 1, cache.states[layer])
            made.append(attend(q.unsqueeze(2), cache.states[layer], table, lengths[layer]))
        return made

    lengths, places = cache.lengths.locate(table, seen, begins, 1, 4)  # rows of padding alone: nothing is written
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(lengths, places)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(lengths, places)
    for number in range(1, 9):
        seen.copy_(torch.tensor([200 + number, 0, 90 + number, 0], dtype=torch.int32))
        for tensor in (q, key, value):
            tensor.normal_()
        with no_host_sync():
            cache.lengths.locate(table, seen, begins, 1, 4)
            graph.replay()
        torch.cuda.synchronize()
        for row, name in ((0, "a"), (2, "b")):
            cache.seen[name] += 1
            for layer in range(cache.layers):
                held = cache.held[name][layer]
                held.append(torch.cat([key[row], value[row]], dim=-1))
                k, v = torch.stack(held).transpose(0, 1).double().split(D, dim=-1)
                weights = (q[row].double().unsqueeze(1) @ k.transpose(1, 2) * D**-0.5).softmax(dim=-1)
                error = (outputs[layer][row].double() - weights @ v).abs().max()
                assert error < 0.02, "a rounding of the output in bfloat16, whose values are below 4"
    cache.check()
