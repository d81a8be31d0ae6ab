"""A plan as a bar chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .plan_report import heading, sections
from .planner import CARDS, Entry, Plan
from .storages import PARTS

# Okabe and Ito's palette, told apart with any colour vision, in an order of alternating lightness.
_COLORS = {"weights": "#0072B2", "master": "#F0E442", "gradients": "#56B4E9", "states": "#D55E00"}
_LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
_NOT_INCLUDED = "Activations are not included."
_NOTE = f"{_NOT_INCLUDED} GB and the cards' memory are 10⁹ bytes."


def draw(plan: Plan, path: Path, per_parameter: bool = False) -> None:
    """Writes the chart as PNG: a bar for each entry, a panel for each rule.

    Args:
        plan: what to show.
        path: of the file; replaced if it exists.
        per_parameter: bytes for each parameter instead of GB, and no cards.

    Raises:
        OSError: the file cannot be written.
    """
    groups = sections(plan)
    rows = [len(entries) for entries in groups.values()]
    figure = Figure(
        figsize=(11, 1.6 + 0.3 * sum(rows) + 0.6 * len(rows)),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
    )
    FigureCanvasAgg(figure)
    ratios = [count + 0.6 for count in rows]
    grid = figure.subplots(len(rows), 1, sharex=True, height_ratios=ratios, squeeze=False)
    panels: list[Axes] = list(grid[:, 0])
    unit = float(plan.parameters) if per_parameter else 1e9
    largest = max(entry.on_each.total for entry in plan.entries) / unit
    for axes, (title, entries) in zip(panels, groups.items(), strict=True):
        _draw_bars(axes, title, entries, largest, unit)
        if not per_parameter:
            _mark_cards(axes, largest)
    name, note = ("bytes per parameter", _NOT_INCLUDED) if per_parameter else ("GB", _NOTE)
    panels[-1].set_xlabel(f"{name}{' on each GPU' if plan.gpus > 1 else ''}. {note}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.suptitle("\n".join(heading(plan)), fontsize=12)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), frameon=False)
    figure.savefig(path, dpi=150, format="png")


def _draw_bars(axes: Axes, title: str, entries: Sequence[Entry], largest: float, unit: float) -> None:
    places, digits = range(len(entries)), 2 if largest < 20 else 1
    lefts = [0.0] * len(entries)
    for part, color in _COLORS.items():
        widths = [getattr(entry.on_each, part) / unit for entry in entries]
        axes.barh(places, widths, 0.72, left=lefts, color=color, edgecolor="black", linewidth=0.5, label=part)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, total in zip(places, lefts, strict=True):
        axes.text(total + 0.008 * largest, place, f"{total:.{digits}f}", va="center", fontsize=9, bbox=_LABEL)
    axes.set_yticks(places, [entry.storage for entry in entries])
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=16)
    axes.set_xlim(0, 1.1 * largest)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_cards(axes: Axes, largest: float) -> None:
    cards = [card for card in CARDS if card <= 1.25 * largest]
    for card in cards:
        axes.axvline(card, color="black", linestyle="--", linewidth=0.9, zorder=0)
        axes.annotate(
            f"{card} GB", (card, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8
        )
    axes.set_xlim(0, max(1.1 * largest, 1.03 * max(cards, default=0)))
