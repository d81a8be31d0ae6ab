"""Where figures come from: the commit that ran, and the processor."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

COMMIT = "FUSED_OPTIM_COMMIT"
"""The variable that names the commit of a copy without .git."""


def run(root: Path, *command: str) -> str | None:
    """What a command prints in a folder; None if it fails or is not here."""
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit_of(root: Path, sources: Sequence[str]) -> str | None:
    """A checkout's commit, with ``+`` if sources differ from it; a copy's is in ``COMMIT``."""
    # Without a .git of its own git would answer for a repository around the copy.
    commit = run(root, "git", "rev-parse", "--short=12", "HEAD") if (root / ".git").exists() else None
    if commit is None:
        return os.environ.get(COMMIT) or None
    return commit + ("+" if run(root, "git", "status", "--porcelain", "--", *sources) else "")


def processor() -> str:
    """The name of this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
