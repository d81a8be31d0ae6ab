"""The native library in a process: its catalogue, its OpenMP runtime, forked children."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.native import cpu, library
from fused_optim.kernels.rules import RULES

assert cpu.unavailable() is None, cpu.unavailable()


def test_every_rule_and_codec_is_compiled() -> None:
    opened = library.load("cpu")
    assert isinstance(opened, library.Library)
    assert set(opened.rules) == set(RULES)
    assert set(opened.codecs) == {name for name, codec in CODECS.items() if codec.compute == "float32"}


STEP = """
import os, signal, sys, torch, fused_optim
param = torch.nn.Parameter(torch.zeros(1 << 20))
param.grad = torch.ones_like(param)
torch.set_num_threads(2)
optimizer = fused_optim.AdamW([param], lr=0.5, weight_decay=0.0, backend="native")
optimizer.step()
"""
ONE_RUNTIME = """
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}
assert any("fused_optim_cpu" in line for line in open("/proc/self/maps"))
print(*runtimes)
sys.exit(len(runtimes) != 1)
"""
FORKED = """
child = os.fork()
if child == 0:
    signal.alarm(60)
    optimizer.step()
    os._exit(0 if param[0] < -0.9 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("rest", [ONE_RUNTIME, FORKED], ids=["one OpenMP runtime", "step in a forked child"])
def test_process(rest: str) -> None:
    """After a step on two threads: torch's OpenMP runtime serves both, and a forked child does not hang."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", STEP + rest], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
