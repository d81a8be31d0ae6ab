"""The CPU codecs' divisions and roots, which are corrected approximations on AVX-512, are IEEE's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fused_optim.kernels.native import cpu

ROOT = Path(__file__).resolve().parent.parent
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"]
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mf16c", "-mno-fma"],
    "avx512": AVX512,
    "avx512_permute": [*AVX512, "-DFO_PERMUTES"],
}


@pytest.mark.parametrize("isa", FLAGS)
def test_every_quotient_and_root(isa: str, tmp_path: Path) -> None:
    if isa not in cpu.isas():
        pytest.skip(f"this machine has no {isa}")
    source, program = ROOT / "tests" / "cpp" / "exact_division.cpp", tmp_path / "program"
    command = [
        "g++",
        "-std=gnu++17",
        "-O2",
        "-ffp-contract=off",
        "-Wno-psabi",
        *FLAGS[isa],
        f"-I{ROOT / 'csrc'}",
    ]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "0", "0"], "quotients, roots and values that are not IEEE's"
