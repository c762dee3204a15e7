"""Heads spread over processes: the mean of their probe scores selects in each what one process selects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from zipvl import ops

from .helpers import make_qkv

RANKS = 2
OPTIONS: dict[str, Any] = {"tau": 0.8, "local_window": 16, "num_sinks": 2}


def selection(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, over_ranks: bool) -> list[torch.Tensor]:
    """``out``, ``index`` and ``count`` of a layer by given scores."""
    probes = ops.probe_index(q, num_recent=16, num_random=16)
    scores = torch.stack(ops.probe_scores(q, k, probes))
    if over_ranks:
        dist.all_reduce(scores)
        scores /= dist.get_world_size()
    return list(ops.zipvl_layer(q, k, v, budget_score=scores[0], rank_score=scores[1], **OPTIONS)[:3])


def rank_main(rank: int, device_type: str, folder: str) -> None:
    """One process with its half of the heads; writes what it selected."""
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    heads = inputs(device)
    own = [x.chunk(RANKS, dim=1)[rank] for x in heads]
    torch.save([t.cpu() for t in selection(*own, over_ranks=True)], f"{folder}/found.{rank}.pt")
    dist.destroy_process_group()


def inputs(device: torch.device) -> list[torch.Tensor]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [t.to(device) for t in make_qkv(2, 8, 4, 700, 64, dtype)]


def check(folder: Path, device_type: str) -> None:
    """Ranks agree bit for bit, and with one process up to tokens that a rounding of the sums moves."""
    torch.multiprocessing.spawn(rank_main, args=(device_type, str(folder)), nprocs=RANKS)
    first, second = (torch.load(folder / f"found.{rank}.pt") for rank in range(RANKS))
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    out, index, count = (t.cpu() for t in selection(*inputs(torch.device(device_type)), over_ranks=False))
    for b in range(2):
        ours, theirs = (set(i[b, : c[b]].tolist()) for i, c in ((first[1], first[2]), (index, count)))
        assert len(ours ^ theirs) <= 2 and len(theirs) < 700
    if torch.equal(first[1], index):
        assert torch.allclose(torch.cat([first[0], second[0]], dim=1).float(), out.float(), atol=1e-2)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    check(tmp_path, "cpu")
