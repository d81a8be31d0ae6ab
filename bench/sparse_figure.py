"""The figure of ``sparse_learning``: losses of all recipes, and how far each is above the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fused_optim.training.figure import spread

from .charts import MARKS

# Okabe and Ito's palette, told apart with any colour vision; lines also differ in their dashes and marks.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#999999")
DASHES = ("-", "--", "-.", ":")
_SHOWN_FROM = 0.4
"""Before that all losses fall by whole nats, and recipes differ by hundredths."""


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the figure as PNG; several seeds are averaged."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    of = {case: [row for row in rows if row["case"] == case] for case in cases}
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    measure = _mean_curve(of[cases[0]], "validation")
    _draw_training(left, of)
    ends = {}
    for (case, found), (color, dashes, mark) in zip(of.items(), _styles(cases), strict=True):
        curve = _mean_curve(found, "validation")
        steps = [step for step in curve if step >= _SHOWN_FROM * max(measure)]
        above = [curve[step] - measure[step] for step in steps]
        right.plot(steps, above, color=color, linestyle=dashes, marker=mark, markersize=6)
        ends[case] = (above[-1], color)
    _name_ends(right, ends, max(measure))
    right.set(xlabel="step", ylabel=f"validation loss above {cases[0]} (nats per byte)")
    right.set_title("Validation, of the model as it is at that step")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _styles(cases: Sequence[str]) -> list[tuple[str, str, str]]:
    """Colour, dashes and mark: after a round of colours each has other dashes and another mark."""
    turns = [(index, index + index // len(COLORS)) for index in range(len(cases))]
    return [
        (COLORS[index % len(COLORS)], DASHES[turn % len(DASHES)], MARKS[turn % len(MARKS)])
        for index, turn in turns
    ]


def _mean_curve(found: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Means over seeds, by step."""
    curves = [dict(map(tuple, row[name])) for row in found]
    return {step: fmean(curve[step] for curve in curves) for step in curves[0]}


def _draw_training(axes: Axes, of: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for (case, found), (color, dashes, _) in zip(of.items(), _styles(list(of)), strict=True):
        curve = _mean_curve(found, "train_loss")
        steps = [step for step in curve if step >= max(curve) / 20]
        axes.plot(steps, [curve[step] for step in steps], color, linestyle=dashes, label=case)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Training (smoothed)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _name_ends(axes: Axes, ends: Mapping[str, tuple[float, str]], last: int) -> None:
    """Every line's name behind its end, at least a line of text apart."""
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda case: ends[case][0])
    values = [ends[case][0] for case in order]
    heights = spread(values, (high - low) / 20)
    shift = fmean(values) - fmean(heights)
    axes.set_xlim(right=last + 0.02 * last)
    for case, height in zip(order, heights, strict=True):
        value, color = ends[case]
        axes.annotate(
            f"{case} {value:+.3f}",
            (last, value),
            (last * 1.06, height + shift),
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)},
        )
