"""Compiles Triton kernels in another process: the compiler cannot run in one that uses the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def python(folder: Path, *arguments: str) -> str:
    """What Python prints, with a compiler's cache in the folder."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def compiled(folder: Path, command: str, *options: str) -> list[dict[str, Any]]:
    """What ``python -m bench`` counts of the kernels that the tests compile."""
    out = folder / "kernels.json"
    python(folder, "-m", "bench", command, "--quick", "--out", str(out), *options)
    return json.loads(out.read_text())["kernels"]
