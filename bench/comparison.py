"""Functions that do the same work, timed in turn: what the benchmarks beside the optimizer's step share."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .machine import present
from .record import Record, add_out, begin, save
from .tables import Table, rounded, show, show_circumstances, target_table
from .timing import Call, Samples, interleave, ratio

SPEEDS = ("TFLOP/s", "of matmul")
"""Columns of what has products of matrices."""


@dataclass
class Contender:
    """Something to time, what it is off by, and how many operations its matrix products have."""

    label: str
    call: Callable[[], Any]
    error: Callable[[], float] | None = None
    flops: int | None = None


@dataclass
class Absent:
    """Something that is not timed, and why: it is missing, failed or wrong."""

    label: str
    status: str
    reason: str


@dataclass
class Case:
    """Contenders for the same work; ``limits`` bounds the first one's time by that of another.

    ``matmuls`` are timed as well: the fastest of them is what the contenders' operations are compared with.
    """

    name: str
    contenders: list[Contender]
    limits: dict[str, float] = field(default_factory=dict)
    absent: Sequence[Absent] = ()
    matmuls: Sequence[Contender] = ()


@dataclass
class Later:
    """A case that is made when its turn comes: what it is checked against may take longer than its timing."""

    name: str
    make: Callable[[], Case]


Suites = Mapping[str, Callable[[argparse.Namespace, torch.device], Iterable[Case | Later]]]


def measure(case: Case, device: torch.device, rounds: int, budget: float) -> dict[str, Any]:
    """Times the contenders in turn; returns what goes into the JSON."""
    calls, matmuls = (
        [Call(contender.label, device, contender.call) for contender in group]
        for group in (case.contenders, case.matmuls)
    )
    everything = [*calls, *matmuls]
    for call in everything:
        call.call()
    # The contenders' share of the budget is what it was without the matmuls.
    interleave(everything, rounds, budget * len(everything) / len(calls), None, least=1)
    rates = [_tflops(*pair) for pair in zip(case.matmuls, matmuls, strict=True)]
    fastest = rates.index(max(rates)) if rates else None
    rows = []
    for contender, call in zip(case.contenders, calls, strict=True):
        error = None if contender.error is None else float(f"{contender.error():.3g}")
        ms = rounded(call.time.summary())
        row: dict[str, Any] = {"label": contender.label, "status": "ok", "ms": ms, "error": error}
        if fastest is not None and contender.flops is not None:
            row |= _of_matmul(contender, call, case.matmuls[fastest], matmuls[fastest])
        rows.append(row)
    rows += [asdict(absent) for absent in case.absent]
    times: dict[str, Samples] = {call.label: call.time for call in calls}
    targets = [_target(against, limit, calls[0].time, times) for against, limit in case.limits.items()]
    record = {"name": case.name, "rounds": rounds, "rows": rows, "targets": targets}
    if rates:
        record["matmuls"] = [
            {
                "label": contender.label,
                "ms": rounded(call.time.summary()),
                "flops": contender.flops,
                "tflop_per_s": round(rate, 4),
            }
            for contender, call, rate in zip(case.matmuls, matmuls, rates, strict=True)
        ]
    return record


def _tflops(contender: Contender, call: Call) -> float:
    assert contender.flops is not None
    return contender.flops / call.time.median / 1e9


def _of_matmul(contender: Contender, call: Call, matmul: Contender, its_call: Call) -> dict[str, Any]:
    """A contender's speed and its share of a matmul's, with the quartiles within rounds."""
    assert contender.flops is not None and matmul.flops is not None
    work = contender.flops / matmul.flops
    share, q1, q3 = (round(work * time, 4) for time in ratio(its_call.time, call.time))
    rate = round(_tflops(contender, call), 4)
    return {
        "flops": contender.flops,
        "tflop_per_s": rate,
        "of_matmul": share,
        "of_matmul_quartiles": [q1, q3],
    }


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
    matmuls = record.get("matmuls", [])
    header = ["case", "median ms", "min", "q1–q3", "ours/this", *(SPEEDS if matmuls else ()), "error"]
    lines = []
    for row in record["rows"]:
        if row["status"] != "ok":
            lines.append([row["label"], *[""] * (len(header) - 2), f"{row['status']}: {row['reason']}"])
            continue
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        against = f"{first / row['ms']['median']:.3g}"
        lines.append([row["label"], *_times(row), against, *(speeds(row) if matmuls else []), error])
    for row in matmuls:
        lines.append([row["label"], *_times(row), "", *speeds(row), ""])
    return Table(f"{record['name']}: {record['rounds']} rounds", header, lines)


def _times(row: dict[str, Any]) -> list[str]:
    ms = row["ms"]
    return [f"{ms['median']:.4g}", f"{ms['min']:.4g}", f"{ms['q1']:.4g}–{ms['q3']:.4g}"]


def speeds(row: dict[str, Any]) -> list[str]:
    """The cells of ``SPEEDS``."""
    share = f"{row['of_matmul']:.0%}" if "of_matmul" in row else ""
    return [f"{row['tflop_per_s']:.3g}" if "tflop_per_s" in row else "", share]


def parser_of(command: str, description: str | None, suites: Suites) -> argparse.ArgumentParser:
    """The options that all have."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {command}", description=description)
    parser.add_argument("--suites", default=",".join(suites), help="comma-separated: " + ", ".join(suites))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of timing per case")
    parser.add_argument("--device", type=present, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--deadline", type=float, help="seconds after which no further case starts")
    add_out(parser)
    parser.add_argument("--quick", action="store_true", help="tiny matrices, three rounds: does it run?")
    return parser


def _prepared(suites: Suites, chosen: Sequence[str], args: argparse.Namespace) -> Iterator[Case | Later]:
    """The cases in turn; a suite that cannot even list its own is one that fails."""
    device = torch.device(args.device)
    for name in chosen:
        try:
            yield from suites[name](args, device)
        except Exception as failure:
            yield Later(name, lambda failure=failure: _raise(failure))


def _raise(failure: Exception) -> Case:
    raise failure


def compare(command: str, suites: Suites, args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures the suites that were asked for, prints their tables and writes what ``--out`` names.

    A case that fails is listed with its reason under ``failed`` and stops no other; the status is then 1.
    """
    chosen = args.suites.split(",")
    unknown = sorted(set(chosen) - set(suites))
    if unknown:
        raise SystemExit(f"unknown suites {', '.join(unknown)}; known: {', '.join(suites)}")
    started, device = time.perf_counter(), torch.device(args.device)
    torch.manual_seed(0)
    result: Record = {**begin(command, argv, device, args.quick), "cases": [], "failed": [], "left_out": []}
    for case in _prepared(suites, chosen, args):
        if args.deadline is not None and time.perf_counter() - started > args.deadline:
            result["left_out"].append(case.name)
            continue
        try:
            made = case.make() if isinstance(case, Later) else case
            result["cases"].append(measure(made, device, args.rounds, args.budget))
            show(table(result["cases"][-1]))
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}"[:300]
            result["failed"].append({"name": case.name, "reason": reason})
            print(f"\n{case.name}: failed: {reason}", flush=True)
        made = None
        _free(device)
        save(result, args.out)
    save(result, args.out)
    show(target_table(result["cases"]))
    if result["left_out"]:
        print(f"left out for lack of time: {', '.join(result['left_out'])}")
    if result["failed"]:
        print(f"FAILED: {', '.join(case['name'] for case in result['failed'])}")
    show_circumstances(result, args.device)
    return 1 if result["failed"] else 0


def _free(device: torch.device) -> None:
    """What a case held goes back to the device, for the next one may be as large."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
