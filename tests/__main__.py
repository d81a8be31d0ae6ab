"""All checks in one command: ``python -m tests [format] [lint] [types] [cpp] [examples] [pytest]``.

Without a name every check runs. ``pytest`` is the quick run; ``--full`` adds the slow tests, ``--gpu`` those
that need a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPP = ("csrc", "tests/cpp", "tests/cuda_on_cpu")
MIRROR = ROOT / "build" / "typing"
PACKAGES = {"fused_optim": "fused_optim", "kernels": "fused_optim/kernels"}
COMMANDS = {
    "format": ["ruff", "format", "--check", "--quiet", "."],
    "lint": ["ruff", "check", "--quiet", "."],
    "types": ["pyright", "--pythonpath", sys.executable],
    "cpp": ["clang-format", "--dry-run", "--Werror"],
    "examples": ["pytest", "--quiet", "-p", "no:cacheprovider", "tests/test_examples.py"],
    "pytest": ["pytest", "--quiet", "-n", "2", "--dist", "loadgroup", "--benchmark-disable"],
}


def _mirror_package() -> None:
    """Links every source where an installation puts it."""
    shutil.rmtree(MIRROR, ignore_errors=True)
    for folder, package in PACKAGES.items():
        for source in (ROOT / folder).rglob("*.py"):
            link = MIRROR / package / source.relative_to(ROOT / folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)


def _original_paths(text: str) -> str:
    """Names the sources instead of their links in the mirror."""
    for folder, package in sorted(PACKAGES.items(), key=lambda item: -len(item[1])):
        text = text.replace(f"{MIRROR}/{package}/", f"{folder}/")
    return text


def run(name: str, extra: list[str]) -> bool:
    """Runs one check and says whether it passed; its output is shown only if it did not."""
    command = [str(Path(sys.executable).with_name(COMMANDS[name][0])), *COMMANDS[name][1:], *extra]
    if name == "types":
        _mirror_package()
    if name == "cpp":
        sources = (path for folder in CPP for path in (ROOT / folder).iterdir())
        command += sorted(str(path) for path in sources if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
    if not Path(command[0]).exists():
        print(
            f"{name}: {COMMANDS[name][0]} is not installed: pip install -c constraints.txt -e '.[test,check]'"
        )
        return False
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{name}: {'ok' if done.returncode == 0 else 'FAILED'}")
    if done.returncode or name == "pytest":
        print(_original_paths(done.stdout).rstrip(), flush=True)
    return done.returncode == 0


def main() -> int:
    """Runs the checks that were asked for, all of them even if one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="check", help=f"one of {', '.join(COMMANDS)}")
    parser.add_argument("--full", action="store_true", help="also the slow tests")
    parser.add_argument("--gpu", action="store_true", help="also the tests that need a GPU")
    options = parser.parse_args()
    unknown = [check for check in options.checks if check not in COMMANDS]
    if unknown:
        parser.error(f"unknown check {unknown[0]!r}: the checks are {', '.join(COMMANDS)}")
    left_out = [
        f"not {mark}" for mark, wanted in (("slow", options.full), ("gpu", options.gpu)) if not wanted
    ]
    quick = ["-m", " and ".join(left_out)] if left_out else []
    passed = [run(check, quick if check == "pytest" else []) for check in options.checks or COMMANDS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
