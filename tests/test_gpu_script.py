"""What one run on a GPU must deliver: bench/gpu.sh, and benchmarks in which no case costs the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import cases, products, run, shapes, tables, timing
from bench.peers import PEERS, Contender
from fused_optim.kernels.rules import RULES

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"
CPU = torch.device("cpu")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@needs_bash
def test_it_parses_and_explains_itself() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    for arguments in ([], ["/nowhere", "everything"], ["/nowhere", "--unknown"]):
        refused = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True)
        assert refused.returncode == 2
        usage = "OUT [all|tests|bench|variants|products|matrices|masks|pretrain] [--installed] [--loose]"
        assert usage in refused.stdout


def test_it_stays_below_nine_minutes() -> None:
    """The limits of all parts and of the report, with ten seconds for what is stopped late."""
    text = SCRIPT.read_text()
    limits = re.search(r"^build_limit=.*\n.*$", text, re.MULTILINE)
    assert limits is not None
    seconds = dict(re.findall(r"(\w+)_limit=(\d+)", limits[0]))
    assert set(re.findall(r"\$(\w+)_limit", text)) == set(seconds)
    assert sum(map(int, seconds.values())) <= 525
    # What every part of its own has.
    assert set(re.findall(r"wanted (\w+)", text)) == set(seconds) - {"build", "report"}


def _python(folder: Path, *hidden: str) -> Path:
    """An interpreter that finds little text to validate on, and some packages not at all."""
    lines = "\n".join(f"sys.modules[{name!r}] = None" for name in hidden)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(f"import sys\n{lines}\n")
    python = folder / "python"
    python.write_text(
        '#!/bin/bash\n[[ " $* " != *" -m fused_optim pretrain "* ]] || '
        f'set -- "$@" --data {ROOT}/tests/oracles\n'
        f'export PYTHONPATH={folder}/site:$PYTHONPATH\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return python


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Without a GPU it only collects, which this very run has done for the other files.
    only = {"PYTHON": "./python", "PYTEST_ADDOPTS": f"--ignore-glob={ROOT}/tests/test_[!g]*"}
    command = ["bash", SCRIPT, "out", *arguments, "--installed"]
    return subprocess.run(command, env={**os.environ, **only}, cwd=folder, capture_output=True, text=True)


def _packed(folder: Path) -> set[str]:
    with tarfile.open(folder / "out" / "results.tar.gz") as archive:
        return {name.removeprefix("./") for name in archive.getnames()}


@needs_bash
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the script would run in full")
def test_it_does_what_it_can_without_a_gpu(tmp_path: Path) -> None:
    _python(tmp_path)
    done = _run(tmp_path, "all")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "no GPU" in done.stdout and "bench, on a GPU (at most " in done.stdout
    assert "python -m bench step --suite gpu --rounds" in done.stdout
    # Few files come back from a machine that is lent.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.json", "results.tar.gz"}
    timed = {
        f"{part}.{kind}" for part in ("bench", "masks", "matrices", "products") for kind in ("json", "log")
    }
    others = {"pretrain.log", "pretrain/results.json", "pretrain/report.png", "report/index.html"}
    assert {*timed, *others, "summary.json", "tests.log", "variants.log"} <= _packed(tmp_path)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    parts = ["tests", "bench", "masks", "matrices", "pretrain", "variants", "products"]
    assert {name: part["state"] for name, part in summary["parts"].items()} == dict.fromkeys(parts, "ok")


@needs_bash
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the script would run in full")
def test_parts_share_a_folder(tmp_path: Path) -> None:
    _python(tmp_path, "pytest_timeout")
    assert _run(tmp_path, "products").returncode == 0
    assert _run(tmp_path, "pretrain").returncode == _run(tmp_path, "pretrain").returncode == 0
    done = _run(tmp_path, "tests")
    # What was not proved is no success.
    assert done.returncode == 1 and "left out: pip install pytest" in done.stdout
    states = {
        name: part["state"][:8]
        for name, part in json.loads((tmp_path / "out" / "summary.json").read_text())["parts"].items()
    }
    assert states == {"products": "ok", "pretrain": "ok", "tests": "left out"}
    assert {"products.json", "pretrain/results.json", "report/index.html"} <= _packed(tmp_path)


def test_the_most_wanted_cases_come_first() -> None:
    found = cases.suite("gpu", list(PEERS), list(RULES), "")
    main = found[1 : 1 + 2 * 3 * len(cases.MAIN_STORAGES)]
    assert {case.contenders[0].rule for case in main} == {"adam", "lion"}
    assert [shapes for shapes in dict.fromkeys(case.shapes for case in main)] == list(cases.GPU_SHAPES)
    later = {case.contenders[0].rule for case in found[1 + len(main) :]}
    assert later == set(RULES) - {"adam", "lion"}
    assert [case.contenders[0].rule for case in cases.variants("3x64")][:16] == ["adam"] * 8 + ["lion"] * 8


def test_a_peer_is_timed_once_for_a_dtype() -> None:
    found = cases.suite("gpu", ["torch-foreach", "torch-fused"], ["adam"], "")
    beside = [case.name for case in found if any(c.source == "torch-foreach" for c in case.contenders)]
    # In 3.2 B parameters of fp32 there is no room for a third optimizer.
    assert beside == [
        f"{model} adam {storage}"
        for model in ("llama-1.1b", "llama-125m")
        for storage in ("fp32/fp32", "bf16/fp32")
    ]


def _fails_after(monkeypatch: pytest.MonkeyPatch, calls: int, label: str) -> None:
    """A contender's call that runs out of memory when it has worked so often."""
    original, made = run.Run.call, {"calls": 0}

    def call(self: run.Run) -> None:
        if label in self.label:
            made["calls"] += 1
            if made["calls"] > calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB")
        original(self)

    monkeypatch.setattr(run.Run, "call", call)


@pytest.mark.parametrize("calls", [0, 2, 3, 5], ids=["checked", "checked late", "first sample", "timed"])
@pytest.mark.parametrize("cold", [True, False])
def test_what_does_not_fit_is_a_row(calls: int, cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _fails_after(monkeypatch, calls, "torch-fused")
    ours, theirs = Contender("fused_optim"), Contender("torch-fused")
    target = cases.Target("ratio", 1.0, ours.label, theirs.label)
    case = cases.Case("two", "3x64", (ours, theirs), (target,), cold=cold)
    small = shapes.parse(case.shapes)
    record = tables.case_record(run.measure(case, small, CPU, 4, 5.0, 2**16))
    kept, failed = record["rows"]
    assert kept["status"] == "ok" and kept["ms"]["n"] == 4
    assert failed["status"] == "failed" and "Tried to allocate 12.00 GiB" in failed["reason"]
    assert "ms" not in failed and record["targets"][0]["met"] is None
    assert tables.case_table(record).lines[1][-1].startswith("failed: OutOfMemoryError")


def test_a_failed_contender_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    _fails_after(monkeypatch, 4, "torch-fused")
    made: list[run.Run] = []
    admit: Callable[..., run.Row] = run._admit

    def noted(*arguments: object) -> run.Row:
        row = admit(*arguments)
        assert row.run is not None
        made.append(row.run)
        return row

    monkeypatch.setattr(run, "_admit", noted)
    case = cases.Case("one", "3x64", (Contender("torch-fused"),))
    run.measure(case, [(64,)] * 3, CPU, 4, 5.0, 2**16)
    assert not hasattr(made[0], "params") and not hasattr(made[0], "optimizer")


def test_a_copy_takes_the_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(timing.InPlace):
        def __init__(self, device: torch.device, size: int) -> None:
            if size > 2**23:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(device, size)

    monkeypatch.setattr(run, "InPlace", Narrow)
    copy, in_place = run._ceilings(CPU, 2**25)
    assert copy.bytes == in_place.bytes == 2**24


def test_products_begin_with_those_of_muon() -> None:
    assert [case.product for case in products.ALL[:3]] == ["gram", "polynomial", "multiply_add"]
    assert products.ALL[0].batches == 12 and len(set(products.ALL)) == len(products.ALL) == 15
