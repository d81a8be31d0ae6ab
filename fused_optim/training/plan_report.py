"""A plan as a table for the terminal and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .peers import PEERS
from .plan_rules import states_of
from .planner import CARDS, Entry, Plan
from .storages import PARTS, Memory

PEERS_TITLE = "AdamW of other libraries"
_BYTES = ("weights", "master", "states", "kept", "gradients", "total")
_GB = ("weights", "master", "states", "gradients", "total")
_HEADS = {"weights": "weight", "gradients": "grads", "total": "sum"}
SHARED = {
    "none": "each holds everything",
    "states": "states and master weights are split evenly among them (ZeRO-1)",
    "all": "everything is split evenly among them (FSDP)",
}


def heading(plan: Plan) -> list[str]:
    """The model, and how it is spread over several GPUs."""
    lines = [
        f"{plan.model}: {plan.parameters:,} parameters in {plan.tensors} tensor{'s' * (plan.tensors > 1)}"
    ]
    return [*lines, f"{plan.gpus} GPUs: {SHARED[plan.shard]}"] if plan.gpus > 1 else lines


def sections(plan: Plan) -> dict[str, list[Entry]]:
    """The entries under a title for each rule, and one for other libraries."""
    out: dict[str, list[Entry]] = {}
    for entry in plan.entries:
        title = PEERS_TITLE
        if entry.rule is not None:
            title = f"{entry.rule}: {states_of(entry.rule)}"
        out.setdefault(title, []).append(entry)
    return out


def smallest_card(entry: Entry) -> str:
    """The smallest card that holds a GPU's share."""
    return f"{min(entry.fits)} GB" if entry.fits else f"> {max(CARDS)} GB"


def _cells(plan: Plan, entry: Entry) -> list[str]:
    largest = max(one.on_each.total for one in plan.entries)
    digits = 1 if largest >= 100e9 else 2 if largest >= 1e9 else 4
    ours, each = entry.memory, entry.on_each
    return [
        f"  {entry.storage}",
        *(f"{getattr(ours, p) / plan.parameters:.3f}" if getattr(ours, p) else "-" for p in _BYTES),
        *(f"{getattr(each, p) / 1e9:.{digits}f}" if getattr(each, p) else "-" for p in _GB),
        smallest_card(entry),
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, figures to the right, a gap between bytes per parameter and GB."""
    first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    left, right = others[: len(_BYTES)], others[len(_BYTES) : -1]
    return f"{cells[0].ljust(len(first))} {' '.join(left)}  {' '.join(right)}  {others[-1]}"


def table(plan: Plan) -> str:
    """Plain text: a section for each rule, a line for each storage.

    Args:
        plan: what to show.

    Example:
        >>> from fused_optim.training import plan
        >>> found = plan({"weight": (1 << 30,)}, rules=["lion"], storages=["split8+int4"], peers=False)
        >>> print(table(found))  # doctest: +NORMALIZE_WHITESPACE
        shapes: 1,073,741,824 parameters in 1 tensor
        ...
        lion: exp_avg
          split8+int4 2.000 1.000 0.531 3.531 2.000 5.531 2.15 1.07 0.57 2.15 5.94 24 GB
        ...
    """
    heads = ["", *(_HEADS.get(part, part) for part in (*_BYTES, *_GB)), "fits on"]
    groups = {title: [_cells(plan, entry) for entry in entries] for title, entries in sections(plan).items()}
    rows = [heads, *(row for group in groups.values() for row in group)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    left, right = (sum(part) + len(part) - 1 for part in (widths[1 : 1 + len(_BYTES)], widths[-6:-1]))
    where = "GB on each GPU" if plan.gpus > 1 else "GB"
    above = f"{' ' * widths[0]} {'bytes per parameter'.center(left)}  {where.center(right)}"
    lines = [*heading(plan), "", above.rstrip()]
    lines.append(_line(heads, widths))
    for title, group in groups.items():
        lines += [title, *(_line(row, widths) for row in group)]
    return "\n".join(
        [*lines, "", "kept = weight + master + states, what stays between two steps", *plan.notes]
    )


def bytes_of_parts(memory: Memory) -> dict[str, int]:
    """Every part of a model's memory and its sums, by name."""
    return {part: getattr(memory, part) for part in (*PARTS, "kept", "total")}


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything in a plan as plain values.

    Args:
        plan: what to write.

    Example:
        >>> from fused_optim.training import plan
        >>> found = plan({"weight": (4096, 4096)}, rules=["lion"], storages=["split8+int8"], peers=False)
        >>> as_json(found)["entries"][0]["bytes"]["kept"]
        67371008
    """
    entries = [
        {
            "rule": entry.rule,
            "storage": entry.storage,
            "bytes": bytes_of_parts(entry.memory),
            "bytes_per_parameter": {
                part: count / plan.parameters for part, count in bytes_of_parts(entry.memory).items()
            },
            "bytes_on_each_gpu": bytes_of_parts(entry.on_each),
            "fits_gb": list(entry.fits),
            "source": PEERS[entry.storage].source if entry.rule is None else None,
        }
        for entry in plan.entries
    ]
    return {
        "format": 1,
        **asdict(plan),
        "notes": list(plan.notes),
        "cards_gb": list(CARDS),
        "entries": entries,
    }
