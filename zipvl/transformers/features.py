"""Demands of a model's attention that neither sparse attention nor SDPA honours, and how its classes hand things on.

A call of the attention function shows it. So does the source of the classes before anything runs, where it is at hand;
a class whose source says nothing is judged by its calls alone.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any, NamedTuple

from torch import nn


class Feature(NamedTuple):
    """One argument of attention functions."""

    words: str
    """How errors name it."""
    remedy: str
    """The attention implementation that honours it."""
    attributes: tuple[str, ...] = ()
    """Attributes of a module that passes it, one of which is not None where it is in use; none: it always is."""


_PAGED = Feature("a paged cache (continuous batching)", "sdpa")
_INDEXER = Feature("a selection of keys by the model's own indexer", "eager", ("indexer",))

FEATURES = {
    "softcap": Feature("logit softcapping (softcap={})", "eager", ("attn_logit_softcapping",)),
    "s_aux": Feature("attention sinks (s_aux)", "eager", ("sinks",)),
    "sinks": Feature("attention sinks (sinks)", "eager", ("sinks", "sink_proj")),
    "position_bias": Feature("a position bias", "eager"),
    "head_mask": Feature("a head mask", "eager"),
    "indices": _INDEXER,
    "block_indices": _INDEXER,
    # Of continuous batching: until transformers 5.23 its cache, since then places in it.
    "cache": _PAGED,
    "block_table": _PAGED,
    "read_index": _PAGED,
}
"""By the keyword of the attention function."""


def refusal(words: str, remedy: str) -> str:
    """The sentence that refuses a feature and says what to do."""
    return f'{words} is not supported. Use attn_implementation="{remedy}" for this model, or turn the feature off.'


def problem_of(module: nn.Module, parent: nn.Module | None, *, latents: bool = False) -> str | None:
    """Why an attention module cannot be sparse, nor run SDPA in place of its own attention; None: nothing is known.

    Args:
        module: the attention module.
        parent: the module that calls it, if known.
        latents: its cache holds latents, and is transformers' own.
    """
    kind: Any = type(module)
    passed = _passed(kind)
    for name, feature in FEATURES.items():
        values = [getattr(module, attribute, None) for attribute in feature.attributes]
        found = [value for value in values if value is not None]
        if name in passed and (found or not feature.attributes):
            return refusal(feature.words.format(*found), feature.remedy)
    if not latents and _alters_states(kind):
        return (
            "its keys or values are altered between the cache and the attention function, which ZipVLCache does not "
            'support. Use attn_implementation="sdpa" for this model.'
        )
    if _shifts_index(kind):
        return (
            "its keys and values are stored in another layer of the cache than its own, which ZipVLCache does not "
            'support. Use attn_implementation="sdpa" for this model.'
        )
    if not passed & {_KWARGS, _UNKNOWN} or (parent is not None and not _hands_on(type(parent), module, parent)):
        return (
            "keyword arguments are not handed on to the attention function, which is how zipvl reaches it. Use "
            'attn_implementation="sdpa" for this model.'
        )
    return None


_KWARGS, _UNKNOWN = "**", "?"


@functools.cache
def forward_of(kind: Any) -> ast.FunctionDef | None:
    """The definition of a class's ``forward``; None where its source is not at hand."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


@functools.cache
def _interface_calls(kind: Any) -> list[ast.Call]:
    """The calls in ``forward`` of what ``ALL_ATTENTION_FUNCTIONS.get_interface`` returned."""
    forward = forward_of(kind)
    nodes = [] if forward is None else list(ast.walk(forward))
    got = [node for node in nodes if isinstance(node, (ast.Assign, ast.AnnAssign)) and _gets_interface(node.value)]
    targets = [target for node in got for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    return [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) in names]


def _gets_interface(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "get_interface"


@functools.cache
def _passed(kind: Any) -> frozenset[str]:
    """The keywords that ``forward`` passes to the attention function, ``**`` for those that it was given; ``?`` where
    that cannot be seen."""
    calls = _interface_calls(kind)
    return frozenset(keyword.arg or _KWARGS for call in calls for keyword in call.keywords) or frozenset({_UNKNOWN})


@functools.cache
def _alters_states(kind: Any) -> bool:
    """Whether ``forward`` always makes other keys or values of those that the cache returned, or takes parts of
    them."""
    forward, calls = forward_of(kind), _interface_calls(kind)
    if forward is None or not calls:
        return False
    returned: set[str] = set()
    for statement in forward.body:
        if statement.lineno >= min(call.lineno for call in calls):
            break
        updates = [node for node in ast.walk(statement) if isinstance(node, ast.Assign) and _is_update(node.value)]
        if updates:
            returned = {name for node in updates for name in _names(node)}
        elif isinstance(statement, ast.Assign) and returned & set(_names(statement)):
            return True
    given = [argument.id for call in calls for argument in call.args[2:4] if isinstance(argument, ast.Name)]
    return bool(returned) and not returned.issuperset(given)


@functools.cache
def _shifts_index(kind: Any) -> bool:
    """Whether ``forward`` stores keys and values in another layer of the cache than its own."""
    forward = forward_of(kind)
    nodes = [] if forward is None else ast.walk(forward)
    updates = [node for node in nodes if isinstance(node, ast.Call) and _is_update(node)]
    return any(len(call.args) > 2 and isinstance(call.args[2], ast.BinOp) for call in updates)


def _is_update(value: ast.expr) -> bool:
    """Whether a value is what ``cache.update(...)`` returns."""
    function = value.func if isinstance(value, ast.Call) else None
    owner = function.value if isinstance(function, ast.Attribute) and function.attr == "update" else None
    return isinstance(owner, ast.Name) and owner.id in ("cache", "past_key_values", "past_key_value")


def _names(assignment: ast.Assign) -> list[str]:
    """The variables that it sets."""
    return [node.id for target in assignment.targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _hands_on(kind: Any, module: nn.Module, parent: nn.Module) -> bool:
    """Whether the forward of ``parent``, a ``kind``, calls ``module`` with the keywords that it was given itself; True
    where that cannot be seen."""
    name = next((name for name, child in parent.named_children() if child is module), None)
    calls = calls_of(kind, name) if name is not None else []
    return not calls or any(keyword.arg is None for call in calls for keyword in call.keywords)


@functools.cache
def calls_of(kind: Any, attribute: str) -> list[Any]:
    """The calls in ``forward`` of ``self.attribute``."""
    forward = forward_of(kind)
    nodes = [] if forward is None else ast.walk(forward)
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == f"self.{attribute}"]
