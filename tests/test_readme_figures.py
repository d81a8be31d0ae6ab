"""The README's figures of time and of compiled kernels are in the files that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.readme import EPYC, FLAT, RESULTS, TEXT, cases_of, result_of, says, table_rows


def test_steps() -> None:
    section = TEXT[TEXT.index("## Numbers") :]
    rows = table_rows("case", section)
    for column, folder in ((2, RESULTS), (3, EPYC)):
        measured = [c["targets"][0]["measured"] for c in cases_of("step.json", folder) if c["targets"]]
        for row, value in zip(rows, measured, strict=True):
            says(row[column], value)
    cold = re.search(r"with cold ones, beside other libraries, it is ([\d.]+) there", FLAT)
    faster = re.search(r"copies were ([\d.]+) times as fast, the ratio was ([\d.]+) ", FLAT)
    assert cold is not None and faster is not None
    now, before = (
        next(c for c in cases_of(name, EPYC) if c["name"] == "AdamW fp32, many tensors")
        for name in ("step.json", "step-faster-memory.json")
    )
    says(faster[1], before["copy_gb_per_s"] / now["copy_gb_per_s"])
    says(faster[2], before["targets"][0]["measured"])
    ours, theirs = cases_of("step.json", EPYC)[-1]["rows"][:2]
    says(cold[1], ours["ms"]["median"] / theirs["ms"]["median"])


def _medians(folder: Path) -> dict[str, dict[str, float]]:
    """By case and library, milliseconds of the codecs' table."""
    return {
        case["name"]: {row["source"]: row["ms"]["median"] for row in case["rows"]}
        for case in cases_of("codecs.json", folder)
    }


def test_codecs() -> None:
    section = TEXT[TEXT.index("States of 8 bits and split weights") :]
    for name, *cells in table_rows("case", section):
        case = name.partition(" (")[0].replace("`", "").replace(" + ", "/")
        case = case.replace("AdamW bf16_split8 ", "AdamW bf16_split8/")
        for peer, cell in zip(("torch-fused", "bitsandbytes-8bit", "torchao-8bit"), cells, strict=True):
            for said, folder in zip(cell.split(", ") if cell else (), (RESULTS, EPYC), strict=bool(cell)):
                found = _medians(folder)[case]
                says(said, found["fused_optim"] / found[peer])
    order = (
        "AdamW fp32/int8",
        "AdamW fp32/int8_companded",
        "AdamW bf16_split8/int8_companded",
        "Lion fp32/int8",
    )
    runs = re.findall(r"it read ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+)", TEXT)
    for said, file in zip(runs, ("codecs-later.json", "codecs-throttled.json"), strict=True):
        rows = {case["name"]: case["rows"] for case in cases_of(file)}
        for text, name in zip(said, order, strict=True):
            says(text, rows[name][0]["ms"]["median"] / rows[name][1]["ms"]["median"])


def test_quartiles_of_slow_peers() -> None:
    number = r"([\d.]+) to ([\d.]+)"
    found = re.search(rf"quartiles are {number} and {number} for AdamW, {number} for Lion", FLAT)
    assert found is not None
    values = [
        edge
        for case in cases_of("codecs.json")
        for target in case["targets"]
        if target["against"].startswith(("bitsandbytes", "torchao"))
        for edge in target["quartiles"]
    ]
    for said, value in zip(found.groups(), values, strict=True):
        says(said, value)


def test_whole_matrices() -> None:
    muon = re.search(r"takes ([\d.]+) of torch.optim.Muon's time \(quartiles ([\d.]+) to ([\d.]+);", TEXT)
    target = cases_of("newton_schulz.json")[0]["targets"][0]
    assert muon is not None
    for text, value in zip(muon.groups(), (target["measured"], *target["quartiles"]), strict=True):
        says(text, value)
    elsewhere = re.search(r"it takes ([\d.]+) \(([\d.]+) to ([\d.]+);", FLAT)
    target = cases_of("newton_schulz.json", EPYC)[-1]["targets"][0]
    assert elsewhere is not None
    for text, value in zip(elsewhere.groups(), (target["measured"], *target["quartiles"]), strict=True):
        says(text, value)
    shares = re.search(
        r"runs at (\d+) % of the speed .* iteration at (\d+) %: .* ours has (\d+) % fewer",
        FLAT,
    )
    rows = {row["label"]: row for row in cases_of("newton_schulz.json")[1]["rows"] if row["status"] == "ok"}
    ours, theirs = rows["fused_optim"], rows["torch.optim.Muon"]
    assert shares is not None
    values = (ours["of_matmul"], theirs["of_matmul"], 1 - ours["flops"] / theirs["flops"])
    for text, value in zip(shares.groups(), values, strict=True):
        says(text, 100 * value)
    cases = cases_of("soft_clip.json", EPYC)
    for row in table_rows("largest singular value over `c`"):
        for cell, dtype in zip(row[1:], ("fp32", "bf16"), strict=True):
            (case,) = [c for c in cases if c["name"].endswith(f"{dtype}, ratio {row[0]}")]
            time, error, theirs = re.fullmatch(r"(\S+), (\S+) \((\S+)\)", cell).groups()
            says(time, case["targets"][0]["measured"])
            says(error, case["rows"][0]["error"])
            says(theirs, case["rows"][1]["error"])


def test_soft_clip_at_our_accuracy() -> None:
    cases = [c for c in cases_of("soft_clip.json", EPYC) if not c["name"].endswith("as exact as released")]
    times = [case["targets"][0]["measured"] for case in cases]
    theirs = [row["error"] for case in cases for row in case["rows"] if row["label"] == "released"]
    found = re.search(r"is off by up to ([\d.]+) %, and takes ([\d.]+) to ([\d.]+) of its time there", FLAT)
    assert found is not None and abs(float(found[1]) / 100 - max(theirs)) < 0.05
    for said, value in zip(found.groups()[1:], (min(times), max(times)), strict=True):
        says(said, value)


def test_soft_clip_as_exact_as_released() -> None:
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for case in cases_of("soft_clip.json", EPYC):
        if case["name"].endswith("as exact as released"):
            times["bf16" if "bf16" in case["name"] else "fp32"].append(case["targets"][0]["measured"])
    found = re.search(
        r"takes ([\d.]+) to ([\d.]+) of its time in fp32 and ([\d.]+) to ([\d.]+) in bf16", FLAT
    )
    assert found is not None
    edges = [e for t in times.values() for e in (min(t), max(t))]
    for said, value in zip(found.groups(), edges, strict=True):
        says(said, value)


def test_soft_clip_of_other_sizes() -> None:
    times: dict[tuple[str, bool], list[float]] = {}
    for case in cases_of("soft_clip_sizes.json", EPYC):
        size, _, ratio = case["name"].removeprefix("soft clip ").partition(", ratio ")
        if ratio.isdecimal():
            times.setdefault((size, int(ratio) > 300), []).append(case["targets"][0]["measured"])
    found = re.search(
        r"takes ([\d.]+) to ([\d.]+) of the released time for 512 × 512 and 512 × 2048 in fp32, ([\d.]+) to "
        r"([\d.]+) for 256 × 1024, ([\d.]+) to ([\d.]+) for 128 × 128 and 64 × 64\. .* takes ([\d.]+) to "
        r"([\d.]+) for 512 rows and ([\d.]+) to ([\d.]+) for fewer; at 10000, .* up to ([\d.]+) \(",
        FLAT,
    )
    assert found is not None
    named = [
        ("512x512 fp32", "512x2048 fp32"),
        ("256x1024 fp32",),
        ("128x128 fp32", "64x64 fp32"),
        ("512x512 bf16", "512x2048 bf16"),
        ("256x1024 bf16", "128x128 bf16", "64x64 bf16"),
    ]
    fars = [(False, True)] * 3 + [(False,)] * 2
    chosen = [
        [t for s in sizes for f in far for t in times[s, f]] for sizes, far in zip(named, fars, strict=True)
    ]
    values = [edge for each in chosen for edge in (min(each), max(each))]
    values.append(max(t for (size, far), each in times.items() if far and "bf16" in size for t in each))
    for said, value in zip(found.groups(), values, strict=True):
        says(said, value)


def test_masks() -> None:
    assert "A 2:4 mask adds 3 % to a step" in FLAT
    names = {
        "2:4 of 1024x1024 fp32": 3,
        "transposable of 1024x1024 fp32": 1,
        "transposable of 1024x1024 bf16": 1,
    }
    found = {case["name"]: [t["measured"] for t in case["targets"]] for case in cases_of("masks.json", EPYC)}
    values = [value for name, count in names.items() for value in found[name][:count]]
    searches = re.search(
        r"takes ([\d.]+) of the time of `argsort`, ([\d.]+) of `topk`, ([\d.]+) of ASP's search in torch; "
        r"transposable masks ([\d.]+), in bf16 ([\d.]+), of",
        FLAT,
    )
    steps = re.search(
        r"2:4 mask takes ([\d.]+) of the dense step's time \(quartiles ([\d.]+) to ([\d.]+);.*?"
        r"\) and ([\d.]+) of torch's .{,160}\(SR-STE\), ([\d.]+) \(",
        FLAT,
    )
    assert searches is not None and steps is not None
    once, anew = (
        {row["label"]: row["ms"]["median"] for row in case["rows"]}
        for case in cases_of("masks_step.json", EPYC)
    )
    target = cases_of("masks_step.json", EPYC)[0]["targets"][0]
    values += [target["measured"], *target["quartiles"]]
    values += [once["masked"] / once["torch fused and three passes (apex ASP)"]]
    values += [anew["masked (SR-STE)"] / anew["dense"]]
    for said, value in zip((*searches.groups(), *steps.groups()), values, strict=True):
        says(said, value)


def test_compiled_steps() -> None:
    """The table has every kernel of the file in the arithmetic that is chosen for it."""
    data = json.loads((RESULTS.parent / "static" / "sm_90.json").read_text())
    assert "nothing was run" in data["note"]
    chosen = [k for k in data["kernels"] if k["arithmetic"] == k["auto"]]
    for row, k in zip(table_rows("compiled step"), chosen, strict=True):
        param, *states, grad = k["storage"].split("/")
        assert [k["read"], k["written"]] == k["model"]
        assert param.startswith(grad)
        name = {"adam": "AdamW", "lion": "Lion"}[k["kernel"]]
        said = [name, f"`{param}`", f"`{states[0]}`", k["arithmetic"], f"{sum(k['model']):.2f}"]
        said += [
            f"{k['executed']:.1f}",
            str(k["registers"]),
            str(k["spilled"]),
            f"{k['share']:.0%}",
            k["bound"],
        ]
        assert row == said
    assert not any(k["spilled"] for k in data["kernels"])
    too_many = [k for k in chosen if k["share"] > 0.8]
    assert {k["storage"].split("/")[1] for k in too_many} == {"int4"}
    assert {k["kernel"] for k in too_many if k["bound"] != "memory"} == {"adam"}


def test_cuda_kernels() -> None:
    """Those that learn of codecs when they run are bound by instructions."""
    launches = json.loads((RESULTS.parent / "static" / "cuda.json").read_text())["launches"]
    said = re.search(
        r"takes (\d+) % of an H200's budget with fp32 parameters and (\d+) % with bf16",
        FLAT,
    )
    assert said
    for number, dtype in zip(said.groups(), ("fp32", "bf16"), strict=True):
        storage = f"{dtype}/int8/int8_unsigned/{dtype}"
        key = {"rule": "adam", "storage": storage, "arithmetic": "fast", "sm": 90}
        (launch,) = (k for k in launches if key.items() <= k.items())
        assert number == f"{launch['used'] * 100:.0f}"
        assert launch["bound"] == {"fp32": "memory", "bf16": "instructions"}[dtype]


def test_trainings() -> None:
    figures = re.findall(r"([\d.]+) bytes(?: per parameter)?, (?:ends )?at ([\d.]+)", FLAT)
    norms = re.search(
        r"ends at ([\d.]+) with a mean spectral norm of ([\d.]+) .{9,99} AdamW has ([\d.]+)\.", FLAT
    )
    files = {"pretrain_adamw.json": ("fused_optim", "torch"), "pretrain_muon.json": ("fused_optim",)}
    found = [result_of(file)["summary"][side] for file, sides in files.items() for side in sides]
    clipped = result_of("pretrain_clip.json")["summary"]["fused_optim"]
    for (memory, loss), summary in zip(figures, found, strict=True):
        says(memory, sum(summary["bytes_per_parameter"].values()))
        says(loss, summary["validation_loss"])
    values = (clipped["validation_loss"], clipped["mean_spectral_norm"], found[1]["mean_spectral_norm"])
    assert norms is not None
    for said, value in zip(norms.groups(), values, strict=True):
        says(said, value)
    crossing = re.search(r"it is below that between steps (\d+) and (\d+)\.", FLAT)
    assert crossing is not None
    curve = dict(result_of("pretrain_muon.json")["runs"]["fused_optim"]["validation"])
    before, after = (curve[int(step)] for step in crossing.groups())
    assert after < found[1]["validation_loss"] < before
