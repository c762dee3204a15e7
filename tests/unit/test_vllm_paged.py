"""zipvl.vllm.paged: prompts and decoding in one paged cache, with a length of its own in every layer and row."""

from __future__ import annotations

import torch

from zipvl.vllm.paged import Lengths, append, gather, store, views

Tensor = torch.Tensor
D, H = 64, 2


class Cache:
    """A paged cache, and beside it what each request should hold in each layer, as plain lists of tokens."""

    def __init__(self, layers: int, blocks: int, block_size: int, rows: int, device: str = "cpu") -> None:
        shape = (layers, blocks, H, block_size, 2 * D)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.states = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.lengths = Lengths(layers, blocks, rows, device)
        self.free = list(range(1, blocks))  # block 0 is nobody's, as in vLLM
        self.tables: dict[str, list[int]] = {}
        self.seen: dict[str, int] = {}
        self.held: dict[str, list[list[Tensor]]] = {}
        self.device, self.layers, self.block_size, self.dtype = device, layers, block_size, dtype

    def tokens(self, count: int) -> tuple[Tensor, Tensor]:
        key, value = torch.randn(2, count, H, D).to(self.dtype)
        return key.to(self.device), value.to(self.device)

    def table(self, requests: list[str]) -> Tensor:
        """Block tables, padded with block 0; a request "" is a row of padding."""
        width = 1 + max(len(blocks) for blocks in self.tables.values())
        blocks = [self.tables.get(name, []) for name in requests]
        rows = [own + [0] * (width - len(own)) for own in blocks]
        return torch.tensor(rows, dtype=torch.int32).to(self.device)

    def prompt(self, name: str, tokens: int, kept: list[list[int]], slots: int) -> None:
        """A new request that keeps ``kept[layer]`` and was given blocks for ``slots`` tokens."""
        self.tables[name] = [self.free.pop(0) for _ in range(-(-slots // self.block_size))]
        self.seen[name], self.held[name] = tokens, []
        table = self.table([name])
        self.lengths.forget(table[:, 0])
        for layer, chosen in enumerate(kept):
            key, value = self.tokens(tokens)
            index = torch.full((1, tokens), tokens, dtype=torch.int32)
            index[0, : len(chosen)] = torch.tensor(chosen)
            count, capacity = (torch.tensor([n], dtype=torch.int32).to(self.device) for n in (len(chosen), slots))
            cache = self.states[layer]
            stored = store(key, value, index.to(self.device), count, table, cache, capacity)
            self.lengths.drop(layer, table[0, :1], tokens, stored)
            self.held[name].append([torch.cat([key[t], value[t]], dim=-1) for t in chosen[-slots:]])

    def located(self, requests: list[str], counts: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The step of ``counts`` new tokens of each request: table, begins, lengths, places."""
        table = self.table(requests)
        seen = torch.tensor([self.seen.get(name, 0) for name in requests], dtype=torch.int32).to(self.device)
        begins = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32).to(self.device)
        lengths, places = self.lengths.locate(table, seen, begins, max(counts), sum(counts))
        return table, begins, lengths, places

    def decode(self, requests: list[str], counts: list[int]) -> None:
        for name, new in zip(requests, counts, strict=True):
            if name:
                self.seen[name] += new
                while self.room(name) < max(len(layer) for layer in self.held[name]) + new:
                    self.tables[name].append(self.free.pop(0))
        table, begins, lengths, places = self.located(requests, counts)
        for layer in range(self.layers):
            key, value = self.tokens(sum(counts))
            append(key, value, places[layer], table, begins, max(counts), self.states[layer])
            first = 0
            for name, new in zip(requests, counts, strict=True):
                if name:
                    rows = torch.cat([key, value], dim=-1)[first : first + new]
                    self.held[name][layer] += list(rows)
                first += new
        for name, length in zip(requests, lengths.T.tolist(), strict=True):
            if name:
                assert length == [len(layer) for layer in self.held[name]]

    def room(self, name: str) -> int:
        return len(self.tables[name]) * self.block_size

    def check(self) -> None:
        """What stands in the blocks of every request is what it should hold, in every layer."""
        for name, layers in self.held.items():
            blocks = torch.tensor(self.tables[name], dtype=torch.int32).to(self.device)
            for layer, held in enumerate(layers):
                k, v = gather(self.states[layer], D, blocks, len(held))
                assert torch.equal(torch.cat([k, v], dim=-1)[0].transpose(0, 1), torch.stack(held))

    def end(self, name: str) -> None:
        self.free += self.tables.pop(name)
        del self.held[name], self.seen[name]


def run_requests(device: str) -> None:
    """Prompts come, decode by one token and by several, end, and others take their blocks."""
    torch.manual_seed(0)
    cache = Cache(layers=3, blocks=30, block_size=4, rows=4, device=device)
    cache.prompt("a", 20, [[0, 3, 19], list(range(20)), [19]], slots=20)
    cache.check()
    cache.decode(["a"], [1])
    cache.prompt("b", 50, [list(range(0, 50, 7)), [49], [1, 2, 49]], slots=9)
    cache.decode(["a", "", "b"], [1, 1, 1])
    cache.decode(["b", "a"], [3, 1])
    cache.check()
    first = cache.tables["a"][0]
    cache.end("a")
    cache.free.sort(key=lambda block: block != first)  # the next request begins where "a" began
    cache.prompt("c", 10, [list(range(10))] * 3, slots=10)
    assert cache.tables["c"][0] == first
    cache.decode(["c", "b"], [2, 2])
    cache.prompt("d", 30, [list(range(30))] * 3, slots=6)  # more than fits: the last are stored
    cache.decode(["b", "d", "c"], [1, 1, 1])
    cache.check()
    assert bool(cache.states[:, 0].isnan().all()), "nobody writes to the block of padding"


def test_requests_come_and_go() -> None:
    run_requests("cpu")


def test_views_are_of_the_cache() -> None:
    states = torch.randn(5, H, 4, 2 * D)
    k_cache, v_cache = views(states, D)
    assert k_cache.shape == v_cache.shape == (5, 4, H, D)
    assert torch.equal(k_cache[3, 1, 0], states[3, 0, 1, :D]) and torch.equal(v_cache[3, 1, 0], states[3, 0, 1, D:])
    assert k_cache.untyped_storage().data_ptr() == states.untyped_storage().data_ptr()


def test_fixed_addresses_of_single_tokens() -> None:
    """What a captured graph reads: the same memory in every step of one token a row."""
    lengths = Lengths(2, 9, 4, "cpu")
    begins = torch.arange(4, dtype=torch.int32)
    table = torch.tensor([[3, 1], [5, 0], [0, 0]], dtype=torch.int32)
    first = lengths.locate(table, torch.tensor([7, 4, 0], dtype=torch.int32), begins, 1, 3)
    lengths.drop(1, torch.tensor([5], dtype=torch.int32), 10, torch.tensor([6], dtype=torch.int32))
    second = lengths.locate(table, torch.tensor([8, 11, 0], dtype=torch.int32), begins, 1, 3)
    assert [a.data_ptr() for a in first] == [b.data_ptr() for b in second]
    assert first[0].tolist() == [[8, 11, 0], [8, 7, 0]] and first[1].tolist() == [[7, 10, -1], [7, 6, -1]]
