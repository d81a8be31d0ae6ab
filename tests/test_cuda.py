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
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from bench import static_cuda
from fused_optim.kernels import dispatch
from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.launch import Driver
from fused_optim.kernels.masking import GROUPS
from fused_optim.kernels.native import cuda, library
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.spec import Codec
from fused_optim.sparsity import SRSTE, OneShot, Sparsity
from tests import cases
from tests.arena import Bed, assert_equal_beds
from tests.cases import Case, Target, assert_same_bits

ROOT = Path(__file__).parents[1]
REFERENCE, NATIVE = Target("reference", "cpu"), Target("native", "cpu")
SIZES = (1, 7, 9, 63, 65, 255, 257, 1025, 4097, 5300)
MASKED_SIZES = (0, 1, 15, 16, 17, 255, 256, 257, 4097)


def _has_fma() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.fixture(scope="session")
def handle(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The sources of the CUDA library, compiled for the CPU."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    flags = ["-std=gnu++20", "-fPIC", "-w", "-U_FORTIFY_SOURCE", f"-I{Path(__file__).parent}/cuda_on_cpu"]
    flags += ["-include", "cuda_runtime.h", "-x", "c++", "-c"]
    exact = ["-O1", "-ffp-contract=off"]
    # Fused operations, and no other freedom of nvcc's fast arithmetic.
    fast = ["-O2", "-ffp-contract=fast", *(["-mfma"] if _has_fma() else [])]
    sources = {
        "exact": ("step_cuda", ["-DFO_EXACT=1", *exact]),
        "fast": ("step_cuda", ["-DFO_EXACT=0", *fast]),
        "rest": ("cuda", exact),
    }

    def build(name: str) -> Path:
        source, options = sources[name]
        target = folder / f"{name}.o"
        command = ["g++", *flags, *options, ROOT / "csrc" / f"{source}.cu", "-o", target]
        subprocess.run(command, check=True)
        return target

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
@pytest.mark.parametrize("case", cases.representative_cases(), ids=lambda case: case.id)
def test_every_size(case: Case) -> None:
    """Whole tiles, tails and misaligned planes, in planes of equal and of different widths."""
    beds = Bed(case, NATIVE, SIZES), Bed(case, REFERENCE, SIZES)
    for bed in beds:
        bed.step()
        bed.assert_intact()
    assert_equal_beds(*beds)


# In turns of three in place and with dense weights, so that sizes of groups and storages meet both.
MASKED = [case for i, case in enumerate(cases.masked_cases()) if i // 6 % 2 == i % 2]


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.id)
def test_masked_rules(case: Case) -> None:
    """New masks in one group of parameters, in the other those that there are, or new ones too."""
    beds = [Bed(case, target, MASKED_SIZES, odd_sizes=(257, 40)) for target in (NATIVE, REFERENCE)]
    for bed in beds:
        bed.step()
        bed.assert_intact()
    assert_equal_beds(*beds)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("group", GROUPS)
def test_equal_magnitudes(group: int) -> None:
    """The first of a group win; every NaN is larger than infinity."""
    values = torch.tensor([1.0, -1.0, 0.0, -0.0, 2.0, torch.inf, -torch.inf, torch.nan, -torch.nan])
    states = []
    for backend in ("native", "reference"):
        w = Parameter(values[torch.arange(1120).pow(2) // 3 % 9].view(35, 32))
        w.grad = torch.zeros_like(w)
        recipe = OneShot(n=max(1, group // 2), m=group)
        optimizer = fused_optim.SGD([w], lr=0.0, sparsity=recipe, backend=backend)
        optimizer.step()
        states.append(optimizer.state[w]["mask"])
    assert_same_bits(*states)


def _strided(dtype: torch.dtype) -> tuple[Tensor, list[Parameter]]:
    """Memory and three parameters in it that are transposed or have gaps, with gradients of other strides."""
    memory = cases.normal((50, 80), torch.float32, 1).to(dtype)
    views = [memory[:30, :60].t(), memory[30:, ::2], memory[30:, 1::2].view(4, 5, 40).permute(2, 0, 1)]
    params = [Parameter(view) for view in views]
    for param in params:
        shape = tuple(reversed(param.shape))
        param.grad = cases.normal(shape, torch.float32, 2).to(dtype).permute(*reversed(range(param.dim())))
    params[0].grad = params[0].grad[:1].expand_as(params[0])
    return memory, params


def _assert_strided_like_the_reference(param: Codec, state: str, **options: Any) -> None:
    runs = []
    for backend in ("native", "reference"):
        memory, params = _strided(cases.DTYPES[param.name])
        optimizer = fused_optim.AdamW(
            params, lr=0.1, param_codec=param.name, state_codec=state, keep_fp32=0, backend=backend, **options
        )
        optimizer.step()
        planes = [plane for p in params for plane in optimizer.state[p].values()]
        runs.append([memory, *planes])
    for actual, expected in zip(*runs, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("state", cases.STATES)
def test_strided(state: str) -> None:
    _assert_strided_like_the_reference(cases.PARAMS[cases.STATES.index(state) % len(cases.PARAMS)], state)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    ("param", "recipe"), [("fp32", OneShot(dim=0)), ("bf16_sr", SRSTE(dim=0))], ids=["in_place", "dense"]
)
def test_strided_masks(param: str, recipe: Sparsity) -> None:
    """Of groups along the dimension that is innermost in memory, and of others, which are found later."""
    _assert_strided_like_the_reference(CODECS[param], "int8", sparsity=recipe)


def _bed_without_rounding(case: Case) -> Bed:
    """Whose rule gives the same bits in either arithmetic, so that only encoding could tell them apart."""
    bed = Bed(case, NATIVE, SIZES)
    exact = {"lr": 0.0 if case.states else 1.0, "weight_decay": 0.0, "betas": (0.0, 0.0)}
    bed.hypers = [{**hyper, **exact} for hyper in bed.hypers]
    dtype = cases.DTYPES[case.grad.name]
    bed.gradient = lambda index, step: cases.tame(bed._sizes[index][0], dtype, index, step)
    return bed


ENCODINGS = [case for case in cases.representative_cases() if case.rule.name in ("adam", "sgd")]


@pytest.mark.parametrize("case", ENCODINGS, ids=lambda case: case.id)
def test_fast_arithmetic_encodes_the_same_bits(
    case: Case, chosen: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both builds hold every codec; the compiler may contract what only the rules may let it."""
    case = case._replace(grad=CODECS["fp32"])
    exact, fast = _bed_without_rounding(case), _bed_without_rounding(case)
    exact.step()
    monkeypatch.setitem(cuda._cuda().step, True, cuda._cuda().step[False])
    fast.step()
    assert_equal_beds(fast, exact)


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


@pytest.fixture(scope="module")
def compiled() -> tuple[str, Path]:
    """A program that reads compiled CUDA code, and the library."""
    try:
        return static_cuda.cuobjdump(), static_cuda.built()
    except static_cuda.MissingToolError as missing:
        pytest.skip(str(missing))


def test_no_kernel_spills(compiled: tuple[str, Path]) -> None:
    """Neither stack nor local memory on any architecture; every rule in both arithmetics."""
    usage = list(static_cuda.usages(static_cuda.dump(*compiled, "-res-usage")))
    steps = [entry for entry in usage if re.search("step_(coded_|masked_)?kernel", entry.function)]
    architectures = len([entry for entry in usage if "square_sum_kernel" in entry.function])
    # One for plain codecs, one for all codecs, one with a mask; cast_adam has only this.
    assert len(steps) == architectures * (3 * len(RULES) + 1) * 2 > 0
    assert sum(entry.exact for entry in steps) == len(steps) / 2
    spilling = [entry for entry in usage if entry.resources["STACK"] or entry.resources["LOCAL"]]
    assert not spilling, spilling


def test_whole_tiles_move_in_16_bytes(compiled: tuple[str, Path]) -> None:
    """Of every plane of plain codecs: two accesses for the one of 4 bytes, one for each of 2 bytes."""
    names = sorted(
        set(re.findall(r"Function (\S*11step_kernel\S*):", static_cuda.dump(*compiled, "-res-usage")))
    )
    sass = static_cuda.dump(*compiled, "-sass", "-arch", "sm_90", "-fun", ",".join(names))
    functions = re.split(r"\n\s*Function : ", sass)[1:]
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
