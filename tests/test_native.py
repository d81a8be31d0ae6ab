"""Every instruction set of the native driver: the reference's bits, and not a byte written outside.

The other tests run the best one that the machine has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim.kernels.codecs import CODECS, OF_DTYPE
from fused_optim.kernels.native import cpu, library
from fused_optim.kernels.reference.codecs import CODECS as REFERENCE_CODECS
from fused_optim.kernels.reference.masking import best_of_blocks, largest_of_groups
from fused_optim.kernels.reference.philox import Stream
from fused_optim.kernels.rules import CAST_ADAM, RULES
from tests import cases
from tests.arena import Arena, Bed, assert_equal_beds
from tests.cases import Case, Target, assert_same_bits

assert cpu.unavailable() is None, cpu.unavailable()

REFERENCE, NATIVE = Target("reference", "cpu"), Target("native", "cpu")
# Around every number of whole vectors up to an unrolled loop's, and all that are shorter than one.
SIZES = (
    *range(19),
    *(16 * n + d for n in (2, 3, 4) for d in (-1, 0, 1)),
    70,
    255,
    256,
    257,
    4095,
    4096,
    4097,
)


def test_every_rule_and_codec_is_compiled() -> None:
    opened = library.load("cpu")
    assert isinstance(opened, library.Library)
    assert set(opened.rules) == {*RULES, CAST_ADAM.name}
    assert set(opened.codecs) == {name for name, codec in CODECS.items() if codec.compute == "float32"}


@pytest.fixture(params=cpu.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set that the machine has."""
    with cpu._forced_isa(request.param):
        yield request.param


@pytest.mark.parametrize("case", cases.representative_cases(), ids=lambda case: case.id)
def test_every_size(case: Case) -> None:
    """Sizes that a vector loop may get wrong, aligned or one element beyond."""
    expected = Bed(case, REFERENCE, SIZES)
    beds = {isa: Bed(case, NATIVE, SIZES) for isa in cpu.isas()}
    expected.step()
    for isa, bed in beds.items():
        with cpu._forced_isa(isa):
            bed.step()
        assert_equal_beds(bed, expected)
        bed.assert_intact()


def _whole(values: Tensor) -> Tensor:
    return values


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": _whole,
    "transposed": Tensor.t,
    "columns": lambda x: x[:, 3:-2],
    "every second": lambda x: x[::2, 1::2],
    "transposed part": lambda x: x[5:30, ::3].t(),
    "four dimensions": lambda x: x[:36, :48].view(6, 6, 8, 6).permute(2, 0, 3, 1),
}


def _laid(view: Callable[[Tensor], Tensor], grad_kind: str, dtype: torch.dtype) -> tuple[Parameter, Tensor]:
    """A parameter that is a view, with a gradient, and the memory behind it."""
    memory = cases.normal((37, 53), torch.float32, 1).to(dtype)
    param = Parameter(view(memory))
    grad = cases.normal(param.shape, torch.float32, 2).to(dtype)
    if grad_kind == "reversed":
        order = list(reversed(range(grad.dim())))
        grad = grad.permute(order).contiguous().permute(order)
    elif grad_kind == "expanded":
        grad = grad[:1].expand_as(param)
    param.grad = grad
    return param, memory


@pytest.mark.parametrize("grad_kind", ["contiguous", "reversed", "expanded"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_strided(name: str, view: Callable[[Tensor], Tensor], grad_kind: str, isa: str) -> None:
    """Elements beside those of a view keep their bits."""
    for dtype in (torch.float32, torch.bfloat16):
        memories = []
        for backend in ("native", "reference"):
            param, memory = _laid(view, grad_kind, dtype)
            optimizer = getattr(fused_optim, name)([param], lr=0.1, weight_decay=0.1, backend=backend)
            for _ in range(2):
                optimizer.step()
            memories.append(memory)
        assert_same_bits(*memories, f"{name} on {isa}")


def _bucket(rule: str, tensors: list[Tensor], row: list[float]) -> Any:
    """A bucket of one tensor: parameter, states, gradient."""
    codec = {cases.DTYPES[name]: CODECS[name] for name in OF_DTYPE.values()}
    param, *states, grad = tensors
    columns = [param.numel(), 0, 0, 0, 0, 0, *(tensor.data_ptr() for tensor in tensors)]
    return SimpleNamespace(
        rule=RULES[rule],
        param=codec[param.dtype],
        grad=codec[grad.dtype],
        states=tuple(codec[state.dtype] for state in states),
        table=torch.tensor(columns).unsqueeze(1),
        rows=torch.tensor([[*row[:2], 0.0, 0.0, *row[2:]]]),
        layouts=None,
        cache={},
        tensors=tensors,
    )


def _halfway(dtype: torch.dtype) -> Tensor:
    """Every 16-bit value, the float32 halfway to the next, the neighbours of both; random bits."""
    codes = torch.arange(1 << 16)
    stored, following = (c.to(torch.int16).view(dtype).double() for c in (codes, codes + 1))
    points = torch.cat([stored, (stored + following) / 2]).float().view(torch.int32)
    anything = torch.randint(-(1 << 31), 1 << 31, (1 << 20,)).int()
    return torch.cat([points, points + 1, points - 1, anything]).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits(dtype: torch.dtype, isa: str) -> None:
    """The buffer of ``b = 0 * b + 1 * g`` is torch's own conversion of the gradient."""
    grad = _halfway(dtype)
    state = torch.zeros(len(grad), dtype=dtype)
    cpu.step(_bucket("sgd_momentum", [torch.zeros(len(grad)), state, grad], [1.0, 1.0, 0, 0, 1, 0, 0, 0]))
    assert_same_bits(state, (grad + 0.0).to(dtype), isa)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_code_survives(dtype: torch.dtype, isa: str) -> None:
    """The buffer of ``b = 1 * b + 1 * g`` keeps its bits if everything else is a negative zero."""
    codes = torch.arange(1 << 16).to(torch.int16).view(dtype)
    state, zeros = codes.clone(), torch.full((1 << 16,), -0.0)
    cpu.step(_bucket("sgd_momentum", [zeros.clone(), state, zeros], [1.0, 1.0, 0, 1, 1, 0, 0, 0]))
    assert_same_bits(state, codes, isa)


def test_inactive_rows(isa: str) -> None:
    """A tensor whose row is inactive keeps its bits, whatever else the row and the gradient hold."""
    param, nan = torch.arange(100.0), float("nan")
    cpu.step(_bucket("sgd", [param, torch.full((100,), nan)], [0.0, nan, nan, nan, nan]))
    assert torch.equal(param, torch.arange(100.0))


@pytest.mark.parametrize("flushes", [False, True], ids=["denormals_kept", "denormals_flushed"])
def test_every_thread_treats_denormals_like_the_caller(flushes: bool) -> None:
    torch.set_num_threads(3)
    weight = torch.zeros(200_000, requires_grad=True)
    optimizer = fused_optim.SGD([weight], lr=1.0, backend="native")
    weight.grad = torch.full_like(weight, 1e-40)
    if not torch.set_flush_denormal(flushes):
        pytest.skip("this processor always keeps denormals")
    try:
        optimizer.step()
    finally:
        torch.set_flush_denormal(False)
    assert weight.ne(0).all() != flushes and weight.eq(0).all() == flushes


@pytest.mark.parametrize("grad", cases.FLOATS, ids=lambda codec: codec.name)
def test_square_sum(grad: Any) -> None:
    """The same bits on every instruction set and any number of threads."""
    arena, sums = Arena("cpu"), set()
    for numel, misaligned in ((17, True), (40_000, False), (300_001, True)):
        values = arena.tensor(cases.normal(numel, cases.DTYPES[grad.name], 1), misaligned)
        bucket = _bucket("sgd", [torch.zeros(numel), values], [1.0, 1.0, 0.0, 0.0, 0.0])
        for isa in cpu.isas():
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                with cpu._forced_isa(isa):
                    sums.add((numel, cpu.square_sum(bucket).item()))
        torch.testing.assert_close(
            dict(sums)[numel], values.double().square().sum().item(), rtol=1e-13, atol=0
        )
    assert len(sums) == 3


def _packed(mask: Tensor) -> Tensor:
    (bits,) = REFERENCE_CODECS["mask"].encode(mask.flatten().float(), Stream(0, 0, 0, 0))
    return bits


@pytest.mark.parametrize("dtype", [cases.DTYPES[codec.name] for codec in cases.FLOATS], ids=str)
@pytest.mark.parametrize(
    ("group", "kept"), [(2, 1), (4, 2), (4, 3), (8, 4), (16, 5), (3, 1), (7, 4), (32, 9)]
)
def test_nm_mask(group: int, kept: int, dtype: torch.dtype, isa: str) -> None:
    """Special values, equal magnitudes, and a last group that is short."""
    for numel in (0, 1, 15, group * 64, 100 * group + 3):
        values = cases.wild(numel, dtype, 3)
        values[::5] = 1.0
        expected = largest_of_groups(values.float(), group, kept)
        assert torch.equal(cpu.nm_mask(values, group, kept), _packed(expected)), f"{numel} on {isa}"


@pytest.mark.parametrize("dtype", [cases.DTYPES[codec.name] for codec in cases.FLOATS], ids=str)
def test_transposable_mask(dtype: torch.dtype, isa: str) -> None:
    """Blocks of special values, of equal scores, and rows that begin within a byte."""
    for shape in ((4, 4), (8, 60), (36, 68), (64, 128)):
        values = cases.wild(shape[0] * shape[1], dtype, 4).view(shape)
        values[:, ::3] = 1.0
        expected = best_of_blocks(values.float())
        assert torch.equal(cpu.transposable_mask(values), _packed(expected)), f"{shape} on {isa}"
        assert (expected.view(-1, 4, shape[1]).sum(1) == 2).all()
