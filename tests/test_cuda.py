"""The CUDA C++ kernels without a GPU: run on the CPU through tests/cuda_on_cpu, and the compiled code read.

On a GPU they are targets of the other tests.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fused_optim
from fused_optim.kernels import dispatch
from fused_optim.kernels.native import cuda, library
from fused_optim.kernels.plan import Driver
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.spec import Codec
from tests import cases
from tests.arena import Bed, assert_equal_beds
from tests.cases import Case, Target, assert_same_bits

ROOT = Path(__file__).parents[1]
REFERENCE, NATIVE = Target("reference", "cpu"), Target("native", "cpu")
SIZES = (1, 15, 16, 17, 255, 257, 1023, 1024, 4095, 4096, 4097, 10_000)


@pytest.fixture(scope="session")
def handle(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The sources of the CUDA library, compiled for the CPU in exact arithmetic."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    flags = [
        "-std=gnu++20",
        "-O1",
        "-ffp-contract=off",
        "-fPIC",
        "-w",
        f"-I{Path(__file__).parent}/cuda_on_cpu",
        "-include",
        "cuda_runtime.h",
    ]
    sources = {"exact": ("step_cuda", "1"), "fast": ("step_cuda", "0"), "rest": ("cuda", "1")}

    def build(name: str) -> Path:
        source, exact = sources[name]
        command = ["g++", *flags, f"-DFO_EXACT={exact}", "-x", "c++", "-c", ROOT / "csrc" / f"{source}.cu"]
        subprocess.run([*command, "-o", folder / f"{name}.o"], check=True)
        return folder / f"{name}.o"

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    target = folder / "libfused_optim_cuda.so"
    subprocess.run(["g++", "-shared", "-pthread", *objects, "-o", target], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def on_cpu(handle: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """The CUDA driver with kernels that run on CPU tensors; each access must be aligned to its width."""
    opened = cuda._Cuda(library.Library("cuda", handle))

    def run(function: Any, bucket: Any, *arguments: Any) -> None:
        assert function(*arguments, 0, None) == 0

    monkeypatch.setattr(cuda, "_cuda", lambda: opened)
    monkeypatch.setattr(cuda, "_run", run)
    yield Driver("cuda", cuda.step, cuda.square_sum)
    assert ctypes.c_int.in_dll(handle, "misaligned").value == 0


@pytest.fixture
def chosen(on_cpu: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Makes backend 'native' mean this driver."""
    choose = dispatch.choose

    def choose_this(device_type: str, compute: str, backend: str) -> Driver:
        return on_cpu if backend == "native" else choose(device_type, compute, backend)

    monkeypatch.setattr(dispatch, "choose", choose_this)
    return on_cpu


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("case", cases.pairwise_cases(), ids=lambda case: case.id)
def test_every_size(case: Case) -> None:
    """Whole tiles, tails and misaligned planes, in planes of equal and of different widths."""
    beds = Bed(case, NATIVE, SIZES), Bed(case, REFERENCE, SIZES)
    for bed in beds:
        bed.step()
        bed.assert_intact()
    assert_equal_beds(*beds)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided(dtype: torch.dtype) -> None:
    memories = []
    for backend in ("native", "reference"):
        memory = cases.normal((70, 90), torch.float32, 1).to(dtype)
        views = [memory[:40, :80].t(), memory[40:, ::2], memory[40:, 1::2].view(5, 6, 45).permute(2, 0, 1)]
        params = [Parameter(view) for view in views]
        for param in params:
            shape = tuple(reversed(param.shape))
            param.grad = (
                cases.normal(shape, torch.float32, 2).to(dtype).permute(*reversed(range(param.dim())))
            )
        params[0].grad = params[0].grad[:1].expand_as(params[0])
        fused_optim.AdamW(params, lr=0.1, backend=backend).step()
        memories.append(memory)
    assert_same_bits(*memories)


@pytest.mark.parametrize("grad", cases.FLOATS, ids=lambda codec: codec.name)
def test_square_sum(grad: Codec, on_cpu: Driver) -> None:
    bed = Bed(Case(RULES["sgd"], grad, grad, ()), REFERENCE, SIZES)
    bed.gradient = lambda index, step: cases.normal(bed._sizes[index][0], cases.DTYPES[grad.name], index)
    bed.step()
    (bucket,) = bed.buckets
    assert bucket.collect()
    expected = torch.stack([g.double().square().sum() for g in bucket.grads]).sum()
    torch.testing.assert_close(on_cpu.square_sum(bucket), expected, rtol=1e-13, atol=0)


def test_built_where_nvcc_is() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH, so that the build makes no CUDA library")
    assert library.path("cuda") is not None


def _cuobjdump() -> str | None:
    triton = pytest.importorskip(
        "triton", reason="needs the cuobjdump of Triton's wheel or of the CUDA toolkit"
    )
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(own) if own.exists() else shutil.which("cuobjdump")


@pytest.fixture(scope="module")
def compiled() -> tuple[str, Path]:
    """A program that reads compiled CUDA code, and the library."""
    file, tool = library.path("cuda"), _cuobjdump()
    if file is None or tool is None:
        pytest.skip("libfused_optim_cuda.so was not built" if file is None else "there is no cuobjdump")
    return tool, file


def _dump(compiled: tuple[str, Path], *options: str) -> str:
    tool, file = compiled
    return subprocess.run([tool, *options, file], check=True, capture_output=True, text=True).stdout


def test_no_kernel_spills(compiled: tuple[str, Path]) -> None:
    """Neither stack nor local memory on any architecture; every rule in both arithmetics."""
    usage = re.findall(
        r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", _dump(compiled, "-res-usage")
    )
    steps = [name for name, *_ in usage if "step_kernel" in name]
    architectures = len([name for name, *_ in usage if "square_sum_kernel" in name])
    assert len(steps) == architectures * len(RULES) * 2 > 0
    spilling = [entry for entry in usage if entry[2:] != ("0", "0")]
    assert not spilling, spilling


def test_whole_tiles_move_in_16_bytes(compiled: tuple[str, Path]) -> None:
    """Of every plane: two accesses for the codec of 4 bytes, one for each codec of 2 bytes."""
    functions = re.split(r"\n\s*Function : ", _dump(compiled, "-sass", "-arch", "sm_90"))[1:]
    for rule in RULES.values():
        own = [f for f in functions if f"{len(rule.name)}{rule.name}E" in f.partition("\n")[0]]
        assert len(own) == 2, f"{rule.name}: {len(own)} kernels instead of one in each arithmetic"
        for function in own:
            for operation, planes in (("LDG", 2 + len(rule.slots)), ("STG", 1 + len(rule.slots))):
                wide = len(re.findall(rf"\b{operation}\.E\.EF\.128\b", function))
                assert wide == 4 * planes, f"{rule.name}: {wide} {operation} of 16 bytes for {planes} planes"
            assert not re.search(r"\b(LD|ST)\.E", function), (
                f"{rule.name}: an access that may leave global memory"
            )
