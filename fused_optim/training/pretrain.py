"""``python -m fused_optim pretrain``: a byte-level Llama learns from real text."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .config import PretrainConfig, parse, resolve, same_or_refuse
from .data import Corpus, UsageError, check_length, load_corpus

CHECKPOINT = "checkpoint.pt"
RESULTS = "results.json"
FIGURE = "report.png"
SPARSE_MODEL = "model.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; ``--help`` lists its options.

    Trains the same Llama twice from the same seed on the same batches, once with this library's
    optimizer and once with torch's (``--compare none``: only ours). Writes ``results.json`` and
    ``report.png`` into a folder under ``runs/`` after each. Ctrl-C and SIGTERM save a checkpoint, from which
    ``--resume`` continues with the same losses, bit for bit, on the same machine. A model that
    ``--sparsity`` made N:M is written there as well (``model.safetensors``, for
    :func:`fused_optim.sparsity.load_sparse`).

    Args:
        argv: the arguments without the program's name; None takes the process's.

    Returns:
        0 when finished, 1 if the model is not as sparse as ``--sparsity`` says, 2 for input that cannot be
        used, 128 + the signal's number when interrupted.

    Example:
        >>> from fused_optim.training import pretrain
        >>> pretrain.main(["--optimizer", "lion", "--betas", "0.9", "1.5"])
        2
    """
    try:
        return _start(parse(argv))
    except UsageError as error:
        print("pretrain: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pretrain: stopped without a new checkpoint", file=sys.stderr)
        return 130


def _start(given: dict[str, Any]) -> int:
    """Checks everything that can be checked, then trains."""
    started = time.perf_counter()
    resumed = None
    if "resume" in given:
        resumed = _read_checkpoint(Path(given["resume"]))
        config = same_or_refuse(given, resumed["config"], Path(given["resume"]))
    else:
        config = resolve(given)
    _check_installation()
    corpus = load_corpus(config.data, config.glob)
    check_length(corpus, config.sequence_length)
    if resumed is not None and resumed["fingerprint"] != corpus.fingerprint:
        raise UsageError(
            f"--resume {given['resume']}: {corpus.source} is no longer that run's text; start a new run"
        )
    folder = _folder(given, config)
    with _reproducible(config.device):
        session = _Session(config, corpus, folder, started, resumed)
        session.keeps_checkpoints = "no_checkpoint" not in given
        return session.run()


class _Session:
    """The contenders one after the other, and one checkpoint for wherever they are."""

    keeps_checkpoints = True

    def __init__(
        self,
        config: PretrainConfig,
        corpus: Corpus,
        folder: Path,
        started: float,
        resumed: dict[str, Any] | None,
    ) -> None:
        from .loop import Record, Trainer
        from .report import environment

        self.config, self.corpus, self.folder = config, corpus, folder
        self.resumed = resumed
        self.started = started - (resumed["seconds"] if resumed else 0.0)
        self.environment = environment(config.device)
        finished = resumed["finished"] if resumed else {}
        self.finished = {name: Record(**record) for name, record in finished.items()}
        contenders = ["fused_optim"] if config.compare == "none" else ["fused_optim", "torch"]
        self.waiting = [name for name in contenders if name not in self.finished]
        self.trainer = Trainer(self.waiting[0], config, corpus)
        if resumed:
            self.trainer.load(resumed)

    def run(self) -> int:
        from .loop import Interrupt, Trainer
        from .sparse import export

        print(self.corpus.summary())
        if self.resumed:
            self._announce()
        text = ""
        with Interrupt() as interrupt:
            for name in self.waiting:
                if name != self.trainer.contender:
                    self.trainer = Trainer(name, self.config, self.corpus)
                if not self.trainer.run(interrupt, self.save, sys.stderr.isatty()):
                    assert interrupt.signal is not None
                    self._say_how_to_continue()
                    return 128 + interrupt.signal
                record = self.trainer.record
                export(self.trainer.model, record.sparsity, self.folder / SPARSE_MODEL)
                self.finished[name] = record
                # Still inside, after each: a signal must not throw finished training away.
                text = self._report()
            print(text)
        if any(record.sparsity.get("wrong") for record in self.finished.values()):
            print(f"pretrain: error: the model is not {self.config.pattern}, see above", file=sys.stderr)
            return 1
        return 0

    def _report(self) -> str:
        """Writes what is finished so far; returns its text."""
        from .report import write_report

        self.folder.mkdir(parents=True, exist_ok=True)
        seconds = time.perf_counter() - self.started
        paths = self.folder / RESULTS, self.folder / FIGURE
        return write_report(self.config, self.corpus, self.finished, self.environment, seconds, *paths)

    def _say_how_to_continue(self) -> None:
        if not self.keeps_checkpoints:
            print(f"{self._where()}; nothing was kept of it (--no-checkpoint)")
            return
        print(f"{self._where()}; continue with")
        print(f"  python -m fused_optim pretrain --resume {self.folder}")

    def save(self, trainer: Any) -> None:
        """Replaces the checkpoint; a crash meanwhile leaves the old one."""
        if not self.keeps_checkpoints:
            return
        state = {
            "config": asdict(self.config),
            "fingerprint": self.corpus.fingerprint,
            "environment": self.environment,
            "finished": {name: asdict(record) for name, record in self.finished.items()},
            "seconds": time.perf_counter() - self.started,
            **trainer.state(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / (CHECKPOINT + ".partial")
        torch.save(state, partial)
        os.replace(partial, self.folder / CHECKPOINT)

    def _where(self) -> str:
        return f"{self.trainer.record.label} stopped after step {self.trainer.step} of {self.config.steps}"

    def _announce(self) -> None:
        assert self.resumed is not None
        print(f"resuming: {self._where()}")
        was = self.resumed["environment"]
        changed = [key for key, value in self.environment.items() if was.get(key) != value]
        for key in changed:
            print(f"note: {key} was {was.get(key)}, is {self.environment[key]}; losses may differ a little")


def _read_checkpoint(folder: Path) -> dict[str, Any]:
    path = folder / CHECKPOINT
    if not path.is_file():
        raise UsageError(
            f"--resume {folder}: there is no {CHECKPOINT}; give the folder of an interrupted run"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise UsageError(
            f"--resume {folder}: {CHECKPOINT} is not a readable checkpoint; start a new run"
        ) from error
    expected = {"config", "fingerprint", "environment", "finished", "seconds", "contender", "record"}
    if not isinstance(state, dict) or not expected <= set(state):
        raise UsageError(f"--resume {folder}: {CHECKPOINT} was not written by pretrain; start a new run")
    return state


def _folder(given: dict[str, Any], config: PretrainConfig) -> Path:
    """Where the run's files go, made sure of before any training."""
    if "resume" in given:
        folder = Path(given["resume"])
        if "out" in given and Path(given["out"]).absolute() != folder.absolute():
            raise UsageError(f"--out {given['out']}: a resumed run stays in {folder}; leave --out out")
        return folder
    name = f"{config.preset}-{config.optimizer}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(given.get("out", Path("runs") / name))
    if (folder / CHECKPOINT).exists():
        raise UsageError(f"--out {folder} holds a run already; give another folder, or --resume {folder}")
    if (folder / RESULTS).exists():
        raise UsageError(f"--out {folder} holds a run already; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made ({error.strerror}); give another folder") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--out {folder} is not writable; give another folder")
    return folder


def _check_installation() -> None:
    missing = [name for name in ("transformers", "tqdm", "matplotlib") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"pretrain needs {', '.join(missing)}; install with: pip install 'fused_optim[pretrain]'"
        )


@contextmanager
def _reproducible(device: str) -> Generator[None]:
    """On CUDA, asks torch for algorithms that give the same bits twice; CPU ones do anyway."""
    if not device.startswith("cuda"):
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


if __name__ == "__main__":
    sys.exit(main())
