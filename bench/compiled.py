"""What the commands that compile kernels without a GPU share."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Job, Report = TypeVar("Job"), TypeVar("Report")


def triton_version(parser: argparse.ArgumentParser) -> str:
    """The compiler's version; a usage error if it cannot compile."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: nothing would be compiled. Unset it")
    try:
        import triton
    except ImportError as error:
        parser.error(f"Triton cannot be imported ({error}): pip install 'triton>=3.6'")
    return triton.__version__


def run(report: Callable[[Job], Report], jobs: Sequence[Job], workers: int | None) -> list[Report]:
    """Reports in the order of the jobs, compiled by several processes or, if it is one, by this."""
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        return list(map(report, jobs))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(report, jobs, chunksize=1)


def write(path: Path, triton: str, kernels: Sequence[dict[str, Any]]) -> None:
    """Writes every count as JSON."""
    path.write_text(json.dumps({"triton": triton, "kernels": kernels}, indent=1))
