"""One side of the comparison: trained step by step, stopped and resumed at any step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from statistics import fmean
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..master import full_precision, set_full_precision
from ..optimizer import FusedOptimizer
from ..sparsity import FlipRate, apply_masks
from .config import PretrainConfig
from .data import Corpus, UsageError, training_batch, validation_batches
from .model import (
    DTYPES,
    activation_bytes,
    build_model,
    mean_loss,
    next_byte_loss,
    spectral_norms,
    stored_bytes,
)
from .optimizers import build_optimizer, build_schedule, label, param_dtype
from .sparse import check_masked, keeps_pattern, outcome, retraining_step

_BAR_WINDOW = 20


@dataclass
class Record:
    """What one side of the comparison measured; plain values, as they go into checkpoints and JSON."""

    label: str
    elements: int
    train_loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    spectral_norms: dict[str, float] = field(default_factory=dict)
    sparsity: dict[str, Any] = field(default_factory=dict)
    flips: list[list[float]] = field(default_factory=list)


class Interrupt(AbstractContextManager["Interrupt"]):
    """The first Ctrl-C or SIGTERM asks to stop after the step, the second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        # Not print(): the signal may have come in the middle of another write to the same stream.
        os.write(2, b"\nstopping after this step (once more: at once, without a checkpoint)\n")


class Trainer:
    """A model, its optimizer and its record."""

    def __init__(self, contender: str, config: PretrainConfig, corpus: Corpus) -> None:
        """Builds everything; nothing has been trained yet.

        Raises:
            UsageError: the optimizer refuses its options.
        """
        self.contender = contender
        self.config = config
        self.corpus = corpus
        self.device = torch.device(config.device)
        dtype = param_dtype(contender, config)
        self.model = build_model(config, config.seed, self.device)
        weights = [p.detach().clone() for p in self.model.parameters()]
        self.model.to(self.device, DTYPES[dtype])
        self._flips: FlipRate | None = None
        self._retrains_at = 0 if contender == "torch" else retraining_step(config)
        if self._retrains_at:
            # What would be refused later is refused now.
            later = self._build(self._retrains_at)
            assert isinstance(later, FusedOptimizer)
            check_masked(later, config)
        self._begin(0, weights)
        # fp16 gradients of a mean loss are mostly below fp16's range; disabled, a scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == "fp16")
        self.record = Record(label(contender, config), sum(p.numel() for p in self.model.parameters()))
        self._validation = validation_batches(corpus, config.batch_size, config.sequence_length)

    def _build(self, step: int) -> torch.optim.Optimizer:
        try:
            return build_optimizer(self.contender, self.model, self.config, step)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error

    def _begin(self, step: int, weights: Sequence[Tensor]) -> None:
        """Makes the optimizer and schedule of the steps from ``step`` on, which start from these weights."""
        self.optimizer = optimizer = self._build(step)
        if isinstance(optimizer, FusedOptimizer):
            for param, weight in zip(self.model.parameters(), weights, strict=True):
                set_full_precision(optimizer, param, weight)
            if self.config.sparsity is not None and step >= self._retrains_at:
                check_masked(optimizer, self.config)
                apply_masks(optimizer)
                self._flips = FlipRate(optimizer)
        self.schedule = build_schedule(optimizer, self.config, step)

    def _retrain(self) -> None:
        """The recipe's own optimizer takes the weights over, with the precision that they have.

        Parameters without masks go on as they were, with their averages.
        """
        before = self.optimizer
        assert isinstance(before, FusedOptimizer)
        self._begin(self.step, [full_precision(before, p) for p in self.model.parameters()])
        state = self.optimizer.state
        state.update({p: was for p, was in before.state.items() if "mask" not in state.get(p, {})})
        self.record.memory.pop("states")

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return len(self.record.train_loss)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs, loadable with ``weights_only=True``."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return {
            "contender": self.contender,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": cuda,
            "record": asdict(self.record),
            "masks": {} if self._flips is None else self._flips.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues where :meth:`state` was taken."""
        self.model.load_state_dict(state["model"])
        if len(state["record"]["train_loss"]) > self._retrains_at > 0:
            self._begin(self._retrains_at, list(self.model.parameters()))
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.record = Record(**state["record"])
        if self._flips is not None:
            # Checkpoints of earlier versions have no masks of the last validation: the present ones serve.
            self._flips.measure()
            self._flips.load_state_dict(state.get("masks", self._flips.state_dict()))

    def run(self, interrupt: Interrupt, save: Callable[[Trainer], None], show_bar: bool) -> bool:
        """Trains to the end, or until interrupted; True if it is finished.

        ``save`` is called where a checkpoint is due and when interrupted.
        """
        config = self.config
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc=self.record.label,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if show_bar else 15,
        )
        with bar:
            while self.step < config.steps and interrupt.signal is None:
                done = self.advance()
                bar.update()
                bar.set_postfix_str(self._progress(), refresh=False)
                due = config.checkpoint_every and (done or self.step % config.checkpoint_every == 0)
                if due and interrupt.signal is None:
                    save(self)
        if interrupt.signal is not None and self.step < config.steps:
            save(self)
            return False
        self.finish()
        return True

    def advance(self) -> bool:
        """Takes a step, with the validations that are due before and after it; True if it was the last."""
        if not self.record.validation:
            self._validate()
        self._train_step()
        done = self.step == self.config.steps
        if done or self.step % self.config.eval_every == 0:
            self._validate()
        return done

    def finish(self) -> None:
        """Notes what the trained model is like."""
        self.record.spectral_norms = spectral_norms(self.model)
        if isinstance(self.optimizer, FusedOptimizer) and self.config.sparsity is not None:
            self.record.sparsity = outcome(self.optimizer, self.model, self.config)

    def _train_step(self) -> None:
        config, record = self.config, self.record
        if self.step == self._retrains_at > 0:
            self._retrain()
        start = time.perf_counter()
        tokens = self._batch(self.step)
        if "activations" not in record.memory:
            record.memory["activations"] = activation_bytes(self.model, tokens)
            start = time.perf_counter()
        loss = next_byte_loss(self.model, tokens)
        self.scaler.scale(loss).backward()
        self._synchronize()
        before = time.perf_counter()
        if self.contender == "torch" and config.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._synchronize()
        after = time.perf_counter()
        if "states" not in record.memory:
            record.memory.update(stored_bytes(self.model, self.optimizer))
        self.optimizer.zero_grad()
        record.lr.append(float(self.schedule.get_last_lr()[0]))
        self.schedule.step()
        record.optimizer_seconds.append(after - before)
        record.step_seconds.append(time.perf_counter() - start)
        record.train_loss.append(loss.item())

    def _batch(self, step: int) -> Tensor:
        config = self.config
        tokens = training_batch(self.corpus, config.batch_size, config.sequence_length, config.seed, step)
        return tokens.to(self.device)

    def _validate(self) -> None:
        batches = [tokens.to(self.device) for tokens in self._validation]
        if self._flips is not None and self.record.validation:
            rate = self._flips.measure().item()
            if keeps_pattern(self.config, self.record.validation[-1][0], self.step):
                self.record.flips.append([self.step, rate])
        self.record.validation.append([self.step, mean_loss(self.model, batches)])

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _progress(self) -> str:
        record, config = self.record, self.config
        rate = config.batch_size * config.sequence_length / fmean(record.step_seconds[-_BAR_WINDOW:])
        optimizer = 1e3 * fmean(record.optimizer_seconds[-_BAR_WINDOW:])
        stored = sum(record.memory[part] for part in ("parameters", "gradients", "states")) / record.elements
        return (
            f"loss {fmean(record.train_loss[-_BAR_WINDOW:]):.3f}, {rate:,.0f} tokens/s, "
            f"optimizer {optimizer:.2f} ms/step, {stored:.1f} bytes/parameter"
        )
