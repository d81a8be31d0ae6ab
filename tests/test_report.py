"""The report: every result file is in it or named as left out, and it needs no other file."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from bench import charts, found, learning_sections, report, sections, static_cuda, static_products
from bench.cuda_paths import LaunchReport
from bench.section import Section
from fused_optim.training import plan
from fused_optim.training.plan_report import as_json

VOID = {"meta", "img", "br"}
SUMMARY = {
    "train_loss": 2.0,
    "validation_loss": 2.1,
    "tokens_per_second": 1e3,
    "optimizer_ms_per_step": 1.0,
    "optimizer_share_of_step": 0.1,
    "bytes_per_parameter": {"parameters": 4, "gradients": 4, "states": 8},
    "activation_bytes": 2**20,
    "mean_spectral_norm": 2.0,
}
PRODUCT = static_products.Report(
    product="gram",
    dtype="bf16",
    sm=90,
    tile="128x256x64",
    fed_by="boxes",
    by_columns=False,
    warps=8,
    stages=4,
    registers=170,
    spilled=0,
    shared=196640,
    resident=1,
    tensor={"wgmma.m64n128k16": 4},
    multiplied=1,
    expected=1,
    accesses={},
    issued=9.0,
    tensor_clocks=512.0,
)


class Page(HTMLParser):
    """What a page shows, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[bytes] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            head, _, data = (given["src"] or "").partition(",")
            assert head == "data:image/png;base64" and given["alt"]
            self.images.append(base64.b64decode(data))
        assert tag not in ("link", "script", "iframe") and not {"srcset", "background"} & set(given)
        if given.get("href"):
            self.links.append(str(given["href"]))
        if given.get("id"):
            self.ids.add(str(given["id"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the results in this repository."""
    return report.write(report.RESULTS, tmp_path_factory.mktemp("report"), "the command")[0]


def test_every_result_is_on_the_page(written: Path) -> None:
    page = Page(written.read_text())
    results, left_out = found.find(report.RESULTS)
    assert len(results) >= 10 and "the command" in page.text
    for path, why in left_out.items():
        assert f"{path.relative_to(report.RESULTS)}: {why}" in page.text
    for path, _, data in results:
        facts = found.circumstances(data)
        assert str(path.relative_to(report.RESULTS)) in page.text
        assert found.machine_name(data) in page.text
        assert all(value in page.text for value in facts.values())
        for case in data.get("cases", ()):
            assert case["name"] in page.text
    assert all(link.removeprefix("#") in page.ids and link.startswith("#") for link in page.links)
    assert "://" not in written.read_text()


def test_pictures_are_files_of_sensible_sizes(written: Path) -> None:
    images = Page(written.read_text()).images
    files = {path.name: path.read_bytes() for path in written.parent.glob("*.png")}
    assert sorted(images) == sorted(files.values()) and "bytes-per-parameter.png" in files
    for name, png in files.items():
        width, height = _size(png)
        assert 700 <= width <= 2000 and 400 <= height <= 2600, (name, width, height)
        assert len(png) > 10_000, name


def _training(label: str) -> dict[str, Any]:
    return {
        "label": label,
        "elements": 1000,
        "train_loss": [3.0, None, 2.0],
        "lr": [0.1] * 3,
        "validation": [[0, 3.0], [3, 2.1]],
        "step_seconds": [0.1] * 3,
        "optimizer_seconds": [0.01] * 3,
        "memory": {"parameters": 4000, "gradients": 4000, "states": 8000, "activations": 9000},
        "spectral_norms": {},
    }


def _recipe(case: str, loss: float | None) -> dict[str, Any]:
    curve = [[step, loss] for step in range(1, 6)]
    config = {"steps": 5, "batch_size": 2, "sequence_length": 8}
    return {
        "case": case,
        "seed": 3,
        "config": config,
        "validation_loss": loss,
        "validation": curve,
        "train_loss": curve,
    }


def _files() -> dict[str, Any]:
    machine = json.loads(next(report.RESULTS.rglob("step.json")).read_text())["machine"]
    ms = {"min": 1.0, "q1": 1.5, "median": 2.0, "q3": 2.5, "n": 3}
    product = {"case": "gram 1x64x64 bfloat16", "tile": "64x128", "ms": ms, "torch_ms": ms}
    sizes = {"shapes": "2x8", "tensors": 2, "elements": 16, "gradients": "fresh"}
    compared = {**sizes, "name": "Lion fp32", "status": "ok", "ratio": 0.9, "quartiles": [0.8, 1.0]}
    compared["ms"] = {"this": ms, "base": ms}
    names = ("fused_optim", "torch")
    kernel = {"kernel": "adam", "storage": "fp32/fp32/fp32/fp32", "sm": 90, "strided": False}
    launch = asdict(LaunchReport("step", "", None, "fp32/fp32", "exact", 0, 8.0, 4.0, 30.0, 60.0, (16,)))
    launch |= {"used": 0.5, "bound": "memory"}
    processor = {"cpu": "A processor", "logical_cpus": 3}
    environment = {**processor, "torch": "2.13.0", "torch_threads": 2, "gpu": None}
    absent = {"label": "muonium", "status": "missing", "reason": "muonium runs on cuda, not on cpu"}
    timed = [{"label": name, "status": "ok", "ms": ms, "error": 0.01} for name in ("fused_optim", "peer")]
    timed[0] |= {"tflop_per_s": 0.25, "of_matmul": 0.625}
    matmul = {"label": "torch.bmm, one step", "ms": ms, "tflop_per_s": 0.4}
    unmeasured = {"kind": "ratio", "against": "muonium", "limit": 0.5, "measured": None, "met": None}
    return {
        "times": {
            "kind": "newton_schulz",
            "machine": machine,
            "cases": [
                {
                    "name": "Muon.step()",
                    "rounds": 3,
                    "rows": [*timed, absent],
                    "targets": [unmeasured],
                    "matmuls": [matmul],
                }
            ],
            "failed": [{"name": "soft clip", "reason": "no <room>"}],
            "left_out": ["hard clip"],
        },
        "products": {
            "kind": "products",
            "machine": {**machine, "gpu": {"name": "A GPU"}, "commit": "abc+"},
            "cases": [
                {**product, "speedup": 1.5, "speedup_quartiles": [1.4, 1.6], "torch_tflops": 9.0},
                {"case": "gram 1x128x128 bfloat16", "failed": "no <memory>"},
            ],
        },
        "base": {
            "kind": "base",
            "machine": machine,
            "base": {"ref": "main", "commit": "abc"},
            "cases": [compared, {**sizes, "name": "Muon", "status": "missing", "reason": "no such class"}],
        },
        "training": {
            "config": {"steps": 3, "batch_size": 2, "sequence_length": 8, "seed": 0},
            "environment": environment,
            "parameters": 1000,
            "summary": {name: SUMMARY for name in names},
            "runs": {name: _training(f"{name} AdamW fp32") for name in names},
        },
        "static": {
            "kind": "static",
            "machine": machine,
            "kernels": [{**kernel, "arithmetic": kind, "share": 0.3} for kind in ("exact", "fast")],
        },
        "static_cuda": {
            "kind": "static_cuda",
            "machine": machine,
            "kernels": [asdict(static_cuda.Report("step", "adam", "exact", 90, 64, 0, 0, 1234))],
            "launches": [{**launch, "rule": rule, "sm": sm} for rule in ("adam", "sgd") for sm in (80, 90)],
        },
        "static_products": {
            "kind": "static_products",
            "machine": machine,
            "kernels": [asdict(PRODUCT)],
        },
        "recipes": {
            "machine": machine,
            "final_tokens": 4096,
            "table": ["| case | density |", "|---|---|", "| dense | 100.0 % |", "| cast | 50.0 % |"],
            "rows": [_recipe("dense", 2.0), _recipe("cast", 2.5), _recipe("sr-ste", None)],
        },
        "plan": as_json(
            plan(
                {"w": (4096, 4096)},
                rules=["sgd"],
                storages=["fp32"],
                gpus=8,
                shard="all",
                peers=False,
                name="A model",
            )
        ),
        "parts": {"gpu": "", "seconds": 31, "parts": {"tests": {"state": "stopped after 9 s", "seconds": 9}}},
        "quick": {"quick": True, "kind": "step", "cases": [{}]},
        "empty": {"kind": "products", "cases": []},
        "no_kernels": {"kind": "static", "kernels": []},
        "other": {"kind": "else"},
        "list": [1],
    }


def test_other_kinds_are_shown_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The chart that every page has is drawn above.
    monkeypatch.setattr(learning_sections, "memory", lambda out: Section("Memory", {}))
    results = tmp_path / "results"
    results.mkdir()
    for name, content in _files().items():
        (results / f"{name}.json").write_text(json.dumps(content))
    (results / "broken.json").write_text("{")
    assert report.main(["--results", str(results), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    page = Page((tmp_path / "out" / report.PAGE).read_text())
    shown = (
        "A GPU",
        "abc, with changes",
        "failed: no <memory>",
        "Failed: soft clip: no <room>",
        "Left out for lack of time: hard clip.",
        "missing: muonium runs on cuda, not on cpu",
        "This version beside main",
        "A processor, 3 cores",
        "of matmul",
        "torch.bmm, one step",
        "Compiled kernels, sm_90",
        "Compiled CUDA C++ kernels",
        "4xwgmma.m64n128k16",
        "sr-ste diverged: it is not in the chart",
        "seed 3. The table's losses are of 4096 bytes",
        "50.0 %",
        "Memory of training: A model",
        "8 GPUs: everything is split evenly",
        "no GPU: a dry run",
        "stopped after 9 s, 9 s",
    )
    for text in (*shown, "62%", "1234", "Pretraining: 1,000 parameters", "fused_optim AdamW fp32"):
        assert text in page.text, text
    for name in ("quick", "empty", "no_kernels", "other", "list", "broken"):
        assert f"left out: {name}.json: " in printed and f"{name}.json: " in page.text
    assert len(page.images) == 9


@pytest.mark.parametrize(("schema", "value", "mark"), [(2, 0.07, ""), (1, 0.0625, "*")])
def test_bars_are_of_common_rounds_or_marked(schema: int, value: float, mark: str) -> None:
    """The slow peer took 3 of 9 rounds, in which the machine was slow."""
    ours = {"label": "ours", "source": "fused_optim", "ms": {"median": 25.0, "n": 9}}
    slow = {"label": "slow", "source": "slow", "param": "fp32", "ms": {"median": 400.0, "n": 3}}
    measured = {"measured": 0.07, "quartiles": [0.06, 0.08], "rounds": 3}
    case = {"name": "case", "shapes": "1x8", "tensors": 1, "elements": 8, "gradients": "fresh", "targets": []}
    case["rows"] = [ours, slow]
    if schema == 1:
        case["targets"] = [
            {"kind": "ratio", "ours": "ours", "against": "slow", **measured, "measured": 0.0625}
        ]
    else:
        slow["ratios"] = {"ours": measured}
    (bar,) = sections._step_ratios(case, {"schema": schema}).bars
    assert bar == charts.Bar("slow fp32", value, (0.06, 0.08), "25.0 / 400", mark)
    section = Section("Steps", {})
    section.draw = lambda *arguments: section.notes.append(arguments[-1])  # type: ignore[method-assign]
    sections._draw_ratios(section, Path("stem"), [charts.Group("case", [bar])], "")
    said = [f"{sections.LEFT_IS_FASTER}\n* medians of different rounds: see the note", sections._ROUNDS_APART]
    assert section.notes == (said if mark else [sections.LEFT_IS_FASTER])


def test_contents_tell_files_of_one_kind_apart(written: Path) -> None:
    contents = written.read_text().partition("<ol>")[2].partition("</ol>")[0]
    entries = Page(contents.replace("</li>", "\n</li>")).text.strip().split("\n\n")
    links = re.findall(r">([^<]+)</a>", contents)
    assert len(entries) == len(links) == len(set(links))
    assert any("codecs.json" in entry and "AMD EPYC" in entry for entry in entries)


def test_long_labels_are_cut_where_they_can_be() -> None:
    lines = charts._folded("bf16_split8/int8_companded/int8_companded_unsigned/bf16").split("\n")
    assert lines == ["bf16_split8/int8_companded/", "int8_companded_unsigned/bf16"]
    label = f"{sections.ERRORS['masks']} (logarithmic; none or not measured: no point)\nand more"
    assert max(map(len, charts._lines_of(label).split("\n"))) <= 76
    assert charts._lines_of(label).replace("\n", " ") == label.replace("\n", " ")


def test_lines_join_what_differs_in_one_thing() -> None:
    """Warm caches are left out, and so are two sizes that differ in their tensors as well."""
    row = {"label": "ours", "source": "fused_optim", "status": "ok", "ms": {"median": 1.0}}
    case = {"gradients": "fresh", "caches": "cold", "rows": [row]}
    sizes = (("8x4Mi", 8, 2**25, "cold"), ("300x16", 300, 4800, "warm"), ("300x16Ki", 300, 4915200, "cold"))
    grids = [{**case, "shapes": s, "tensors": t, "elements": e, "caches": c} for s, t, e, c in sizes]
    assert sections._scaling(grids) == []
    models = [
        {**case, "shapes": f"llama-{name}", "tensors": tensors, "elements": elements}
        for name, tensors, elements in (("125m", 110, 10**8), ("1.1b", 201, 10**9))
    ]
    ((lines, label, _),) = sections._scaling([*grids, *models])
    assert label == "parameters of a Llama" and [x for x, _ in lines[0].points] == [10**8, 10**9]


def test_only_one_size_changes_in_the_scaling() -> None:
    shapes = {"1x8": (1, 8), "4x8": (4, 32), "4x16": (4, 64), "8x8": (8, 64), "64x1": (64, 64)}
    row = {"label": "ours", "source": "fused_optim", "status": "ok"}
    cases = [
        {"shapes": name, "tensors": tensors, "elements": elements, "gradients": "fresh"}
        | {"rows": [{**row, "ms": {"median": elements + tensors}}]}
        for name, (tensors, elements) in shapes.items()
    ]
    (grown, label, _), (cut, _, _) = sections._scaling(cases)
    assert label == "parameters, 8 in each tensor"
    assert [x for x, _ in grown[0].points] == [8, 32, 64] and grown[0].points[-1][1] == 64 + 8
    assert cut[0].notes == ["4x16", "8x8", "64x1"]


def test_many_cases_are_cut_into_figures_that_can_be_read() -> None:
    groups = [charts.Group(str(i), [charts.Bar("torch-fused", 1.0)] * 3) for i in range(40)]
    found_pages = charts.pages([*groups, charts.Group("nothing to show", [])])
    assert [group for page in found_pages for group in page] == groups
    assert len(found_pages) == 4 and max(map(len, found_pages)) <= 11


def test_colours_differ_within_a_chart() -> None:
    names = ["fused_optim", "torch-fused fp32", "torch-fused bf16", *(f"library{i} fp32" for i in range(5))]
    styles = charts._styles(names)
    assert list(styles) == names
    assert len({(style["color"], style["hatch"]) for style in styles.values()}) == len(names)
    assert charts._styles(["fast"])["fast"] == charts._styles(["exact", "fast"])["fast"]


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path / "absent")])
    assert "is no folder; --results names one" in capsys.readouterr().err
    monkeypatch.setattr(report, "NEEDS", ("no_such_package",))
    with pytest.raises(SystemExit):
        report.main([])
    assert "report needs no_such_package; install with" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on the PATH")
def test_a_browser_renders_it(written: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}"]
    subprocess.run([*command, "--window-size=1200,3000", written.as_uri()], capture_output=True, check=True)
    assert _size(shot.read_bytes()) == (1200, 3000) and shot.stat().st_size > 100_000
