"""The pretraining job: it learns, resumes bit for bit, reports, and refuses bad input in one line."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_optim.training import data, figure, model, optimizers, pretrain, report
from fused_optim.training.config import PretrainConfig, parse, resolve
from fused_optim.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--hidden", "32", "--layers", "1", "--heads", "2", "--sequence-length", "32", "--batch-size", "4"]
TINY_RUN = [*SMALL, "--steps", "10", "--eval-every", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a language that a small model learns in a few steps."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        body = "".join(f"def f{n}(x):\n    return x + {n * number}\n\n" for n in range(40))
        (folder / f"module_{number}.py").write_text(body)
    return folder


def _pretrain(*options: str | Path) -> int:
    return pretrain.main([str(option) for option in options])


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / pretrain.RESULTS).read_text())


def _stop_after(monkeypatch: pytest.MonkeyPatch, contender: str, step: int, number: signal.Signals) -> None:
    """A signal arrives while this step of this contender runs."""
    original = Trainer._train_step

    def with_signal(trainer: Trainer) -> None:
        if trainer.contender == contender and trainer.step + 1 == step:
            signal.raise_signal(number)
        original(trainer)

    monkeypatch.setattr(Trainer, "_train_step", with_signal)


def test_learns_and_agrees_with_torch(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--storage", "fp32", "--steps", "60", "--lr", "1e-2"]
    assert _pretrain("--data", text, *SMALL, *options, "--out", out) == 0
    results = _results(out)
    ours, theirs = results["runs"]["fused_optim"], results["runs"]["torch"]
    assert ours["validation"][0] == theirs["validation"][0]
    assert ours["validation"][0][1] > 5.0
    assert ours["validation"][-1][0] == 60
    assert ours["validation"][-1][1] < 2.0
    assert results["comparison"]["train_distance"] < 5e-3
    assert results["comparison"]["validation_distance"] < 5e-3
    assert len(ours["train_loss"]) == len(ours["lr"]) == len(ours["optimizer_seconds"]) == 60
    assert "fused_optim AdamW" in (table := capsys.readouterr().out)
    assert "torch AdamW" in table
    assert (out / pretrain.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert results["environment"]["torch"] == torch.__version__
    assert results["command"].startswith("python ") and "commit" in results["environment"]
    assert results["config"]["lr"] == 1e-2


def test_results_name_their_command_and_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python", "-m", "fused_optim", "pretrain", "--glob", "*.py"])
    assert report._command() == "python -m fused_optim pretrain --glob '*.py'"
    monkeypatch.setenv("FUSED_OPTIM_COMMIT", "abc123")
    if shutil.which("git") and (report._ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12}\+?", report.environment("cpu")["commit"])
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    assert report.environment("cpu")["commit"] == "abc123"
    monkeypatch.delenv("FUSED_OPTIM_COMMIT")
    assert report.environment("cpu")["commit"] is None


def test_memory_is_measured(text: Path, tmp_path: Path) -> None:
    options = ["--data", text, *TINY_RUN, "--torch-dtype", "bf16", "--steps", "1"]
    assert _pretrain(*options, "--storage", "bf16+fp32", "--out", tmp_path / "run") == 0
    results = _results(tmp_path / "run")
    elements = results["parameters"]
    for contender, state_bytes in (("fused_optim", 8), ("torch", 4)):
        memory = results["runs"][contender]["memory"]
        assert memory["parameters"] == memory["gradients"] == 2 * elements
        counters = memory["states"] - state_bytes * elements
        assert 0 <= counters < 1024
        assert memory["activations"] > 0


def test_activations_grow_with_the_batch() -> None:
    config = resolve(parse(TINY_RUN))
    llama = model.build_model(config, 0)
    tokens = torch.zeros(8, 33, dtype=torch.int64)
    small, large = (model.activation_bytes(llama, tokens[:n]) for n in (4, 8))
    assert 1.9 < large / small <= 2.0


@pytest.mark.parametrize(
    ("contender", "step", "number", "options"),
    [
        ("fused_optim", 3, signal.SIGTERM, ()),
        ("torch", 4, signal.SIGINT, ()),
        ("fused_optim", 10, signal.SIGINT, ("--optimizer", "sgd", "--weight-decay", "0.01")),
        ("fused_optim", 5, signal.SIGINT, ("--optimizer", "lion", "--storage", "fp32+bf16")),
        ("fused_optim", 5, signal.SIGINT, ("--storage", "sr+int4", "--clip-grad-norm", "none")),
        ("fused_optim", 5, signal.SIGINT, ("--optimizer", "muon", "--compare", "none")),
        ("fused_optim", 5, signal.SIGINT, ("--spectral-clip", "0.5", "--compare", "none")),
    ],
)
def test_resuming_is_bit_exact(
    contender: str,
    step: int,
    number: signal.Signals,
    options: tuple[str, ...],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    everything = ["--data", text, *TINY_RUN, *options, "--checkpoint-every", "10"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert _pretrain(*everything, "--out", whole) == 0
    with monkeypatch.context() as patched:
        _stop_after(patched, contender, step, number)
        code = _pretrain(*everything, "--out", halves)
    finished_alone = contender == "fused_optim" and step == 10 and "torch" not in _results(whole)["runs"]
    assert code == (0 if finished_alone else 128 + number)
    assert f"--resume {halves}" in capsys.readouterr().out
    assert (halves / pretrain.RESULTS).exists() == (contender == "torch" or step == 10)
    assert _pretrain("--resume", halves) == 0

    expected, found = _results(whole)["runs"], _results(halves)["runs"]
    assert expected.keys() == found.keys()
    for name in expected:
        for curve in ("train_loss", "validation", "lr"):
            assert found[name][curve] == expected[name][curve]
    last, last_found = (torch.load(f / pretrain.CHECKPOINT, weights_only=True) for f in (whole, halves))
    for part in ("model", "optimizer", "schedule", "rng"):
        assert _equal(last[part], last_found[part]), part


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def test_fp16_trains_with_a_loss_scale(text: Path, tmp_path: Path) -> None:
    options = ["--data", text, *TINY_RUN, "--storage", "fp16", "--compare", "none", "--lr", "1e-2"]
    assert _pretrain(*options, "--out", tmp_path / "run") == 0
    losses = _results(tmp_path / "run")["runs"]["fused_optim"]["train_loss"]
    assert losses[-1] < losses[0] - 1.0


def test_schedule() -> None:
    factors = [optimizers.wsd(step, steps=20, warmup=4, decay=5) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:15] == [1.0] * 11
    assert factors[14:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert optimizers.wsd(0, steps=1, warmup=0, decay=0) == 1.0


def test_only_matrices_decay() -> None:
    llama = model.build_model(resolve(parse(TINY_RUN)), 0)
    decayed, others = model.decay_groups(llama, 0.1)
    assert {name for name, _ in others["params"]} == {
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(llama.parameters()))


def test_files_are_split_and_stay_on_their_side() -> None:
    names = [f"package/module_{n}.py" for n in range(400)]
    train, validation = data.split_files(names)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(names)
    assert 0.02 < len(validation) / len(names) < 0.1
    fewer = data.split_files(names[:200])
    assert set(fewer[0]) <= set(train)
    assert set(fewer[1]) <= set(validation)
    for few in (names[:2], validation[:2]):
        assert all(data.split_files(few))


def test_standard_library_is_the_default_text() -> None:
    names = [path.as_posix() for path in data.find_files(data.standard_library(), "*.py")]
    assert len(names) > 500
    assert not [name for name in names if "site-packages" in name]


def test_text_becomes_separated_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\n".encode())
    (tmp_path / "b.txt").write_bytes(b"two")
    (tmp_path / "image.bin").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_bytes(b"never read")
    corpus = data.load_corpus(str(tmp_path), None)
    sides = sorted([corpus.train.tolist(), corpus.validation.tolist()])
    assert sides == [[256, *b"two"], [256, *"é\n".encode()]]
    assert corpus.skipped_files == 1


def test_batches_depend_on_seed_and_step_alone(text: Path) -> None:
    corpus = data.load_corpus(str(text), None)
    batch = data.training_batch(corpus, 4, 16, seed=1, step=7)
    assert batch.shape == (4, 17)
    assert torch.equal(batch, data.training_batch(corpus, 4, 16, seed=1, step=7))
    assert not torch.equal(batch, data.training_batch(corpus, 4, 16, seed=1, step=8))
    assert not torch.equal(batch, data.training_batch(corpus, 4, 16, seed=2, step=7))
    windows = data.validation_batches(corpus, 4, 16)
    assert all(map(torch.equal, windows, data.validation_batches(corpus, 4, 16)))


def test_a_file_is_split_by_position(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(32, 127)) * 20)
    corpus = data.load_corpus(str(path), None)
    assert [256, *path.read_bytes()] == [*corpus.train.tolist(), *corpus.validation.tolist()]
    assert len(corpus.validation) == int(1901 * data.VALIDATION_SHARE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/nowhere/text"], "/nowhere/text does not exist"),
        (["--data", "{folder}/empty"], "has 0 text files"),
        (["--data", "{folder}/short.txt"], "too few for --sequence-length 128"),
        (["--data", "{folder}/binary"], "is not text"),
        (["--data", "{folder}/short.txt", "--glob", "*.py"], "--glob chooses among the files of a folder"),
        (["--preset", "gigantic"], "invalid choice: 'gigantic'"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--steps", "0"], "--steps must be 1 or more"),
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["--lr", "-1"], "--lr must be finite and 0 or more"),
        (["--lr", "nan"], "--lr must be finite and 0 or more"),
        (["--betas", "0.9", "1.0"], "--betas must be in [0, 1)"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--momentum", "0.9"], "--momentum does not exist for adamw"),
        (["--optimizer", "sgd", "--betas", "0.9", "0.99"], "--betas does not exist for sgd"),
        (["--optimizer", "lion", "--compare", "torch"], "torch.optim has no lion"),
        (["--heads", "3"], "must be an even multiple of --heads 3"),
        (["--kv-heads", "3"], "must be a multiple of --kv-heads 3"),
        (["--warmup-steps", "700", "--decay-steps", "700", "--steps", "800"], "together exceed"),
        (
            ["--storage", "fp33"],
            "--storage: storage 'fp33': parameters cannot be stored as 'fp33'; allowed: auto",
        ),
        (["--storage", "fp32+fp64"], "states cannot be stored as 'fp64'; allowed: auto, fp32, bf16"),
        (
            ["--storage", "fp64"],
            "parameters cannot be stored as 'fp64'; allowed: auto, fp32, bf16, fp16, bf16_sr",
        ),
        (["--glob", "/abs/*.txt"], "--glob '/abs/*.txt' is no pattern of files in the folder"),
        (["--glob", "**.txt"], "--glob '**.txt' is no pattern of files in the folder"),
        (["--glob", ""], "--glob '' is no pattern of files in the folder"),
        (["--seed", str(2**63)], "--seed must be 0 or more and less than 2**32"),
        (["--seed", "999999999999999999999"], "--seed must be 0 or more and less than 2**32"),
        (["--backend", "cuda", "--device", "cpu"], "backend='cuda' cannot run here"),
        (["--clip-grad-norm", "much"], "invalid number (or none) value: 'much'"),
        (["--torch-dtype", "fp16"], "torch cannot clip loss-scaled fp16 gradients"),
        (["--spectral-clip", "0"], "--spectral-clip must be above 0 and finite"),
        (["--optimizer", "muon", "--spectral-clip", "1"], "--spectral-clip does not go with muon"),
        (["--device", "tpu"], "is not a device"),
        (["--device", "meta"], "is not supported"),
        (["--out", "{folder}/done"], "holds a run already"),
        (["--out", "{folder}/short.txt/run"], "cannot be made"),
        (["--resume", "{folder}/empty"], "there is no checkpoint.pt"),
        (["--resume", "{folder}/broken"], "is not a readable checkpoint"),
        (["--resume", "{folder}/foreign"], "was not written by pretrain"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    for folder in ("empty", "done", "broken", "foreign"):
        (tmp_path / folder).mkdir()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    (tmp_path / "done" / pretrain.RESULTS).write_text("{}")
    (tmp_path / "broken" / pretrain.CHECKPOINT).write_bytes(b"nonsense")
    torch.save({"model": {}}, tmp_path / "foreign" / pretrain.CHECKPOINT)
    given = [option.replace("{folder}", str(tmp_path)) for option in options]
    if not {"--data", "--resume"} & set(given):
        given += ["--data", str(text)]
    if "--out" not in given and "--resume" not in given:
        given += ["--out", str(tmp_path / "run")]
    assert _pretrain(*given) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("pretrain: error: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run" / pretrain.CHECKPOINT).exists()
    if options[0] in ("--storage", "--glob", "--seed"):
        assert not (tmp_path / "run").exists()
    assert "fp64," not in captured.err


def test_resuming_something_else_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = tmp_path / "text", tmp_path / "run"
    shutil.copytree(text, copy)
    with monkeypatch.context() as patched:
        _stop_after(patched, "fused_optim", 2, signal.SIGINT)
        assert _pretrain("--data", copy, *TINY_RUN, "--out", out) == 130

    def refused(expected: str, *options: str | Path) -> None:
        capsys.readouterr()
        assert _pretrain("--resume", out, *options) == 2
        assert expected in capsys.readouterr().err

    refused("it has --lr 0.0", "--lr", "0.5")
    refused("it has --optimizer adamw, not lion", "--optimizer", "lion")
    refused("a resumed run stays in", "--out", tmp_path / "other")
    (copy / "module_3.py").write_text("x = 1\n")
    refused("is no longer that run's text", "--steps", "10")


def test_a_diverged_run_is_reported(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", text, *TINY_RUN, "--optimizer", "sgd", "--lr", "1e6", "--clip-grad-norm", "none"]
    assert _pretrain(*options, "--out", tmp_path / "run") == 0
    results, printed = _results(tmp_path / "run"), capsys.readouterr().out
    assert results["summary"]["fused_optim"]["validation_loss"] is None
    assert results["comparison"]["train_distance"] is results["comparison"]["validation_distance"] is None
    for name in ("fused_optim", "torch"):
        losses = results["runs"][name]["train_loss"]
        label, first = results["runs"][name]["label"], losses.index(None) + 1
        # A validation comes after its step.
        assert any(
            f"{label} DIVERGED: its loss is not finite in step {i}\n" in printed for i in (first - 1, first)
        )
    assert "nats apart" not in printed


def test_a_nan_is_no_short_distance() -> None:
    numbers = report.Record("a", 1, [1.0, 2.0], [], [[0, 1.0], [2, 2.0]], [0.1], [0.1])
    broken = report.Record("b", 1, [1.0, math.nan], [], [[0, 1.0], [2, math.nan]], [0.1], [0.1])
    found = report.compare(numbers, broken)
    assert math.isnan(found["train_distance"]) and math.isnan(found["validation_distance"])
    assert not report.divergence(numbers) and "step 2" in report.divergence(broken)


def test_a_second_signal_stops_at_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice(trainer: Trainer) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    handlers: Callable[[], list[Any]] = lambda: [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]  # noqa: E731
    before = handlers()
    monkeypatch.setattr(Trainer, "_train_step", twice)
    assert _pretrain("--data", text, *TINY_RUN, "--out", tmp_path / "run") == 130
    assert "without a new checkpoint" in capsys.readouterr().err
    assert handlers() == before


def test_a_signal_after_the_last_step_costs_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        figure.draw(*args)

    monkeypatch.setattr(report, "draw", interrupted)
    out = tmp_path / "run"
    assert _pretrain("--data", text, *TINY_RUN, "--compare", "none", "--steps", "1", "--out", out) == 0
    assert _results(out)["runs"]["fused_optim"]["train_loss"]


def test_defaults_resolve_for_every_preset_and_optimizer() -> None:
    for preset in model.PRESETS:
        for optimizer in optimizers.OPTIMIZERS:
            config = resolve(parse(["--preset", preset, "--optimizer", optimizer]))
            assert isinstance(config, PretrainConfig)
            assert math.isfinite(config.lr)


def test_labels_keep_their_distance() -> None:
    assert figure.spread([0.1, 0.15, 0.9], 0.2) == pytest.approx([0.1, 0.3, 0.9])
