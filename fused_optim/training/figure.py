"""The figure of a run: loss curves, and where the memory goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from .loop import Record

# Okabe and Ito's palette, told apart with any colour vision.
_LINES = {"torch": ("#E69F00", 5.0, "o"), "fused_optim": ("#0072B2", 1.5, "x")}
_PARTS = {"parameters": "#0072B2", "gradients": "#56B4E9", "states": "#E69F00", "activations": "#BBBBBB"}
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_LEAST_GAP = 0.075


def draw(records: Mapping[str, Record], smoothed: Mapping[str, Sequence[float]], path: Path) -> None:
    """Writes the figure as PNG."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    losses, memory = figure.subplots(1, 2, width_ratios=[1.5, 1.0])
    _draw_losses(losses, records, smoothed)
    _draw_memory(memory, records)
    figure.savefig(path, dpi=150)


def _draw_losses(axes: Axes, records: Mapping[str, Record], smoothed: Mapping[str, Sequence[float]]) -> None:
    # torch's wide line goes under ours: two curves that agree are then both seen.
    for name in [name for name in _LINES if name in records]:
        record, (color, width, marker) = records[name], _LINES[name]
        steps = range(1, len(smoothed[name]) + 1)
        axes.plot(
            steps, smoothed[name], color=color, linewidth=width, label=f"{record.label}, training (smoothed)"
        )
        axes.plot(
            [step for step, _ in record.validation],
            [loss for _, loss in record.validation],
            linestyle="none",
            marker=marker,
            markersize=9 if marker == "o" else 6,
            markeredgecolor="black" if marker == "o" else color,
            markerfacecolor=color,
            markeredgewidth=1.0 if marker == "o" else 2.0,
            label=f"{record.label}, validation",
            zorder=3,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title("Loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False)


def _draw_memory(axes: Axes, records: Mapping[str, Record]) -> None:
    largest = max(sum(record.memory.values()) for record in records.values())
    unit, scale = next((u for u in _UNITS if largest >= u[1]), ("bytes", 1))
    top = highest = largest / scale
    for position, record in enumerate(records.values()):
        bottom, middles, texts = 0.0, [], []
        for part, color in _PARTS.items():
            height = record.memory[part] / scale
            axes.bar(
                position, height, bottom=bottom, width=0.26, color=color, edgecolor="black", linewidth=0.6
            )
            middles.append(bottom + height / 2)
            texts.append(f"{part} {height:.3g}" if height < 1000 else f"{part} {height:.0f}")
            bottom += height
        heights = spread(middles, _LEAST_GAP * top)
        highest = max(highest, heights[-1])
        for middle, y, text in zip(middles, heights, texts, strict=True):
            axes.plot([position + 0.13, position + 0.19], [middle, y], color="black", linewidth=0.6)
            axes.text(position + 0.2, y, text, va="center", fontsize=8.5)
    labels = [record.label.replace(" ", "\n") for record in records.values()]
    axes.set_xticks(range(len(records)), labels)
    axes.set_xlim(-0.2, len(records) - 0.2)
    axes.set_ylim(0, highest + _LEAST_GAP * top)
    axes.set_ylabel(f"memory ({unit})")
    axes.set_title("Memory in training")


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Ascending positions near the values, at least a gap apart."""
    out: list[float] = []
    for value in values:
        out.append(value if not out else max(value, out[-1] + gap))
    return out
