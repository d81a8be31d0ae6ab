"""The README: its paths exist, its recipes use what we have, its tables of bytes and learning hold."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import fused_optim
from bench import sparse_learning
from fused_optim.training import plan, plan_command, pretrain
from tests.readme import EPYC, FILES, FLAT, ROOT, TEXT, result_of, says, table_rows


def test_every_path_exists() -> None:
    paths: list[Path] = []
    for file, text in FILES.items():
        links = re.findall(r"\]\(([^)#][^)#]*)(?:#[^)]*)?\)", text)
        paths += [file.parent / link for link in links if "://" not in link]
        code = re.findall(r"`((?:bench|tests|fused_optim|kernels|csrc)/[\w./]*)`", text)
        paths += [ROOT / path for path in code if "<" not in path]
    assert len(paths) > 50
    assert [path for path in paths if not path.exists()] == []


def test_every_anchor_exists() -> None:
    anchors = {
        file: {
            re.sub(r"[^\w -]", "", head).lower().replace(" ", "-")
            for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        }
        for file, text in FILES.items()
    }
    for file, text in FILES.items():
        for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
            assert anchor in anchors[(file.parent / link if link else file).resolve()]


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
    for _, name, options, said in table_rows("you want"):
        if not said[0].isdigit():
            continue
        given = dict(re.findall(r'(param_codec|state_codec)="(\w+)"', options))
        state = given.get("state_codec", "int8" if "8bit" in name else "auto")
        rule = {"`Lion`": "lion", "`Muon`": "sgd_momentum"}.get(name, "adam")
        storage = f"{given.get('param_codec', 'fp32')}+{state}"
        found = plan({"w": (4096, 4096)}, rules=[rule], storages=[storage], peers=False)
        says(said, found.entries[0].memory.kept / found.parameters)


def test_bytes_of_the_recipes(tmp_path: Path) -> None:
    """The command that the README names gives the bytes of every recipe."""
    found = re.search(r"`python -m fused_optim plan (--matrix [^`]*) --sparsity [\w-]+`", FLAT)
    assert found is not None
    path = tmp_path / "plan.json"
    for _, _, said, name in table_rows("recipe"):
        recipe = ["--sparsity", name.strip("`")] if name else []
        assert plan_command.main([*found[1].split(), *recipe, "--no-peers", "--json", str(path)]) == 0
        entries = json.loads(path.read_text())["entries"]
        for text, entry in zip(said.replace("(", "").split(), entries, strict=True):
            says(text, entry["bytes_per_parameter"]["kept"])


def test_table_of_what_recipes_learn() -> None:
    for line in result_of("sparse_learning.json", EPYC)["table"]:
        assert line in TEXT.splitlines()


def test_differences_between_recipes_over_six_seeds() -> None:
    losses: dict[str, dict[int, float]] = {}
    for file in ("sparse_learning", "sparse_learning_cast", "sparse_learning_seeds"):
        for row in result_of(f"{file}.json")["rows"]:
            losses.setdefault(row["case"], {})[row["seed"]] = row["validation_loss"]
    for name, case in (("sr-ste", "sr-ste"), ("mask-decay", "mask-decay"), ("cast", "cast:dense-steps=700")):
        apart = [losses[case][seed] - losses["one-shot"][seed] for seed in range(6)]
        text = f"{statistics.mean(apart):+.3f} ± {statistics.stdev(apart) / 6**0.5:.3f} for `{name}`"
        assert text in FLAT, text


def _apart(file: str, case: str) -> list[float]:
    """Validation losses beside those of pruning once, seed by seed."""
    rows = {(row["case"], row["seed"]): row["validation_loss"] for row in result_of(file, EPYC)["rows"]}
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
        says(number, value)


def test_papers_are_cited() -> None:
    papers = TEXT[TEXT.index("## Papers") :]
    cited = (ROOT / "CITATION.cff").read_text()
    assert set(re.findall(r"abs/([\d.]+)\)", papers)) == set(re.findall(r"arxiv.org/abs/([\d.]+)", cited))


def test_commands_of_the_results_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    for _, cell in table_rows("result file"):
        words = cell.split("`")[1].removeprefix("OMP_NUM_THREADS=1 ").split()
        if words[2:4] == ["bench", "sparse_learning"]:
            pretrain.parse(sparse_learning._parser().parse_known_args(words[4:])[1])
        elif words[2] == "bench":
            importlib.import_module(f"bench.{words[3]}")._parser().parse_args(words[4:])
        else:
            pretrain.parse(words[4:])
