"""Checks which module of zipvl imports which: ``import_layers.py [FOLDER]`` prints every import that may not be.

The layers are the packages of zipvl and, as ``core``, the modules directly in it. ``LAYERS`` says what each may import
anywhere, in functions and under ``TYPE_CHECKING`` too. Modules that import each other when they are imported are
refused as well. What ``import_module`` is given is not seen. Exit code 1 if an import is refused.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LAYERS = {
    "core": {"core"},
    "transformers": {"core", "transformers"},
    "baselines": {"core", "transformers", "baselines"},
    "vllm": {"core", "vllm"},
    "app": {"core", "transformers", "baselines", "vllm", "app"},
    "lmms_eval": {"core", "transformers", "baselines", "vllm", "app", "lmms_eval"},
}
WITHOUT_TRANSFORMERS = {"core", "vllm"}  # layers that work where Hugging Face's package is not installed
NOT_SHIPPED = {"benchmarks", "tests", "tools"}

# Importer, imported: for TYPE_CHECKING and for attributes that import when they are first used.
LAZY_EXCEPTIONS = {("__init__", "transformers")}
EXCEPTIONS = {("__main__", "app.cli")}


@dataclass(frozen=True)
class Import:
    """One name that one module imports."""

    importer: str
    """The module; of a package ``package.__init__``."""
    target: str
    """The module that is meant, ``package.__init__`` of a package of the folder; others are left as they stand."""
    at_import: bool
    """Whether it runs when ``importer`` is imported: in no function, not under ``TYPE_CHECKING``."""
    where: str
    """``path:line``."""
    text: str


def check(folder: Path) -> list[str]:
    """What is wrong with the imports of the package in ``folder``, a line each: place, rule, source line."""
    imports = [found for path in sorted(folder.rglob("*.py")) for found in imports_of(path, folder)]
    wrong = [(found, problem) for found in imports if (problem := wrong_direction(found, folder.name))]
    wrong += [(found, f"{found.importer} and {found.target} import each other") for found in in_cycles(imports)]
    return [f"{found.where}: {problem}: {found.text}" for found, problem in wrong]


def imports_of(path: Path, folder: Path) -> Iterator[Import]:
    """Every import in the module ``path`` of the package in ``folder``."""
    source = path.read_text()
    lines = source.splitlines()
    importer = ".".join((folder.name, *path.relative_to(folder).with_suffix("").parts))
    for node, at_import in statements(ast.parse(source, path).body, True):
        if isinstance(node, ast.Import):
            targets = [module(alias.name, folder) for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                base = ".".join((*importer.split(".")[: -node.level], *([base] if base else [])))
            # A name of a package is its submodule if there is one, and else an attribute that its __init__ makes.
            targets = [module(f"{base}.{alias.name}", folder) or module(base, folder) for alias in node.names]
        for target in dict.fromkeys(targets):
            yield Import(importer, target, at_import, f"{path}:{node.lineno}", lines[node.lineno - 1].strip())


def statements(nodes: Iterable[ast.AST], at_import: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements in ``nodes``, and whether each runs when its module is imported."""
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, at_import
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from statements(node.body, False)
            yield from statements(node.orelse, at_import)
        else:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from statements(ast.iter_child_nodes(node), at_import and not function)


def module(name: str, folder: Path) -> str:
    """``name``, with ``.__init__`` if it is a package of ``folder``; empty if ``folder`` should have it and has not."""
    package, *parts = name.split(".")
    if package != folder.name:
        return name
    path = folder.joinpath(*parts)
    if (path / "__init__.py").exists():
        return f"{name}.__init__"
    return name if path.with_suffix(".py").exists() else ""


def wrong_direction(found: Import, package: str) -> str | None:
    """The rule that an import breaks, whatever runs when; None if it breaks none."""
    layer = layer_of(found.importer)
    if layer not in LAYERS:
        return f"tools/import_layers.py has no rule for {package}/{layer}"
    root = found.target.partition(".")[0]
    if root in NOT_SHIPPED:
        return f"{package} must not import {root}, which is not part of it"
    if root == "transformers" and layer in WITHOUT_TRANSFORMERS:
        return f"{layer} must not import transformers"
    if root != package or layer_of(found.target) in LAYERS[layer]:
        return None
    pair = tuple(name.removeprefix(f"{package}.").removesuffix(".__init__") for name in (found.importer, found.target))
    if pair in EXCEPTIONS or (pair in LAZY_EXCEPTIONS and not found.at_import):
        return None
    return f"{layer} must not import {layer_of(found.target)}"


def layer_of(name: str) -> str:
    """The layer of a module of the package: its folder, or ``core``."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 else "core"


def in_cycles(imports: list[Import]) -> list[Import]:
    """The imports between modules that import each other, directly or not, when they are imported."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        if found.at_import:
            edges.setdefault(found.importer, set()).add(found.target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in edges.get(waiting.pop(), set()) - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    reach = {name: reached(name) for name in edges}
    return [found for found in imports if found.at_import and found.importer in reach.get(found.target, set())]


if __name__ == "__main__":
    problems = check(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "zipvl")
    print("\n".join(problems) or "imports are in order")
    sys.exit(bool(problems))
