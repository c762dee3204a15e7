"""MLPs that run for the selected tokens of a sparse prefill alone, in the layers of ``ZipVLConfig.skip_mlp_layers``.

The output of every other token is zero, so that it keeps its residual, and the next layer may select it again. Decoded
tokens and dense prefills run whole MLPs. On a device how many tokens there are stays there: a product that counts its
rows on the device computes them alone, every other MLP as many rows as the host knows to be enough.

``SparseMLP`` takes the place of an MLP's forward for as long as a run asks for it. An MLP is handed hidden states and
nothing else, so the attention function of its layer leaves the selection for it (``Passed``).
"""

from __future__ import annotations

import ast
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils.import_utils import is_tracing

from zipvl.config import ZipVLConfig
from zipvl.transformers import features
from zipvl.transformers.methods import Method
from zipvl.transformers.products import counts_rows, is_plain
from zipvl.transformers.target import Target, find, layer_index, layers_that_can
from zipvl.transformers.walk import modules_of

NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")
"""What decoder layers call their MLP."""

COUNTED = frozenset(
    {
        "Gemma3MLP",
        "LlamaMLP",
        "MistralMLP",
        "Qwen2MLP",
        "Qwen3MLP",
        "Qwen3MoeMLP",
        "Qwen3VLMoeTextMLP",
        "Qwen3VLTextMLP",
    }
)
"""transformers' MLPs that compute what ``_counted`` does, ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""

ROUTED = frozenset(
    {
        "MixtralSparseMoeBlock",
        "OlmoeSparseMoeBlock",
        "Qwen3MoeSparseMoeBlock",
        "Qwen3VLMoeTextSparseMoeBlock",
    }
)
"""transformers' mixtures of experts that compute what ``_routed`` does."""

MAX_CHUNKS = 8  # one without rows costs its launches and the activation of what is there
MIN_CHUNK = 4096  # rows; see docs/kernels/projections.md


class Rows(NamedTuple):
    """The tokens of one forward that an MLP runs for."""

    mask: Tensor
    """``[B, n]`` bool."""
    most: int | None
    """No row of the batch has more, unless its scores are not finite; None: any may have all."""


class Passed:
    """What the attention functions of the decoder's forward under way left for the MLPs of their layers; one a
    thread."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self.traced: dict[int, Rows] = {}
        """While a graph is traced, which has no threads to tell apart."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Passed.__init__(self)

    def begin(self) -> None:
        """Forgets what a forward left that did not end."""
        if torch.compiler.is_compiling():
            self.traced = {}
        else:
            self._of_thread.rows = dict[int, Rows]()
            self.traced.clear()

    def _own(self) -> dict[int, Rows]:
        own: dict[int, Rows] | None = getattr(self._of_thread, "rows", None)
        if own is None:
            own = self._of_thread.rows = {}
        return own

    def put(self, layer: int, rows: Rows) -> None:
        """Leaves ``rows`` for the MLP of ``layer``."""
        (self.traced if torch.compiler.is_compiling() else self._own())[layer] = rows

    def take(self, layer: int) -> Rows | None:
        """What was left for the MLP of ``layer``, once; None: it runs for every token."""
        if torch.compiler.is_compiling():
            return self.traced.pop(layer, None)
        found = self._own().pop(layer, None)  # where a graph broke between attention and MLP, it is with the traced
        return self.traced.pop(layer, None) if found is None else found

    def left(self) -> list[int]:
        """The layers whose MLPs did not take what was left for them."""
        return sorted(self.traced if torch.compiler.is_compiling() else {*self._own(), *self.traced})


def rows_of(index: Tensor, count: Tensor, tokens: int, new: int, candidates: int, most: int | None) -> Rows:
    """The selected tokens among the last ``new`` of ``tokens``, and all ``candidates`` behind them.

    Args:
        index: ``[B, M]`` int32, a selection among ``tokens``; places from ``count [B]`` on are unused.
        most: no row of the batch selects more; None: any may select all.
    """
    used = torch.arange(index.shape[1], device=index.device) < count[:, None]
    mask = torch.zeros(index.shape[0], tokens + 1, dtype=torch.bool, device=index.device)
    mask = mask.scatter_(1, index.long().masked_fill(~used, tokens), True)[:, tokens - new : tokens]
    if candidates > 0:
        mask = nn.functional.pad(mask, (0, candidates), value=True)
    return Rows(mask, None if most is None else min(most, new) + candidates)


class MLPs:
    """The MLPs of a decoder's layers, as far as they run for selected tokens alone.

    Args:
        target: the language part of the model.

    Attributes:
        installed: the MLPs that have a ``SparseMLP``, by layer.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.passed = target, Passed()
        self.installed: dict[int, nn.Module] = {}

    def check(self, config: ZipVLConfig) -> None:
        """Raises if ``config.skip_mlp_layers`` names a layer whose MLP cannot run for selected tokens alone.

        Raises:
            ValueError: naming the layer, and the legal ones or the reason.
        """
        self._found(config.skip_mlp_layers)

    def keep(self, layers: set[int]) -> None:
        """Installs the MLPs of ``layers``, which ``check`` has seen, and removes the others."""
        for layer in self.installed.keys() - layers:
            SparseMLP.remove(self.installed.pop(layer))
        for layer, mlp in self._found(tuple(layers - self.installed.keys())).items():
            SparseMLP(mlp, layer, self.passed).install()
            self.installed[layer] = mlp

    def admit(self, config: ZipVLConfig) -> Passed:
        """Installs what ``config`` asks for on top, that of a cache among it; where attention leaves its selections."""
        missing = [layer for layer in config.skip_mlp_layers if layer not in self.installed]
        if missing:
            self.keep({*self.installed, *missing})
        return self.passed

    def _found(self, layers: tuple[int, ...]) -> dict[int, nn.Module]:
        """The MLPs of ``layers``.

        Raises:
            ValueError: as ``check`` says.
        """
        if not layers:
            return {}
        name, able = type(self.target.decoder).__name__, layers_that_can(self.target)
        if wrong := sorted(set(layers) - able):
            raise ValueError(
                f"zipvl.sparse: ZipVLConfig.skip_mlp_layers names {wrong}, which {name} does not have or which cannot "
                f"be sparse; those that can: {sorted(able)}"
            )
        parents = {id(child): parent for parent in modules_of(self.target.decoder) for child in parent.children()}
        found: dict[int, nn.Module] = {}
        for attention in self.target.attention:
            layer = layer_index(attention)
            if layer is None or layer not in layers:
                continue
            mlp = _mlp_of(parents.get(id(attention)), attention)
            if isinstance(mlp, nn.Module) and (mlp in found.values() or layer in found):
                mlp = "it shares its MLP with another layer"
            if isinstance(mlp, str):
                raise ValueError(
                    f"zipvl.sparse: ZipVLConfig.skip_mlp_layers names layer {layer} of {name}, whose MLP cannot run "
                    f"for selected tokens alone: {mlp}. Leave it out"
                )
            found[layer] = mlp
        return found


def layers_whose_mlps_can_skip(model: nn.Module) -> list[int]:
    """The layers that ``ZipVLConfig.skip_mlp_layers`` may name for ``model``.

    Raises:
        ValueError: ``model`` cannot be sparse at all, and why.
    """
    target = find(model)
    mlps = MLPs(target)

    def can(layer: int) -> bool:
        try:
            mlps.check(ZipVLConfig(skip_mlp_layers=(layer,)))
        except ValueError:
            return False
        return True

    return [layer for layer in sorted(layers_that_can(target)) if can(layer)]


def _mlp_of(layer: nn.Module | None, attention: nn.Module) -> nn.Module | str:
    """The MLP of a decoder layer, or why it has none that could run for some of the tokens.

    Args:
        layer: the module that calls ``attention``.
        attention: its attention module.
    """
    children = {} if layer is None else dict(layer.named_children())
    attribute = next((name for name in NAMES if name in children), None)
    if layer is None or attribute is None:
        return f"no MLP beside its attention, under one of the names {', '.join(NAMES)}"
    mlp = children[attribute]
    others = [name for name, child in children.items() if child not in (attention, mlp) and _multiplies(child)]
    if others:
        return f"{type(layer).__name__} has {', '.join(others)} beside its attention and its MLP"
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        return "its weights are spread over processes"
    called = next(name for name, child in children.items() if child is attention)
    return _why_not(type(layer), called, attribute) or mlp


def _multiplies(module: nn.Module) -> bool:
    """Whether a module has weights of two dimensions or more; a norm has none."""
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _why_not(kind: Any, attention: str, mlp: str) -> str | None:
    """Why the forward of a decoder layer does not call ``self.mlp(states)`` with what attention has been added to; None
    if it does.

    Args:
        kind: the layer's class.
        attention, mlp: the layer's attributes.
    """
    forward, calls = features.forward_of(kind), features.calls_of(kind, mlp)
    if forward is None or not calls:
        return f"the source of {kind.__name__}, which says what its MLP is given, is not at hand"
    if any(len(call.args) != 1 or call.keywords for call in calls):
        return f"{kind.__name__} gives it more than hidden states"
    order = _Order(f"self.{attention}", f"self.{mlp}")
    order.run(forward.body, frozenset())
    if not order.follows:
        return f"{kind.__name__} computes attention and MLP side by side, of the same states (a parallel block)"
    return None


class _Order:
    """Which variables hold what came of attention, statement by statement.

    Args:
        attention, mlp: the expressions that are called.

    Attributes:
        follows: whether every MLP was given such a variable, on every path.
    """

    def __init__(self, attention: str, mlp: str) -> None:
        self.attention, self.mlp, self.follows = attention, mlp, True

    def run(self, body: list[ast.stmt], after: frozenset[str]) -> frozenset[str]:
        """The variables behind ``body``, of ``after`` before it."""
        for statement in body:
            if isinstance(statement, ast.If):
                self._look(statement.test, after)
                after = self.run(statement.body, after) & self.run(statement.orelse, after)
            elif isinstance(statement, (ast.With, ast.For, ast.While)):
                after = self.run(statement.body, after)
            else:
                self._look(statement, after)
                after = self._assigned(statement, after)
        return after

    def _look(self, node: ast.AST, after: frozenset[str]) -> None:
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == self.mlp:
                self.follows = self.follows and self._came_of(call.args[0], after)

    def _came_of(self, value: ast.AST, after: frozenset[str]) -> bool:
        nodes = list(ast.walk(value))
        named = any(isinstance(node, ast.Name) and node.id in after for node in nodes)
        return named or any(isinstance(n, ast.Call) and ast.unparse(n.func) == self.attention for n in nodes)

    def _assigned(self, statement: ast.stmt, after: frozenset[str]) -> frozenset[str]:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
            targets = [statement.target]
        else:
            return after
        named = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
        names = {node.id for node in named if isinstance(node.ctx, ast.Store)}  # not the self of self.x
        if statement.value is not None and self._came_of(statement.value, after):
            return after | names
        return after if isinstance(statement, ast.AugAssign) else after - names


class SparseMLP(Method):
    """An MLP's forward, on the instance.

    Args:
        owner: the MLP.
        layer: the index of its layer.
        passed: where the attention function of its layer leaves a selection.
    """

    chains = True

    def __init__(self, owner: Any, layer: int, passed: Passed) -> None:
        super().__init__(owner)
        self.layer, self.passed = layer, passed

    def __call__(self, hidden_states: Tensor) -> Any:
        """The module's forward of ``[B, n, C]``: of the selected tokens, zero for the others; of all where nothing was
        selected.

        Raises:
            RuntimeError: these are not the states of the tokens that attention selected among.
        """
        rows = self.passed.take(self.layer)
        if rows is None:
            return self.ordinary(hidden_states)
        if hidden_states.dim() != 3 or hidden_states.shape[:2] != rows.mask.shape:
            raise RuntimeError(
                f"zipvl: ZipVLConfig.skip_mlp_layers names layer {self.layer}, whose {type(self.owner).__name__} was "
                f"given hidden states {list(hidden_states.shape)}; expected [B, n, C] with B, n = "
                f"{list(rows.mask.shape)}. Leave the layer out"
            )
        if hidden_states.device.type == "cpu" and not is_tracing(hidden_states):
            return self._named(hidden_states, rows.mask)
        if can_count(self.owner, self.before, hidden_states):
            return _counted(self.owner, hidden_states, rows)
        return self._enough(hidden_states, rows)

    def _named(self, x: Tensor, mask: Tensor) -> Any:
        """Where the host may read which tokens are selected."""
        at = mask.flatten().nonzero()[:, 0]
        if at.shape[0] == mask.numel():
            return self.ordinary(x)
        if at.shape[0] == 0:
            return torch.zeros_like(x)
        states = x.flatten(0, 1)
        result = self.ordinary(states.index_select(0, at)[None])
        return _first_replaced(result, lambda y: _put_back(states, at, y).view(x.shape))

    def _enough(self, x: Tensor, rows: Rows) -> Any:
        """As many rows as the host knows to be enough; all of them, others made zero, where it knows nothing. Experts
        that can are told which of these are none."""
        routes = can_route(self.owner, self.before)
        if rows.most is None or rows.most >= x.shape[1]:
            if routes:
                return _routed(self.owner, x.flatten(0, 1), rows.mask.flatten()).view(x.shape)
            result = self.ordinary(x)
            return _first_replaced(result, lambda y: y.view(x.shape).masked_fill(~rows.mask[:, :, None], 0.0))
        states, at = x.flatten(0, 1), _places(rows, 1)[0]
        picked = states.index_select(0, at.clamp(max=states.shape[0] - 1))
        if routes:
            return _put_back(states, at, _routed(self.owner, picked, at < states.shape[0])).view(x.shape)
        result = self.ordinary(picked[None])
        return _first_replaced(result, lambda y: _put_back(states, at, y).view(x.shape))


def _first_replaced(result: Any, replaced: Any) -> Any:
    """``replaced`` of what an MLP returned: of the first part where it is a tuple, such as beside a router's logits."""
    return (replaced(result[0]), *result[1:]) if isinstance(result, tuple) else replaced(result)


def _put_back(states: Tensor, at: Tensor, y: Tensor) -> Tensor:
    """``y [p, C]`` or ``[1, p, C]`` at the places ``at`` of zeros like ``states [T, C]``; those at ``T`` go nowhere."""
    tokens, channels = states.shape
    return y.new_zeros(tokens + 1, channels).index_copy_(0, at, y.reshape(-1, channels))[:tokens]


def _places(rows: Rows, parts: int) -> tuple[Tensor, Tensor]:
    """Where the chosen tokens are, without a host read: those of all rows of the batch behind one another.

    Returns:
        ``[p]`` int64, places in the ``T = B * n`` tokens, ``T`` in unused ones, ``p`` a multiple of ``parts``; ``[1]``
        int64, how many there are.
    """
    batch, new = rows.mask.shape
    chosen = rows.mask if rows.most is None else rows.mask & (rows.mask.cumsum(1) <= rows.most)
    flat, tokens = chosen.flatten(), batch * new
    places = (batch * (new if rows.most is None else rows.most) + parts - 1) // parts * parts
    number = flat.cumsum(0)
    at = torch.full((places + 1,), tokens, dtype=torch.int64, device=flat.device)
    at = at.scatter_(0, (number - 1).masked_fill(~flat, places), torch.arange(tokens, device=flat.device))
    return at[:places], number[-1:]


def can_count(module: Any, before: Any, x: Tensor) -> bool:
    """Whether ``module`` is an MLP whose products, of ``x``, can be told on the device how many rows they have."""
    kind = type(module)
    if before is not None or kind.__name__ not in COUNTED or not kind.__module__.startswith("transformers.models."):
        return False
    if not counts_rows(x.device, x.dtype) or torch.is_autocast_enabled(x.device.type):
        return False
    parts = [getattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(is_plain(part) and _in_vectors(part.weight, x.dtype) for part in parts)


def _in_vectors(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the rows of a weight and of its transpose are of whole 16 bytes, in a dtype of 2."""
    return weight.dtype == dtype and weight.is_contiguous() and weight.shape[0] % 8 == weight.shape[1] % 8 == 0


def can_route(module: Any, before: Any) -> bool:
    """Whether ``module`` is a mixture of experts that leaves out, on the device, what is routed to no expert.

    transformers' grouped product of experts sorts the rows by expert and ends with the last one's, as under expert
    parallelism; biases it would look up for every row.
    """
    kind = type(module)
    if before is not None or kind.__name__ not in ROUTED or not kind.__module__.startswith("transformers.models."):
        return False
    experts = module.experts
    grouped = getattr(getattr(experts, "config", None), "_experts_implementation", None) == "grouped_mm"
    return grouped and "forward" not in experts.__dict__ and getattr(experts, "has_bias", None) is False


def _routed(module: Any, x: Tensor, chosen: Tensor) -> Tensor:
    """A mixture of experts of the rows of ``x [T, C]`` that are ``chosen [T]``; the others, which no expert computes,
    are zero."""
    _, weights, experts = module.gate(x)
    others = ~chosen[:, None]
    experts = experts.masked_fill(others, module.experts.num_experts)
    return module.experts(x, experts, weights.masked_fill(others, 0.0)).masked_fill(others, 0.0)


def _counted(module: Any, x: Tensor, rows: Rows) -> Tensor:
    """The MLP of the rows there are, chunk after chunk: memory for the products of every place would be that of a whole
    MLP. ``x [B, n, C]``; the same shape."""
    states, places = x.flatten(0, 1), rows.mask.shape[0] * (rows.mask.shape[1] if rows.most is None else rows.most)
    chunks = MAX_CHUNKS if torch.compiler.is_compiling() else max(1, min(MAX_CHUNKS, places // MIN_CHUNK))
    at, total = _places(rows, chunks)
    size, tokens = at.shape[0] // chunks, states.shape[0]
    out = x.new_zeros(tokens + 1, x.shape[2])
    for chunk in range(chunks):
        here = at[chunk * size : (chunk + 1) * size]
        end = (total - chunk * size).clamp(0, size).int()
        part = states.index_select(0, here.clamp(max=tokens - 1))
        gated = module.act_fn(_product(module.gate_proj, part, end)) * _product(module.up_proj, part, end)
        out.index_copy_(0, here, _product(module.down_proj, gated, end))
    return out[:tokens].view(x.shape)


def _product(linear: nn.Linear, x: Tensor, end: Tensor) -> Tensor:
    """A linear layer of the first ``end [1]`` rows of ``x [p, C]``; the others are undefined."""
    out = nn.functional.grouped_mm(x, linear.weight.t()[None], offs=end)
    return out if linear.bias is None else out + linear.bias
