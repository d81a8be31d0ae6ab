"""The benchmark: it runs, it refuses wrong results, and what it prints follows from its samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, machine, masks, peers, shapes, static, step, tables, timing, verify
from bench.peers import PEERS, Contender, MissingPeerError
from bench.run import Gradients, Run, measure
from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.rules import RULES
from fused_optim.training.origin import COMMIT

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def _quick(case: cases.Case, rounds: int = 3) -> dict[str, Any]:
    small = shapes.shrink(shapes.parse(case.shapes), 64)
    return tables.case_record(measure(case, small, CPU, rounds, 5.0, 2**16))


def test_shapes_are_the_models() -> None:
    llama = shapes.parse("llama-1.1b")
    assert len(llama) == 201
    assert sum(torch.Size(shape).numel() for shape in llama) == 1_100_048_384
    assert shapes.parse("300x16Ki") == [(16384,)] * 300
    with pytest.raises(ValueError, match="COUNTxSIZE"):
        shapes.parse("8x4Gi")


def test_every_rule_has_a_recipe_and_every_suite_its_cases() -> None:
    assert set(peers.recipes()) == set(RULES)
    for name in cases.SUITES:
        found = cases.suite(name, list(PEERS), list(RULES), "8x16")
        assert len({(case.name, case.shapes) for case in found}) == len(found)
        for case in found:
            labels = [contender.label for contender in case.contenders]
            assert len(set(labels)) == len(labels)
            assert {t.ours for t in case.targets} | {t.against for t in case.targets if t.against} <= set(
                labels
            )
    rules = {case.contenders[0].rule for case in cases.suite("gpu", [], list(RULES), "")}
    assert rules == set(RULES)


def test_the_issue_table_holds_the_issue_figures() -> None:
    limits = [target.limit for case in cases.issue_table(()) for target in case.targets]
    assert limits == [1.03, 0.85, 0.75, 0.78, 0.5, 0.25]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("param", "states"), cases.MAIN_STORAGES)
def test_our_steps_pass_the_check(rule: str, param: str, states: str) -> None:
    # Smaller ones would keep fp32 states, others end with a short block.
    blocks = CODECS[states].block > 1
    sizes: list[tuple[int, ...]] = [(64, 64), (8192,)] if blocks else [(5,), (64, 33), (1,)]
    run = Run(Contender("fused_optim", rule, param, states), sizes, Gradients(sizes, CPU), CPU, False)
    assert run.check(verify.Sampler(sizes, CPU)) <= run.contender.allowed_error
    model, kept = run.bytes_per_parameter(), run.state_bytes()
    assert model == 3 * run.dtype.itemsize + 2 * kept, "the codec model and the tensors disagree"


@pytest.mark.parametrize("grads", ["fresh", "kept"])
def test_gradients_are_new_tensors_or_the_same(grads: str) -> None:
    sizes = [(64,)] * 3
    run = Run(Contender("fused_optim"), sizes, Gradients(sizes, CPU), CPU, grads == "kept")
    seen = []
    for _ in range(2):
        run.prepare()
        seen.append([param.grad for param in run.params])
        run.call()
        run.finish()
    same = [a is b for a, b in zip(*seen, strict=True)]
    assert all(same) if grads == "kept" else not any(same)


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    case = cases.Case("wrong", "3x64", (Contender("torch-fused"),))
    monkeypatch.setattr(verify, "change_in_float64", lambda *_: torch.ones(3))
    monkeypatch.setattr(
        "bench.run.change_in_float64", lambda rule, hyper, start, grads: torch.ones_like(start)
    )
    (row,) = _quick(case)["rows"]
    assert row["status"] == "wrong"
    assert "ms" not in row and "relative error 1.0e+00" in row["reason"]


def test_a_missing_peer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "absent", peers.Peer("absent", "no_such_package", {"adam": "AdamW"}))
    ours, absent = Contender("fused_optim"), Contender("absent")
    target = cases.Target("ratio", 1.0, ours.label, absent.label)
    record = _quick(cases.Case("missing", "3x64", (ours, absent), (target,)))
    assert [row["status"] for row in record["rows"]] == ["ok", "missing"]
    assert "absent is not installed" in record["rows"][1]["reason"]
    assert record["targets"][0]["met"] is None
    assert "not measured" in tables.target_table([record]).lines[0]


def test_a_backend_that_is_not_here_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    contender = Contender("fused_optim", options=(("backend", "cuda"), ("arithmetic", "fast")))
    with pytest.raises(MissingPeerError, match="cuda"):
        contender.make([torch.nn.Parameter(torch.ones(3))])


def test_ratio_of_medians_is_over_the_rounds_of_both() -> None:
    """A slow peer misses the later rounds, in which the machine is twice as fast."""
    ours = timing.Samples({0: 1.0, 1: 2.0, 2: 3.0, 3: 0.5, 4: 0.5, 5: 0.5})
    theirs = timing.Samples({0: 2.0, 1: 4.0, 2: 6.0})
    assert timing.ratio(ours, theirs) == (0.5, 0.5, 0.5)
    assert timing.ratio(theirs, ours) == (2.0, 2.0, 2.0)
    assert timing.ratio(timing.Samples({1: 2.0, 2: 3.0}), theirs) == (0.5, 0.5, 0.5)
    assert ours.summary()["min"] == 0.5 and ours.summary()["n"] == 6


def test_every_peer_has_its_ratio_over_common_rounds() -> None:
    ours, theirs = Contender("fused_optim"), Contender("torch-fused")
    case = cases.Case("both", "3x64", (ours, theirs), (cases.Target("ratio", 9.0, ours.label, theirs.label),))
    outcome = measure(case, [(64,)] * 3, CPU, 3, 5.0, 2**16)
    for row, times in zip(outcome.rows, ({0: 1.0, 1: 2.0, 2: 0.1}, {0: 4.0, 1: 4.0}), strict=True):
        assert row.run is not None
        row.run.time = timing.Samples(times)
    record = tables.case_record(outcome)
    mine, other = record["rows"]
    assert "ratios" not in mine
    wanted = {"measured": 0.375, "quartiles": [0.3125, 0.4375], "rounds": 2}
    assert other["ratios"] == {ours.label: wanted}
    (target,) = record["targets"]
    assert (target["measured"], target["quartiles"]) == (wanted["measured"], wanted["quartiles"])


class _Ticking(timing.Timed):
    def call(self) -> None:
        self.spent_s += 1.0


def test_interleaving_takes_turns_and_spares_the_slow() -> None:
    items = [_Ticking(name, CPU) for name in "ab"]
    items[1].spent_s = 1e9
    timing.interleave(items, 5, 1e6, None, least=2)
    assert sorted(items[0].time.by_round) == [0, 1, 2, 3, 4]
    assert sorted(items[1].time.by_round) == [0, 1]


def test_warm_samples_follow_calls_that_do_not_count() -> None:
    item, calls = _Ticking("a", CPU), []
    item.call = lambda: calls.append(len(item.time.by_round))  # type: ignore[method-assign]
    timing.interleave([item], 2, 1e6, None, warm=True)
    # The last of each four is the sample.
    assert calls == [0, 0, 0, 0, 1, 1, 1, 1] and sorted(item.time.by_round) == [0, 1]


class _Clock:
    """Stands in for CUDA events: the device's time is 2 ms."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, stop: _Clock) -> float:
        return 2.0


def test_device_time_and_host_time_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    spins: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "Event", _Clock)
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)
    item = _Ticking("gpu", torch.device("cuda"))
    item.sample(0, None)
    assert item.time.by_round == {0: 2.0}
    assert 0 < item.host.by_round[0] <= item.wall.by_round[0] < 2.0
    assert spins and spins[0] >= 100 * 2000


def test_command_writes_json_and_prints_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    arguments = ["--issue-table", "--quick", "--peers", "none", "--cases", "Lion", "--device", "cpu"]
    assert step.main([*arguments, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["quick"] and result["machine"]["versions"]["torch"] and result["machine"]["sources"]
    (case,) = result["cases"]
    assert {row["source"] for row in case["rows"]} == {"fused_optim", "torch-fused"}
    assert all(row["ms"]["min"] <= row["ms"]["median"] and row["ms"]["n"] == 3 for row in case["rows"])
    (target,) = case["targets"]
    assert target["limit"] == 0.78 and target["measured"] > 0
    printed = capsys.readouterr().out
    assert "0.78" in printed and tables.NOTE in printed and tables.QUICK in printed


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (step, "--suite catalogue --shapes 8x4Gi --list", "unknown shapes '8x4Gi'; use COUNTxSIZE such as"),
        (step, "--suite catalogue --shapes 8x0", "--shapes 8x0: no elements to step over; use COUNTxSIZE"),
        (step, "--device cuda:99", "'cuda:99' is not here, torch sees"),
        (step, "--device tpu", "unknown device 'tpu': allowed are cpu and"),
        (
            step,
            "--cases zzz",
            "'zzz' is in no name of the 8 cases of the suite issue: AdamW fp32; AdamW bf16",
        ),
        (
            step,
            "--shapes 8x4Mi",
            "the suite issue has its own; leave it out, or give --suite with one of",
        ),
        (step, "--suite codecs --rules lion", "--rules lion: the suite codecs has its own"),
        (step, "--suite scaling --shapes 1x8", "--shapes 1x8: the suite scaling has its own"),
        (step, "--suite variants --peers all", "--peers all: the suite variants has its own"),
        (step, "--suite catalogue --rules adamw", "--rules 'adamw': there is no 'adamw'; known: adam,"),
        (step, "--peers apex", "--peers 'apex': there is no 'apex'; known: torch-fused,"),
        (step, "--rounds 0", "'0': a number of rounds, 1 or more"),
        (step, "--base HEAD --samples", "--samples with --base, which times our own steps alone: leave one"),
        (machine, "foo", "unknown device 'foo': allowed are cpu and"),
        (machine, "meta", "nothing runs on 'meta': allowed are cpu and"),
        (static, "--sm 75 --quick", "--sm with --quick, which compiles a list of its own: leave one of them"),
        (static, "--rule sgd --quick", "--rule with --quick"),
        (static, "--sm 7", "--sm 7: Triton compiles for 75, 80"),
    ],
)
def test_a_wrong_or_ignored_argument_is_one_line(
    command: Any, arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments.split()
    if command is step and "--device" not in given:
        given += ["--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        command.main(given)
    *usage, error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and said in error and usage[0].startswith("usage: python -m bench ")


def test_names_say_what_is_stored() -> None:
    """torch has no codecs of ours, and SGD without momentum has no states."""
    arguments = ["--suite", "catalogue", "--shapes", "2x64", "--rules", "sgd,adam", "--device", "cpu"]
    found = step.select(step._parser().parse_args([*arguments, "--peers", "torch-foreach"]))
    names = [case.name for case in found]
    assert names[:3] == ["2x64 sgd fp32", "2x64 sgd bf16", "2x64 sgd bf16_split8"]
    assert "2x64 adam bf16_split8/int8" in names
    for case in found:
        ours, *others = case.contenders
        assert all("split" not in contender.label for contender in others)
        labels = {contender.label for contender in case.contenders}
        assert {t.against for t in case.targets if t.against} <= labels and ours.label in labels


def test_a_deadline_names_what_it_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--issue-table", "--quick", "--deadline", "-1", "--device", "cpu"]) == 0
    assert "left out for lack of time: AdamW fp32" in capsys.readouterr().out


def test_variants_fit_one_table() -> None:
    (case,) = [c for c in cases.variants("3x64", ["lion"]) if "bf16/fp32" in c.name]
    if torch.cuda.is_available():
        pytest.skip("the variants would run")
    table = tables.variant_table([_quick(case)])
    assert table.header == ["case", "triton exact", "triton fast", "cuda exact", "cuda fast"]
    assert table.lines[0][3:] == ["missing", "missing"]


def test_the_machine_is_described() -> None:
    described = machine.describe(CPU)
    assert described["cores"] >= 1 and described["last_level_cache_bytes"] > 0
    assert machine.source_digest() == machine.source_digest()


def test_a_copy_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.delenv(COMMIT, raising=False)
    assert machine.describe(CPU)["commit"] is None
    monkeypatch.setenv(COMMIT, "abc123")
    assert machine.describe(CPU)["commit"] == "abc123"


def test_benchmark_entry_points_run() -> None:
    """Those of the smallest tensors, once each and without a clock; a wrong step would fail."""
    options = ["--quiet", "-p", "no:cacheprovider", "--benchmark-disable", "-k", "host_overhead"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/test_step.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout + done.stderr


def test_bench_without_a_command_lists_them() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "step" in done.stdout and "static" in done.stdout


def test_an_exported_layer_is_timed_or_the_reason_is_said(tmp_path: Path) -> None:
    out = tmp_path / "masks.json"
    assert masks.main(["--suites", "forward", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert [row["status"] for row in case["rows"]] == ["ok", "missing"]
    assert "sparse tensor cores are an NVIDIA GPU's" in case["rows"][1]["reason"]


@pytest.mark.gpu
def test_an_exported_layer_computes_the_same(tmp_path: Path) -> None:
    out = tmp_path / "masks.json"
    sizes = ["--rows", "256", "--columns", "512", "--rounds", "2", "--device", "cuda"]
    assert masks.main(["--suites", "forward", *sizes, "--out", str(out)]) == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert [row["status"] for row in case["rows"]] == ["ok", "ok"]
