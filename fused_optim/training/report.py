"""The end of a run: a table, a JSON file and a figure."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

import fused_optim

from .config import PretrainConfig
from .data import Corpus
from .figure import draw
from .loop import Record
from .origin import commit_of, processor
from .sparse import sentence

_PARTS = ("parameters", "gradients", "states")
_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("fused_optim", "kernels", "csrc")


def environment(device: str) -> dict[str, Any]:
    """What losses and times depend on beside the configuration."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "fused_optim": fused_optim.__version__,
        "platform": platform.platform(),
        "cpu": processor(),
        "logical_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "commit": commit_of(_ROOT, _SOURCES),
    }


def _command() -> str:
    """What started this process, without the path of its Python."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def smooth(losses: Sequence[float]) -> list[float]:
    """Mean over the last fiftieth of the run at each step."""
    window = max(1, len(losses) // 50)
    return [fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]


def summarize(record: Record, config: PretrainConfig) -> dict[str, Any]:
    """The figures of one contender's row in the table."""
    step, optimizer = median(record.step_seconds), median(record.optimizer_seconds)
    return {
        "train_loss": smooth(record.train_loss)[-1],
        "validation_loss": record.validation[-1][1],
        "validation_bits_per_byte": record.validation[-1][1] / math.log(2),
        "tokens_per_second": config.batch_size * config.sequence_length / step,
        "optimizer_ms_per_step": 1e3 * optimizer,
        "optimizer_share_of_step": optimizer / step,
        "bytes_per_parameter": {part: record.memory[part] / record.elements for part in _PARTS},
        "activation_bytes": record.memory["activations"],
        "mean_spectral_norm": fmean(record.spectral_norms.values()),
        "density": record.sparsity["density"] if record.sparsity else None,
        "flip_rate": fmean(rate for _, rate in record.flips) if record.flips else None,
    }


def compare(ours: Record, theirs: Record) -> dict[str, float]:
    """How far the two curves lie apart, in nats (NaN if one diverged); and the two optimizers' times."""
    smoothed = zip(smooth(ours.train_loss), smooth(theirs.train_loss), strict=True)
    validations = zip(ours.validation, theirs.validation, strict=True)
    return {
        "train_distance": _largest([abs(a - b) for a, b in smoothed]),
        "validation_distance": _largest([abs(a[1] - b[1]) for a, b in validations]),
        "optimizer_time_ratio": median(ours.optimizer_seconds) / median(theirs.optimizer_seconds),
    }


def _largest(distances: Sequence[float]) -> float:
    # max() passes over a NaN that is not the first.
    return max(distances) if all(map(math.isfinite, distances)) else math.nan


def divergence(record: Record) -> str:
    """Since when a run's losses are no longer numbers; empty if they all are."""
    losses = [*enumerate(record.train_loss, 1), *record.validation]
    steps = [int(step) for step, loss in losses if not math.isfinite(loss)]
    return f"{record.label} DIVERGED: its loss is not finite in step {min(steps)}" if steps else ""


def table(records: Mapping[str, Record], summaries: Mapping[str, dict[str, Any]]) -> str:
    """Plain text, one row per contender."""
    head = [
        "",
        "train loss",
        "validation",
        "tokens/s",
        "optimizer ms/step",
        "of step",
        "bytes/parameter",
        "activations",
        "spectral norm",
        *(["density", "flips"] if any(record.sparsity for record in records.values()) else []),
    ]
    rows = [head]
    for name, row in summaries.items():
        parts = row["bytes_per_parameter"]
        # Results of earlier versions have no flip rates.
        masks = [_percent(row.get("density"), "dense"), _percent(row.get("flip_rate"), "none")]
        rows.append([
            records[name].label,
            f"{row['train_loss']:.4f}",
            f"{row['validation_loss']:.4f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['optimizer_ms_per_step']:.3f}",
            f"{100 * row['optimizer_share_of_step']:.1f} %",
            " + ".join(f"{parts[part]:.3g}" for part in _PARTS) + f" = {sum(parts.values()):.3g}",
            f"{row['activation_bytes'] / 2**20:.1f} MiB",
            f"{row['mean_spectral_norm']:.2f}",
            *(masks if len(head) > 9 else []),
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _percent(share: float | None, without: str) -> str:
    return without if share is None else f"{100 * share:.1f} %"


def finite(value: Any) -> Any:
    """The same value with None for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_report(
    config: PretrainConfig,
    corpus: Corpus,
    records: Mapping[str, Record],
    machine: Mapping[str, Any],
    seconds: float,
    results_path: Path,
    figure_path: Path,
) -> str:
    """Writes the JSON and the figure; returns the text for the terminal."""
    summaries = {name: summarize(record, config) for name, record in records.items()}
    comparison = compare(records["fused_optim"], records["torch"]) if len(records) > 1 else None
    elements = next(iter(records.values())).elements
    results = {
        "format": 1,
        "command": _command(),
        "config": asdict(config),
        "environment": machine,
        "data": {
            "source": corpus.source,
            "train_tokens": len(corpus.train),
            "validation_tokens": len(corpus.validation),
            "train_files": corpus.train_files,
            "validation_files": corpus.validation_files,
            "fingerprint": corpus.fingerprint,
        },
        "parameters": elements,
        "summary": summaries,
        "comparison": comparison,
        "runs": {name: asdict(record) for name, record in records.items()},
        "seconds": seconds,
    }
    results_path.write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n")
    draw(records, {name: smooth(record.train_loss) for name, record in records.items()}, figure_path)
    lines = ["", table(records, summaries)]
    diverged = [text for text in map(divergence, records.values()) if text]
    lines += diverged
    if comparison:
        apart = (
            f"curves at most {comparison['train_distance']:.4f} nats apart in training (smoothed), "
            f"{comparison['validation_distance']:.4f} in validation; "
        )
        ratio = comparison["optimizer_time_ratio"]
        lines.append(f"{'' if diverged else apart}optimizer step in {ratio:.2f} of torch's time")
    lines += [sentence(record.sparsity) for record in records.values() if record.sparsity]
    lines.append(f"{elements / 1e6:.2f} M parameters, {config.steps} steps, {seconds:.0f} s in all")
    lines.append(f"{figure_path}  {results_path}")
    return "\n".join(lines)
