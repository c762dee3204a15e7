"""What ``zipvl doctor`` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["print_doctor"]

_STATES = {"native": "green", "fallback": "yellow", "unavailable": "red"}


def print_doctor(facts: dict[str, Any]) -> None:
    """One table of what is installed, one of ops by device, the reasons, and a verdict."""
    console = Console(highlight=False)
    console.print(_installed(facts))
    ops = Table("op", "device", "runs", "against the reference", title="Ops")
    reasons: dict[str, list[str]] = {}
    for row in facts["ops"]:
        check = row["check"]
        color = {"ok": "green", "not run": "bright_black"}.get(check, "bold red")
        state = f"[{_STATES[row['state']]}]{row['state']}[/]"
        ops.add_row(row["op"], row["device"], state, f"[{color}]{escape(check)}[/]")
        if row["reason"]:
            reasons.setdefault(f"{row['state']} on {row['device']}: {row['reason']}", []).append(row["op"])
    console.print(ops)
    for reason, names in reasons.items():
        which = "every op" if len(names) == len({row["op"] for row in facts["ops"]}) else ", ".join(names)
        console.print(f"{escape(which)}: {escape(reason)}")
    healthy = "[bold green]healthy[/]: the ops run on the CPU and agree with the reference"
    console.print(healthy if facts["healthy"] else "[bold red]broken[/]: see the ops above that are not ok")


def _installed(facts: dict[str, Any]) -> Table:
    table = Table("what", "found", title="Installed", show_lines=False)
    table.add_row("python", f"{facts['python']}, {facts['platform']}")
    table.add_row("torch", f"{facts['torch']}, CUDA {facts['torch_cuda'] or 'none'}")
    for package, version in facts["packages"].items():
        table.add_row(package, version or "not installed as a package")
    vllm = facts["vllm"]
    if vllm["version"] is None:
        table.add_row("vllm", f"not installed (the plugin was tested with {vllm['tested']})")
    else:
        state = escape(vllm["problem"] or f"the plugin acts in it (tested with {vllm['tested']})")
        table.add_row("vllm", f"{vllm['version']}: {state}")
    for device in facts["devices"]:
        table.add_row(device["device"], escape(device["name"]))
    library = facts["op_library"]
    state = f"loaded: {library['path']}" if library["loaded"] else f"not loaded: {library['error']}"
    table.add_row("op library", escape(state))
    cuda = facts["cuda_library"]
    where = f": {escape(cuda['path'])}" if cuda["path"] else ""
    table.add_row("CUDA library", f"loaded{where}" if cuda["loaded"] else f"not loaded: {escape(cuda['error'])}")
    for name, value in facts["build"].items():
        table.add_row(f"build: {name.replace('_', ' ')}", value or "none")
    return table
