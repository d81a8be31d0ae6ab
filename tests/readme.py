"""The README, the results that it names, and its recipes for other frameworks as the tests run them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu-2-core-avx512"
EPYC = RESULTS.with_name("cpu-2-core-epyc")
FILES = {path: path.read_text() for path in (ROOT / "README.md", ROOT / "docs" / "numbers.md")}
TEXT = "\n".join(FILES.values())
"""The README, and the page of numbers that belongs to it."""
FLAT = " ".join(TEXT.split())
"""Without line breaks."""


def code_of(title: str) -> str:
    """The code below a bold title."""
    found = re.search(rf"^\*\*{re.escape(title)}\.\*\*.*?^```py\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def result_of(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """A file of results."""
    return json.loads((folder / name).read_text())


def cases_of(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """What was measured in it."""
    return result_of(name, folder)["cases"]


def table_rows(first_cell_of_header: str, section: str = TEXT) -> list[list[str]]:
    """The cells of a table, found by its header."""
    lines = section[section.index(f"| {first_cell_of_header} |") :].splitlines()[2:]
    cells: list[list[str]] = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


def says(text: str, value: float) -> None:
    """The text rounds the value: within half a unit of its last digit."""
    number = re.match(r"[\d.]+(?:e-?\d+)?", text)
    assert number is not None, text
    mantissa, _, exponent = number[0].partition("e")
    digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
    assert abs(float(number[0]) - value) <= 0.5000001 * 10.0**-digits, (text, value)
