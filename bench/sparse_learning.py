"""``python -m bench sparse_learning``: recipes for N:M sparsity beside each other on the pretraining job.

Every case trains the same model from the same weights on the same batches, all of them step by step in turn,
so that they share the hours of the machine. A case is ``dense`` or a recipe of ``pretrain --sparsity``, with
further options of ``pretrain`` behind a colon: ``sr-ste:pruned-decay=1e-3,lr=1e-3``. Options that this
command does not know go to all cases. Models that end N:M are exported, loaded into a new model and checked.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fused_optim.sparsity import load_sparse, save_sparse
from fused_optim.training.config import parse, resolve
from fused_optim.training.data import Corpus, UsageError, check_length, load_corpus, validation_batches
from fused_optim.training.loop import Trainer
from fused_optim.training.model import build_model, mean_loss
from fused_optim.training.report import finite, smooth
from fused_optim.training.sparse import parse_pattern

from .machine import describe
from .sparse_figure import draw

SCHEMA = 1
CASES = ("dense", "one-shot", "sr-ste", "mask-decay", "structure-decay", "masked-decay", "cast")
BASELINE = "one-shot"
POINTS = 100
_RATIOS = ("optimizer_time_ratio", "step_time_ratio")
FINAL_TOKENS = 1 << 18
"""Sixteen times as many as a validation during the training has: recipes differ by hundredths of a nat."""


def options_of(case: str) -> list[str]:
    """``"sr-ste:pruned-decay=1e-3"`` as options of ``pretrain``."""
    name, _, rest = case.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    own = [] if name == "dense" else ["--sparsity", name]
    return own + [part for key, _, value in pairs for part in (f"--{key}", value)]


def train(case: str, seed: int, options: Sequence[str], corpus: Corpus) -> Trainer:
    """A case that has not taken a step.

    Raises:
        UsageError: options that contradict each other.
    """
    given = parse([*options, *options_of(case), "--compare", "none", "--seed", str(seed)])
    return Trainer("fused_optim", resolve(given), corpus)


def thinned(losses: Sequence[float]) -> list[list[float]]:
    """About a hundred of them, with their steps."""
    every = max(1, len(losses) // POINTS)
    return [[step, round(losses[step - 1], 4)] for step in range(every, len(losses) + 1, every)]


def has_too_many(w: np.ndarray[Any, Any], n: int, m: int) -> bool:
    """Whether any ``m`` neighbours in a row of a matrix have more than ``n`` that are not zero."""
    return bool((np.count_nonzero(w.reshape(len(w), -1, m), axis=2) > n).any())


def export(trainer: Trainer, batches: Sequence[torch.Tensor], loss: float) -> dict[str, Any]:
    """Writes the model as N:M and reads it back into a new one, which must be the same and really sparse.

    Raises:
        RuntimeError: it is not.
    """
    config = trainer.config
    assert config.pattern is not None
    n, m = parse_pattern(config.pattern)
    dense_bytes = sum(p.nbytes for p in trainer.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        names = save_sparse(trainer.model, path, n, m)
        loaded, size = load_sparse(path), path.stat().st_size
    fresh = build_model(config, config.seed + 1).to(next(trainer.model.parameters()).dtype)
    fresh.load_state_dict(loaded)
    matrices = {name: loaded[name].float().numpy() for name in names}
    wrong = [name for name, w in matrices.items() if has_too_many(w, n, m)]
    again = mean_loss(fresh, batches)
    if wrong or len(names) != trainer.record.sparsity["matrices"] or again != loss:
        raise RuntimeError(f"{config.sparsity}: loss {loss}, exported {again}; not {config.pattern}: {wrong}")
    return {"matrices": len(names), "bytes": size, "dense_bytes": dense_bytes, "validation_loss": again}


def finish(case: str, trainer: Trainer, batches: Sequence[torch.Tensor]) -> dict[str, Any]:
    """A trained case's figures.

    Raises:
        RuntimeError: it should be N:M and is not.
    """
    trainer.finish()
    record = trainer.record
    loss = mean_loss(trainer.model, batches)
    found = record.sparsity
    if found and found["wrong"]:
        raise RuntimeError(f"{case} is not {found['pattern']}: {', '.join(found['wrong'])}")
    parts = ("parameters", "states")
    return {
        "case": case,
        "config": asdict(trainer.config),
        "validation_loss": loss,
        "validation": record.validation,
        "train_loss": thinned(smooth(record.train_loss)),
        "sparsity": found or None,
        "kept_bytes_per_parameter": sum(record.memory[part] for part in parts) / record.elements,
        "exported": export(trainer, batches, loss) if found and not found["ends_dense"] else None,
    }


def run_seed(cases: Sequence[str], seed: int, options: Sequence[str], corpus: Corpus) -> list[dict[str, Any]]:
    """All cases from one seed, in turn."""
    trainers = {case: train(case, seed, options, corpus) for case in cases}
    config = next(iter(trainers.values())).config
    for _ in tqdm(range(config.steps), desc=f"seed {seed}", unit="step", mininterval=15):
        for trainer in trainers.values():
            trainer.advance()
    batches = validation_batches(corpus, 32, config.sequence_length, FINAL_TOKENS)
    first = next(iter(trainers.values())).record
    rows = []
    for case, trainer in trainers.items():
        record = trainer.record
        times = {
            "optimizer_ms": 1e3 * median(record.optimizer_seconds),
            "step_ms": 1e3 * median(record.step_seconds),
            "optimizer_time_ratio": _ratio(record.optimizer_seconds, first.optimizer_seconds),
            "step_time_ratio": _ratio(record.step_seconds, first.step_seconds),
        }
        rows.append({**finish(case, trainer, batches), "seed": seed, **times})
    return rows


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the steps, each of which ran at the same time."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one line per case, means over seeds; times relative to the first case's."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    of = {case: [row for row in rows if row["case"] == case] for case in cases}
    baseline = next((case for case in cases if case == BASELINE), None)
    head = (
        *("case", "pattern at the end", "density", "validation loss", f"beside {cases[0]}"),
        *(f"beside {BASELINE}", "optimizer time", "step time", "bytes per parameter"),
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in cases:
        found = of[case][0]["sparsity"]
        ends_dense = found is None or found["ends_dense"]
        cells = [
            *(case, "dense" if ends_dense else found["pattern"]),
            f"{100 * (found['density'] if found else 1.0):.1f} %",
            _spread([row["validation_loss"] for row in of[case]], "{:.4f}"),
            _beside(of[case], of[cases[0]]),
            _beside(of[case], of[baseline]) if baseline else "",
            *(f"{fmean(row[key] for row in of[case]):.2f}" for key in _RATIOS),
            f"{of[case][0]['kept_bytes_per_parameter']:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _beside(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    if ours is theirs:
        return ""
    losses = [[row["validation_loss"] for row in rows] for rows in (ours, theirs)]
    return _spread([a - b for a, b in zip(*losses, strict=True)], "{:+.4f}")


def _spread(values: Sequence[float], form: str) -> str:
    """Mean, and standard deviation between seeds."""
    mean = form.format(fmean(values))
    return f"{mean} ± {stdev(values):.4f}" if len(values) > 1 else mean


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench sparse_learning", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="times are relative to the first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="a FILE.png is drawn beside it")
    return parser


def main(argv: list[str]) -> int:
    known, options = _parser().parse_known_args(argv)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    try:
        config = resolve(parse(options))
        corpus = load_corpus(config.data, config.glob)
        check_length(corpus, config.sequence_length)
        for seed in known.seeds:
            rows += run_seed(known.cases, seed, options, corpus)
            _write(known.out, rows, config, corpus, time.perf_counter() - start)
    except UsageError as error:
        print(f"sparse_learning: error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def dumps(results: Mapping[str, Any]) -> str:
    """JSON with every list of numbers on a line of its own."""
    text = json.dumps(finite(results), indent=1, allow_nan=False)
    return re.sub(r"\[[\s\d.,e+-]+\]", lambda found: re.sub(r"\s+", "", found[0]), text) + "\n"


def _write(
    path: Path | None, rows: list[dict[str, Any]], config: Any, corpus: Corpus, seconds: float
) -> None:
    if path is None:
        return
    results = {
        "schema": SCHEMA,
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "machine": describe(torch.device(config.device)),
        "data": {"source": corpus.source, "fingerprint": corpus.fingerprint},
        "final_tokens": FINAL_TOKENS,
        "seconds": round(seconds),
        "table": table(rows).splitlines(),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(results))
    draw(rows, path.with_suffix(".png"))
