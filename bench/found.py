"""Finds result files and says what each of them is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .record import Record


class Result(NamedTuple):
    """The content of a file that can be shown."""

    path: Path
    kind: str
    data: Record


def _has(*keys: str) -> Callable[[Record], bool]:
    return lambda record: all(key in record for key in keys)


def _rows_with(*keys: str) -> Callable[[Record], bool]:
    """Whether the cases have rows, and the rows that were timed these keys."""

    def test(result: Record) -> bool:
        cases = result.get("cases", [])
        rows = [row for case in cases for row in case.get("rows", [])]
        timed = [row for row in rows if row.get("status", "ok") == "ok"]
        return bool(timed) and all(key in row for row in timed for key in keys)

    return test


def _kernels_with(key: str) -> Callable[[Record], bool]:
    return lambda result: all(key in kernel for kernel in result.get("kernels", [{}]))


KINDS: Mapping[str, Callable[[Record], bool]] = {
    "parts": _has("gpu", "seconds", "parts"),
    "pretraining": _has("config", "environment", "summary", "runs"),
    "recipes": _has("final_tokens", "table", "rows"),
    "plan": _has("cards_gb", "entries", "notes"),
    "step": _rows_with("source", "ms", "percent_of_copy"),
    "times": _rows_with("label", "ms"),
    "base": lambda result: result.get("kind") == "base" and bool(result["cases"]),
    "static": _kernels_with("share"),
    "static_cuda": _kernels_with("rule"),
    "static_products": _kernels_with("tensor_clocks"),
    "products": lambda result: result.get("kind") == "products" and bool(result["cases"]),
}
"""What a file may hold, by its keys: a new benchmark that writes the same rows is shown without more work."""


def _read(path: Path) -> Result | str:
    """What is in the file, or why it is left out."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return f"not JSON ({error})"
    if not isinstance(data, dict):
        return "not a result: no object at its top"
    if data.get("quick"):
        return "a trial run (--quick): its figures mean nothing"
    if [] in (data.get("cases"), data.get("kernels")):
        return "nothing was measured"
    for kind, fits in KINDS.items():
        if fits(data):
            return Result(path, kind, data)
    return f"of an unknown kind: {data.get('kind', 'no kind named')!r}"


def find(folder: Path) -> tuple[list[Result], dict[Path, str]]:
    """Every result below the folder, and the reasons why other files are left out."""
    results: list[Result] = []
    left_out: dict[Path, str] = {}
    for path in sorted(folder.rglob("*.json")):
        found = _read(path)
        if isinstance(found, str):
            left_out[path] = found
        else:
            results.append(found)
    return results, left_out


def machine_name(data: Record) -> str:
    """The GPU, else the processor with its instructions and cores."""
    machine = data.get("machine") or data["environment"]
    gpu = machine.get("gpu")
    if gpu:
        return gpu["name"] if isinstance(gpu, dict) else gpu
    if "processor" not in machine:
        return f"{machine['cpu']}, {_cores(machine['logical_cpus'])}"
    return f"{machine['processor']} ({machine['instructions']}), {_cores(machine['cores'])}"


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def _commit(commit: str | None) -> str:
    if commit is None:
        return "not recorded"
    return f"{commit.removesuffix('+')}, with changes" if commit.endswith("+") else commit


def circumstances(data: Record) -> dict[str, str]:
    """Machine, versions, commit and command, for people."""
    machine = data.get("machine") or data["environment"]
    names = ("python", "torch", "transformers", "fused_optim")
    versions = machine.get("versions") or {name: machine.get(name) for name in names}
    named = [f"{name} {version}" for name, version in versions.items() if version]
    facts = {
        "Machine": machine_name(data),
        "System": machine.get("system") or machine.get("platform"),
        "Threads": str(machine.get("threads") or machine.get("torch_threads")),
        "Versions": ", ".join(named),
        "Commit": _commit(machine.get("commit")),
        "Command": data.get("command", "not recorded"),
        "Started": data.get("started"),
    }
    load = machine.get("load_average")
    if load is not None and not machine.get("gpu"):
        facts["Load average"] = f"{load:g} when the run started"
    return {name: str(value) for name, value in facts.items() if value}


def on_gpu(data: Record) -> bool:
    """Whether a GPU was timed."""
    return data["machine"]["device"] == torch.device("cuda").type
