"""The examples in docstrings and in the documents run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"fused_optim": "fused_optim", "kernels": "fused_optim.kernels"}


def _modules() -> list[str]:
    """Every module that holds an example, by its installed name."""
    names: list[str] = []
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text():
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                names.append(".".join((package, *(part for part in parts if part != "__init__"))))
    return names


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert tried and not failed


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_document_examples(path: Path) -> None:
    """Python blocks run one after the other in one namespace; those with prompts print what they say."""
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        test = doctest.DocTestParser().get_doctest(block, names, path.name, str(path), 0)
        if test.examples:
            assert (
                doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=False).failed == 0
            )
            names.update(test.globs)
        else:
            exec(compile(block, str(path), "exec"), names)
