"""The native CPU driver against NumPy: same bits on every instruction set, and not a byte written outside."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.layout import LAYOUT_LENGTH, MAX_DIMS
from fused_optim.kernels.native import cpu
from fused_optim.kernels.rules import RULES

if reason := cpu.unavailable():
    pytest.skip(reason, allow_module_level=True)

Array = np.ndarray
F32 = np.float32
NAMES = ("fp32", "bf16", "fp16")
SIZES = (*range(71), 255, 256, 257, 4095, 4096, 4097)
SPECIAL = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-40, 3e38, -65520.0, 6e-8], F32)
GUARD = 0xA5


def adam(p: Array, g: Array, s: list[Array], k: Sequence[F32]) -> tuple[Array, list[Array]]:
    l2, w1, b2, w2, c2, eps, step_size, decay = k
    m, v, *vmax = s
    g = g + l2 * p
    m = m + w1 * (g - m)
    v = b2 * v + (w2 * g) * g
    vmax = [np.maximum(old, v) for old in vmax]
    d = np.sqrt(vmax[0] if vmax else v) * c2 + eps
    return p - (step_size * (m / d) + decay * p), [m, v, *vmax]


def lion(p: Array, g: Array, s: list[Array], k: Sequence[F32]) -> tuple[Array, list[Array]]:
    b1, w1, b2, w2, lr, decay = k
    c = b1 * s[0] + w1 * g
    u = np.where(c > 0, F32(1), np.where(c < 0, F32(-1), F32(0)))
    return p - (lr * u + decay * p), [b2 * s[0] + w2 * g]


def sgd(p: Array, g: Array, s: list[Array], k: Sequence[F32]) -> tuple[Array, list[Array]]:
    l2, lr = k
    return p - lr * (g + l2 * p), s


def sgd_momentum(p: Array, g: Array, s: list[Array], k: Sequence[F32]) -> tuple[Array, list[Array]]:
    l2, mu, w, ng, nb, lr = k
    g = g + l2 * p
    b = mu * s[0] + w * g
    return p - lr * (ng * g + nb * b), [b]


ORACLES: dict[str, Callable[..., tuple[Array, list[Array]]]] = {
    "adam": adam,
    "adam_amsgrad": adam,
    "lion": lion,
    "sgd": sgd,
    "sgd_momentum": sgd_momentum,
}
SCALARS = {
    "adam": (0.01, 0.1, 0.999, 0.001, 3.3, 1e-8, 0.02, 1e-4),
    "adam_amsgrad": (0.0, 0.1, 0.95, 0.05, 1.7, 1e-6, 0.03, 1e-3),
    "lion": (0.9, 0.1, 0.99, 0.01, 0.01, 1e-3),
    "sgd": (0.01, 0.1),
    "sgd_momentum": (0.01, 0.9, 0.7, 1.0, 0.9, 0.1),
}


def encode(values: Array, codec: str) -> Array:
    """The bits of the values in storage."""
    values = np.ascontiguousarray(values, F32)
    if codec == "fp32":
        return values.view(np.uint32)
    if codec == "fp16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    return torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)


def decode(bits: Array, codec: str) -> Array:
    if codec == "fp32":
        return bits.view(F32)
    if codec == "fp16":
        return bits.view(np.float16).astype(F32)
    return (bits.astype(np.uint32) << 16).view(F32)


class Plane:
    """Storage of one tensor with guard bytes around it, ``shift`` elements away from alignment."""

    def __init__(self, values: Array, codec: str, shift: int = 0) -> None:
        bits, self.codec = encode(values, codec), codec
        self.start = 64 + shift * bits.itemsize
        self.bytes = np.full(self.start + bits.nbytes + 64 + 15, GUARD, np.uint8)
        self.start += -self.bytes.ctypes.data % 16
        self.bits = self.bytes[self.start : self.start + bits.nbytes].view(bits.dtype)
        self.bits[:] = bits
        self.address = self.bytes.ctypes.data + self.start

    def values(self) -> Array:
        return decode(self.bits.copy(), self.codec)

    def outside(self) -> Array:
        return np.concatenate([self.bytes[: self.start], self.bytes[self.start + self.bits.nbytes :]])


def check(planes: Sequence[Plane], expected: Array) -> None:
    """Expected values after rounding to storage, one plane after the other; NaN for NaN; guards intact."""
    codec = planes[0].codec
    stored = decode(encode(expected, codec), codec)
    values = np.concatenate([plane.values() for plane in planes])
    np.testing.assert_array_equal(values, stored)
    zeros = stored == 0
    np.testing.assert_array_equal(np.signbit(values[zeros]), np.signbit(stored[zeros]))
    assert (np.concatenate([plane.outside() for plane in planes]) == GUARD).all()


class Tensors:
    """A bucket as kernels/plan.py describes it, over guarded planes."""

    def __init__(self, rule: str, codecs: Sequence[str], strided: Sequence[Sequence[int]] = ()) -> None:
        self.rule, self.codecs, self.layouts = rule, codecs, strided
        self.planes: list[list[Plane]] = []  # parameter, states, gradient
        self.numels: list[int] = []
        self.row_of: list[int] = []
        self.rows = [[1.0, 0.5, *SCALARS[rule]]]

    def add(self, numel: int, values: Sequence[Array], shift: int = 0, row: int = 0) -> list[Plane]:
        """``values``: parameter, states, gradient."""
        param, grad, *states = self.codecs
        planes = [Plane(v, c, shift) for v, c in zip(values, (param, *states, grad), strict=True)]
        self.planes.append(planes)
        self.numels.append(numel)
        self.row_of.append(row)
        return planes

    def bucket(self) -> Any:
        n = len(self.planes)
        addresses = zip(*([p.address for p in planes] for planes in self.planes), strict=True)
        aligned = [all(p.address % 16 == 0 for p in planes) for planes in self.planes]
        columns = [self.numels, self.row_of, aligned, range(n), *addresses]
        param, grad, *states = (CODECS[name] for name in self.codecs)
        return SimpleNamespace(
            rule=RULES[self.rule],
            param=param,
            grad=grad,
            states=tuple(states),
            table=torch.tensor([list(map(int, column)) for column in columns]),
            rows=torch.tensor(self.rows, dtype=torch.float32),
            layouts=torch.tensor(self.layouts) if self.layouts else None,
            cache={},
        )

    def expected(self, planes: Sequence[Sequence[Plane]], row: int) -> list[Array]:
        """Parameter, states and gradient of some tensors after a step, before rounding to storage."""
        p, *s, g = (
            np.concatenate([plane.values() for plane in column]) for column in zip(*planes, strict=True)
        )
        g_scale, *k = (F32(x) for x in self.rows[row][1:])
        with np.errstate(all="ignore"):
            new_p, new_s = ORACLES[self.rule](p, g * g_scale, s, k)
        return [new_p, *new_s, g]

    def step_and_check(self, isa: str) -> None:
        """One step on one instruction set, all tensors following the first row."""
        expected = self.expected(self.planes, 0)
        with cpu._forced_isa(isa):
            cpu.step(self.bucket())
        for column, values in zip(zip(*self.planes, strict=True), expected, strict=True):
            check(column, values)


def codecs_of(rule: str, param: str, grad: str, state: str) -> list[str]:
    return [param, grad, *[state] * len(RULES[rule].slots)]


def draw(rng: np.random.Generator, numel: int, rule: str) -> list[Array]:
    """Parameter, states and gradient, with special values in the gradient."""
    values = [rng.normal(size=numel).astype(F32) for _ in range(len(RULES[rule].slots) + 2)]
    for slot, state in zip(RULES[rule].slots, values[1:-1], strict=True):
        if not slot.signed:
            np.abs(state, out=state)
    spots = rng.random(numel) < 0.1
    values[-1][spots] = rng.choice(SPECIAL, spots.sum())
    return values


# Every pair of parameter and state, and every codec of the gradient with each of both.
STORAGES = [(p, NAMES[(i + j) % 3], s) for i, p in enumerate(NAMES) for j, s in enumerate(NAMES)]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("storage", STORAGES, ids="-".join)
@pytest.mark.parametrize("rule", ORACLES)
def test_step_equals_numpy(
    rule: str, storage: tuple[str, str, str], isa: str, rng: np.random.Generator
) -> None:
    """Every size that a vector loop may get wrong, aligned or not, several steps in a row."""
    tensors = Tensors(rule, codecs_of(rule, *storage))
    for i, numel in enumerate(SIZES):
        tensors.add(numel, draw(rng, numel, rule), shift=(0, 1, 7)[i % 3])
    for _ in range(2):
        tensors.step_and_check(isa)


@pytest.mark.parametrize("isa", cpu.isas())
def test_states_of_different_codecs(isa: str, rng: np.random.Generator) -> None:
    tensors = Tensors("adam_amsgrad", ["bf16", "fp32", "fp16", "fp32", "bf16"])
    for numel in (5, 64, 777):
        tensors.add(numel, draw(rng, numel, "adam_amsgrad"))
    tensors.step_and_check(isa)


def record(sizes: Sequence[int], param: Sequence[int], grad: Sequence[int]) -> list[int]:
    parts = ([*part, *[fill] * (MAX_DIMS - len(sizes))] for part, fill in ((sizes, 1), (param, 0), (grad, 0)))
    flat = [len(sizes), *itertools.chain(*parts)]
    assert len(flat) == LAYOUT_LENGTH
    return flat


STRIDED = {
    "transposed gradient": ((37, 45), (45, 1), (1, 37)),
    "sliced parameter": ((31, 20), (53, 2), (20, 1)),
    "expanded gradient": ((19, 33), (33, 1), (0, 1)),
    "one value for all": ((501,), (1,), (0,)),
    "three dimensions": ((7, 9, 11), (200, 20, 1), (1, 7, 63)),
    "eight dimensions": ((2,) * 8, (256, 128, 64, 32, 16, 8, 4, 2), (1, 2, 4, 8, 16, 32, 64, 128)),
    "a scalar": ((), (), ()),
}


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("storage", [("fp32",) * 3, ("bf16", "fp16", "fp32")], ids="-".join)
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_strided(rule: str, storage: tuple[str, str, str], isa: str, rng: np.random.Generator) -> None:
    """Elements between those of a strided parameter keep their bytes."""
    tensors = Tensors(rule, codecs_of(rule, *storage), [record(*layout) for layout in STRIDED.values()])
    checks = []
    for index, (sizes, param, grad) in enumerate(STRIDED.values()):
        numel = int(np.prod(sizes))
        coordinates = np.indices(sizes).reshape(len(sizes), numel)
        offsets = [np.dot(strides, coordinates).astype(int) for strides in (param, grad)]
        spans = [int(offset.max()) + 1 for offset in offsets]
        values = draw(rng, max(spans), rule)
        values = [values[0][: spans[0]], *(v[:numel] for v in values[1:-1]), values[-1][: spans[1]]]
        tensors.add(numel, values)
        checks.append((index, *offsets))
    expected = []
    for index, at_param, at_grad in checks:
        p, *s, g = (plane.values() for plane in tensors.planes[index])
        g_scale, *k = (F32(x) for x in tensors.rows[0][1:])
        with np.errstate(all="ignore"):
            new_p, new_s = ORACLES[rule](p[at_param], g[at_grad] * g_scale, s, k)
        p[at_param] = new_p
        expected.append((p, *new_s, g))
    with cpu._forced_isa(isa):
        cpu.step(tensors.bucket())
    for planes, values in zip(tensors.planes, expected, strict=True):
        for plane, value in zip(planes, values, strict=True):
            check([plane], value)


@pytest.mark.parametrize("isa", cpu.isas())
def test_rows(isa: str, rng: np.random.Generator) -> None:
    """Each tensor follows its own row, and one whose row is inactive is not touched."""
    tensors = Tensors("sgd", ["fp32", "fp32"])
    tensors.rows = [[1.0, 1.0, 0.0, 0.1], [0.0, np.nan, np.nan, np.nan], [1.0, -2.0, 0.5, 0.3]]
    for i in range(9):
        tensors.add(100, draw(rng, 100, "sgd"), row=i % 3)
    expected = [tensors.expected([planes], i % 3) for i, planes in enumerate(tensors.planes)]
    before = [planes[0].bytes.copy() for planes in tensors.planes]
    with cpu._forced_isa(isa):
        cpu.step(tensors.bucket())
    for i, (param, grad) in enumerate(tensors.planes):
        check([grad], expected[i][1])
        if i % 3 == 1:
            np.testing.assert_array_equal(param.bytes, before[i])
        else:
            check([param], expected[i][0])


@pytest.fixture
def threads() -> Any:
    """Sets torch's thread count and puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHARED = {"one": (300_001,), "unequal": (70_000, 3, 16, 90_001), "many": (40,) * 2000}


@pytest.mark.parametrize("numels", SHARED.values(), ids=SHARED.keys())
def test_threads_share_the_work(numels: tuple[int, ...], rng: np.random.Generator, threads: Any) -> None:
    """Any number of threads gives the oracle's bits and the same sum of squares."""
    sums = set()
    for count in (1, 2, 3, 7):
        threads(count)
        tensors = Tensors("lion", ["fp32", "bf16", "fp32"])
        local = np.random.default_rng(5)
        for numel in numels:
            tensors.add(numel, [local.normal(size=numel).astype(F32) for _ in range(3)])
        sums.add(cpu.square_sum(tensors.bucket()).item())
        tensors.step_and_check(cpu.isas()[0])
    assert len(sums) == 1
    exact = sum((planes[-1].values().astype(float) ** 2).sum() for planes in tensors.planes)
    np.testing.assert_allclose(sums.pop(), exact, rtol=1e-13)


@pytest.mark.parametrize("codec", NAMES)
def test_square_sum(codec: str, rng: np.random.Generator) -> None:
    """The same bits on every instruction set; strided or not; not finite when a gradient is not."""
    results = set()
    tensors = Tensors("sgd", ["fp32", codec])
    for numel in (1, 15, 16, 17, 4097, 40_000):
        tensors.add(numel, [np.zeros(numel, F32), rng.normal(size=numel).astype(F32)], shift=numel % 3)
    exact = sum((planes[-1].values().astype(float) ** 2).sum() for planes in tensors.planes)
    for isa in cpu.isas():
        with cpu._forced_isa(isa):
            results.add(cpu.square_sum(tensors.bucket()).item())
            tensors.layouts = [record((numel,), (1,), (1,)) for numel in tensors.numels]
            results.add(cpu.square_sum(tensors.bucket()).item())
            tensors.layouts = []
    assert len(results) == 1
    np.testing.assert_allclose(results.pop(), exact, rtol=1e-13)
    for bad in (np.nan, np.inf):
        tensors.planes[-1][-1].bits[39_999:] = encode(np.array([bad]), codec)
        assert not np.isfinite(cpu.square_sum(tensors.bucket()).item())


def all_roundings(codec: str) -> Array:
    """Every stored value, the points half-way to the next one, and their float32 neighbours."""
    stored = decode(np.arange(2**16, dtype=np.uint16), codec)
    with np.errstate(all="ignore"):
        following = decode((np.arange(2**16) + 1).astype(np.uint16), codec)
        middle = (stored.astype(float) / 2 + following.astype(float) / 2).astype(F32)
    bits = np.concatenate([stored, middle]).view(np.uint32)
    random = np.random.default_rng(3).integers(0, 2**32, 2**20, dtype=np.uint32)
    return np.concatenate([bits, bits + 1, bits - 1, random]).view(F32)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_codec_exhaustively(codec: str, isa: str) -> None:
    """Momentum with ``b = 0 * b + 1 * g`` stores float32 values; ``b = 1 * b + 0 * g`` keeps every code."""
    values = all_roundings(codec)
    zeros = np.zeros_like(values)
    tensors = Tensors("sgd_momentum", ["fp32", "fp32", codec])
    tensors.rows = [[1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    tensors.add(len(values), [zeros, zeros, values])
    tensors.step_and_check(isa)
    codes = np.arange(2**16, dtype=np.uint16)
    tensors = Tensors("sgd_momentum", ["fp32", "fp32", codec])
    tensors.rows = [[1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    (_, state, _) = tensors.add(2**16, [zeros[: 2**16]] * 3)
    state.bits[:] = codes
    with cpu._forced_isa(isa):
        cpu.step(tensors.bucket())
    same = (state.bits == codes) | np.isnan(decode(codes, codec)) | (codes == 0x8000)
    assert same.all()
    assert np.isnan(state.values()[np.isnan(decode(codes, codec))]).all()
