"""Result files: what every one of them says about where its figures come from, and how it is written."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .machine import describe

SCHEMA = COMMON_ROUNDS = 2
"""Since 2 a ratio is of medians over the rounds that both contenders took, and rows of steps hold theirs."""

Record = dict[str, Any]


def begin(kind: str, argv: Sequence[str], device: torch.device, quick: bool = False) -> Record:
    """The head of a result: ``kind`` is the command's name, ``argv`` what followed it."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "command": shlex.join(["python", "-m", "bench", kind, *argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": quick,
        "machine": describe(device),
    }


def add_out(parser: argparse.ArgumentParser, when: str = "after every case") -> None:
    """The option ``--out``."""
    parser.add_argument(
        "--out",
        type=Path,
        help=f"JSON file, or a folder that exists and gets one more file with each run; written {when}",
    )


def save(result: Record, out: Path | None) -> None:
    """Writes the result so far; in a folder, runs that started at different times keep their own files."""
    if out is None:
        return
    if out.is_dir():
        out /= f"{result['kind']}-{result['started'].replace(':', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
