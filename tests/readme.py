"""The README, and its recipes for other frameworks as the tests run them."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[1] / "README.md").read_text()
FLAT = " ".join(TEXT.split())
"""Without line breaks."""


def code_of(title: str) -> str:
    """The code below a bold title."""
    found = re.search(rf"^\*\*{re.escape(title)}\.\*\*.*?^```py\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]
