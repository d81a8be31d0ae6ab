"""What the report shows of trainings, and of the memory that they take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fused_optim.training import Memory, Plan, plan
from fused_optim.training.figure import draw as draw_losses
from fused_optim.training.loop import Record as Training
from fused_optim.training.plan_figure import draw as draw_plan
from fused_optim.training.plan_report import table as plan_table
from fused_optim.training.planner import Entry
from fused_optim.training.presets import PRESETS
from fused_optim.training.report import smooth
from fused_optim.training.report import table as training_table
from fused_optim.training.storages import PARTS

from .found import Record, Result, circumstances
from .section import Section
from .sparse_figure import draw as draw_recipes
from .tables import Table


def _finite(losses: Sequence[float | None]) -> list[float]:
    return [math.nan if loss is None else loss for loss in losses]


def pretraining(result: Result, stem: Path) -> Section:
    """Loss curves of a training, and its table."""
    data = result.data
    runs: dict[str, Training] = {}
    for name, run in data["runs"].items():
        validation = [[place, math.nan if loss is None else loss] for place, loss in run["validation"]]
        losses = {"train_loss": _finite(run["train_loss"]), "validation": validation}
        runs[name] = Training(**{**run, **losses})
    config: Record = data["config"]
    section = Section(f"Pretraining: {data['parameters']:,} parameters", circumstances(data))
    path = Path(f"{stem}-losses.png")
    draw_losses(runs, {name: smooth(run.train_loss) for name, run in runs.items()}, path)
    section.pictures.append((path, "Loss curves, and where the memory goes"))
    section.text = training_table(runs, data["summary"])
    section.notes.append(
        f"{config['steps']} steps of {config['batch_size']} × {config['sequence_length']} bytes of text, "
        f"seed {config['seed']}."
    )
    return section


def memory(folder: Path) -> Section:
    """Bytes per parameter under every rule and storage, counted and not measured."""
    model = PRESETS["1b"]
    found = plan(model.tensors(), name=model.model)
    section = Section("Bytes per parameter", {"Command": "python -m fused_optim plan --model 1b"})
    path = folder / "bytes-per-parameter.png"
    draw_plan(found, path, per_parameter=True)
    section.pictures.append((path, "Bytes per parameter of weights, master bits, gradients and states"))
    section.notes.append(
        "Counted by the functions that the optimizer allocates with; other libraries by their sources."
    )
    section.text = plan_table(found)
    return section


def planned(result: Result, stem: Path) -> Section:
    """What ``plan --json`` wrote."""
    data = result.data
    entries = [
        Entry(row["rule"], row["storage"], _memory(row["bytes"]), _memory(row["bytes_on_each_gpu"]))
        for row in data["entries"]
    ]
    heads = {name: data[name] for name in ("model", "parameters", "tensors", "gpus", "shard")}
    found = Plan(**heads, entries=tuple(entries), notes=tuple(data["notes"]))
    section = Section(f"Memory of training: {found.model}", {"Command": "python -m fused_optim plan --json"})
    path = Path(f"{stem}-memory.png")
    draw_plan(found, path)
    section.pictures.append((path, "Memory of weights, master bits, gradients and states"))
    section.text = plan_table(found)
    return section


def _memory(parts: Record) -> Memory:
    return Memory(**{part: parts[part] for part in PARTS})


def _diverged(row: Record) -> bool:
    """Whether a loss is None, which stands for NaN and infinities."""
    losses = [loss for curve in ("validation", "train_loss") for _, loss in row[curve]]
    return None in (*losses, row["validation_loss"])


def _unbroken(cell: str) -> str:
    """A mean and its deviation stay on one line."""
    return cell.strip().replace(" ± ", "\u00a0±\u00a0")


def recipes(result: Result, stem: Path) -> Section:
    """What recipes for N:M sparsity learn on the same job."""
    data, rows = result.data, result.data["rows"]
    config = rows[0]["config"]
    section = Section("Recipes for N:M sparsity", circumstances(data))
    seeds = sorted({row["seed"] for row in rows})
    section.notes.append(
        f"{config['steps']} steps of {config['batch_size']} × {config['sequence_length']} bytes of text, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. The table's losses are of "
        f"{data['final_tokens']} bytes after the training, the chart's of fewer; times are relative to the "
        "first case."
    )
    lost = {row["case"] for row in rows if _diverged(row)}
    drawn = [row for row in rows if row["case"] not in lost]
    section.notes += [f"{case} diverged: it is not in the chart." for case in sorted(lost)]
    if drawn:
        path = Path(f"{stem}-losses.png")
        draw_recipes(drawn, path)
        section.pictures.append((path, "Losses of all recipes, and how far each is above the first case"))
    header, _, *lines = [[_unbroken(cell) for cell in line[1:-1].split("|")] for line in data["table"]]
    section.tables.append(Table("Recipes", header, lines))
    return section
