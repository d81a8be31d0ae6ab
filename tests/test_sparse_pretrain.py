"""Pretraining with recipes for N:M sparsity: models end sparse, export, resume; bad options are one line."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fused_optim
from bench import sparse_learning
from fused_optim.master import full_precision
from fused_optim.sparsity import CAST, load_sparse, masks_of
from fused_optim.training import pretrain, report, sparse
from fused_optim.training.config import parse, resolve
from fused_optim.training.data import load_corpus, validation_batches
from fused_optim.training.loop import Trainer
from fused_optim.training.model import build_model, mean_loss
from fused_optim.training.sparse import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--hidden", "32", "--layers", "1", "--heads", "2", "--sequence-length", "16", "--batch-size", "2"]
RUN = [*SMALL, "--steps", "8", "--eval-every", "4", "--device", "cpu", "--lr", "1e-2", "--compare", "none"]
MATRICES = {
    f"model.layers.0.{name}_proj.weight"
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
}


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of such a short run."""
    monkeypatch.setattr(report, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("".join(f"def f{n}(x):\n    return x + {n * n}\n\n" for n in range(300)))
    return path


def _pretrain(*options: str | Path) -> int:
    return pretrain.main([str(option) for option in options])


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / pretrain.RESULTS).read_text())


def _most_of_groups(w: torch.Tensor, m: int) -> int:
    return int(np.count_nonzero(w.float().numpy().reshape(len(w), -1, m), axis=2).max())


@pytest.mark.parametrize(
    ("options", "n", "m"),
    [
        *[([name], 2, 4) for name in RECIPES if name != "masked-decay"],
        (["one-shot", "--pattern", "1:8", "--dense-steps", "0", "--storage", "fp32"], 1, 8),
        (["sr-ste", "--optimizer", "muon", "--pruned-decay", "0.01"], 2, 4),
        (["mask-decay", "--spectral-clip", "0.5", "--optimizer", "lion", "--storage", "sr+int8"], 2, 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_models_end_sparse_and_can_be_loaded(
    options: list[str], n: int, m: int, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    everything = [*RUN, "--sparsity", *options]
    assert _pretrain("--data", text, *everything, "--out", out) == 0
    record = _results(out)["runs"]["fused_optim"]
    assert (record["sparsity"]["matrices"], record["sparsity"]["wrong"]) == (len(MATRICES), [])
    assert record["sparsity"]["density"] == n / m
    assert _results(out)["summary"]["fused_optim"]["flip_rate"] == pytest.approx(
        np.mean([rate for _, rate in record["flips"]]).item() if record["flips"] else None
    )
    assert f"{options[0]} {n}:{m}" in (table := capsys.readouterr().out)
    assert f"{n}:{m} in 7 matrices" in table

    loaded = load_sparse(out / pretrain.SPARSE_MODEL)
    assert {name: _most_of_groups(loaded[name], m) for name in MATRICES} == dict.fromkeys(MATRICES, n)
    config = resolve(parse(["--data", str(text), *everything]))
    model = build_model(config, 1).to(loaded["lm_head.weight"].dtype)
    model.load_state_dict(loaded)
    batches = validation_batches(load_corpus(str(text), None), config.batch_size, config.sequence_length)
    assert mean_loss(model, batches) == record["validation"][-1][1]


def test_a_recipe_that_ends_dense_says_so(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert _pretrain("--data", text, *RUN, "--sparsity", "masked-decay", "--out", out) == 0
    assert "masked-decay ends dense: 7 matrices" in capsys.readouterr().out
    assert _results(out)["runs"]["fused_optim"]["sparsity"]["ends_dense"]
    assert not (out / pretrain.SPARSE_MODEL).exists()


def test_a_model_that_is_not_sparse_fails(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sparse, "check_mask", lambda w, n, m, dim: len(w) != 96)
        assert _pretrain("--data", text, *RUN, "--sparsity", "sr-ste", "--out", tmp_path / "run") == 1
    captured = capsys.readouterr()
    assert "NOT 2:4: model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight" in captured.out
    assert captured.err.endswith("pretrain: error: the model is not 2:4, see above\n")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["one-shot", "--dense-steps", "3"], [8]),
        (["sr-ste", "--dense-steps", "5"], []),
        (["mask-decay"], [4, 8]),
        (["structure-decay"], [8]),
        (["masked-decay"], [4]),
        (["cast"], [4, 8]),
        (["sr-ste", "--dense-steps", "0", "--pattern", "6:8"], [4, 8]),
    ],
    ids=lambda value: value[0] if value and isinstance(value[0], str) else None,
)
def test_flips_are_told_from_pruning(options: list[str], expected: list[int]) -> None:
    config = resolve(parse([*RUN, "--sparsity", *options]))
    assert [now for now in (4, 8) if sparse.keeps_pattern(config, now - 4, now)] == expected


def test_flips_are_counted_between_validations(text: Path, tmp_path: Path) -> None:
    masks: list[dict[str, np.ndarray]] = []
    config = resolve(parse(["--data", str(text), *RUN, "--sparsity", "sr-ste", "--dense-steps", "0"]))
    trainer = Trainer("fused_optim", config, load_corpus(str(text), None))
    for at in range(config.steps + 1):
        if at % config.eval_every == 0:
            masks.append({name: mask.numpy() for name, mask in masks_of(trainer.optimizer).items()})
        if at < config.steps:
            trainer.advance()
    rates = [
        np.mean(np.concatenate([(old[k] != new[k]).ravel() for k in old])) for old, new in pairwise(masks)
    ]
    assert trainer.record.flips == [[4, rates[0]], [8, rates[1]]] and min(rates) > 0
    old = trainer.state()
    del old["masks"]
    trainer.load(old)
    assert trainer._flips is not None and trainer._flips.measure() == 0


@pytest.mark.parametrize(
    ("options", "every"),
    [
        (["one-shot"], 4),
        (["sr-ste"], 4),
        (["cast", "--dense-steps", "0"], 4),
        # Stopped when AdamS has taken a step, and just before its first.
        (["cast", "--dense-steps", "4"], 4),
        (["cast", "--dense-steps", "5"], 4),
        (["mask-decay"], 3),
        (["structure-decay"], 3),
    ],
    ids=lambda value: "_".join(value).replace("_--", "_") if isinstance(value, list) else None,
)
def test_resuming_is_bit_exact(
    options: list[str], every: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._train_step

    def stopping(trainer: Trainer) -> None:
        if trainer.step == 4:
            signal.raise_signal(signal.SIGTERM)
        step(trainer)

    everything = [
        "--data",
        text,
        *RUN,
        "--sparsity",
        *options,
        "--checkpoint-every",
        "8",
        "--eval-every",
        every,
    ]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert _pretrain(*everything, "--out", whole) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", stopping)
        assert _pretrain(*everything, "--out", halves) == 128 + signal.SIGTERM
    assert _pretrain("--resume", halves) == 0
    expected, found = (_results(folder)["runs"]["fused_optim"] for folder in (whole, halves))
    assert found["train_loss"] == expected["train_loss"]
    assert found["validation"] == expected["validation"]
    assert found["sparsity"]["density"] == expected["sparsity"]["density"]
    assert found["flips"] == expected["flips"]
    # Stopped between two validations: the masks of the first are in the checkpoint.
    assert every == 4 or any(rate > 0 for at, rate in expected["flips"] if at > 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "asp"], "invalid choice: 'asp'"),
        (["--pattern", "2:4"], "--pattern is for a recipe; give --sparsity one-shot, sr-ste"),
        (["--sparsity", "sr-ste", "--pattern", "half"], "--pattern half is not N:M, such as 2:4"),
        (["--sparsity", "sr-ste", "--pattern", "4:2"], "0 < n < m <= 32"),
        (["--sparsity", "sr-ste", "--pattern", "1:5"], "--pattern 1:5 fits no matrix: dimension 1 has 32"),
        (
            ["--sparsity", "masked-decay", "--dense-steps", "3"],
            "--dense-steps does not exist for --sparsity",
        ),
        (["--sparsity", "cast", "--pattern", "1:5"], "--pattern 1:5 fits no matrix: dimension 1 has 32"),
        (["--sparsity", "one-shot", "--pruned-decay", "1"], "--pruned-decay does not exist"),
        (["--sparsity", "one-shot", "--dense-steps", "8"], "less than --steps 8"),
        (["--sparsity", "cast", "--pruned-decay", "-1"], "--pruned-decay must be finite and 0 or more"),
        (["--sparsity", "cast", "--optimizer", "lion"], "does not go with --optimizer lion"),
        (["--sparsity", "cast", "--spectral-clip", "1"], "does not go with --spectral-clip"),
        (["--sparsity", "masked-decay", "--pattern", "1:4"], "is 2:4 in rows and columns"),
        (["--sparsity", "structure-decay", "--dense-steps", "5"], "less than a step for each of 2 patterns"),
        (["--sparsity", "mask-decay", "--dense-steps", "7"], "--dense-steps 7 must be below 6"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _pretrain("--data", text, *RUN, *options, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("pretrain: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(("dense_steps", "pruning"), [("3", 2), ("7", 1)])
def test_cast_has_pruned_after_half_of_its_steps(dense_steps: str, pruning: int) -> None:
    recipe = sparse.build_recipe(resolve(parse([*RUN, "--sparsity", "cast", "--dense-steps", dense_steps])))
    assert recipe == CAST(total_steps=pruning)


def test_matrices_of_cast_have_a_learning_rate_of_their_own() -> None:
    config = resolve(parse(["--sparsity", "cast"]))
    trained = resolve(parse([]))
    assert config.lr == pytest.approx(trained.lr * RECIPES["cast"].lr_factor)
    groups = [{"params": [(n, torch.zeros(8, 8)) for n in ("up", "lm_head")], "weight_decay": 0.1}]
    recipe = sparse.build_recipe(config)
    assert recipe is not None
    masked, others = sparse.separate(groups, recipe, others_lr=0.5)
    assert [name for name, _ in masked["params"]] == ["up"] and "lr" not in masked
    assert [name for name, _ in others["params"]] == ["lm_head"] and others["lr"] == 0.5


def test_recipes_beside_each_other(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ["dense", "one-shot:dense-steps=2", "sr-ste:pruned-decay=0.1,lr=1e-3"]
    options = [option for option in RUN if option not in ("--compare", "none")]
    out = tmp_path / "sparse.json"
    argv = [
        "--data",
        str(text),
        *options,
        "--cases",
        *cases,
        "--seeds",
        "0",
        "1",
        "--out",
        str(out),
        "--steps",
        "4",
    ]
    assert sparse_learning.main(argv) == 0
    found = json.loads(out.read_text())
    assert [(row["case"], row["seed"]) for row in found["rows"]] == [(c, s) for s in (0, 1) for c in cases]
    for row in found["rows"]:
        assert row["config"]["lr"] == (1e-3 if "lr=" in row["case"] else 1e-2)
        if row["case"] != "dense":
            assert row["exported"]["validation_loss"] == row["validation_loss"]
            assert row["exported"]["bytes"] < row["exported"]["dense_bytes"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines() == found["table"]
    assert sparse_learning.main(["--data", str(text), *options, "--cases", "dense", "asp"]) == 2


@pytest.mark.parametrize("storage", ["split8+int8", "fp32"])
def test_cast_takes_a_dense_model_over(storage: str, text: Path) -> None:
    """AdamW without masks up to there, then AdamS on the same weights, all bits of them."""
    options = ["--sparsity", "cast", "--dense-steps", "3", "--storage", storage, "--warmup-steps", "2"]
    config = resolve(parse(["--data", str(text), *RUN, *options]))
    corpus = load_corpus(str(text), None)
    trainer = Trainer("fused_optim", config, corpus)
    lr = ["--lr", repr(config.lr / RECIPES["cast"].lr_factor)]
    dense = Trainer("fused_optim", resolve(parse(["--data", str(text), *RUN, *options[4:], *lr])), corpus)
    for _ in range(3):
        trainer.advance()
        dense.advance()
    assert type(trainer.optimizer) is type(dense.optimizer) is fused_optim.AdamW
    assert trainer.record.train_loss == dense.record.train_loss
    before = trainer.optimizer
    weights = [full_precision(before, p) for p in trainer.model.parameters()]
    trainer._retrain()
    after = trainer.optimizer
    assert type(after) is fused_optim.CASTAdamS and masks_of(after)
    for param, weight in zip(trainer.model.parameters(), weights, strict=True):
        assert torch.equal(full_precision(after, param), weight)
    # What has no masks goes on with its averages.
    masked = {p for p, state in after.state.items() if "mask" in state}
    assert len(masked) == len(MATRICES)
    for param in trainer.model.parameters():
        assert param in masked or after.state[param] is before.state[param]
        assert param not in masked or after.state[param]["step"] == 0
    # The schedule is that of the whole run: there is no second warm-up.
    assert trainer.schedule.get_last_lr()[0] == config.lr


def test_a_group_with_too_many_is_found() -> None:
    w = np.zeros((4, 8))
    w[2, 4:6] = 1
    assert not sparse_learning.has_too_many(w, 2, 4)
    w[2, 6] = np.nan
    assert sparse_learning.has_too_many(w, 2, 4)
