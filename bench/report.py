"""``python -m bench report``: one HTML page and PNG charts of every result file below a folder."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path

from .found import find

RESULTS = Path(__file__).parent / "results"
PAGE = "index.html"
NEEDS = ("matplotlib", "tqdm")


def write(results: Path, out: Path, command: str) -> tuple[Path, dict[str, str]]:
    """Draws everything; returns the page's path, and the files left out with the reasons."""
    from .learning_sections import memory
    from .page import page
    from .section import Section
    from .sections import section_of

    found, left_out = find(results)
    out.mkdir(parents=True, exist_ok=True)
    sections: list[tuple[str, Section]] = [("counted from shapes", memory(out))]
    for result in sorted(found, key=lambda result: result.kind != "parts"):
        name = result.path.relative_to(results)
        stem = "-".join(name.with_suffix("").parts)
        sections.append((str(name), section_of(result, out, stem)))
    reasons = {str(path.relative_to(results)): why for path, why in left_out.items()}
    (out / PAGE).write_text(page(sections, reasons, command))
    return out / PAGE, reasons


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files (default: ours)")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="default: runs/report")
    args = parser.parse_args(argv)
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"report needs {', '.join(missing)}; install with: pip install 'fused_optim[pretrain]'")
    if not args.results.is_dir():
        parser.error(f"{args.results} is no folder; --results names one with the JSON files of a run")
    path, left_out = write(args.results, args.out, shlex.join(["python", "-m", "bench", "report", *argv]))
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    print(path)
    return 0
