"""``python -m bench static_cuda``: what it reads in cuobjdump's output, and what it says where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import static_cuda
from fused_optim.kernels.native import library

UNIT = "_ZN45_GLOBAL__N__d9795ced_12_step_cuda_cu_0e4fd45d"
CODED, SUM = f"{UNIT}17step_coded_kernelINS_12sgd_momentumEEEvNS_6LaunchE", f"{UNIT}17square_sum_kernelEPd"
USAGE = """
Fatbin ptx code:
================
arch = sm_80
ptxasOptions = {options}

Fatbin elf code:
================
arch = sm_{sm}

Resource usage:
 Common:
  GLOBAL:96 CONSTANT[4]:16
 Function {function}:
  REG:96 STACK:{stack} SHARED:1248 LOCAL:{local} CONSTANT[2]:172 CONSTANT[0]:752 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	code for sm_90
		Function : {function}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;         /* 0x00000a00ff017b82 */
                                                                  /* 0x000fe20000000800 */
        /*0010*/              @!P0 STG.E.64 desc[UR6][R2.64], R4 ;  /* 0x0 */
        /*0020*/                   EXIT ;                         /* 0x000000000000794d */
        /*0030*/                   BRA 0x30;                      /* 0xfffffffc00fc7947 */
        /*0040*/                   NOP;                           /* 0x0000000000007918 */
		..........
"""


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """By option, what cuobjdump prints of a library."""
    printed = {"-sass": SASS.format(function=CODED) + SASS.format(function=SUM)}
    file = tmp_path / "libfused_optim_cuda.so"
    file.touch()
    monkeypatch.setattr(static_cuda, "cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(static_cuda, "dump", lambda tool, file, option, *more: printed[option])
    monkeypatch.setattr(library, "path", lambda kind: file)
    return printed


def _usage(function: str, options: str = "", stack: int = 0, local: int = 0) -> str:
    return USAGE.format(function=function, options=options, sm=90, stack=stack, local=local)


def test_kernels_are_named_and_counted(listed: dict[str, str], tmp_path: Path) -> None:
    listed["-res-usage"] = _usage(CODED) + _usage(SUM, "--fmad false ")
    assert static_cuda.main(["--out", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["kind"] == "static_cuda" and written["command"].startswith("python -m bench static_cuda")
    counts = {"sm": 90, "registers": 96, "spilled": 0, "shared": 1248, "emitted": 3}
    assert written["kernels"] == [
        {"kernel": "square_sum", "rule": None, "arithmetic": "exact", **counts},
        {"kernel": "step_coded", "rule": "sgd_momentum", "arithmetic": "fast", **counts},
    ]


@pytest.mark.parametrize("spilled", [{"stack": 16}, {"local": 16}])
def test_a_spill_is_a_status(
    spilled: dict[str, int], listed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    listed["-res-usage"] = _usage(CODED, **spilled) + _usage(SUM)
    assert static_cuda.main([]) == 1
    assert "step_coded sgd_momentum fast sm_90 spills 16 bytes" in capsys.readouterr().out


def test_what_is_missing_is_said(
    listed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as status:
            static_cuda.main([*arguments])
        assert status.value.code == 2
        return capsys.readouterr().err

    listed["-res-usage"] = ""
    assert "has no machine code of a GPU" in refused()
    listed["-res-usage"] = _usage(CODED)
    assert "has no code for sm_80, only for sm_90" in refused("--sm", "80")
    monkeypatch.setattr(library, "path", lambda kind: None)
    library.load.cache_clear()
    assert "libfused_optim_cuda.so was not built; install nvcc" in refused()
    library.load.cache_clear()


def test_where_no_cuobjdump_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cuda.shutil, "which", lambda name: None)
    monkeypatch.setitem(static_cuda.sys.modules, "triton", None)
    with pytest.raises(static_cuda.MissingToolError, match="install the CUDA toolkit, or pip install triton"):
        static_cuda.cuobjdump()


def test_the_installed_library_is_read(tmp_path: Path) -> None:
    """Where both are there; a file that is no library is refused."""
    try:
        tool, file = static_cuda.cuobjdump(), static_cuda.built()
    except static_cuda.MissingToolError as missing:
        pytest.skip(str(missing))
    found = static_cuda.reports(tool, file, [90])
    assert {r.kernel for r in found} == {"step", "step_coded", "step_masked", "square_sum"}
    assert {r.arithmetic for r in found} == {"exact", "fast"} and all(r.emitted > 100 for r in found)
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(static_cuda.MissingToolError):
        static_cuda.reports(tool, text, [90])
