"""``python -m fused_optim plan``: where the memory of training goes, and what fits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from .data import UsageError
from .model import DTYPES
from .plan_report import as_json
from .planner import DEFAULT_RULES, DEFAULT_STORAGES, SHARDS, plan
from .presets import PRESETS


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists all options)")


def _size_or_pattern(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fused_optim plan",
        description="Memory of training under each rule and storage, beside other libraries' AdamW: "
        "bytes per parameter, GB, and the cards that hold it. Activations are not included. No allocation.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model").add_argument
    names = ", ".join(f"{name} ({shape.model})" for name, shape in PRESETS.items())
    add("--model", choices=PRESETS, metavar="NAME", type=str.lower, help=f"{names}; default: 8b")
    add("--config", metavar="FILE", help="a transformers config.json instead (needs transformers)")
    add = parser.add_argument_group("storage").add_argument
    add("--rule", action="append", metavar="NAME", help=f"repeatable; default: {' '.join(DEFAULT_RULES)}")
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


def _run(given: argparse.Namespace) -> int:
    if given.model and given.config:
        raise UsageError("--model and --config both name a model; give one of them")
    if given.png:
        _need("matplotlib", "--png")
    for path in filter(None, (given.json, given.png)):
        if not Path(path).absolute().parent.is_dir():
            raise UsageError(f"{path}: the folder does not exist; make it first or give another file")
    preset = given.model or "8b"
    found = plan(
        from_config(given.config) if given.config else PRESETS[preset].tensors(),
        rules=given.rule or DEFAULT_RULES,
        storages=given.storage or DEFAULT_STORAGES,
        grad_dtype=given.grad_dtype,
        gpus=given.gpus,
        shard=given.shard,
        keep_fp32=given.keep_fp32 or 4096,
        peers=not given.no_peers,
        name=given.config or f"{preset} ({PRESETS[preset].model})",
    )
    if given.json:
        with _writing(given.json):
            Path(given.json).write_text(json.dumps(as_json(found), indent=1, allow_nan=False) + "\n")
    if given.png:
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
