"""What a step leaves behind in its process: one OpenMP runtime, no hanging forks, no 32-bit indices."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from tests import cases
from tests.cases import Target, assert_same_bits, normal


def _run(code: str, *options: str, timeout: float = 120.0) -> str:
    """Standard output of a fresh interpreter outside of the repository."""
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "3"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


STEP = """
    import torch, fused_optim
    torch.set_num_threads(3)
    params = [torch.nn.Parameter(torch.ones(n)) for n in (300_000, 5, 70_000)]
    optimizer = fused_optim.AdamW(params, lr=0.5, weight_decay=0.0, backend="native", clip_grad_norm=1e9)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.allclose(p, torch.full_like(p, 0.5)) for p in params)
"""


def test_one_openmp_runtime_and_forks() -> None:
    """Two runtimes oversubscribe the cores, and may crash; ours is torch's, on the same threads.

    Loaded alone the library would find the system's; by name it finds the one that is in the process already.
    Forked children inherit the locks of threads that they do not have; they must neither hang nor fail. Those
    of DataLoader set one thread; a plain one has torch's number of threads.
    """
    out = _run(
        STEP
        + """
    import os, re, signal
    print(len(os.listdir("/proc/self/task")))
    optimizer.step()
    print(len(os.listdir("/proc/self/task")))
    (torch.ones(1000, 1000) + 1).sum()
    print(len(os.listdir("/proc/self/task")))
    names = re.compile(r"(/\\S*/lib(?:gomp|iomp|omp)[^/]*\\.so\\S*)")
    loaded = {m[1] for line in open("/proc/self/maps") if (m := names.search(line))}
    print(*loaded, sep="\\n")

    for threads in (1, 3):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            torch.set_num_threads(threads)
            optimizer.step()
            # One element: torch's own parallel operations would wait for threads that a child lacks.
            os._exit(0 if abs(params[0][0].item() + 0.5) < 0.01 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, threads
    optimizer.step()

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            x = (torch.ones(300, 300) @ torch.ones(300, 300)).sum()
            p = torch.nn.Parameter(torch.ones(100_000))
            p.grad = torch.ones_like(p)
            fused_optim.SGD([p], lr=0.5, backend="native").step()
            return x, p.detach().mean()

    for _ in range(2):
        loader = torch.utils.data.DataLoader(
            Data(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        seen = [(x.tolist(), y.tolist()) for x, y in loader]
        assert seen == [([27e6] * 2, [0.5] * 2)] * 4, seen
        optimizer.step()
    print("done")
    """
    )
    before, after, with_torch, *runtimes, done = out.split()
    assert before == after == with_torch, "torch and we run on the same threads"
    assert len(runtimes) == 1 and done == "done", runtimes
    torch_folder = Path(torch.__file__).parents[1]
    assert torch_folder in Path(runtimes[0]).parents or Path(runtimes[0]).name == "libgomp.so.1"


def test_steps_without_assertions_equal_torch() -> None:
    """``python -O`` leaves out assertions, and whatever they call."""
    code = """
    import torch, fused_optim
    for backend in ("native", "reference"):
        params = [torch.nn.Parameter(torch.ones(300, 5)) for _ in range(2)]
        ours = fused_optim.AdamW(params[:1], lr=0.1, backend=backend)
        theirs = torch.optim.AdamW(params[1:], lr=0.1)
        for step in range(3):
            for param, optimizer in zip(params, (ours, theirs)):
                param.grad = torch.linspace(-1, 2 + step, 1500).view(300, 5)
                optimizer.step()
        print(__debug__, torch.allclose(*params, rtol=1e-6), params[0].min().item() < 0.8)
    """
    assert _run(code, "-O").splitlines() == ["False True True"] * 2


def test_optimizers_in_several_threads() -> None:
    """The kernels run without the interpreter's lock; two optimizers must not meet in it."""
    threads, steps = 4, 20
    params = [[Parameter(normal((3000,), torch.float32, i)) for _ in range(3)] for i in range(threads)]
    clones = [[Parameter(p.detach().clone()) for p in each] for each in params]

    def train(mine: list[Parameter], seed: int) -> None:
        optimizer = fused_optim.AdamW(mine, lr=0.1, clip_grad_norm=1.0, backend="native")
        for step in range(steps):
            for index, param in enumerate(mine):
                param.grad = normal((3000,), torch.float32, 1000 * seed + 10 * step + index)
            optimizer.step()

    workers = [threading.Thread(target=train, args=(each, i)) for i, each in enumerate(params)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, each in enumerate(clones):
        train(each, i)
    for mine, alone in zip(params, clones, strict=True):
        for param, clone in zip(mine, alone, strict=True):
            assert_same_bits(param, clone)


HUGE = 2**31 + 2 * 4096 + 3


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def _needs(device: str, needed: int) -> None:
    free = _free_bytes(device)
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of memory on {device}, {free / 2**30:.0f} GiB are free")


def _places() -> Tensor:
    """Elements where a 32-bit index, a tile count or a byte offset would wrap."""
    edges = (0, 2**30, 2**31, HUGE)
    return torch.tensor([e + d for e in edges for d in (-4097, -1, 0, 1, 4096) if 0 <= e + d < HUGE])


@pytest.mark.slow
@pytest.mark.parametrize("target", [cases.NATIVE, *cases.GPU])
def test_more_elements_than_an_int_can_count(target: Target) -> None:
    """4.3 GB only: the gradient of p**2 / 2 is p itself."""
    _needs(target.device, 7 * 2**30)
    torch.set_num_threads(2)
    places = _places().to(target.device)
    values = normal((len(places),), torch.bfloat16, 1).to(target.device)
    param = Parameter(torch.zeros(HUGE, dtype=torch.bfloat16, device=target.device))
    param.data[places] = values
    param.grad = param.detach()
    optimizer = fused_optim.SGD([param], lr=0.5, backend=target.backend, arithmetic="exact")
    optimizer.step()
    assert_same_bits(param.data[places], values / 2)
    param.data[places] = 0
    assert not _any(param.data), "an element beside the ones that were set has changed"


@pytest.mark.slow
@pytest.mark.parametrize("target", [cases.NATIVE, *cases.GPU])
def test_more_strided_elements_than_an_int_can_count(target: Target) -> None:
    _needs(target.device, 7 * 2**30)
    torch.set_num_threads(2)
    rows = torch.arange(3.0, device=target.device)[:, None].bfloat16()
    param = Parameter(torch.zeros(3, HUGE // 3, dtype=torch.bfloat16, device=target.device))
    param.grad = rows.expand(3, HUGE // 3)
    optimizer = fused_optim.SGD([param], lr=1.0, backend=target.backend, arithmetic="exact")
    optimizer.step()
    for row, data in enumerate(param.data):
        low, high = torch.aminmax(data)
        assert low == high == -row


def _any(data: Tensor) -> bool:
    """``data.any()`` without a copy of its size."""
    return any(bool(part.view(torch.int16).any()) for part in data.split(2**26))
