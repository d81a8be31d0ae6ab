"""``python -m fused_optim plan``: where the memory of training goes, and what fits."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..recipe import Sparsity
from .config import Parser, resolve
from .data import UsageError
from .model import DTYPES
from .plan_report import as_json
from .plan_rules import NAMES
from .planner import DEFAULT_RULES, DEFAULT_STORAGES, plan
from .presets import PRESETS
from .sparse import RECIPES, build_recipe
from .storages import SHARDS


def _size_or_pattern(text: str) -> int | str:
    if re.match(r"-\d", text):
        raise argparse.ArgumentTypeError(f"{text} is negative; give a size of 0 or more, or a name pattern")
    return int(text) if text.isdecimal() else text


def _rows_and_columns(text: str) -> tuple[int, int]:
    rows, columns = map(int, text.split("x"))
    return rows, columns


_rows_and_columns.__name__ = "ROWSxCOLUMNS"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fused_optim plan",
        description="Memory of training under each rule and storage, beside other libraries' AdamW: "
        "bytes per parameter, GB, and the cards that hold it. Activations are not included. No allocation.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model").add_argument
    names = ", ".join(f"{name} ({shape.model})" for name, shape in PRESETS.items())
    add("--model", choices=PRESETS, metavar="NAME", type=str.lower, help=f"{names}; default: 8b")
    add("--config", metavar="FILE", help="a transformers config.json instead (needs transformers)")
    add(
        "--matrix",
        type=_rows_and_columns,
        metavar="ROWSxCOLUMNS",
        help="one matrix of a hidden layer instead",
    )
    add = parser.add_argument_group("storage").add_argument
    add(
        "--rule",
        action="append",
        metavar="NAME",
        help=f"{', '.join(NAMES)}; repeatable; default: {' '.join(DEFAULT_RULES)}, {DEFAULT_RULES[0]} with "
        "--sparsity. Muon and its relatives leave embeddings, heads and vectors to AdamW",
    )
    add(
        "--storage",
        action="append",
        metavar="PARAM[+STATES]",
        help="codecs of parameters and states (python -m fused_optim list), bf16_ may be left out before "
        f"split8, split16, kahan, sr; repeatable; default: {' '.join(DEFAULT_STORAGES)}",
    )
    add("--grad-dtype", choices=DTYPES, help="of gradients (default: the parameters')")
    add(
        "--keep-fp32",
        action="append",
        type=_size_or_pattern,
        metavar="SIZE|PATTERN",
        help="states that stay in fp32: of tensors with fewer values or of such names; repeatable; "
        "default: 4096",
    )
    add("--sparsity", choices=RECIPES, help="a recipe of pretrain: masks, and weights behind them")
    add("--pattern", metavar="N:M", help="N weights are kept of M neighbours (default: 2:4)")
    add("--no-peers", action="store_true", help="leave other libraries out")
    add = parser.add_argument_group("GPUs").add_argument
    add("--gpus", type=int, default=1, metavar="N", help="default: 1")
    add(
        "--shard", choices=SHARDS, default="none", help="what they split: states as in ZeRO-1, all as in FSDP"
    )
    add = parser.add_argument_group("files").add_argument
    add("--json", metavar="FILE", help="every number, exact")
    add("--png", metavar="FILE", help="a bar chart (needs matplotlib)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; ``--help`` lists its options.

    Args:
        argv: the arguments without the program's name; None takes the process's.

    Returns:
        0, or 2 for input that cannot be used.

    Example:
        >>> from fused_optim.training import plan_command
        >>> plan_command.main(["--model", "1t"])
        2
    """
    try:
        return _run(_parser().parse_args(argv))
    except (ValueError, TypeError) as error:
        print("plan: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


def _model(given: argparse.Namespace) -> tuple[str, Any]:
    """Its name, and what :func:`plan` takes."""
    if sum(value is not None for value in (given.model, given.config, given.matrix)) > 1:
        raise UsageError("--model, --config and --matrix all name a model; give one of them")
    if given.config is not None:
        return given.config, from_config(given.config)
    if given.matrix:
        return "x".join(map(str, given.matrix)), {"matrix": given.matrix}
    preset = given.model or "8b"
    return f"{preset} ({PRESETS[preset].model})", PRESETS[preset].tensors()


def _recipe(given: argparse.Namespace) -> Sparsity | None:
    """As ``pretrain`` builds it."""
    options = {name: getattr(given, name) for name in ("sparsity", "pattern")}
    return build_recipe(resolve({name: value for name, value in options.items() if value is not None}))


def _run(given: argparse.Namespace) -> int:
    if given.png is not None:
        _need("matplotlib", "--png")
    for path in (given.json, given.png):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"{path}: the folder does not exist; make it first or give another file")
    recipe = _recipe(given)
    name, model = _model(given)
    found = plan(
        model,
        rules=given.rule or (DEFAULT_RULES if recipe is None else DEFAULT_RULES[:1]),
        storages=given.storage or DEFAULT_STORAGES,
        grad_dtype=given.grad_dtype,
        gpus=given.gpus,
        shard=given.shard,
        keep_fp32=given.keep_fp32 or 4096,
        sparsity=recipe,
        peers=not given.no_peers,
        name=name if recipe is None else f"{name}, {given.sparsity} {recipe.n}:{recipe.m}",
    )
    if given.json is not None:
        with _writing(given.json):
            Path(given.json).write_text(json.dumps(as_json(found), indent=1, allow_nan=False) + "\n")
    if given.png is not None:
        from .plan_figure import draw

        with _writing(given.png):
            draw(found, Path(given.png))
    print(found)
    return 0


def _need(package: str, option: str) -> None:
    if find_spec(package) is None:
        raise UsageError(f"{option} needs {package}; install with: pip install 'fused_optim[pretrain]'")


@contextmanager
def _writing(path: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); give another file") from error


def from_config(path: str) -> nn.Module:
    """The model that a ``transformers`` configuration describes, without memory.

    Args:
        path: of a ``config.json``.

    Raises:
        UsageError: there is no such file, ``transformers`` is missing or does not know the model.
    """
    _need("transformers", "--config")
    if not Path(path).is_file():
        raise UsageError(f"--config {path}: there is no such file; give the config.json of a model")
    # Any: the classes are found by name.
    import transformers

    known: Any = transformers
    try:
        config = known.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        names = getattr(config, "architectures", None) or [""]
        with torch.device("meta"):
            if hasattr(known, names[0]):
                return getattr(known, names[0])(config)
            return known.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # Whatever a configuration from anywhere provokes there.
        raise UsageError(
            f"--config {path}: transformers {known.__version__} cannot build this model ({error}); give the "
            "config.json of a model that it knows"
        ) from error
