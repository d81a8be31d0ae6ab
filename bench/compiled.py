"""What the commands that compile kernels without a GPU share."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from .record import add_out, begin, save

CAPABILITIES = (80, 90, 100)
"""Compute capabilities of A100, H200 and B200."""

NOTE = "counted in compiled code; nothing was run, and no time was measured"

Job, Report = TypeVar("Job"), TypeVar("Report")


def bound(share: float) -> str:
    """What sets the time at best, by the part of the instruction budget that is used."""
    return "memory" if share <= 1 else "instructions"


def command_line(kind: str, about: str | None) -> argparse.ArgumentParser:
    """Options of every command that compiles."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {kind}", description=about)
    add_out(parser, "at the end")
    parser.add_argument("--sm", type=int, nargs="+", default=CAPABILITIES, help="compute capabilities")
    parser.add_argument("--workers", type=int, help="compiling processes (default: one a core)")
    return parser


def check_triton(parser: argparse.ArgumentParser) -> None:
    """A usage error if Triton cannot compile."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: nothing would be compiled. Unset it")
    try:
        importlib.import_module("triton")
    except ImportError as error:
        parser.error(f"Triton cannot be imported ({error}): pip install 'triton>=3.6'")


def _counted(reports: Iterable[Report], jobs: int) -> list[Report]:
    """All reports; what is done is said on the terminal's error stream: hundreds of kernels take an hour."""
    found = []
    for report in reports:
        found.append(report)
        print(f"\r{len(found)} of {jobs} kernels compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def run(report: Callable[[Job], Report], jobs: Sequence[Job], workers: int | None) -> list[Report]:
    """Reports in the order of the jobs, compiled by several processes or, if it is one, by this."""
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        return _counted(map(report, jobs), len(jobs))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return _counted(pool.imap(report, jobs, chunksize=1), len(jobs))


def write(kind: str, argv: Sequence[str], options: argparse.Namespace, kernels: Sequence[Any]) -> None:
    """Writes every count as JSON, where ``--out`` says; that of few kernels is as true as that of all."""
    head = begin(kind, argv, torch.device("cpu"))
    save({**head, "note": NOTE, "kernels": kernels}, options.out)
