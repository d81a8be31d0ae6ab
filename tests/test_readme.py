"""The README: its paths exist, its figures are in the files it names, its recipes use what we have."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_optim
from bench import sparse_learning
from fused_optim.training import plan, plan_command, pretrain
from tests.readme import FLAT, TEXT

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu-2-core-avx512"
EPYC = RESULTS.with_name("cpu-2-core-epyc")


def _result(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def _cases(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    return _result(name, folder)["cases"]


def _rows(first_cell_of_header: str, section: str = TEXT) -> list[list[str]]:
    """The cells of a table, found by its header."""
    lines = section[section.index(f"| {first_cell_of_header} |") :].splitlines()[2:]
    cells: list[list[str]] = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


def _says(text: str, value: float) -> None:
    """The text rounds the value: within half a unit of its last digit."""
    number = re.match(r"[\d.]+(?:e-?\d+)?", text)
    assert number is not None, text
    mantissa, _, exponent = number[0].partition("e")
    digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
    assert abs(float(number[0]) - value) <= 0.5000001 * 10.0**-digits, (text, value)


def test_every_path_exists() -> None:
    links = re.findall(r"\]\(([^)#][^)]*)\)", TEXT)
    code = re.findall(r"`((?:bench|tests|fused_optim|kernels|csrc)/[\w./]*)`", TEXT)
    paths = [link for link in links if "://" not in link]
    assert len(paths) > 10 and code
    missing = [path for path in (*paths, *code) if "<" not in path and not (ROOT / path).exists()]
    assert missing == []


def test_every_anchor_exists() -> None:
    heads = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_steps() -> None:
    section = TEXT[TEXT.index("## Numbers") :]
    rows = _rows("case", section)
    for column, folder in ((2, RESULTS), (3, EPYC)):
        measured = [c["targets"][0]["measured"] for c in _cases("step.json", folder) if c["targets"]]
        for row, value in zip(rows, measured, strict=True):
            _says(row[column], value)
    cold = re.search(r"with cold ones, beside other libraries, it is ([\d.]+) there", FLAT)
    faster = re.search(r"copies were ([\d.]+) times as fast, the ratio was ([\d.]+) ", FLAT)
    assert cold is not None and faster is not None
    now, before = (
        next(c for c in _cases(name, EPYC) if c["name"] == "AdamW fp32, many tensors")
        for name in ("step.json", "step-faster-memory.json")
    )
    _says(faster[1], before["copy_gb_per_s"] / now["copy_gb_per_s"])
    _says(faster[2], before["targets"][0]["measured"])
    ours, theirs = _cases("step.json", EPYC)[-1]["rows"][:2]
    _says(cold[1], ours["ms"]["median"] / theirs["ms"]["median"])


def _medians(folder: Path) -> dict[str, dict[str, float]]:
    """By case and library, milliseconds of the codecs' table."""
    return {
        case["name"]: {row["source"]: row["ms"]["median"] for row in case["rows"]}
        for case in _cases("codecs.json", folder)
    }


def test_codecs() -> None:
    section = TEXT[TEXT.index("States of 8 bits and split weights") :]
    for name, *cells in _rows("case", section):
        case = name.partition(" (")[0].replace("`", "").replace(" + ", "/")
        case = case.replace("AdamW bf16_split8 ", "AdamW bf16_split8/")
        for peer, cell in zip(("torch-fused", "bitsandbytes-8bit", "torchao-8bit"), cells, strict=True):
            for said, folder in zip(cell.split(", ") if cell else (), (RESULTS, EPYC), strict=bool(cell)):
                found = _medians(folder)[case]
                _says(said, found["fused_optim"] / found[peer])
    order = (
        "AdamW fp32/int8",
        "AdamW fp32/int8_companded",
        "AdamW bf16_split8/int8_companded",
        "Lion fp32/int8",
    )
    runs = re.findall(r"it read ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+)", TEXT)
    for said, file in zip(runs, ("codecs-later.json", "codecs-throttled.json"), strict=True):
        rows = {case["name"]: case["rows"] for case in _cases(file)}
        for text, name in zip(said, order, strict=True):
            _says(text, rows[name][0]["ms"]["median"] / rows[name][1]["ms"]["median"])


def test_whole_matrices() -> None:
    muon = re.search(r"takes ([\d.]+) of torch.optim.Muon's time \(quartiles ([\d.]+) to ([\d.]+);", TEXT)
    target = _cases("newton_schulz.json")[0]["targets"][0]
    assert muon is not None
    for text, value in zip(muon.groups(), (target["measured"], *target["quartiles"]), strict=True):
        _says(text, value)
    elsewhere = re.search(r"it takes ([\d.]+) \(([\d.]+) to ([\d.]+);", FLAT)
    target = _cases("newton_schulz.json", EPYC)[-1]["targets"][0]
    assert elsewhere is not None
    for text, value in zip(elsewhere.groups(), (target["measured"], *target["quartiles"]), strict=True):
        _says(text, value)
    shares = re.search(
        r"runs at (\d+) % of the speed .* iteration at (\d+) %: .* ours has (\d+) % fewer",
        FLAT,
    )
    rows = {row["label"]: row for row in _cases("newton_schulz.json")[1]["rows"] if row["status"] == "ok"}
    ours, theirs = rows["fused_optim"], rows["torch.optim.Muon"]
    assert shares is not None
    values = (ours["of_matmul"], theirs["of_matmul"], 1 - ours["flops"] / theirs["flops"])
    for text, value in zip(shares.groups(), values, strict=True):
        _says(text, 100 * value)
    cases = _cases("soft_clip.json", EPYC)
    for row in _rows("largest singular value over `c`"):
        for cell, dtype in zip(row[1:], ("fp32", "bf16"), strict=True):
            (case,) = [c for c in cases if c["name"].endswith(f"{dtype}, ratio {row[0]}")]
            time, error, theirs = re.fullmatch(r"(\S+), (\S+) \((\S+)\)", cell).groups()
            _says(time, case["targets"][0]["measured"])
            _says(error, case["rows"][0]["error"])
            _says(theirs, case["rows"][1]["error"])


def test_soft_clip_as_exact_as_released() -> None:
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for case in _cases("soft_clip.json", EPYC):
        if case["name"].endswith("as exact as released"):
            times["bf16" if "bf16" in case["name"] else "fp32"].append(case["targets"][0]["measured"])
    found = re.search(
        r"takes ([\d.]+) to ([\d.]+) of its time in fp32 and ([\d.]+) to ([\d.]+) in bf16",
        FLAT,
    )
    assert found is not None
    for said, value in zip(
        found.groups(), [e for t in times.values() for e in (min(t), max(t))], strict=True
    ):
        _says(said, value)


def test_soft_clip_of_other_sizes() -> None:
    times: dict[str, list[float]] = {}
    for case in _cases("soft_clip_sizes.json", EPYC):
        size, _, ratio = case["name"].removeprefix("soft clip ").partition(", ratio ")
        if ratio.isdecimal():
            times.setdefault(size, []).append(case["targets"][0]["measured"])
    found = re.search(
        r"takes ([\d.]+) to ([\d.]+) of the released time for 512 × 512 in fp32, ([\d.]+) to ([\d.]+) for "
        r"512 × 2048 and ([\d.]+) to ([\d.]+) for 256 × 1024\..* up to ([\d.]+) times the released one in "
        r"fp32, and ([\d.]+) times in bf16",
        FLAT,
    )
    assert found is not None
    named = [times[f"{size} fp32"] for size in ("512x512", "512x2048", "256x1024")]
    values = [edge for each in named for edge in (min(each), max(each))]
    values += [
        max(max(each) for size, each in times.items() if size.endswith(end)) for end in ("fp32", "bf16")
    ]
    for said, value in zip(found.groups(), values, strict=True):
        _says(said, value)


def test_masks() -> None:
    names = {
        "2:4 of 1024x1024 fp32": 3,
        "transposable of 1024x1024 fp32": 1,
        "transposable of 1024x1024 bf16": 1,
    }
    found = {case["name"]: [t["measured"] for t in case["targets"]] for case in _cases("masks.json", EPYC)}
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
        for case in _cases("masks_step.json", EPYC)
    )
    target = _cases("masks_step.json", EPYC)[0]["targets"][0]
    values += [target["measured"], *target["quartiles"]]
    values += [once["masked"] / once["torch fused and three passes (apex ASP)"]]
    values += [anew["masked (SR-STE)"] / anew["dense"]]
    for said, value in zip((*searches.groups(), *steps.groups()), values, strict=True):
        _says(said, value)


def test_compiled_steps() -> None:
    """The table has every kernel of the file in the arithmetic that is chosen for it."""
    data = json.loads((RESULTS.parent / "static" / "sm_90.json").read_text())
    assert "nothing was run" in data["note"]
    chosen = [k for k in data["kernels"] if k["arithmetic"] == k["auto"]]
    for row, k in zip(_rows("compiled step"), chosen, strict=True):
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
    found = [_result(file)["summary"][side] for file, sides in files.items() for side in sides]
    clipped = _result("pretrain_clip.json")["summary"]["fused_optim"]
    for (memory, loss), summary in zip(figures, found, strict=True):
        _says(memory, sum(summary["bytes_per_parameter"].values()))
        _says(loss, summary["validation_loss"])
    values = (clipped["validation_loss"], clipped["mean_spectral_norm"], found[1]["mean_spectral_norm"])
    assert norms is not None
    for said, value in zip(norms.groups(), values, strict=True):
        _says(said, value)
    crossing = re.search(r"it is below that between steps (\d+) and (\d+)\.", FLAT)
    assert crossing is not None
    curve = dict(_result("pretrain_muon.json")["runs"]["fused_optim"]["validation"])
    before, after = (curve[int(step)] for step in crossing.groups())
    assert after < found[1]["validation_loss"] < before


@pytest.mark.parametrize("block", re.findall(r"^```py\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
def test_recipes_use_our_names_and_arguments(block: str) -> None:
    """What may need packages that are not here: syntax, our classes, our arguments."""
    tree = ast.parse(block)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    ours = {
        ast.unparse(c.func): [k.arg for k in c.keywords]
        for c in calls
        if "fused_optim." in ast.unparse(c.func)
    }
    handed = re.search(r"optimizer_cls_and_kwargs=\(fused_optim\.(\w+), options\)", block)
    if handed:
        (options,) = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
        ours[f"fused_optim.{handed[1]}"] = [ast.literal_eval(key) for key in options.keys if key]
    assert ours
    for name, keywords in ours.items():
        cls = getattr(fused_optim, name.removeprefix("fused_optim."))
        options = {"lr": 0.1, "betas": (0.9, 0.95), "state_codec": "int8", "clip_grad_norm": 1.0}
        assert set(keywords) <= set(options)
        cls([torch.nn.Parameter(torch.ones(2))], **{key: options[key] for key in keywords if key})


def test_the_trainer_takes_what_its_recipe_gives() -> None:
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        pytest.skip("transformers is not installed")
    # Read, not imported: that takes seconds.
    tree = ast.parse(Path(found.origin).with_name("trainer.py").read_text())
    (trainer,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Trainer"]
    (init,) = [n for n in trainer.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    assert "optimizer_cls_and_kwargs" in {argument.arg for argument in init.args.args}


def test_bytes_of_the_guide() -> None:
    """The table beside the planner."""
    for _, name, options, said in _rows("you want"):
        if not said[0].isdigit():
            continue
        given = dict(re.findall(r'(param_codec|state_codec)="(\w+)"', options))
        state = given.get("state_codec", "int8" if "8bit" in name else "auto")
        rule = {"`Lion`": "lion", "`Muon`": "sgd_momentum"}.get(name, "adam")
        storage = f"{given.get('param_codec', 'fp32')}+{state}"
        found = plan({"w": (4096, 4096)}, rules=[rule], storages=[storage], peers=False)
        _says(said, found.entries[0].memory.kept / found.parameters)


def test_bytes_of_the_recipes(tmp_path: Path) -> None:
    """The command that the README names gives the bytes of every recipe."""
    found = re.search(r"`python -m fused_optim plan (--matrix [^`]*) --sparsity [\w-]+`", FLAT)
    assert found is not None
    path = tmp_path / "plan.json"
    for _, _, said, name in _rows("recipe"):
        recipe = ["--sparsity", name.strip("`")] if name else []
        assert plan_command.main([*found[1].split(), *recipe, "--no-peers", "--json", str(path)]) == 0
        entries = json.loads(path.read_text())["entries"]
        for text, entry in zip(said.replace("(", "").split(), entries, strict=True):
            _says(text, entry["bytes_per_parameter"]["kept"])


def test_table_of_what_recipes_learn() -> None:
    for line in _result("sparse_learning.json", EPYC)["table"]:
        assert line in TEXT.splitlines()


def test_differences_between_recipes_over_six_seeds() -> None:
    losses: dict[str, dict[int, float]] = {}
    for file in ("sparse_learning", "sparse_learning_cast", "sparse_learning_seeds"):
        for row in _result(f"{file}.json")["rows"]:
            losses.setdefault(row["case"], {})[row["seed"]] = row["validation_loss"]
    for name, case in (("sr-ste", "sr-ste"), ("mask-decay", "mask-decay"), ("cast", "cast:dense-steps=700")):
        apart = [losses[case][seed] - losses["one-shot"][seed] for seed in range(6)]
        text = f"{statistics.mean(apart):+.3f} ± {statistics.stdev(apart) / 6**0.5:.3f} for `{name}`"
        assert text in FLAT, text


def _apart(file: str, case: str) -> list[float]:
    """Validation losses beside those of pruning once, seed by seed."""
    rows = {(row["case"], row["seed"]): row["validation_loss"] for row in _result(file, EPYC)["rows"]}
    return [loss - rows["one-shot", seed] for (name, seed), loss in rows.items() if name == case]


def test_recipes_beat_pruning_once() -> None:
    files = {"sr-ste": "sparse_learning", "mask-decay": "sparse_learning", "cast": "sparse_learning_cast"}
    for name, file in files.items():
        apart = _apart(f"{file}.json", name)
        assert len(apart) == 6 and max(apart) < 0
        error = statistics.stdev(apart) / 6**0.5
        assert f"{statistics.mean(apart):+.4f} ± {error:.4f} for `{name}`" in FLAT
    said = re.search(
        r"`sr-ste` wins by ([\d.]+) ± ([\d.]+), `mask-decay` by ([\d.]+) ± ([\d.]+) and `cast` by "
        r"([\d.]+) ± ([\d.]+); `sr-ste` with masks from the first step loses "
        r"([\d.]+) ± ([\d.]+), `structure-decay` ([\d.]+) ± ([\d.]+)\.",
        FLAT,
    )
    assert said is not None
    values: list[float] = []
    for case in ("sr-ste", "mask-decay", "cast", "sr-ste:dense-steps=0", "structure-decay"):
        apart = _apart("sparse_learning_nano.json", case)
        values += [abs(statistics.mean(apart)), statistics.stdev(apart)]
    for number, value in zip(said.groups(), values, strict=True):
        _says(number, value)


def test_papers_are_cited() -> None:
    papers = TEXT[TEXT.index("## Papers") :]
    cited = (ROOT / "CITATION.cff").read_text()
    assert set(re.findall(r"abs/([\d.]+)\)", papers)) == set(re.findall(r"arxiv.org/abs/([\d.]+)", cited))


def test_commands_of_the_results_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    for _, cell in _rows("result file"):
        words = cell.split("`")[1].removeprefix("OMP_NUM_THREADS=1 ").split()
        if words[2:4] == ["bench", "sparse_learning"]:
            pretrain.parse(sparse_learning._parser().parse_known_args(words[4:])[1])
        elif words[2] == "bench":
            importlib.import_module(f"bench.{words[3]}")._parser().parse_args(words[4:])
        else:
            pretrain.parse(words[4:])
