"""What the report shows of each kind of result: charts, tables, and where the figures come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import charts, learning_sections
from .charts import Bar, Group, Line
from .comparison import SPEEDS, speeds
from .cuda_paths import table as launch_table
from .found import Record, Result, circumstances, on_gpu
from .record import COMMON_ROUNDS
from .section import Section
from .shapes import MODELS
from .static_cuda import table as cuda_table
from .static_products import Report
from .static_products import table as products_table
from .tables import NOTE, Table, case_table

_PICTURED = ("adam", "lion")
"""Rules whose launches are drawn."""

_LINES = 8
"""At most so many in one chart of the scaling."""

LEFT_IS_FASTER = "our median time over the other's (logarithmic; left of 1: ours is faster)"

_APART = "*"
_ROUNDS_APART = (
    f"{_APART}: medians of different rounds. The slower one sat out some rounds, and this file does not hold "
    "the time of each, from which later files have ratios of common rounds: where the machine changed its "
    "pace meanwhile, such a ratio is off."
)

ERRORS = {"masks": "share of weights on which the mask disagrees with ours; of a forward pass: relative"}
"""What the errors of a command are, where they are not relative ones."""


def _size(count: int) -> str:
    for unit, factor in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return str(count)


def _case_name(case: Record) -> str:
    """The case with its shapes, which some names hold already."""
    name = case["name"].removeprefix(case["shapes"]).strip()
    kept = ", gradients kept" if case["gradients"] == "kept" and "kept" not in name else ""
    return f"{name}{kept}\n{_tensors(case)}, {_size(case['elements'])} parameters"


def _tensors(case: Record) -> str:
    return f"{case['tensors']} tensor{'s' * (case['tensors'] > 1)}"


def _timed(row: Record) -> bool:
    return row.get("status", "ok") == "ok"


def _split(case: Record) -> tuple[list[Record], list[Record]]:
    """Our rows and the peers' rows that were timed."""
    timed = list(filter(_timed, case["rows"]))
    ours = [row for row in timed if row["source"] == "fused_optim"]
    return ours, [row for row in timed if row["source"] != "fused_optim"]


def _bar(series: str, ours: Record, other: Record, data: Record, known: Record | None) -> Bar:
    """Our time over another's; ``known`` is the ratio as it was measured, with its quartiles."""
    medians = ours["ms"]["median"], other["ms"]["median"]
    value, mark, known = medians[0] / medians[1], "", known or {}
    if known.get("measured") and data.get("schema", 1) >= COMMON_ROUNDS:
        value = known["measured"]
    elif ours["ms"]["n"] != other["ms"]["n"]:
        mark = _APART
    low, high = known.get("quartiles", (None, None))
    quartiles = None if low is None else (low, high)
    return Bar(series, value, quartiles, charts.milliseconds(*medians), mark)


def _targeted(case: Record, ours: str, against: str) -> Record | None:
    """What was measured for a target."""
    for target in case.get("targets", ()):
        if target["kind"] == "ratio" and target.get("ours", ours) == ours and target["against"] == against:
            return target
    return None


def _draw_ratios(section: Section, stem: Path, groups: Sequence[Group], alt: str) -> None:
    """The chart of our times over others', and what its marks mean."""
    apart = any(bar.mark for group in groups for bar in group.bars)
    label = LEFT_IS_FASTER + (f"\n{_APART} medians of different rounds: see the note" if apart else "")
    section.draw(Path(f"{stem}-ratios"), groups, alt, charts.ratios, label)
    if apart:
        section.notes.append(_ROUNDS_APART)


def _variant(row: Record) -> str:
    """How our rows of one case differ."""
    return " ".join(["fused_optim", *map(str, row["options"].values())])


def _peer(row: Record) -> str:
    """A peer, and the dtype of its parameters: it knows nothing of our codecs."""
    return f"{row['source']} {row['param'].partition('_')[0]}"


def _step_ratios(case: Record, data: Record) -> Group:
    ours, others = _split(case)
    pairs: list[tuple[str, Record, Record]] = []
    if len(ours) == 1:
        pairs = [(_peer(other), ours[0], other) for other in others]
    elif others:
        pairs = [(_variant(row), row, others[0]) for row in ours]
    bars: list[Bar] = []
    for series, own, other in pairs:
        known = other.get("ratios", {}).get(own["label"]) or _targeted(case, own["label"], other["label"])
        bars.append(_bar(series, own, other, data, known))
    return Group(_case_name(case), bars)


def _step_percents(case: Record) -> Group:
    ours, others = _split(case)
    rows = [(_variant(row), row) for row in ours] + [(_peer(row), row) for row in others]
    bars = [
        Bar(series, row["percent_of_copy"], time=charts.milliseconds(row["ms"]["median"]))
        for series, row in rows
    ]
    ceiling = 100 * case["in_place_gb_per_s"] / case["copy_gb_per_s"]
    return Group(_case_name(case), bars, ceiling)


def _lines(cases: Sequence[Record], x: str, note: Callable[[Record], str]) -> list[Line]:
    """A line for every contender that was timed at two places or more."""
    lines: dict[str, dict[float, tuple[float, str]]] = {}
    for case in cases:
        for row in (row for rows in _split(case) for row in rows):
            lines.setdefault(row["label"], {}).setdefault(case[x], (row["ms"]["median"], note(case)))
    found: list[Line] = []
    for label, values in lines.items():
        places = sorted(values)
        if len(places) > 1:
            found.append(Line(label, [(p, values[p][0]) for p in places], [values[p][1] for p in places]))
    return sorted(found, key=lambda line: -len(line.points))[:_LINES]


def _grouped(cases: Sequence[Record], key: Callable[[Record], object]) -> list[list[Record]]:
    found: dict[object, list[Record]] = {}
    for case in cases:
        found.setdefault(key(case), []).append(case)
    return list(found.values())


def _family(case: Record) -> object:
    """What cases share of which only the number of parameters differs: equal tensors, or a Llama's."""
    return "llama" if case["shapes"] in MODELS else case["elements"] / case["tensors"]


def _scaling(cases: Sequence[Record]) -> list[tuple[list[Line], str, str]]:
    """Time over the number of parameters, and over the number of tensors that hold the same parameters.

    Nothing else differs along a line: gradients are new and caches cold, as in a training.
    """
    alike = [c for c in cases if c["gradients"] == "fresh" and c.get("caches", "cold") == "cold"]
    totals = _grouped(alike, lambda case: case["elements"])
    most = max(totals, key=lambda found: len({case["tensors"] for case in found}), default=[])
    families = _grouped(alike, _family)
    grown = max(families, key=lambda found: len({case["elements"] for case in found}), default=[])
    label = held = ""
    if grown:
        size = _size(grown[0]["elements"] // grown[0]["tensors"])
        label = (
            "parameters of a Llama" if _family(grown[0]) == "llama" else f"parameters, {size} in each tensor"
        )
        held = f"tensors that hold {_size(most[0]['elements'])} parameters together"
    panels = [
        (_lines(grown, "elements", _tensors), label, "ms for a step"),
        (_lines(most, "tensors", lambda case: case["shapes"]), held, "ms for a step"),
    ]
    return [panel for panel in panels if panel[0]]


def step(result: Result, stem: Path) -> Section:
    """Steps of optimizers beside peers."""
    data, cases = result.data, result.data["cases"]
    section = Section("Steps of optimizers", circumstances(data))
    if not on_gpu(data):
        section.notes.append(NOTE)
    section.notes.append(
        "Every contender's first steps were checked against float64 before it was timed. Percent of a copy: "
        "bytes that a one-pass step must move, by the codec model, per second, over what a plain copy moves; "
        "on a CPU a copy also has to fetch its target, which a step does not."
    )
    groups = [_step_ratios(case, data) for case in cases]
    _draw_ratios(section, stem, groups, "Time beside other optimizers")
    copied = "percent of a copy's bandwidth (dashed: the copy)"
    ceiling = "a buffer that is read and written in place"
    section.draw(
        Path(f"{stem}-ceiling"),
        map(_step_percents, cases),
        "Percent of a copy's bandwidth",
        charts.percents,
        copied,
        ceiling,
    )
    panels = _scaling(cases)
    if panels:
        path = Path(f"{stem}-scaling.png")
        charts.scaling(panels, "Scaling", path)
        section.pictures.append((path, "Scaling over parameters and tensors"))
    section.tables = [case_table(case) for case in cases]
    return section


def _ms_table(title: str, rows: Sequence[Record]) -> Table:
    fast = [any("tflop_per_s" in row for row in rows)] * len(SPEEDS)
    header = ["contender", "median ms", "q1–q3", "rounds", *itertools.compress(SPEEDS, fast), "error"]
    lines = []
    for row in rows:
        if not _timed(row):
            lines.append([row["label"], *[""] * (len(header) - 2), f"{row['status']}: {row['reason']}"])
            continue
        ms, error = row["ms"], row.get("error")
        times = [f"{ms['median']:.4g}", f"{ms['q1']:.4g}–{ms['q3']:.4g}", str(ms["n"])]
        times += itertools.compress(speeds(row), fast)
        lines.append([row["label"], *times, "" if error is None else f"{error:.1e}"])
    return Table(title, header, lines)


def times(result: Result, stem: Path) -> Section:
    """Cases whose first row is ours: whole steps of Muon, soft clipping, products."""
    data, cases = result.data, result.data["cases"]
    section = Section(str(data.get("kind", "times")).replace("_", " ").capitalize(), circumstances(data))
    ratios, errors = [], []
    for case in cases:
        first, *others = filter(_timed, case["rows"])
        bars = [
            _bar(row["label"], first, row, data, _targeted(case, first["label"], row["label"]))
            for row in others
        ]
        ratios.append(Group(case["name"], bars))
        known = [row for row in case["rows"] if row.get("error")]
        errors.append(Group(case["name"], [Bar(row["label"], row["error"]) for row in known]))
    _draw_ratios(section, stem, ratios, "Time beside other implementations")
    label = ERRORS.get(data.get("kind", ""), "relative error against float64")
    label += " (logarithmic; none or not measured: no point)"
    section.draw(Path(f"{stem}-errors"), errors, "Errors", charts.errors, label)
    section.tables = [
        _ms_table(f"{case['name']}: {case['rounds']} rounds", [*case["rows"], *case.get("matmuls", ())])
        for case in cases
    ]
    section.notes += [f"Failed: {case['name']}: {case['reason']}" for case in data.get("failed", ())]
    if data.get("left_out"):
        section.notes.append(f"Left out for lack of time: {', '.join(data['left_out'])}.")
    return section


def products(result: Result, stem: Path) -> Section:
    """Matrix products on a GPU beside torch.matmul."""
    data = result.data
    section = Section("Matrix products", circumstances(data))
    done = [case for case in data["cases"] if "failed" not in case]
    groups, lines = [], []
    for case in done:
        q1, q3 = case["speedup_quartiles"]
        time = charts.milliseconds(case["ms"]["median"], case["torch_ms"]["median"])
        groups.append(Group(case["case"], [Bar("torch", 1 / case["speedup"], (1 / q3, 1 / q1), time)]))
        numbers = (case["ms"]["median"], case["torch_ms"]["median"], case["torch_tflops"])
        lines.append([case["case"], *(f"{number:.4g}" for number in numbers), case["tile"]])
    _draw_ratios(section, stem, groups, "Time beside torch.matmul")
    section.tables = [Table("Products", ["case", "ms", "torch ms", "torch TFLOP/s", "tile"], lines)]
    section.notes = [f"{case['case']} failed: {case['failed']}" for case in data["cases"] if "failed" in case]
    return section


def _draw_budget(
    section: Section, stem: Path, kernels: Sequence[Record], rule: str, share: str, alt: str
) -> None:
    """Percent of the instructions that fit into the time of the traffic; the keys hold rule and share."""
    groups: dict[str, list[Bar]] = {}
    for kernel in kernels:
        group = kernel.get("group")
        name = f"{kernel[rule]}{'' if group is None else f' of {group}'}\n{kernel['storage']}"
        groups.setdefault(name, []).append(Bar(kernel["arithmetic"], 100 * kernel[share]))
    label = "percent of the instructions that fit into the time of the memory's traffic (dashed: all of them)"
    pictured = [Group(name, sorted(bars, key=lambda bar: bar.series)) for name, bars in groups.items()]
    section.draw(Path(f"{stem}-budget"), pictured, alt, charts.percents, label, "")


def _capability(kernels: Sequence[Record]) -> int:
    """The H200's if it is there, else the first."""
    found = {kernel["sm"]: None for kernel in kernels}
    return 90 if 90 in found else next(iter(found))


def static(result: Result, stem: Path) -> Section:
    """What the compiled kernels of a step issue, for one capability of the file."""
    kernels = [kernel for kernel in result.data["kernels"] if not kernel["strided"]]
    sm = _capability(kernels)
    section = Section(f"Compiled kernels, sm_{sm}", circumstances(result.data))
    chosen = [kernel for kernel in kernels if kernel["sm"] == sm]
    _draw_budget(section, stem, chosen, "kernel", "share", f"Issue budget of Triton's kernels, sm_{sm}")
    return section


def static_products(result: Result, stem: Path) -> Section:
    """What the compiled kernels of the matrix products cost."""
    section = Section("Compiled kernels of matrix products", circumstances(result.data))
    section.text = products_table(Report(**kernel) for kernel in result.data["kernels"])
    return section


def static_cuda(result: Result, stem: Path) -> Section:
    """What the CUDA C++ kernels take; the chart has the launches of two rules for one capability."""
    section = Section("Compiled CUDA C++ kernels", circumstances(result.data))
    launches = result.data.get("launches", [])
    if launches:
        sm = _capability(launches)
        pictured = [row for row in launches if (row["sm"], row["group"]) == (sm, None)]
        pictured = [row for row in pictured if row["rule"] in _PICTURED]
        _draw_budget(
            section, stem, pictured, "rule", "used", f"Issue budget of the CUDA C++ kernels, sm_{sm}"
        )
        section.notes.append("Pictured are AdamW and Lion without masks; the tables have everything.")
    section.tables = [cuda_table(result.data["kernels"]), launch_table(launches)]
    return section


def parts(result: Result, stem: Path) -> Section:
    """What became of the parts of ``bench/gpu.sh``."""
    data = result.data
    facts = {"Machine": data["gpu"] or "no GPU: a dry run", "Seconds": str(data["seconds"])}
    found = {name: f"{part['state']}, {part['seconds']} s" for name, part in data["parts"].items()}
    return Section("Everything that a GPU must prove: bench/gpu.sh", {**facts, **found})


def base(result: Result, stem: Path) -> Section:
    """Two commits beside each other."""
    data = result.data
    compared = data["base"]
    section = Section(f"This version beside {compared['ref']}", circumstances(data))
    section.facts = {**section.facts, "Compared with": compared["commit"]}
    timed = [case for case in data["cases"] if case["status"] == "ok"]
    groups = []
    for case in timed:
        time = charts.milliseconds(case["ms"]["this"]["median"], case["ms"]["base"]["median"])
        bar = Bar(compared["ref"], case["ratio"], tuple(case["quartiles"]), time)
        groups.append(Group(_case_name(case), [bar]))
    _draw_ratios(section, stem, groups, f"Time beside {compared['ref']}")
    return section


SECTIONS: Mapping[str, Callable[[Result, Path], Section]] = {
    "parts": parts,
    "pretraining": learning_sections.pretraining,
    "recipes": learning_sections.recipes,
    "plan": learning_sections.planned,
    "step": step,
    "times": times,
    "base": base,
    "products": products,
    "static": static,
    "static_cuda": static_cuda,
    "static_products": static_products,
}
"""What draws each of ``found.KINDS``."""


def section_of(result: Result, folder: Path, name: str) -> Section:
    """The section of a file; its pictures' names begin with ``name``."""
    return SECTIONS[result.kind](result, folder / name)
