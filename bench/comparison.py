"""Functions that do the same work, timed in turn: what the benchmarks beside the optimizer's step share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .record import Record, add_out, begin, save
from .tables import Table, rounded, show, show_circumstances, target_table
from .timing import Call, Samples, interleave, ratio


@dataclass
class Contender:
    """Something to time, and what it is off by."""

    label: str
    call: Callable[[], Any]
    error: Callable[[], float] | None = None


@dataclass
class Absent:
    """Something that is not timed, and why: it is missing, failed or wrong."""

    label: str
    status: str
    reason: str


@dataclass
class Case:
    """Contenders for the same work; ``limits`` bounds the first one's time by that of another."""

    name: str
    contenders: list[Contender]
    limits: dict[str, float] = field(default_factory=dict)
    absent: Sequence[Absent] = ()


Suites = Mapping[str, Callable[[argparse.Namespace, torch.device], list[Case]]]


def measure(case: Case, device: torch.device, rounds: int, budget: float) -> dict[str, Any]:
    """Times the contenders in turn; returns what goes into the JSON."""
    calls = [Call(contender.label, device, contender.call) for contender in case.contenders]
    for call in calls:
        call.call()
    interleave(calls, rounds, budget, None, least=1)
    rows = []
    for contender, call in zip(case.contenders, calls, strict=True):
        error = None if contender.error is None else float(f"{contender.error():.3g}")
        ms = rounded(call.time.summary())
        rows.append({"label": contender.label, "status": "ok", "ms": ms, "error": error})
    rows += [asdict(absent) for absent in case.absent]
    times: dict[str, Samples] = {call.label: call.time for call in calls}
    targets = [_target(against, limit, calls[0].time, times) for against, limit in case.limits.items()]
    return {"name": case.name, "rounds": rounds, "rows": rows, "targets": targets}


def _target(against: str, limit: float, ours: Samples, times: Mapping[str, Samples]) -> dict[str, Any]:
    """What was reached; ``met`` is None where the other was not timed."""
    target: dict[str, Any] = {"kind": "ratio", "against": against, "limit": limit}
    if against not in times:
        return {**target, "measured": None, "met": None}
    found, q1, q3 = ratio(ours, times[against])
    quartiles = [round(q1, 4), round(q3, 4)]
    return {**target, "measured": round(found, 4), "quartiles": quartiles, "met": found <= limit}


def table(record: dict[str, Any]) -> Table:
    """One case for people: times, ratios to the first contender, errors."""
    first = record["rows"][0]["ms"]["median"]
    lines = []
    for row in record["rows"]:
        if row["status"] != "ok":
            lines.append([row["label"], *[""] * 4, f"{row['status']}: {row['reason']}"])
            continue
        ms = row["ms"]
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(
            [
                row["label"],
                f"{ms['median']:.4g}",
                f"{ms['min']:.4g}",
                f"{ms['q1']:.4g}–{ms['q3']:.4g}",
                f"{first / ms['median']:.3g}",
                error,
            ]
        )
    header = ["case", "median ms", "min", "q1–q3", "ours/this", "error"]
    return Table(f"{record['name']}: {record['rounds']} rounds", header, lines)


def parser_of(command: str, description: str | None, suites: Suites) -> argparse.ArgumentParser:
    """The options that all have."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {command}", description=description)
    parser.add_argument("--suites", default=",".join(suites), help="comma-separated: " + ", ".join(suites))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of timing per case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_out(parser)
    parser.add_argument("--quick", action="store_true", help="tiny matrices, three rounds: does it run?")
    return parser


def compare(command: str, suites: Suites, args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures the suites that were asked for, prints their tables and writes what ``--out`` names."""
    chosen = args.suites.split(",")
    unknown = sorted(set(chosen) - set(suites))
    if unknown:
        raise SystemExit(f"unknown suites {', '.join(unknown)}; known: {', '.join(suites)}")
    device = torch.device(args.device)
    torch.manual_seed(0)
    result: Record = {**begin(command, argv, device, args.quick), "cases": []}
    for case in (case for suite in chosen for case in suites[suite](args, device)):
        result["cases"].append(measure(case, device, args.rounds, args.budget))
        show(table(result["cases"][-1]))
        save(result, args.out)
    show(target_table(result["cases"]))
    show_circumstances(result, args.device)
    return 0
