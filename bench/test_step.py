"""pytest-benchmark entry points for the main cases: ``pytest bench/test_step.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import Case, issue_table
from bench.peers import Contender, MissingPeerError
from bench.run import Gradients, Run
from bench.shapes import parse
from bench.timing import Sweep
from bench.verify import Sampler

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENTRIES = [
    pytest.param(case, contender, id=f"{case.name}-{contender.label}".replace(" ", "_"))
    for case in issue_table(())
    for contender in case.contenders
]


@pytest.mark.parametrize(("case", "contender"), ENTRIES)
def test_step(case: Case, contender: Contender, benchmark: Any) -> None:
    shapes = parse(case.shapes)
    try:
        run = Run(contender, shapes, Gradients(shapes, DEVICE), DEVICE, case.grads == "kept")
    except MissingPeerError as missing:
        pytest.skip(str(missing))
    error = run.check(Sampler(shapes, DEVICE))
    assert error <= contender.allowed_error, "a wrong step is not timed"
    sweep = Sweep(DEVICE) if case.cold else None

    def setup() -> None:
        run.finish()
        run.prepare()
        if sweep is not None:
            sweep()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def step() -> None:
        run.call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.pedantic(step, setup=setup, rounds=15, warmup_rounds=2)
