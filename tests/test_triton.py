"""What only the Triton driver can get wrong: rounding, strides, inactive rows, what it needs to run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_optim
from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.reference import rules as reference
from fused_optim.kernels.reference.blocks import BLOCK_CODECS
from fused_optim.kernels.reference.philox import philox
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.spec import Codec, Rule
from fused_optim.kernels.triton import driver
from fused_optim.kernels.triton.budget import auto_exact, launch_shape
from tests import cases
from tests.arena import Bed
from tests.cases import DTYPES, Case, Target, assert_same_bits, normal

TARGETS = [cases.INTERPRETER, cases.GPU[0]]
FP32 = CODECS["fp32"]
Array = np.ndarray


def _bed(rule: str, codecs: tuple[str, ...], target: Target, sizes: list[int]) -> Bed:
    param, *states, grad = (CODECS[name] for name in codecs)
    return Bed(Case(RULES[rule], param, grad, tuple(states)), target, sizes)


def _edges() -> Tensor:
    """Every sign and exponent of an fp32 number with mantissas that round up, down and from a tie."""
    upper = torch.arange(2**16, dtype=torch.int64)
    upper = upper[(upper % 9 == 0) | (upper % 2**15 < 300) | (upper % 2**15 > 2**15 - 300)] << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (upper[:, None] | lower).flatten().to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_encode_rounds_to_nearest_even(codec: str, target: Target) -> None:
    values = _edges()
    bed = _bed("sgd_momentum", ("fp32", codec, "fp32"), target, [len(values)])
    bed.step()
    bucket = bed.bucket()
    (index,) = [i for i, n in enumerate(bucket.numels) if n == len(values)]
    # With parameters and states of -1 and these scalars the new state is the gradient, -0 included.
    bucket.params[index].fill_(-1)
    bucket.state_planes[index][0][0].fill_(-1)
    owners = [member.param for member in bucket.members]
    owners[index].grad.copy_(values)
    bucket.rows[:] = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    driver.step(bucket)
    assert_same_bits(bucket.state_planes[index][0][0], values.to(DTYPES[codec]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_decode_takes_every_code(codec: str, target: Target) -> None:
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(DTYPES[codec])
    bed = _bed("sgd", ("fp32", codec), target, [2**16])
    bed.step()
    bucket = bed.bucket()
    (index,) = [i for i, n in enumerate(bucket.numels) if n == 2**16]
    bucket.params[index].fill_(-0.0)
    bucket.members[index].param.grad.copy_(codes)
    bucket.rows[:] = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, -1.0, 0.0])
    driver.step(bucket)
    assert_same_bits(bucket.params[index], codes.float())


def _strided_pairs() -> list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], tuple[int, ...]]]:
    """Views of a dense parameter and gradient that walk memory differently, and the shape to take them of."""

    def same(x: Tensor) -> Tensor:
        return x

    def transposed(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT

    def sliced(x: Tensor) -> Tensor:
        return x[..., 1:, ::2]

    def expanded(x: Tensor) -> Tensor:
        return x[:1].expand_as(x)

    def shuffled(x: Tensor) -> Tensor:
        return x.permute(3, 1, 4, 0, 2).contiguous().permute(3, 1, 4, 0, 2)

    return [
        (same, transposed, (3, 700)),
        (transposed, same, (1025, 5)),
        (sliced, sliced, (4, 700)),
        (same, expanded, (2, 2049)),
        (same, shuffled, (3, 2, 5, 4, 7)),
    ]


_STRIDED_STORAGES = [
    pytest.param(torch.float32, {}, id="fp32"),
    # Planes beside the parameter are dense, its own is not; random bits follow the states' order.
    pytest.param(torch.bfloat16, {"param_codec": "bf16_split8", "state_codec": "int4"}, id="split"),
    pytest.param(torch.bfloat16, {"param_codec": "bf16_sr"}, id="random"),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "options"), _STRIDED_STORAGES)
def test_strides(dtype: torch.dtype, options: dict[str, str], target: Target) -> None:
    def train(device: str, backend: str) -> list[Tensor]:
        params = []
        for seed, (view_p, view_g, shape) in enumerate(_strided_pairs()):
            param = view_p(normal(shape, dtype, seed).to(device)).detach().requires_grad_()
            grad = view_g(normal(shape, dtype, 100 + seed).to(device))
            param.grad = grad if grad.shape == param.shape else grad[: param.shape[0]]
            params.append(param)
        optimizer = fused_optim.AdamW(params, lr=0.1, backend=backend, arithmetic="exact", **options)
        for _ in range(2):
            optimizer.step()
        return [t for p in params for t in (p, *optimizer.state[p].values())]

    actual, expected = train(target.device, target.backend), train("cpu", "reference")
    for a, b in zip(actual, expected, strict=True):
        assert a.stride() == b.stride()
        assert_same_bits(a, b)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strided", [False, True], ids=["flat", "strided"])
def test_offsets_beyond_32_bits(strided: bool, target: Target) -> None:
    """The last tile of a tensor of 3 x (2**31 + 9) elements, of which only that tile exists."""
    device, rule = torch.device(target.device), RULES["sgd_momentum"]
    sizes = (3, 2**31 + 9)
    numel, size = sizes[0] * sizes[1], launch_shape([FP32] * 3).tile
    start = numel // size * size
    count, column = numel - start, start - 2 * sizes[1]
    step = 3 if strided else 1
    p, s, g = (normal(n, torch.float32, n).to(device) for n in (count, count, step * count))
    g_start = 2 + 3 * column if strided else start
    table = torch.tensor(
        [numel, 0, 1, 0, 0, 0, p.data_ptr() - 4 * start, s.data_ptr() - 4 * start, 0], device=device
    )
    table[-1] = g.data_ptr() - 4 * g_start
    layout = [2, *sizes, *(1,) * 6, sizes[1], 1, *(0,) * 6, 1, 3, *(0,) * 6]
    k = [0.25, 0.5, 0.75, 1.0, 0.5, 0.125]
    bucket = SimpleNamespace(
        rule=rule, param=FP32, states=(FP32,), grad=FP32, strided=strided, exact=True, device=device,
        cache={}, numels=[count],
        table=table[:, None], rows=torch.tensor([[1.0, 1.0, 0.0, 0.0, *k]], device=device),
        layouts=torch.tensor([layout], device=device),
        tiles=lambda size: torch.tensor([[0, start // size]], dtype=torch.int32, device=device),
    )  # fmt: skip
    expected, (momentum,) = reference.sgd_momentum(p.cpu(), g.cpu()[::step], (s.cpu(),), torch.tensor(k))
    driver.step(bucket)
    assert_same_bits(p, expected)
    assert_same_bits(s, momentum)


@pytest.mark.parametrize("drawn", [0, 2**32 - 2])
@pytest.mark.parametrize("target", TARGETS)
def test_random_bits_beyond_32_bit_counters(target: Target, drawn: int) -> None:
    """The last tile of a tensor of 2**36 + 4133 elements, of which only that tile exists."""
    device, codec = torch.device(target.device), CODECS["bf16_sr"]
    size = launch_shape([codec, FP32]).tile
    start, numel = (2**36 // size + 2) * size, 2**36 + 2 * size + 37
    p, g = torch.zeros(37, dtype=torch.bfloat16, device=device), normal(37, torch.float32, 1).to(device)
    addresses = [p.data_ptr() - 2 * start, g.data_ptr() - 4 * start]
    rows = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0]])
    rows.view(torch.int32)[0, 2:4] = torch.tensor([-5, 3])
    bucket = SimpleNamespace(
        rule=RULES["sgd"], param=codec, states=(), grad=FP32, strided=False, exact=True, device=device,
        cache={}, numels=[37], rows=rows.to(device), layouts=None,
        table=torch.tensor([numel, 0, 1, 0, 7, drawn, *addresses], device=device)[:, None],
        tiles=lambda size: torch.tensor([[0, start // size]], dtype=torch.int32, device=device),
    )  # fmt: skip
    driver.step(bucket)
    eighth = torch.arange(start // 8, start // 8 + 5) + drawn
    counter = eighth & 0xFFFFFFFF, eighth >> 32, torch.full_like(eighth, 7), torch.zeros_like(eighth)
    words = torch.stack(philox(counter, (2**32 - 5, 3)), 1).flatten()
    random = torch.stack([words & 0xFFFF, words >> 16], 1).flatten()[:37].int()
    expected = ((g.cpu().view(torch.int32) + random) >> 16).to(torch.int16).view(torch.bfloat16)
    assert_same_bits(p, expected)


def _blocks_of_every_kind(numel: int) -> Tensor:
    """Blocks of ordinary numbers, and some whose largest one is NaN, Inf, zero, denormal, tiny or huge."""
    x, lane = normal(numel, torch.float32, 3), torch.arange(numel)
    kind = lane // 256 % 9
    x[lane % 13 == 5] = 0.0
    x[kind == 1] *= 1e-38
    x[kind == 2] *= 3e36
    x[(kind == 3) & (lane % 100 == 7)] = float("nan")
    x[(kind == 4) & (lane % 64 == 7)] = float("inf")
    x[kind == 5] = 0.0
    # The largest magnitude has both signs.
    x[kind == 6] = x[kind == 6].sign() * 0.5
    x[kind == 7] = 1e-41
    return x


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "codec", [codec for codec in CODECS.values() if codec.block > 1], ids=lambda c: c.name
)
def test_blocks_of_every_kind(codec: Codec, target: Target) -> None:
    numel = 9 * 256 + 101
    case = Case(RULES["sgd_momentum"], FP32, FP32, (codec,))
    bed = Bed(case, target, [numel], odd_sizes=())
    bed.step()
    bucket = bed.bucket()
    x = _blocks_of_every_kind(numel)
    x = x.abs() if codec.name.endswith("unsigned") else x
    (planes,) = bucket.state_planes[0]
    bucket.members[0].param.grad.copy_(x)
    # The new state is the gradient; then the parameter is what that decodes to.
    bucket.rows[:] = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    for plane in planes:
        plane.zero_()
    driver.step(bucket)
    expected = BLOCK_CODECS[codec.name].encode(x + 0.0)
    for plane, actual, wanted in zip(codec.planes, planes, expected, strict=True):
        assert_same_bits(actual, wanted, f"{codec.name}{plane.suffix}")
    bucket.rows[:] = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, -1.0])
    bucket.members[0].param.grad.zero_()
    bucket.params[0].zero_()
    driver.step(bucket)
    assert_same_bits(bucket.params[0] + 0.0, BLOCK_CODECS[codec.name].decode(expected)[:numel] + 0.0)


def _fma(x: Array, y: Array, z: Array) -> Array:
    return (x.astype(np.float64) * y + z).astype(np.float32)


def _neighbours(x: Array) -> Array:
    """The 129 fp32 numbers around each of some."""
    bits = x.astype(np.float32).view(np.int32)[:, None] + np.arange(-64, 65, dtype=np.int32)
    return bits.view(np.float32).flatten()


def _ulps(x: Array, ulps: int) -> Array:
    return (x.astype(np.float32).view(np.int32) + np.int32(ulps)).view(np.float32)


def _quotient(x: Array, y: Array, ulps: int) -> Array:
    """What ``arithmetic.quotient`` computes with a reciprocal that is some ulps off."""
    r = _ulps(1 / y.astype(np.float64), ulps)
    q = x * r
    return _fma(_fma(-y, q, x), r, q)


def _root(x: Array, ulps: int) -> Array:
    r = _ulps(1 / np.sqrt(x.astype(np.float64)), ulps)
    q = x * r
    return _fma(_fma(-q, q, x), np.float32(0.5) * r, q)


@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
def test_corrected_approximations_give_the_codes_of_ieee_arithmetic(ulps: int) -> None:
    """Everywhere if around every number at which the code changes: elsewhere an ulp changes nothing."""
    f = np.float32
    q = np.arange(128, dtype=f)
    assert np.array_equal(_quotient(q, 254 - q, ulps), q / (254 - q))
    ties = np.arange(127) + 0.5
    n = _neighbours(ties / (254 - ties))
    x, y = f(254) * n, f(1) + n
    assert np.array_equal(np.rint(_quotient(x, y, ulps)), np.rint(x / y))
    n = _neighbours(((np.arange(255) + 0.5) / 255) ** 2)
    assert np.array_equal(np.rint(f(255) * _root(n, ulps)), np.rint(f(255) * np.sqrt(n)))
    n = _neighbours(((np.arange(1, 16) + 0.5) / 16) ** 4)
    expected = np.rint(f(16) * np.sqrt(np.sqrt(n)))
    assert all(np.array_equal(np.rint(f(16) * _root(_root(n, ulps), u)), expected) for u in (-2, 0, 2))


@pytest.mark.parametrize("target", TARGETS)
def test_inactive_rows_are_left_alone(target: Target) -> None:
    bed = _bed("adam", ("bf16", "fp32", "fp32", "bf16"), target, [1, 257, 4097])
    bed.step()
    bucket = bed.bucket()
    before = bed.snapshot()
    asleep = 0
    bucket.rows[asleep, 0] = 0.0
    for member in bucket.members:
        member.param.grad.fill_(float("nan"))
    driver.step(bucket)
    rows = {id(member): row for member, row in zip(bucket.members, bucket.row_indices, strict=True)}
    changed = iter(zip(before, bed.named(), strict=True))
    for member in bed.members:
        old, (name, new) = next(changed)
        if rows[id(member)] == asleep:
            assert_same_bits(new, old, name)
        else:
            assert new.isnan().all(), name
        for _ in member.state:
            next(changed)


def test_the_sum_of_squares_follows_strides() -> None:
    if driver.unavailable("cpu"):
        pytest.skip("Triton compiles for the GPU in this process")
    param = torch.zeros(3, 700, requires_grad=True)
    param.grad = normal((700, 3), torch.float32, 1).mT
    optimizer = fused_optim.SGD([param], lr=1.0, clip_grad_norm=1.0, backend="triton")
    optimizer.step()
    torch.testing.assert_close(param.norm(), torch.tensor(1.0))


class _SmoothBed(Bed):
    """A bed whose gradients are ordinary numbers."""

    def gradient(self, index: int, step: int) -> Tensor:
        return normal(self._sizes[index][0], torch.float32, index)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_fast_is_within_two_ulp_of_exact(rule: Rule) -> None:
    case = Case(rule, FP32, FP32, (FP32,) * len(rule.slots))
    exact, fast = (_SmoothBed(case, Target("triton", "cuda"), [100_003]) for _ in range(2))
    before = exact.snapshot()
    fast.bucket().exact = False
    exact.step()
    fast.step()
    for old, (name, a), (_, b) in zip(before, exact.named(), fast.named(), strict=True):
        # An ulp of the largest number that was added up, since sums cancel; of a parameter's own update too.
        floor = 0.05 if name.endswith("parameter") else 0.0
        largest = torch.maximum(old.abs(), a.abs()).clamp(min=floor)
        ulp = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
        assert ((b - a).abs() <= 2 * ulp).all(), name


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if driver.unavailable("cpu") is None:
        assert "unset it" in str(driver.unavailable("cuda"))
    else:
        assert "TRITON_INTERPRET=1" in str(driver.unavailable("cpu"))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install" in str(driver.unavailable("cuda"))


def test_launch_shapes() -> None:
    fp32, bf16 = CODECS["fp32"], CODECS["bf16"]
    assert launch_shape([fp32, bf16]).vector == 4
    assert launch_shape([bf16, bf16]).vector == 8
    for codecs in ([fp32], [bf16], [bf16] * 3, [fp32] * 5):
        shape = launch_shape(codecs)
        assert shape.tile % (32 * shape.warps * shape.vector) == 0
        assert shape.tile % shape.chunk == 0
    assert auto_exact(RULES["adam"], fp32, fp32, (fp32, fp32))
