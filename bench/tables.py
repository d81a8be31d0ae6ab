"""What was measured, as records for JSON and as tables for people."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import NamedTuple

from .cases import Target
from .record import Record
from .run import Outcome, Row
from .timing import Timed, ratio

_TEXT = ("optimizer", "case", "against", "ran")


NOTE = "On a CPU only ratios of medians within one run mean something: its memory and cores may be shared."
QUICK = "--quick: tiny tensors and few rounds; these figures mean nothing."


class Table(NamedTuple):
    """Lines of text cells under a header."""

    title: str
    header: list[str]
    lines: list[list[str]]


def rounded(values: dict[str, float | int]) -> dict[str, float | int]:
    return {key: value if isinstance(value, int) else float(f"{value:.5g}") for key, value in values.items()}


def _gbps(run: Timed, moved: float) -> float:
    return moved / run.time.median / 1e6


def _row(row: Row, copy_gbps: float, samples: bool) -> Record:
    contender = row.contender
    record: Record = {
        "label": contender.label,
        "source": contender.source,
        "rule": contender.rule,
        "param": contender.param,
        "states": contender.states if contender.is_ours else None,
        "options": dict(contender.options),
        "status": row.status,
        "reason": row.reason,
        "error": row.error,
        **row.facts,
    }
    run = row.run
    if run is None:
        return record
    gbps = _gbps(run, row.facts["bytes_per_parameter"] * run.elements)
    record |= {"ms": rounded(run.time.summary()), "gb_per_s": round(gbps, 2)}
    record["percent_of_copy"] = round(100 * gbps / copy_gbps, 1)
    if run.host.by_round:
        record["host_us"] = rounded({k: v if k == "n" else 1e3 * v for k, v in run.host.summary().items()})
        record["wall_ms"] = rounded(run.wall.summary())
    if samples:
        record["samples_ms"] = {round_: float(f"{ms:.5g}") for round_, ms in run.time.by_round.items()}
    return record


def _add_ratios(rows: dict[str, Row], records: dict[str, Record]) -> None:
    """To every other library's row, each of our times over its own: the ratio, its quartiles and rounds."""
    timed = {label: row.run.time for label, row in rows.items() if row.run is not None}
    ours = [label for label in timed if rows[label].contender.is_ours]
    for label in timed.keys() - set(ours):
        records[label]["ratios"] = {
            name: {
                "measured": round(found[0], 4),
                "quartiles": [round(found[1], 4), round(found[2], 4)],
                "rounds": len(timed[name].by_round.keys() & timed[label].by_round.keys()),
            }
            for name in ours
            for found in [ratio(timed[name], timed[label])]
        }


def _target(target: Target, rows: dict[str, Row], records: dict[str, Record]) -> Record:
    """What was reached; ``met`` is None where the figure could not be measured."""
    record: Record = {
        "kind": target.kind,
        "limit": target.limit,
        "ours": target.ours,
        "against": target.against,
    }
    ours = rows[target.ours].run
    measured: float | None = None
    if ours is not None and target.kind == "ratio":
        theirs = rows[target.against].run
        if theirs is not None:
            measured, q1, q3 = ratio(ours.time, theirs.time)
            record["quartiles"] = [round(q1, 4), round(q3, 4)]
    elif ours is not None and target.kind == "percent_of_copy":
        measured = records[target.ours]["percent_of_copy"]
    elif ours is not None and ours.host.by_round:
        measured = records[target.ours]["host_us"]["median"]
    record["measured"] = None if measured is None else round(measured, 4)
    better = measured is not None and (
        measured >= target.limit if target.kind == "percent_of_copy" else measured <= target.limit
    )
    record["met"] = None if measured is None else better
    return record


def case_record(outcome: Outcome, samples: bool = False) -> Record:
    """Everything about a measured case, for JSON."""
    case, copy = outcome.case, outcome.copy
    copy_gbps, in_place_gbps = _gbps(copy, copy.bytes), _gbps(outcome.in_place, outcome.in_place.bytes)
    rows = {row.contender.label: row for row in outcome.rows}
    records = {label: _row(row, copy_gbps, samples) for label, row in rows.items()}
    _add_ratios(rows, records)
    return {
        "name": case.name,
        "shapes": case.shapes,
        "tensors": len(outcome.shapes),
        "elements": sum(math.prod(shape) for shape in outcome.shapes),
        "gradients": case.grads,
        "caches": "cold" if case.cold else "warm",
        "rounds": outcome.rounds,
        "copy_gb_per_s": round(copy_gbps, 2),
        "in_place_gb_per_s": round(in_place_gbps, 2),
        "rows": list(records.values()),
        "targets": [_target(target, rows, records) for target in case.targets],
    }


def case_table(case: Record) -> Table:
    """One case: what every optimizer took, or why it was not timed."""
    title = (
        f"{case['name']}: {case['tensors']} tensors, {case['elements']:,} parameters, "
        f"gradients {case['gradients']}, caches {case['caches']}, {case['rounds']} rounds; "
        f"copy {case['copy_gb_per_s']:.4g} GB/s, "
        f"in place {case['in_place_gb_per_s']:.4g} GB/s"
    )
    on_gpu = any("host_us" in row for row in case["rows"])
    header = ["optimizer", "median ms", "min", "q1–q3", "GB/s", "% copy", *(["host µs"] if on_gpu else [])]
    header += ["B moved", "B state", "error", "ran"]
    lines = []
    for row in case["rows"]:
        if row["status"] != "ok":
            lines.append([row["label"], *[""] * (len(header) - 2), f"{row['status']}: {row['reason']}"])
            continue
        ms = row["ms"]
        line = [row["label"], f"{ms['median']:.4g}", f"{ms['min']:.4g}", f"{ms['q1']:.4g}–{ms['q3']:.4g}"]
        line += [f"{row['gb_per_s']:.4g}", f"{row['percent_of_copy']:.0f}"]
        line += [f"{row['host_us']['median']:.0f}"] if on_gpu else []
        line += [f"{row['bytes_per_parameter']:.4g}", f"{row['state_bytes_per_parameter']:.4g}"]
        lines.append([*line, f"{row['error']:.0e}", row["driver"] or ""])
    return Table(title, header, lines)


_SIGNS = {"ratio": "≤", "host_us": "≤", "percent_of_copy": "≥"}
_UNITS = {"ratio": "ratio", "host_us": "host µs", "percent_of_copy": "% of copy"}


def target_table(cases: Sequence[Record]) -> Table:
    """The figures to reach and what was reached."""
    lines = []
    for case in cases:
        for target in case["targets"]:
            measured, spread = target["measured"], target.get("quartiles")
            lines.append(
                [
                    case["name"],
                    target["against"] or _UNITS[target["kind"]],
                    f"{_SIGNS[target['kind']]} {target['limit']:g}",
                    "-" if measured is None else f"{measured:.3g}",
                    f"{spread[0]:.3g}–{spread[1]:.3g}" if spread else "",
                    {True: "yes", False: "NO", None: "not measured"}[target["met"]],
                ]
            )
    header = ["case", "against", "target", "measured", "q1–q3 of rounds", "reached"]
    title = "Figures to reach (a ratio is our median time over the other's, of the rounds that both took)"
    return Table(title, header, lines)


def variant_table(cases: Sequence[Record]) -> Table:
    """Every rule and storage in one line: median and percent of a copy for each backend and arithmetic."""
    columns: dict[str, None] = {}
    found: list[tuple[str, dict[str, str]]] = []
    for case in cases:
        cells: dict[str, str] = {}
        for row in case["rows"]:
            column = " ".join(row["options"].values()) or row["source"]
            columns[column] = None
            timed = row["status"] == "ok"
            cells[column] = (
                f"{row['ms']['median']:.4g} ({row['percent_of_copy']:.0f})" if timed else row["status"]
            )
        found.append((case["name"], cells))
    lines = [[name, *(cells.get(column, "") for column in columns)] for name, cells in found]
    return Table("Backends and arithmetics: median ms (percent of a copy)", ["case", *columns], lines)


def show_circumstances(result: Record, device: str) -> None:
    """Prints what figures depend on: a shared CPU, a trial run, other work on the machine."""
    if device == "cpu":
        print(NOTE)
    if result["quick"]:
        print(QUICK)
    load, cores = result["machine"]["load_average"], result["machine"]["cores"]
    if device == "cpu" and load > 0.5 * cores:
        print(f"The machine was not quiet: load average {load} on {cores} cores when the run started.")


def show(table: Table) -> None:
    """Prints a table, with rich where it is installed."""
    if importlib.util.find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(table.header, *table.lines, strict=True)]
        print("", table.title, sep="\n")
        for line in [table.header, *table.lines]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    # A file or a pipe has no width of its own: nothing is folded there.
    console = console if console.is_terminal else Console(width=200)
    rich_table = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in table.header:
        rich_table.add_column(name, justify="left" if name in _TEXT else "right", overflow="fold")
    for line in table.lines:
        rich_table.add_row(*line)
    console.print(rich_table)
