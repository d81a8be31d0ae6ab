"""The README's recipes for frameworks; FSDP2's is in ``test_dtensor.py``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_optim
from tests.readme import code_of

# Warnings of these packages about each other are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY, LENGTH, SEQUENCES = 32, 8, 16


def _need(*packages: str) -> None:
    """Skips without importing, which takes seconds."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))


def _data() -> list[dict[str, torch.Tensor]]:
    """Every token is followed by the next number."""
    rows = [torch.arange(start, start + LENGTH) % VOCABULARY for start in range(SEQUENCES)]
    return [{"input_ids": row, "labels": row} for row in rows]


def _loader() -> Any:
    return torch.utils.data.DataLoader(_data(), batch_size=4)


def _check(model: Any, fresh: Any, optimizer: Any, steps: int) -> None:
    """Our class took the steps, in 8 bits, and moved every parameter."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert type(optimizer) is fused_optim.AdamW
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert optimizer.state[weight]["exp_avg"].dtype == torch.uint8
    assert {int(state["step"]) for state in optimizer.state.values()} == {steps}
    moved = zip(model.parameters(), fresh.parameters(), strict=True)
    assert not any(torch.equal(ours, before) for ours, before in moved)


def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _need("transformers", "accelerate")
    monkeypatch.chdir(tmp_path)
    code = code_of("Hugging Face Trainer")
    assert "bf16=True" in code
    names: dict[str, Any] = {"model": _model(), "data": _data(), "fused_optim": fused_optim}
    exec(code.replace("bf16=True", "bf16=True, use_cpu=True"), names)
    trainer = names["trainer"]
    _check(trainer.model, _model(), trainer.optimizer, steps=6)
    groups = [(group["weight_decay"], group["initial_lr"]) for group in trainer.optimizer.param_groups]
    assert groups == [(0.1, 3e-4), (0.0, 3e-4)]


def test_lightning() -> None:
    _need("lightning", "transformers")
    import lightning

    names: dict[str, Any] = {"lightning": lightning, "torch": torch, "fused_optim": fused_optim}
    exec(code_of("Lightning"), names)

    class Model(names["Model"]):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _model()

        def training_step(self, batch: dict[str, torch.Tensor]) -> Any:
            return self.inner(**batch).loss

    model = Model()
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    options = {"max_steps": 5, "accelerator": "cpu", "precision": "bf16-mixed", **quiet}
    trainer = lightning.Trainer(**options)
    trainer.fit(model, _loader())
    _check(model.inner, _model(), trainer.optimizers[0], steps=5)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-9
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        lightning.Trainer(gradient_clip_val=1.0, **options).fit(Model(), _loader())


def test_accelerate() -> None:
    _need("accelerate", "transformers")
    names: dict[str, Any] = {"model": _model(), "loader": _loader(), "fused_optim": fused_optim}
    exec(code_of("Accelerate"), names)
    _check(names["model"], _model(), names["optimizer"], steps=4)
