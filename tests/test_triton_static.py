"""What the compiled Triton kernels do, counted without a GPU: bytes, vectors, spills, instructions.

The compiler cannot run in a process that uses the interpreter, so the kernels are compiled in another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.triton.budget import EXACT_INSTRUCTIONS, USABLE_SHARE

pytest.importorskip("triton")
# One worker compiles for all tests of this file.
pytestmark = pytest.mark.xdist_group("triton_static")

ROOT = Path(__file__).parents[1]


def _python(folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("static")
    _python(folder, "-m", "bench", "static", "--quick", "--out", str(folder / "kernels.json"))
    return json.loads((folder / "kernels.json").read_text())["kernels"]


def _named(kernel: dict[str, Any]) -> str:
    return " ".join(str(kernel[key]) for key in ("kernel", "storage", "arithmetic", "sm"))


def test_every_rule_is_compiled_in_both_arithmetics(kernels: list[dict[str, Any]]) -> None:
    compiled = {(k["kernel"], k["arithmetic"]) for k in kernels}
    assert compiled >= {(rule, arithmetic) for rule in RULES for arithmetic in ("exact", "fast")}
    assert {k["sm"] for k in kernels} == {80, 90, 100}


def test_one_pass(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert [kernel["read"], kernel["written"]] == kernel["model"], _named(kernel)


def test_full_tiles_move_in_vectors(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if not kernel["strided"]:
            widths = {CODECS[name].planes[0].bits // 8 for name in kernel["storage"].split("/")}
            # As many elements of every plane as make 16 bytes of the widest.
            assert set(kernel["access"]) == {16 * width // max(widths) for width in widths}, _named(kernel)


def test_nothing_spills(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["spilled"] == 0, _named(kernel)
        assert kernel["shared"] == 0 or kernel["kernel"] == "square_sum", _named(kernel)
        assert kernel["registers"] <= 128, _named(kernel)


def test_exact_kernels_round_every_operation(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if kernel["arithmetic"] == "exact" and kernel["kernel"] != "square_sum":
            assert kernel["contracted"] == kernel["approximate"] == 0, _named(kernel)


def test_instructions_leave_memory_the_bottleneck(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if not kernel["strided"] and "exact" in (kernel["auto"], kernel["kernel"]):
            assert kernel["share"] <= USABLE_SHARE, _named(kernel)
        if kernel["arithmetic"] == "fast":
            assert kernel["share"] <= USABLE_SHARE, _named(kernel)


def test_exact_costs_are_those_counted(kernels: list[dict[str, Any]]) -> None:
    assert set(EXACT_INSTRUCTIONS) == set(RULES), "python -m bench static counts a new rule's instructions"
    for rule, bound in EXACT_INSTRUCTIONS.items():
        counts = [
            kernel["executed"]
            for kernel in kernels
            if kernel["kernel"] == rule and kernel["arithmetic"] == "exact" and not kernel["strided"]
        ]
        assert 0.8 * bound <= max(counts) <= bound, rule


_TWINS = """
import sys
from pathlib import Path
from fused_optim.kernels.triton.driver import _sources
text = "import triton\\n@triton.jit\\ndef encode(x):\\n    return x + {}\\n"
twins = []
for number in (1, 2):
    folder = Path(sys.argv[1]) / str(number)
    folder.mkdir()
    (folder / "twin.py").write_text(text.format(number))
    sys.path.insert(0, str(folder))
    sys.modules.pop("twin", None)
    twins.append(__import__("twin").encode)
    sys.path.pop(0)
assert str((twins[0], 1)) == str((twins[1], 1)), "Triton tells them apart by itself now: SOURCES may go"
assert _sources(twins[0]) != _sources(twins[1])
"""


def test_a_changed_codec_is_compiled_anew(tmp_path: Path) -> None:
    _python(tmp_path, "-c", _TWINS, str(tmp_path))
