"""``bench step --base``: another commit beside this version, in a process of its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bench import base, base_worker, record, step
from fused_optim.kernels.native import cpu

ROOT = Path(__file__).resolve().parents[1]
IS_CHECKOUT = shutil.which("git") is not None and (ROOT / ".git").exists()
pytestmark = pytest.mark.skipif(not IS_CHECKOUT, reason="no git checkout")
QUICK = ("--quick", "--device", "cpu", "--cases", "Lion", "--peers", "none")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_last_commit_beside_this_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    out.mkdir()
    assert step.main([*QUICK, "--base", "HEAD", "--out", str(out)]) == 0
    (file,) = out.iterdir()
    result = json.loads(file.read_text())
    assert result["kind"] == "base" and result["base"]["commit"] == base.commit_of("HEAD")
    assert result["command"].startswith("python -m bench step --quick --device cpu")
    (case,) = result["cases"]
    assert case["status"] == "ok" and case["ratio"] > 0 and case["rounds"] == 3
    assert case["quartiles"][0] <= case["quartiles"][1]
    printed = capsys.readouterr().out
    assert f"{case['ratio']:.3g}" in printed and "bits after 3 steps" in printed
    (kept,) = (tmp_path / "cache" / "fused_optim" / "commits").iterdir()
    assert kept.name.startswith(base.commit_of("HEAD"))
    assert {path.name for path in (kept / "fused_optim").iterdir()} >= {"adamw.py", "kernels", "lib"}


@pytest.mark.parametrize("best", cpu.isas() if cpu.unavailable() is None else ())
def test_csrc_is_built_for_what_it_can_be_asked_for(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set that is built along with another, the other one is asked for."""
    monkeypatch.setattr(cpu, "isas", lambda: (best,))
    lines = (ROOT / "csrc" / "CMakeLists.txt").read_text().partition("set(FUSED_OPTIM_ISAS")[0]
    known = re.findall(r"(?:set\(isas|APPEND isas) ([\w ]+)\)", lines)
    assert base.instruction_set() in " ".join(known).split()


def test_what_an_older_version_lacks_is_said() -> None:
    order = {"shapes": [[2]], "kept": True, "device": "cpu", "sweep_bytes": 0, "threads": 1}
    for name, options, said in (("Newer", {}, "no attribute 'Newer'"), ("Lion", {"newer": 1}, "'newer'")):
        steps, answer = base_worker._make(
            {**order, "optimizer": name, "options": {"param_codec": "fp32", **options}}
        )
        assert steps is None and said in answer["failed"]


def test_a_commit_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main([*QUICK, "--base", "no-such-ref"]) == 1
    assert "--base no-such-ref: fatal: Needed a single revision" in capsys.readouterr().err


SMALL = """
cmake_minimum_required(VERSION 3.22)
project(small LANGUAGES CXX)
if(NOT FUSED_OPTIM_ISAS STREQUAL "{isa}" OR NOT DEFINED FUSED_OPTIM_CUDA OR FUSED_OPTIM_CUDA)
  message(FATAL_ERROR "${{FUSED_OPTIM_ISAS}}, ${{FUSED_OPTIM_CUDA}}")
endif()
file(WRITE "${{CMAKE_BINARY_DIR}}/small.cpp" "int small() {{ return 1; }}")
add_library(fused_optim_cpu SHARED "${{CMAKE_BINARY_DIR}}/small.cpp")
"""


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no library, hence no instruction set to build for")
def test_libraries_are_built(tmp_path: Path) -> None:
    """From little source: test_packaging.py builds csrc/ with the same switches."""
    (tmp_path / "CMakeLists.txt").write_text(SMALL.format(isa=base.instruction_set()))
    base.compile_libraries(tmp_path, tmp_path / "lib", with_cuda=False)
    assert [path.name for path in (tmp_path / "lib").iterdir()] == ["libfused_optim_cpu.so"]


def test_sources_that_do_not_compile_are_shown(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text("message(FATAL_ERROR broken)")
    with pytest.raises(base.BaseError, match="broken"):
        base.compile_libraries(tmp_path, tmp_path / "lib", with_cuda=False)


def test_runs_into_a_folder_keep_their_own_files(tmp_path: Path) -> None:
    result = {"kind": "step", "started": "2026-11-22T07:53:46Z"}
    for started in ("2026-11-22T07:53:46Z", "2026-11-22T07:53:46Z", "2026-11-22T08:00:00Z"):
        record.save({**result, "started": started}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-2026-11-22T075346Z.json",
        "step-2026-11-22T080000Z.json",
    ]
