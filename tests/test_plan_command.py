"""``python -m fused_optim plan``: its table, chart and JSON, configurations, and what it refuses."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path

import pytest

from fused_optim.training import Storage, plan, plan_command, plan_figure, plan_report
from fused_optim.training.peers import PEERS
from fused_optim.training.planner import DEFAULT_RULES, DEFAULT_STORAGES
from fused_optim.training.presets import PRESETS


@pytest.mark.parametrize("name", ["124m", "1b"])
def test_presets_are_transformers_llamas(name: str, tmp_path: Path) -> None:
    shape = PRESETS[name]
    path = tmp_path / "config.json"
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "tie_word_embeddings": shape.tied,
    }
    path.write_text(json.dumps(config))
    model = plan_command.from_config(str(path))
    assert {key: tuple(param.shape) for key, param in model.named_parameters()} == shape.tensors()
    assert all(param.is_meta for param in model.parameters())


def test_one_name_needs_no_list() -> None:
    shapes, how = {"weight": (64, 64)}, Storage.parse("split8+int8")
    expected = plan(shapes, rules=["lion"], storages=[how], peers=False)
    assert plan(shapes, rules="lion", storages=how, peers=False) == expected
    assert plan(shapes, rules="lion", storages="split8+int8", peers=False) == expected


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("options", [(), ("--gpus", "1024", "--shard", "states")], ids=["one", "many"])
def test_table_fits_the_terminal(
    name: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    rules = [text for rule in ("adam_amsgrad", "sgd") for text in ("--rule", rule)]
    assert plan_command.main(["--model", name, *rules, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert all(any(line.startswith(f"  {how} ") for line in lines) for how in (*DEFAULT_STORAGES, *PEERS))
    assert any(line.startswith("Activations") and "not included" in line for line in lines)


def test_command_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers, chart = tmp_path / "plan.json", tmp_path / "plan.png"
    assert plan_command.main(["--model", "1B", "--json", str(numbers), "--png", str(chart)]) == 0
    assert "TinyLlama" in capsys.readouterr().out
    assert chart.read_bytes().startswith(b"\x89PNG")
    read = json.loads(numbers.read_text())
    assert read["parameters"] == 1_100_048_384
    rows = {(entry["rule"], entry["storage"]): entry for entry in read["entries"]}
    assert set(rows) == {*itertools.product(DEFAULT_RULES, DEFAULT_STORAGES), *((None, key) for key in PEERS)}
    for entry in rows.values():
        parts = entry["bytes"]
        assert parts["total"] == sum(parts[key] for key in ("weights", "master", "gradients", "states"))
        assert (entry["source"] is None) == (entry["rule"] is not None)


def test_chart_of_little_and_of_many_gpus(tmp_path: Path) -> None:
    for index, options in enumerate(({}, {"gpus": 64, "shard": "all"})):
        found = plan({"weight": (100, 100)}, rules=["sgd"], storages=["fp32"], peers=False, **options)
        path = tmp_path / f"{index}.png"
        plan_figure.draw(found, path)
        assert path.stat().st_size > 1000


def test_options_reach_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    options = ["--keep-fp32", "*norm*", "--keep-fp32", "10", "--grad-dtype", "fp32", "--no-peers"]
    options += ["--rule", "adamw", "--storage", "kahan+fp8", "--json", str(path)]
    assert plan_command.main(["--model", "124m", *options]) == 0
    (entry,) = json.loads(path.read_text())["entries"]
    expected = plan(
        PRESETS["124m"].tensors(),
        rules=["adamw"],
        storages=["kahan+fp8"],
        grad_dtype="fp32",
        keep_fp32=["*norm*", 10],
        peers=False,
    ).entries[0]
    assert (entry["bytes"], entry["rule"]) == (plan_report.bytes_of_parts(expected.memory), "adamw")


def test_sparsity_reaches_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    options = ["--sparsity", "masked-decay", "--storage", "fp32", "--json", str(path)]
    assert plan_command.main(["--model", "124m", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "), masked-decay 2:4: 123,551,232 parameters" in lines[0] and max(map(len, lines)) <= 120
    (entry,) = [e for e in json.loads(path.read_text())["entries"] if e["rule"]]
    layers = {name: size for name, size in PRESETS["124m"].tensors().items() if "proj" in name}
    masked = sum(map(math.prod, layers.values()))
    assert f"Masked: {len(layers)} tensors" in "\n".join(lines)
    assert (entry["rule"], entry["bytes"]["master"]) == ("adam", 4 * masked)


def test_muon_by_its_readme_row(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rule", "muon", "--storage", "split8+int8", "--no-peers"]
    assert plan_command.main(["--matrix", "4096x4096", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "muon: momentum_buffer; others: exp_avg, exp_avg_sq" in lines
    (row,) = (line.split() for line in lines if line.startswith("  split8+int8"))
    assert row[1:5] == ["2.000", "1.000", "1.016", "4.016"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "9t"], "invalid choice: '9t'"),
        (["--model", "8b", "--config", "config.json"], "--config and --matrix all name a model; give one"),
        (["--model", "8b", "--matrix", "8x8"], "--config and --matrix all name a model; give one"),
        (["--matrix", "8"], "invalid ROWSxCOLUMNS value: '8'"),
        (
            ["--matrix", "8x6", "--sparsity", "sr-ste"],
            "SRSTE 2:4 masks no parameter: matrix: dimension 1 has 6 weights, no multiple of 4;",
        ),
        (["--matrix", "9" * 20 + "x" + "9" * 20], "the shape of 'matrix' has more than 2**59 values"),
        (["--matrix", "0x" + "9" * 20], "the shape of 'matrix' has more than 2**59 values"),
        (["--sparsity", "sparser"], "invalid choice: 'sparser'"),
        (["--pattern", "1:4"], "--pattern is for a recipe; give --sparsity one-shot"),
        (["--sparsity", "cast", "--rule", "lion"], "error: CAST is for CASTAdamS"),
        (["--config", ""], "--config : there is no such file"),
        (["--keep-fp32=-5"], "-5 is negative; give a size of 0 or more, or a name pattern"),
        (["--keep-fp32", "-5"], "-5 is negative; give a size of 0 or more, or a name pattern"),
        (["--json", ""], "cannot be written"),
        (["--config", "no/config.json"], "there is no such file; give the config.json of a model"),
        (["--rule", "adan"], "rule 'adan' is unknown; allowed: adam,"),
        (["--storage", "int8"], "parameters cannot be stored as 'int8'; allowed: auto, fp32"),
        (["--storage", "bf16+int3"], "states cannot be stored as 'int3'; allowed: auto, fp32"),
        (["--gpus", "0"], "gpus=0: at least one GPU is needed"),
        (["--gpus", "many"], "invalid int value: 'many'"),
        (["--shard", "half"], "invalid choice: 'half'"),
        (["--grad-dtype", "int8"], "invalid choice: 'int8'"),
        (["--json", "no/such/folder/plan.json"], "the folder does not exist"),
        (["--verbose"], "unrecognized arguments: --verbose (--help lists all options)"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_command.main(options) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("plan: error: ") and message in printed.err
    assert printed.err.count("\n") == 1 and not printed.out


def test_configs_that_cannot_be_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    for text in ("{", "{}", '{"model_type": "no-such-model"}', '{"model_type": "llama", "hidden_size": -1}'):
        path.write_text(text)
        assert plan_command.main(["--config", str(path)]) == 2
        assert "cannot build this model" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--png"])
def test_files_that_cannot_be_written(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_command.main(["--model", "124m", option, str(tmp_path)]) == 2
    assert "cannot be written (Is a directory); give another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "options"), [("matplotlib", ["--png", "x.png"]), ("transformers", ["--config", "c.json"])]
)
def test_missing_packages_are_named(
    package: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(plan_command, "find_spec", lambda name: None if name == package else find(name))
    assert plan_command.main(options) == 2
    expected = f"{options[0]} needs {package}; install with: pip install 'fused_optim[pretrain]'"
    assert expected in capsys.readouterr().err
