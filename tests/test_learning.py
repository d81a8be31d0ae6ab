"""Learning, not only arithmetic: a small Llama on real text ends where fp32 ends, whatever stores it."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import pytest
import torch

import fused_optim
from fused_optim.training.config import parse, resolve
from fused_optim.training.data import Corpus, load_corpus
from fused_optim.training.loop import Interrupt, Trainer

MODEL = ["--hidden", "64", "--layers", "1", "--heads", "2", "--sequence-length", "64", "--batch-size", "8"]
TRAINING = ["--steps", "100", "--eval-every", "100", "--lr", "5e-3", "--device", "cpu", "--compare", "none"]

GAPS = {
    "fp32+bf16": 0.005,
    "split8+bf16": 0.005,
    "fp32+int8": 0.005,
    "fp32+int8_companded": 0.005,
    "fp32+fp8": 0.005,
    "split8+fp8": 0.005,
    "sr+int8": 0.005,
    "split16": 0.005,
    "split8+int8": 0.005,
    "split8+int8_companded": 0.005,
    "kahan+int8": 0.005,
    "kahan+int8_companded": 0.005,
    "sr+sr": 0.015,
    "fp32+int4": 0.015,
    "split8+int4": 0.015,
    "kahan+int4": 0.015,
    "sr+int4": 0.015,
}
"""Storage and how much larger than with fp32 everywhere the validation loss may be, relatively."""


@cache
def _corpus() -> Corpus:
    return load_corpus(str(Path(sysconfig.get_paths()["stdlib"]) / "json"), "*.py")


@cache
def _validation_loss(storage: str, optimizer: str = "adamw") -> float:
    options = ["--storage", storage, "--optimizer", optimizer]
    trainer = Trainer("fused_optim", resolve(parse([*MODEL, *TRAINING, *options])), _corpus())
    assert trainer.run(Interrupt(), lambda _: None, show_bar=False)
    return trainer.record.validation[-1][1]


@pytest.mark.parametrize("storage", GAPS)
def test_storage_learns_like_fp32(storage: str) -> None:
    reference, loss = _validation_loss("fp32"), _validation_loss(storage)
    assert reference < 2.6, "a model that learns nothing proves nothing"
    assert loss <= (1 + GAPS[storage]) * reference


# Lion's steps are signs, which any difference flips: runs lie 1 % apart, to both sides.
@pytest.mark.parametrize(("optimizer", "gap"), [("lion", 0.03), ("muon", 0.01)])
@pytest.mark.parametrize("storage", ["split8+int8", "fp32+int8_companded"])
def test_other_rules_learn_with_8_bits(storage: str, optimizer: str, gap: float) -> None:
    reference, loss = _validation_loss("fp32", optimizer), _validation_loss(storage, optimizer)
    assert reference < 2.6 and loss <= (1 + gap) * reference


@pytest.mark.parametrize("codec", ["int8", "int8_companded", "fp8", "int4", "bf16_sr"])
@pytest.mark.parametrize("beta2", [0.999, 0.99])
def test_second_moments_decay(codec: str, beta2: float) -> None:
    """When gradients become ten times smaller, however little a step takes away; as in fp32."""
    averages: list[list[float]] = []
    for each in ("fp32", codec):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.zeros(4096))
        optimizer = fused_optim.AdamW(
            [param], lr=0.0, betas=(0.9, beta2), state_codec={"exp_avg_sq": each}, keep_fp32=0
        )
        averages.append([])
        for size, steps in ((1.0, 300), (0.1, 2500)):
            for _ in range(steps):
                param.grad = size * torch.randn(4096, generator=generator)
                optimizer.step()
            found = fused_optim.full_precision(optimizer, param, "exp_avg_sq")
            averages[-1].append(float(found.mean()))
    for right, ours in zip(*averages, strict=True):
        # Coarse codes follow the largest value of their block, which is above the mean.
        assert 0.9 < ours / right < (1.1 if codec.startswith(("int8", "bf16")) else 2.5)
