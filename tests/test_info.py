"""The command line's ``info`` and ``list``, and what it says when it is called wrongly."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import fused_optim
from fused_optim import info
from fused_optim.__main__ import main
from fused_optim.kernels import dispatch
from fused_optim.kernels.codecs import CODECS, PARAM_CODECS, STATE_CODECS
from fused_optim.kernels.native import cpu, library
from fused_optim.kernels.rules import RULES
from fused_optim.training import plan_rules


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_info_shows_versions_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    text = _printed(capsys, "info")
    assert re.search(rf"^  fused_optim +{re.escape(fused_optim.__version__)}$", text, re.MULTILINE)
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}$", text, re.MULTILINE)
    assert str(library.path("cpu")) in text
    assert f"{cpu.isas()[0]} (in use)" in text
    assert re.search(rf"^  threads +{torch.get_num_threads()} ", text, re.MULTILINE)


def test_info_names_every_backend_with_what_it_lacks() -> None:
    backends = info.report()["backends"]
    assert list(backends) == [name for name in dispatch.BACKENDS if name != "auto"]
    for name, missing in dispatch.available().items():
        assert backends[name] == (missing or "ready")


def test_info_says_how_to_get_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "libfused_optim_cpu.so was not built; install g++"
    monkeypatch.setattr(cpu, "unavailable", lambda: remedy)
    report = info.report()
    assert report["CPU"]["library"] == remedy
    assert report["CPU"]["paths"] == "none"
    assert report["backends"]["native"] == remedy


def test_a_missing_library_is_built_from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package index has none of this name."""
    monkeypatch.setattr(library, "path", lambda kind: None)
    said = library.load.__wrapped__("cpu")
    assert said.endswith("in the checkout, or there `pip install --force-reinstall --no-deps .`")


def test_info_shows_one_openmp_runtime() -> None:
    """In a process of its own: what other tests import must not count."""
    code = "from fused_optim import info; print(info.report()['CPU']['OpenMP'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (runtime,) = done.stdout.strip().split(", ")
    assert Path(runtime).name.startswith("libgomp")


def test_list_gives_the_bytes_of_the_catalogues(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _printed(capsys, "list").splitlines()
    rows = {cells[0]: cells[1:] for cells in map(str.split, lines)}
    assert "blank" not in rows
    for codec in (codec for codec in CODECS.values() if not codec.write_only):
        shown = rows[codec.name]
        assert float(shown[0]) == pytest.approx(codec.bytes_per_value, rel=1e-3)
        for rule, cell in zip(RULES.values(), shown[-len(RULES) :], strict=True):
            if codec.name in STATE_CODECS:
                assert float(cell) == pytest.approx(len(rule.slots) * codec.bytes_per_value, rel=1e-3)
            else:
                assert cell == "-"


def test_list_says_what_options_may_name(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _printed(capsys, "list").splitlines()
    rows = {cells[0]: " ".join(cells[1 : -len(RULES)]) for cells in map(str.split, lines) if cells}
    options = {"param_codec": PARAM_CODECS, "state_codec": STATE_CODECS}
    dtypes = {name: codec.planes[0].dtype for name, codec in CODECS.items() if not codec.write_only}
    for name, dtype in dtypes.items():
        plain = dtype if CODECS[name].block == 1 and dtype != "uint8" else "float32"
        weight = torch.nn.Parameter(torch.ones(64, 64, dtype=getattr(torch, plain)))
        shown = rows[name].split(" ")
        for option, names in options.items():
            assert (option.removesuffix("_codec") in [cell.strip(",") for cell in shown]) == (name in names)
            with nullcontext() if name in names else pytest.raises(ValueError, match=name):
                fused_optim.AdamW([weight], **{option: name})


def test_list_names_the_states_of_every_class_that_plan_knows(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split(maxsplit=1) for line in _printed(capsys, "list").splitlines()]
    rows = {cells[0]: cells[-1] for cells in lines}
    assert set(plan_rules.NAMES) - set(rows) == {"adamw", "adamw_amsgrad"}
    assert rows["normuon"] == "momentum_buffer, row_second_moment; others: exp_avg, exp_avg_sq"
    assert rows["adamh"] == "exp_avg, exp_avg_sq, radius; others: exp_avg, exp_avg_sq"


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_every_command(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    text = _printed(capsys, *arguments)
    assert all(f"\n  {command} " in text for command in ("info", "list", "plan", "pretrain"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inof",), "unknown command 'inof': the commands are info, list, plan and pretrain"),
        (("info", "--verbose"), "info takes no options, got --verbose"),
        (("list", "adam"), "list takes no options, got adam"),
    ],
)
def test_wrong_call_is_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert "usage: python -m fused_optim" in printed.err
    assert not printed.out


@pytest.mark.parametrize("command", ["info", "list"])
def test_commands_without_options_have_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("-h", "--help"):
        assert _printed(capsys, command, option).startswith("usage: python -m fused_optim COMMAND")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _printed(capsys, "--version") == f"fused_optim {fused_optim.__version__}\n"


@pytest.mark.parametrize("command", ["list", "plan --help"])
def test_a_reader_that_leaves_early_ends_it_quietly(command: str) -> None:
    """As ``| head -1`` does."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fused_optim", *command.split()],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("pretrain --help", "cuda, cuda:1 ... (default: auto)"),
        ("pretrain --data no/böök", "no/b\\xf6\\xf6k does not exist"),
        ("plan --matrix 8x8 --json plän.json --no-peers", "8x8"),
    ],
)
def test_a_terminal_with_ascii_alone(command: str, shown: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-m", "fused_optim", *command.split()],
        cwd=tmp_path,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    text = (done.stdout + done.stderr).decode("ascii")
    assert shown in text and "Traceback" not in text


def test_pretrain_gets_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err
