"""The options of ``pretrain``: what can be given, what follows from it, and what is refused."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..kernels.dispatch import BACKENDS
from .data import UsageError
from .model import DTYPES, PRESETS
from .optimizers import OPTIMIZERS
from .sparse import RECIPES, build_recipe
from .storages import check_codecs, split

_FREE_ON_RESUME = {"resume", "out", "checkpoint_every", "no_checkpoint"}


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that the losses of a run depend on, with no default left open; plain JSON values."""

    data: str | None
    glob: str | None
    preset: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    sequence_length: int
    batch_size: int
    steps: int
    optimizer: str
    lr: float
    weight_decay: float
    betas: list[float] | None
    momentum: float | None
    spectral_clip: float | None
    sparsity: str | None
    pattern: str | None
    dense_steps: int | None
    pruned_decay: float | None
    storage: str
    torch_dtype: str
    backend: str
    clip_grad_norm: float | None
    warmup_steps: int
    decay_steps: int
    eval_every: int
    seed: int
    device: str
    compare: str
    checkpoint_every: int


class Parser(argparse.ArgumentParser):
    """Raises :class:`UsageError` where others print and exit."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong."""
        raise UsageError(f"{message} (--help lists all options)")


def _norm_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


_norm_or_none.__name__ = "number (or none)"


def build_parser() -> argparse.ArgumentParser:
    """Only options that were given appear in the result."""
    parser = Parser(
        prog="python -m fused_optim pretrain",
        description="Pretrains a byte-level Llama on real text, with our optimizer and, beside it, torch's.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("text").add_argument
    add("--data", metavar="PATH", help="file or folder (default: the sources of Python's standard library)")
    add("--glob", metavar="PATTERN", help="which files of the folder (default: all; *.py without --data)")
    add = parser.add_argument_group("model").add_argument
    add(
        "--preset",
        "--model",
        choices=PRESETS,
        help="sizes and, for each, batch, steps and lr (default: tiny)",
    )
    for name, what in (
        ("hidden", "width"),
        ("layers", "number of layers"),
        ("heads", "attention heads"),
        ("kv-heads", "heads of keys and values (default: as the preset; with --heads, that many)"),
        ("intermediate", "width of the MLP (default: as the preset; with --hidden, 8/3 of it)"),
    ):
        add(f"--{name}", type=int, metavar="N", help=what)
    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=OPTIMIZERS, help="default: adamw; muon stands beside AdamW of torch")
    add(
        "--storage",
        metavar="PARAM+STATES",
        help="how our optimizer keeps parameters and states, such as fp32, bf16+bf16, split8+int4; "
        "python -m fused_optim list shows all codecs (default: split8+int8)",
    )
    add("--torch-dtype", choices=DTYPES, help="dtype of the model that torch trains (default: fp32)")
    add("--backend", choices=BACKENDS, help="default: auto")
    add("--lr", type=float, help="peak learning rate (default: the preset's, scaled for the optimizer)")
    add("--weight-decay", type=float, help="of matrices other than the token embedding")
    add("--betas", type=float, nargs=2, metavar=("B1", "B2"), help="adamw, adam, lion")
    add("--momentum", type=float, help="sgd, muon")
    add(
        "--spectral-clip",
        type=_norm_or_none,
        metavar="C",
        help="largest singular value of an update, such as 10 (SPECTRA; adamw, adam, lion, sgd)",
    )
    add("--clip-grad-norm", type=_norm_or_none, metavar="NORM", help="a number or none (default: 1.0)")
    add = parser.add_argument_group("sparsity").add_argument
    add("--sparsity", choices=RECIPES, help="of our optimizer's hidden matrices (default: none)")
    add("--pattern", metavar="N:M", help="N weights are kept of M neighbours (default: 2:4)")
    add(
        "--dense-steps",
        type=int,
        metavar="N",
        help="steps before anything is pruned (one-shot and sr-ste: half of the steps, mask-decay and cast: "
        "40 %%, structure-decay: 0)",
    )
    add(
        "--pruned-decay",
        type=float,
        metavar="X",
        help="pull on pruned weights: decay of sr-ste and masked-decay, l1 of cast",
    )
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, metavar="N")
    add("--batch-size", type=int, metavar="N", help="sequences in a step")
    add("--sequence-length", type=int, metavar="N", help="bytes in a sequence")
    add("--warmup-steps", type=int, metavar="N", help="linear from 0 (default: 5 %% of the steps)")
    add("--decay-steps", type=int, metavar="N", help="linear to 0 at the end (default: 30 %% of the steps)")
    add("--eval-every", type=int, metavar="N", help="steps between validations (default: a tenth)")
    add("--seed", type=int, metavar="N", help="of the initial weights and of the batches (default: 0)")
    add("--device", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    add("--compare", choices=("torch", "none"), help="default: torch where torch has the optimizer")
    add = parser.add_argument_group("files").add_argument
    add("--out", metavar="FOLDER", help="default: runs/<preset>-<optimizer>-<time>")
    add("--checkpoint-every", type=int, metavar="N", help="steps (default: 0, only when interrupted)")
    add("--no-checkpoint", action="store_true", help="not even when interrupted: it may take gigabytes")
    add("--resume", metavar="FOLDER", help="continue an interrupted run with its own options")
    return parser


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """The options that were given, with paths made absolute.

    Raises:
        UsageError: an unknown option, or a value of the wrong kind.
    """
    given = vars(build_parser().parse_args(argv))
    if "data" in given:
        given["data"] = str(Path(given["data"]).absolute())
    return given


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise UsageError(message)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is not a device; give auto, cpu, cuda or cuda:1") from None
    _require(device.type in ("cpu", "cuda"), f"--device {name} is not supported; give auto, cpu or cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda":
        _require(count > 0, f"--device {name}: torch sees no CUDA device here; give --device cpu")
        _require((device.index or 0) < count, f"--device {name}: torch sees cuda:0 to cuda:{count - 1}")
    return name


def resolve(given: Mapping[str, Any]) -> PretrainConfig:
    """Fills in what follows from the preset and the optimizer, and checks everything.

    Raises:
        UsageError: a value out of range, or options that contradict each other.
    """
    _require(
        not (given.get("no_checkpoint") and given.get("checkpoint_every")),
        "--no-checkpoint does not go with --checkpoint-every; leave one out",
    )
    preset = given.get("preset", "tiny")
    shape = PRESETS[preset]
    optimizer = given.get("optimizer", "adamw")
    pair = OPTIMIZERS[optimizer]
    for name in {"betas", "momentum"} - {pair.moments}:
        _require(name not in given, f"--{name} does not exist for {optimizer}; it has --{pair.moments}")
    steps = given.get("steps", shape.steps)
    sparse = _sparse(given, steps)
    lr_factor = pair.lr_factor * (RECIPES[given["sparsity"]].lr_factor if "sparsity" in given else 1.0)
    hidden, heads = given.get("hidden", shape.hidden), given.get("heads", shape.heads)
    intermediate = -(-hidden * 8 // 3 // 16) * 16 if "hidden" in given else shape.intermediate
    derived: dict[str, Any] = {
        "data": None,
        "glob": None,
        "preset": preset,
        "hidden": hidden,
        "layers": shape.layers,
        "heads": heads,
        "kv_heads": heads if "heads" in given else shape.kv_heads,
        "intermediate": intermediate,
        "sequence_length": shape.sequence_length,
        "batch_size": shape.batch_size,
        "steps": steps,
        "optimizer": optimizer,
        "lr": shape.lr * lr_factor,
        "weight_decay": pair.weight_decay,
        "betas": None,
        "momentum": None,
        pair.moments: pair.default_moments,
        "spectral_clip": None,
        **sparse,
        "storage": "split8+int8",
        "torch_dtype": "fp32",
        "backend": "auto",
        "clip_grad_norm": 1.0,
        "warmup_steps": steps // 20,
        "decay_steps": steps * 3 // 10,
        "eval_every": max(1, steps // 10),
        "seed": 0,
        "compare": "torch" if pair.theirs else "none",
        "checkpoint_every": 0,
    }
    chosen: dict[str, Any] = {**derived, **given, "device": _device(given.get("device", "auto"))}
    config = PretrainConfig(**{field.name: chosen[field.name] for field in fields(PretrainConfig)})
    _check(config)
    return config


def _sparse(given: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What follows from a recipe."""
    name = given.get("sparsity")
    if name is None:
        for option in ("pattern", "dense_steps", "pruned_decay"):
            flag = "--" + option.replace("_", "-")
            _require(option not in given, f"{flag} is for a recipe; give --sparsity {', '.join(RECIPES)}")
        return dict.fromkeys(("sparsity", "pattern", "dense_steps", "pruned_decay"))
    recipe = RECIPES[name]
    for option, value in (("dense_steps", recipe.dense_share), ("pruned_decay", recipe.decay)):
        flag = "--" + option.replace("_", "-")
        _require(option not in given or value is not None, f"{flag} does not exist for --sparsity {name}")
    dense_steps = None if recipe.dense_share is None else int(steps * recipe.dense_share)
    return {
        "sparsity": name,
        "pattern": "2:4",
        "dense_steps": dense_steps,
        "pruned_decay": recipe.decay,
    }


def _check_sparse(config: PretrainConfig) -> None:
    if config.sparsity is None:
        return
    _require(
        config.dense_steps is None or 0 <= config.dense_steps < config.steps,
        f"--dense-steps must be 0 or more and less than --steps {config.steps}, got {config.dense_steps}",
    )
    _require(
        config.sparsity != "cast" or config.optimizer == "adamw",
        f"--sparsity cast brings its own rule, AdamS, in place of adamw; it does not go with "
        f"--optimizer {config.optimizer}",
    )
    _require(
        config.sparsity != "cast" or config.spectral_clip is None,
        "--sparsity cast does not go with --spectral-clip",
    )
    _require(
        config.sparsity != "masked-decay" or config.pattern == "2:4",
        f"--sparsity masked-decay is 2:4 in rows and columns; leave --pattern {config.pattern} out",
    )
    build_recipe(config)


def _check(config: PretrainConfig) -> None:
    counts = (
        "hidden",
        "layers",
        "heads",
        "kv_heads",
        "intermediate",
        "sequence_length",
        "batch_size",
        "steps",
    )
    for name in (*counts, "eval_every"):
        value = getattr(config, name)
        _require(value >= 1, f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    for name in ("lr", "weight_decay", "momentum", "clip_grad_norm", "pruned_decay"):
        value = getattr(config, name)
        flag = "--" + name.replace("_", "-")
        _require(value is None or 0 <= value < math.inf, f"{flag} must be finite and 0 or more, got {value}")
    for beta in config.betas or ():
        _require(0 <= beta < 1, f"--betas must be in [0, 1), got {beta}")
    for name in ("warmup_steps", "decay_steps", "checkpoint_every"):
        value = getattr(config, name)
        _require(value >= 0, f"--{name.replace('_', '-')} must be 0 or more, got {value}")
    _require(0 <= config.seed < 1 << 32, f"--seed must be 0 or more and less than 2**32, got {config.seed}")
    _require(
        config.warmup_steps + config.decay_steps <= config.steps,
        f"--warmup-steps {config.warmup_steps} and --decay-steps {config.decay_steps} together exceed "
        f"--steps {config.steps}; shorten them",
    )
    head, rest = divmod(config.hidden, config.heads)
    _require(
        rest == 0 and head % 2 == 0,
        f"--hidden {config.hidden} must be an even multiple of --heads {config.heads} (rotary embedding)",
    )
    _require(
        config.heads % config.kv_heads == 0,
        f"--heads {config.heads} must be a multiple of --kv-heads {config.kv_heads}",
    )
    param, states = split(config.storage)
    try:
        # A model in float64 has nobody to train it beside.
        check_codecs(config.storage, param, [states], without=("fp64",))
    except ValueError as error:
        raise UsageError(f"--storage: {error}") from None
    clip = config.spectral_clip
    _require(clip is None or 0 < clip < math.inf, f"--spectral-clip must be above 0 and finite, got {clip}")
    _require(
        clip is None or config.optimizer != "muon",
        "--spectral-clip does not go with muon, whose updates are orthogonal already",
    )
    _check_sparse(config)
    theirs = OPTIMIZERS[config.optimizer].theirs
    _require(
        config.compare == "none" or theirs is not None,
        f"--compare torch: torch.optim has no {config.optimizer}; give --compare none",
    )
    # torch's clipping needs unscaled gradients, and GradScaler refuses to unscale fp16 ones.
    _require(
        config.compare == "none" or config.torch_dtype != "fp16" or config.clip_grad_norm is None,
        "--torch-dtype fp16: torch cannot clip loss-scaled fp16 gradients; give --clip-grad-norm none, "
        "another dtype, or --compare none",
    )


def same_or_refuse(given: Mapping[str, Any], saved: Mapping[str, Any], folder: Path) -> PretrainConfig:
    """The configuration of a run to be resumed, unless an option now says something else.

    Raises:
        UsageError: the option, what it was and what it is.
    """
    if set(saved) != {field.name for field in fields(PretrainConfig)}:
        raise UsageError(
            f"--resume {folder}: the checkpoint is from another version of this program; start a new run"
        )
    for name, value in given.items():
        was = saved.get(name)
        if name == "device":
            value = _device(value)
        if name not in _FREE_ON_RESUME and value != was:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"--resume {folder}: it has {flag} {was}, not {value}; leave {flag} out, or start a new run"
            )
    changed = {"checkpoint_every": given["checkpoint_every"]} if "checkpoint_every" in given else {}
    config = PretrainConfig(**{**saved, **changed})
    _check(config)
    _device(config.device)
    return config
