"""Pretraining in parts: what is finished is kept, also without checkpoints; models are made in place."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from fused_optim.training import model, pretrain
from fused_optim.training.config import parse, resolve
from fused_optim.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = ["--hidden", "32", "--layers", "1", "--heads", "2", "--sequence-length", "32", "--batch-size", "4"]
RUN = [*SIZES, "--steps", "3", "--device", "cpu", "--data", str(Path(__file__).parent / "oracles")]


def test_without_checkpoints_what_is_finished_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, out = Trainer._train_step, tmp_path / "run"

    def with_signal(trainer: Trainer) -> None:
        if trainer.contender == "torch" and trainer.step == 1:
            signal.raise_signal(signal.SIGTERM)
        original(trainer)

    monkeypatch.setattr(Trainer, "_train_step", with_signal)
    assert pretrain.main([*RUN, "--no-checkpoint", "--out", str(out)]) == 128 + signal.SIGTERM
    assert "nothing was kept of it (--no-checkpoint)" in capsys.readouterr().out
    assert not (out / pretrain.CHECKPOINT).exists()
    results = json.loads((out / pretrain.RESULTS).read_text())
    assert list(results["runs"]) == ["fused_optim"] and results["comparison"] is None


def test_no_checkpoint_and_one_every_so_often_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main([*RUN, "--no-checkpoint", "--checkpoint-every", "2"]) == 2
    assert "--no-checkpoint does not go with --checkpoint-every" in capsys.readouterr().err


def test_only_a_run_with_a_checkpoint_is_to_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, advice in ((pretrain.RESULTS, "another folder"), (pretrain.CHECKPOINT, f"--resume {tmp_path}")):
        (tmp_path / name).write_text("{}")
        assert pretrain.main([*RUN, "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.endswith(f"{advice}\n")


@pytest.mark.parametrize(("count", "said"), [(1, "1 binary file left"), (2, "2 binary files left")])
def test_a_folder_of_binary_files(
    count: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b")[:count]:
        (tmp_path / name).write_bytes(b"\0\1")
    assert pretrain.main([*RUN, "--data", str(tmp_path)]) == 2
    assert f"not empty ({said} out); give two or more" in capsys.readouterr().err


def test_spectral_norms_are_those_of_an_svd() -> None:
    llama = model.build_model(resolve(parse(RUN)), 0)
    matrices = {name: p.detach() for name, p in llama.named_parameters() if p.ndim == 2}
    expected = {name: torch.linalg.matrix_norm(p, 2).item() for name, p in matrices.items()}
    assert model.spectral_norms(llama) == pytest.approx(expected, rel=1e-4)


def test_models_are_made_on_their_device() -> None:
    """Nothing of the 970 million parameters goes through the CPU's memory."""
    llama = model.build_model(resolve(parse(["--preset", "llama-1b", "--device", "cpu"])), 0, "meta")
    tensors = [*llama.parameters(), *llama.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert sum(p.numel() for p in llama.parameters()) == 970_029_056


@pytest.mark.gpu
def test_both_contenders_start_from_the_same_weights_on_a_gpu() -> None:
    config = resolve(parse(RUN))
    first, second = (model.build_model(config, 1, "cuda").state_dict() for _ in range(2))
    assert all(value.is_cuda and torch.equal(value, second[name]) for name, value in first.items())
