"""Charts of results: bars of ratios, percents and errors, and lines over sizes, as PNG files."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

# Okabe and Ito's palette, told apart with any colour vision; a library has one colour in every chart.
_PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#999999")
_COLORS = {
    "fused_optim": "#0072B2",
    "torch-fused": _PALETTE[0],
    "bitsandbytes-8bit": _PALETTE[1],
    "torchao-8bit": _PALETTE[3],
    "torch.optim.Muon": _PALETTE[0],
    "exact": _PALETTE[0],
    "fast": _PALETTE[1],
}
_HATCHES = ("", "//", "xx", "..")
MARKS = "os^DvPX*"
_BARS_A_FIGURE = 36
_DPI = 150
_LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}


@dataclass(frozen=True)
class Bar:
    """A value of a series, the quartiles where they are known, what took how long, a mark for a footnote."""

    series: str
    value: float
    quartiles: tuple[float, float] | None = None
    time: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Group:
    """Bars that belong together; ``ceiling`` is a value that is marked across them."""

    name: str
    bars: Sequence[Bar]
    ceiling: float | None = None


@dataclass(frozen=True)
class Line:
    """Points of one contender from left to right, with a note for each."""

    series: str
    points: list[tuple[float, float]]
    notes: list[str]


def pages(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups for one figure each: as many as stay readable, in almost equal parts."""
    wanted = [group for group in groups if group.bars]
    total = sum(len(group.bars) for group in wanted)
    share = total / max(1, math.ceil(total / _BARS_A_FIGURE))
    found: list[list[Group]] = []
    drawn = 0
    for group in wanted:
        if drawn >= share * len(found):
            found.append([])
        found[-1].append(group)
        drawn += len(group.bars)
    return found


def _source(series: str) -> str:
    """The library, which a series' name begins with."""
    return "fused_optim" if series.startswith("fused_optim") else series.split()[0]


def _styles(series: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour for every library, a hatch for each further series of it."""
    names = list(dict.fromkeys(series))
    colors = {_source(name): _COLORS.get(_source(name), "") for name in names}
    free = [color for color in _PALETTE if color not in colors.values()]
    for i, source in enumerate(source for source, color in list(colors.items()) if not color):
        colors[source] = free[i % len(free)]
    found: dict[str, dict[str, str]] = {}
    for name in names:
        color = colors[_source(name)]
        used = sum(style["color"] == color for style in found.values())
        found[name] = {"color": color, "hatch": _HATCHES[used % len(_HATCHES)]}
    return found


def _canvas(title: str, bars: int, groups: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, 1.7 + 0.24 * bars + 0.14 * groups), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _places(groups: Sequence[Group]) -> list[list[float]]:
    """Where the bars stand, from the top."""
    found: list[list[float]] = []
    y = 0.0
    for group in groups:
        found.append([y + i for i in range(len(group.bars))])
        y += len(group.bars) + 0.6
    return found


def _steps(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: the fewer in a decade the more decades there are."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    digits = (1, 2, 3, 4, 5, 6, 8) if span < 1 else (1, 2, 5) if span < 3.5 else (1,)
    return [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]


def _logarithmic(axes: Axes, low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(_steps(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _label(axes: Axes, text: str, place: tuple[float, float], before: bool = False, away: int = 4) -> None:
    """Text some points behind a place, or before it."""
    axes.annotate(
        text,
        place,
        xytext=(-away if before else away, 0),
        textcoords="offset points",
        ha="right" if before else "left",
        va="center",
        fontsize=8.5,
        bbox=_LABEL,
        zorder=4,
    )


def _digits(value: float, count: int) -> str:
    """So many of them, zeros at the end as well.

    >>> _digits(1.2, 3), _digits(123.4, 3), _digits(0.1, 2)
    ('1.20', '123', '0.10')
    """
    return f"{value:#.{count}g}".removesuffix(".")


def milliseconds(*times: float) -> str:
    """Three digits of each, without powers of ten.

    >>> milliseconds(0.19604, 7169.6)
    '0.196 / 7170'
    """
    return " / ".join(f"{time:.0f}" if time >= 100 else _digits(time, 3) for time in times)


def _folded(line: str) -> str:
    """Short enough for the margin; storages are cut between codecs."""
    return textwrap.fill(line.replace("/", "/ "), 46).replace("/ ", "/")


def _add_times(axes: Axes, groups: Sequence[Group], head: str) -> None:
    """Every bar's time, in a column behind the axes."""
    column: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "annotation_clip": False}
    for group, ys in zip(groups, _places(groups), strict=True):
        for bar, y in zip(group.bars, ys, strict=True):
            place = (1, y)
            axes.annotate(bar.time, place, (6, 0), ("axes fraction", "data"), va="center", **column)
    if any(bar.time for group in groups for bar in group.bars):
        axes.annotate(head, (1, 1), (6, 2), "axes fraction", va="bottom", color="#444444", **column)


def _finish(
    figure: Figure, axes: Axes, groups: Sequence[Group], handles: Sequence[Artist], path: Path
) -> None:
    """Names of groups, legend, file."""
    places = _places(groups)
    names = ["\n".join(map(_folded, group.name.split("\n"))) for group in groups]
    axes.set_yticks([sum(ys) / len(ys) for ys in places], names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(places[-1][-1] + 0.7, -0.7)
    figure.legend(handles=list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=_DPI, format="png")


def _lines_of(label: str) -> str:
    """An axis' label, no longer than the axis."""
    return "\n".join(textwrap.fill(line, 76) for line in label.split("\n"))


def _patches(styles: Mapping[str, Mapping[str, str]]) -> list[Artist]:
    """Of the bars, for the legend."""
    return [
        Patch(facecolor=s["color"], hatch=s["hatch"], edgecolor="black", linewidth=0.5, label=name)
        for name, s in styles.items()
    ]


def ratios(groups: Sequence[Group], title: str, label: str, path: Path) -> None:
    """Bars to the left and right of 1 on a logarithmic axis: half and twice are as far away."""
    count = sum(len(group.bars) for group in groups)
    figure, axes = _canvas(title, count, len(groups))
    styles = _styles(bar.series for group in groups for bar in group.bars)
    ends = [1.0]
    for group, ys in zip(groups, _places(groups), strict=True):
        for bar, y in zip(group.bars, ys, strict=True):
            low, high = bar.quartiles or (bar.value, bar.value)
            axes.barh(y, bar.value - 1, 0.8, left=1, edgecolor="black", linewidth=0.5, **styles[bar.series])
            if bar.quartiles:
                axes.plot([low, high], [y, y], color="black", linewidth=1.4, solid_capstyle="butt")
            left = bar.value <= 1
            end = min(low, bar.value) if left else max(high, bar.value)
            text = _digits(bar.value, 3 if bar.value >= 1 else 2) + bar.mark
            _label(axes, text, (end, y), before=left)
            ends.append(end)
    axes.axvline(1, color="black", linewidth=1.2)
    span = max(max(ends) / min(ends), 2.0)
    _logarithmic(axes, min(ends) / span**0.12, max(ends) * span**0.12)
    _add_times(axes, groups, "ms: ours / other")
    axes.set_xlabel(_lines_of(label))
    _finish(figure, axes, groups, _patches(styles), path)


def percents(groups: Sequence[Group], title: str, label: str, ceiling: str, path: Path) -> None:
    """Bars from 0, a line at 100, and each group's own ceiling."""
    count = sum(len(group.bars) for group in groups)
    figure, axes = _canvas(title, count, len(groups))
    styles = _styles(bar.series for group in groups for bar in group.bars)
    largest = max([100.0, *(max(b.value for b in g.bars) for g in groups), *(g.ceiling or 0 for g in groups)])
    for group, ys in zip(groups, _places(groups), strict=True):
        if group.ceiling is not None:
            axes.vlines(group.ceiling, ys[0] - 0.5, ys[-1] + 0.5, color="black", linewidth=2.2, zorder=3)
        for bar, y in zip(group.bars, ys, strict=True):
            axes.barh(y, bar.value, 0.8, edgecolor="black", linewidth=0.5, **styles[bar.series])
            # Files hold tenths of a percent.
            text = f"{bar.value:.0f}" if bar.value >= 9.5 else f"{bar.value:.2g}" if bar.value else "<0.1"
            _label(axes, text, (bar.value, y), before=bar.value > 0.12 * largest)
    axes.axvline(100, color="black", linewidth=1.2, linestyle="--")
    axes.set_xlim(0, 1.06 * largest)
    _add_times(axes, groups, "ms")
    axes.set_xlabel(_lines_of(label))
    marked = [Patch(facecolor="black", label=ceiling)] if any(g.ceiling for g in groups) else []
    _finish(figure, axes, groups, [*_patches(styles), *marked], path)


def errors(groups: Sequence[Group], title: str, label: str, path: Path) -> None:
    """Points on a logarithmic axis, another mark for every series."""
    count = sum(len(group.bars) for group in groups)
    figure, axes = _canvas(title, count, len(groups))
    styles = _styles(bar.series for group in groups for bar in group.bars)
    points = {
        name: Line2D(
            [], [], color=style["color"], marker=mark, linestyle="", markeredgecolor="black", label=name
        )
        for (name, style), mark in zip(styles.items(), itertools.cycle(MARKS))
    }
    values = [bar.value for group in groups for bar in group.bars]
    for group, ys in zip(groups, _places(groups), strict=True):
        for bar, y in zip(group.bars, ys, strict=True):
            point = points[bar.series]
            axes.plot(
                bar.value, y, color=point.get_color(), marker=point.get_marker(), markeredgecolor="black"
            )
            _label(axes, f"{bar.value:.1e}", (bar.value, y), away=8)
    _logarithmic(axes, min(values) / 3, max(values) * 10)
    axes.set_xlabel(_lines_of(label))
    _finish(figure, axes, groups, list(points.values()), path)


def _draw_lines(axes: Axes, lines: Sequence[Line], xlabel: str, ylabel: str) -> None:
    styles = _styles(_source(line.series) for line in lines)
    seen: dict[str, int] = {}
    for number, line in enumerate(lines):
        source = _source(line.series)
        turn = seen[source] = seen.get(source, -1) + 1
        axes.plot(
            *zip(*line.points, strict=True),
            color=styles[source]["color"],
            linestyle=("-", "--", ":", "-.")[turn % 4],
            marker=MARKS[number % len(MARKS)],
            markeredgecolor="black",
            markeredgewidth=0.6,
            label=line.series,
        )
    heights = [y for line in lines for _, y in line.points]
    for point, note in zip(lines[0].points, lines[0].notes, strict=True):
        axes.annotate(
            note,
            (point[0], min(heights) / 1.6),
            ha="center",
            va="top",
            fontsize=8,
            rotation=90,
            color="#444444",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Room for the notes below the lines.
    axes.set_ylim(min(heights) / (2 * (max(heights) / min(heights)) ** 0.5), 1.5 * max(heights))
    axes.margins(x=0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1,) if axis is axes.xaxis else (1, 2, 5), numticks=12))
        axis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def scaling(panels: Sequence[tuple[Sequence[Line], str, str]], title: str, path: Path) -> None:
    """A panel for each set of lines with its two labels; a series has one look in all of them."""
    figure = Figure(figsize=(5.2 * len(panels) + 0.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (lines, xlabel, ylabel) in zip(grid[0], panels, strict=True):
        _draw_lines(axes, lines, xlabel, ylabel)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=_DPI, format="png")
