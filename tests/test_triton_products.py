"""The matrix products against float64: every edge of a tile, layout and dtype, interpreted and on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fused_optim.kernels.triton import product_shapes, products
from tests import cases
from tests.cases import Target

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
product_kernels = pytest.importorskip("fused_optim.kernels.triton.product_kernels")
# NumPy 2.4 refuses what Triton 3.6 does for a range whose bound is an argument.
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret and triton.__version__ < "3.7",
    reason="Triton 3.6 interprets no such range",
)

TARGETS = [cases.INTERPRETER, cases.GPU[0]]
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
BF16, FP16, FP32 = UNIT


class Machine(NamedTuple):
    """What the launch shapes are chosen for."""

    capability: int
    processors: int


POINTERS, BOXES = Machine(80, 108), Machine(90, 132)
MACHINES = [pytest.param(POINTERS, id="pointers"), pytest.param(BOXES, id="boxes")]


@triton.jit
def _rows(index_ptr, row_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(row_ptr + offs, product_kernels.triangle_row(tl.load(index_ptr + offs)))


@triton.jit
def _tiles(out_ptr, rows, columns, BAND: tl.constexpr, TRIANGLE: tl.constexpr):
    index = tl.program_id(0)
    if TRIANGLE:
        row, column = product_kernels.below_diagonal(index, rows, BAND)
    else:
        row, column = product_kernels.in_bands(index, rows, columns, BAND)
    tl.store(out_ptr + 2 * index, row)
    tl.store(out_ptr + 2 * index + 1, column)


def _pretend(machine: Machine, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches as on that GPU, which the one at hand can do if it is no older."""
    if target.device == "cuda" and product_shapes.has_boxes(machine.capability):
        capability = products._machine(torch.device("cuda", 0))[0]
        if not product_shapes.has_boxes(capability):
            pytest.skip(f"compute capability {capability} has no bulk copy engine for tensor cores")
    monkeypatch.setattr(products, "_machine", lambda _: machine)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, target: Target, by_columns: bool = False) -> Tensor:
    x = torch.randn(*shape[:-2], shape[-1], shape[-2]).mT if by_columns else torch.randn(shape)
    return x.to(target.device, dtype)


def _assert_close(actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Rounded once after a sum of products whose absolute values add up to ``magnitude``."""
    error = (actual.double().cpu() - expected).abs()
    bound = UNIT[actual.dtype] * expected.abs() + 2.0**-19 * magnitude + 2.0**-24
    assert (error <= bound).all(), float((error / bound).max())


def _check(X: Tensor, **out: Tensor) -> None:
    """All products of X; ``out`` names tensors to write to."""
    x = X.double().cpu()
    A = products.gram(X, out.get("gram"))
    assert torch.equal(A, A.mT)
    _assert_close(A, x @ x.mT, x.abs() @ x.abs().mT)

    A = (A / (2 * X.shape[-1] ** 0.5)).to(X.dtype)
    a = A.double().cpu()
    Q = products.polynomial(A, 0.5, -0.25, out.get("polynomial"))
    assert torch.equal(Q, Q.mT)
    _assert_close(Q, 0.5 * a - 0.25 * a @ a, a.abs() + a.abs() @ a.abs())

    # An operand that commutes with A but for the rounding of its entries.
    C = products.multiply_commuting(A, Q, 2.0, out.get("multiply_commuting"))
    assert torch.equal(C, C.mT)
    q = Q.double().cpu()
    lower = (2 * a + a @ q).tril()
    _assert_close(C, lower + lower.tril(-1).mT, 2 * a.abs() + a.abs() @ q.abs())

    R = products.multiply_add(X, A, 2.0, out.get("multiply_add"))
    _assert_close(R, 2 * x + a @ x, 2 * x.abs() + a.abs() @ x.abs())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("shape", "dtype", "by_columns", "machine"),
    [
        ((1, 1), BF16, False, POINTERS),
        ((1, 1), BF16, False, BOXES),
        ((15, 17), FP32, False, POINTERS),
        ((64, 64), FP16, False, POINTERS),
        ((64, 16), BF16, True, BOXES),
        ((16, 200), FP32, True, BOXES),
        ((129, 200), BF16, False, POINTERS),
        ((72, 40), FP16, True, POINTERS),
        ((136, 24), BF16, False, BOXES),
    ],
    ids=str,
)
def test_products(
    shape: tuple[int, int], dtype: torch.dtype, by_columns: bool, machine: Machine, target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _pretend(machine, target, monkeypatch)
    _check(_normal(shape, dtype, target, by_columns))


@pytest.mark.parametrize("target", [cases.INTERPRETER])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("m", [40, 72])
def test_every_part_of_a_triangle(
    m: int, machine: Machine, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles so small that matrices of any number of them are soon multiplied."""
    _pretend(machine, target, monkeypatch)
    monkeypatch.setattr(product_shapes, "shapes", lambda *_: (product_shapes.Shape(16, 64, 1, 4),))
    _check(_normal((m, 16), FP32, target))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("machine", "dtype"), [(POINTERS, BF16), (BOXES, FP32)], ids=["pointers", "boxes"])
def test_a_bad_matrix_spoils_no_other(
    machine: Machine, dtype: torch.dtype, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(machine, target, monkeypatch)
    X, A = _normal((3, 24, 40), dtype, target), _normal((3, 24, 24), dtype, target)
    A = (A + A.mT) / 2
    good = [products.gram(X), products.polynomial(A, 1.0, 1.0), products.multiply_add(X, A, 1.0)]
    X[1, -1, -1], A[1, 0, 0] = torch.nan, torch.inf
    bad = [products.gram(X), products.polynomial(A, 1.0, 1.0), products.multiply_add(X, A, 1.0)]
    for a, b in zip(good, bad, strict=True):
        assert torch.equal(a[::2], b[::2])
        assert not b[1].isfinite().all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("machine", MACHINES)
def test_batches_and_views(machine: Machine, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leading dimensions, rows with gaps, starts off 16 bytes, results by columns, untouched surroundings."""
    _pretend(machine, target, monkeypatch)

    def guarded(rows: int, columns: int, start: int, by_columns: bool = False) -> tuple[Tensor, Tensor]:
        around = torch.full((2, 1, rows + 16, columns + 16), 7.0, dtype=FP16, device=target.device)
        inside = around[..., start : start + rows, start : start + columns]
        return around, inside.mT if by_columns else inside

    for start, by_columns in ((8, False), (8, True), (3, True)):
        _, X = guarded(24, 40, start)
        X.copy_(torch.randn(X.shape))
        results = {
            "gram": guarded(24, 24, start, by_columns),
            "polynomial": guarded(24, 24, start, by_columns),
            "multiply_commuting": guarded(24, 24, start, by_columns),
            "multiply_add": guarded(*((40, 24) if by_columns else (24, 40)), start, by_columns),
        }
        _check(X, **{name: inside for name, (_, inside) in results.items()})
        for around, inside in results.values():
            inside.fill_(7.0)
            assert (around == 7.0).all()


def test_what_the_copy_engine_takes() -> None:
    x = torch.zeros(3, 24, 40, dtype=BF16)
    assert all(
        map(products._is_boxed, (x, x.mT, x[:, 8:, 8:], x[:1, :1], x[..., :5], x.new_zeros(1, 3, 5)[:, :1]))
    )
    assert not any(
        map(products._is_boxed, (x[..., 1:], x[..., ::2], x[:1].expand_as(x), x.new_zeros(1, 3, 5)))
    )


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_to_multiply(target: Target) -> None:
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0)):
        X = torch.ones(shape, device=target.device)
        A = products.gram(X, torch.full((*shape[:-1], shape[-2]), torch.nan, device=target.device))
        assert A.shape == (*shape[:-1], shape[-2])
        assert not A.any()
        assert products.polynomial(A, 1.0, 1.0).shape == A.shape
        assert products.multiply_add(X, A, 1.0).shape == X.shape


@pytest.mark.parametrize("target", TARGETS)
def test_a_product_cannot_replace_its_operand(target: Target) -> None:
    A = torch.ones(4, 4, device=target.device)
    with pytest.raises(AssertionError, match="cannot replace"):
        products.polynomial(A, 1.0, 1.0, out=A)


@pytest.mark.parametrize("target", TARGETS)
def test_the_row_of_an_index_is_exact(target: Target) -> None:
    """Beside every multiple of 41 up to where 32 bits end, the last and the first index of a row."""
    rows = torch.cat([torch.arange(1, 1024), torch.arange(1025, 46340, 41)]).repeat(2)[:4096]
    rows[2048:] = rows[:2048]
    first = rows * (rows - 1) // 2
    index = torch.where(torch.arange(4096) < 2048, first, first + rows - 1).int().to(target.device)
    found = torch.empty_like(index)
    _rows[(1,)](index, found, SIZE=4096)
    assert torch.equal(found.cpu().long(), rows)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (9, 2), (4, 4), (6, None), (9, None)])
def test_every_tile_is_visited_once(rows: int, columns: int | None, target: Target) -> None:
    triangle = columns is None
    expected = {(i, j) for i in range(rows) for j in range(i if columns is None else columns)}
    out = torch.full((len(expected), 2), -1, dtype=torch.int32, device=target.device)
    _tiles[(len(expected),)](out, rows, columns or 0, BAND=product_shapes.BAND, TRIANGLE=triangle)
    assert set(map(tuple, out.tolist())) == expected


def test_one_triangle_is_computed() -> None:
    """Each square on or below the diagonal once, whatever the tile; its neighbours above are not."""
    for side in (64, 128):
        for squares in range(1, 20):
            tiles, halves = product_shapes.triangle(2 * side * squares, side)
            n = 2 * squares
            assert 2 * tiles + halves == n * (n + 1) // 2
            assert product_shapes.triangle(2 * side * (squares - 1) + 1, side) == (tiles, halves)


def test_tiles_follow_size_and_processors() -> None:
    def side(batches: int, m: int) -> int:
        return product_shapes.symmetric_shape(batches, m, 16, 90, 132).side

    assert [side(1, m) for m in (16, 512, 1024, 2048, 4096, 8192)] == [64, 64, 64, 128, 128, 128]
    assert [side(batches, 1024) for batches in (4, 16, 64)] == [128, 128, 128]
    assert product_shapes.rectangular_shape(1, 4096, 11008, 16, 90, 132).side == 128
    assert product_shapes.rectangular_shape(1, 256, 1024, 16, 90, 132).side == 64
    # 256 whole tiles' worth of work and 4 processors' worth of halves: two tiles each, none waits.
    tiles, halves = product_shapes.triangle(4096, 128)
    assert tiles + halves / 2 == 2 * 132


@pytest.mark.gpu
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("shape", [(3, 1040, 2056), (2, 2048, 512), (1, 333, 4096)], ids=str)
def test_large_matrices(
    shape: tuple[int, ...], dtype: torch.dtype, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target("triton", "cuda")
    _pretend(machine, target, monkeypatch)
    X = _normal(shape, dtype, target)
    _check(X)
    assert torch.equal(products.gram(X), products.gram(X))


@pytest.mark.gpu
@pytest.mark.parametrize("machine", MACHINES)
def test_offsets_beyond_32_bits(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("triton", "cuda")
    _pretend(machine, target, monkeypatch)
    for shape, strides in (((40, 64), (2**26, 1)), ((2, 40, 64), (2**31, 64, 1))):
        reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        X = torch.empty(reach, dtype=BF16, device="cuda").as_strided(shape, strides)
        X.copy_(torch.randn(shape))
        _check(X)


@pytest.mark.gpu
@pytest.mark.parametrize("machine", MACHINES)
def test_a_graph_replays_products(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("triton", "cuda")
    _pretend(machine, target, monkeypatch)
    X, S = _normal((2, 192, 320), BF16, target), torch.eye(192, dtype=BF16, device="cuda").repeat(2, 1, 1)

    def iterate() -> Tensor:
        return products.multiply_add(X, products.polynomial(products.gram(X), 0.5, -0.25), 2.0)

    iterate()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = iterate()
    X.copy_(_normal((2, 192, 320), BF16, target) / 16)
    graph.replay()
    expected = iterate()
    torch.cuda.set_sync_debug_mode("error")
    try:
        products.multiply_add(X, S, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(captured, expected)
