"""The kernels of products.py: ``alpha P Qᵀ + beta D``, and one triangle of it with its mirror image.

P has ``m`` rows, Q has ``n``, both are ``k`` deep. An operand is a tensor descriptor (the bulk copy engine
fetches its boxes, with zeros beyond the edges) or ``(pointer, batch stride, row stride, depth stride)``. A
tile is ``SIDE`` rows of P and ``2 SIDE`` of Q; results leave in squares of that side.
"""

import triton
import triton.language as tl

from .arithmetic import INTERPRETED
from .codecs import from_bf16, to_bf16


@triton.jit
def triangle_row(index):
    """The row r > 0 of an element below a diagonal, row by row: r (r-1) / 2 <= index < r (r+1) / 2."""
    r = ((1.0 + tl.sqrt(1.0 + 8.0 * index.to(tl.float32))) * 0.5).to(tl.int32)
    # The root is rounded, so it may be the neighbour's: integers decide.
    r -= (r * (r - 1) // 2 > index).to(tl.int32)
    r += (r * (r + 1) // 2 <= index).to(tl.int32)
    return r


@triton.jit
def below_diagonal(index, squares, BAND: tl.constexpr):
    """Row and column of a square below the diagonal; ``BAND`` rows of squares share the columns they read."""
    first = triangle_row(index) // BAND * BAND
    index -= first * (first - 1) // 2
    rows = tl.minimum(BAND, squares - first)
    row, column = first + index % rows, index // rows
    if index >= first * rows:
        index -= first * rows
        row = triangle_row(index)
        column = first + index - row * (row - 1) // 2
        row += first
    return row, column


@triton.jit
def in_bands(index, rows, columns, BAND: tl.constexpr):
    """Row and column of a tile of a rectangle, ``BAND`` rows column by column."""
    first = index // (BAND * columns) * BAND
    index -= first * columns
    rows = tl.minimum(BAND, rows - first)
    return first + index % rows, index // rows


@triton.jit
def _box(source, batch, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWAPPED: tl.constexpr):
    if SWAPPED:
        return source.load([batch, column, row]).reshape(COLUMNS, ROWS).T
    else:
        return source.load([batch, row, column]).reshape(ROWS, COLUMNS)


@triton.jit
def _pointers(source, batch, rows, columns):
    start = source[0] + batch.to(tl.int64) * source[1]
    return start + rows.to(tl.int64) * source[2] + columns.to(tl.int64) * source[3]


@triton.jit
def _fp32(x):
    if INTERPRETED and x.dtype == tl.bfloat16:
        return from_bf16(x.to(tl.uint16, bitcast=True))
    else:
        return x.to(tl.float32)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:
        return to_bf16(x).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _dot(x, y, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        # It multiplies what bits of bf16 mean as integers.
        x, y = _fp32(x), _fp32(y)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def _product(
    p, q, batch, row, column, m, n, k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BOXES: tl.constexpr, P_SWAPPED: tl.constexpr, Q_SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BOXES:
        for start in tl.range(0, k, DEPTH):
            x = _box(p, batch, row, start, ROWS, DEPTH, P_SWAPPED)
            y = _box(q, batch, column, start, COLUMNS, DEPTH, Q_SWAPPED)
            acc = _dot(x, y.T, acc, PRECISION)
    else:
        rows, columns = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
        across, down = tl.arange(0, DEPTH)[None, :], tl.arange(0, DEPTH)[:, None]
        x_ptr, y_ptr = _pointers(p, batch, rows, across), _pointers(q, batch, columns, down)
        for start in tl.range(0, k, DEPTH):
            x = tl.load(x_ptr, mask=(rows < m) & (across < k - start), other=0.0)
            y = tl.load(y_ptr, mask=(columns < n) & (down < k - start), other=0.0)
            acc = _dot(x, y, acc, PRECISION)
            x_ptr += DEPTH * p[3]
            y_ptr += DEPTH * q[3]
    return acc


@triton.jit
def _squares(x, SIDE: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(x, (SIDE, 2, SIDE)), (0, 2, 1)))


@triton.jit
def _combined(
    acc, d, out, batch, row, column, m, n, alpha, beta,
    SIDE: tl.constexpr, ADD: tl.constexpr, BOXES: tl.constexpr, D_SWAPPED: tl.constexpr,
):  # fmt: skip
    """A square of the result, rounded once."""
    x = alpha * acc
    if BOXES:
        if ADD:
            x += beta * _fp32(_box(d, batch, row, column, SIDE, SIDE, D_SWAPPED))
        return _rounded(x, out.dtype)
    else:
        if ADD:
            rows, columns = row + tl.arange(0, SIDE)[:, None], column + tl.arange(0, SIDE)[None, :]
            mask = (rows < m) & (columns < n)
            x += beta * _fp32(tl.load(_pointers(d, batch, rows, columns), mask=mask, other=0.0))
        return _rounded(x, out[0].dtype.element_ty)


@triton.jit
def _store(out, x, batch, row, column, m, n, SIDE: tl.constexpr, BOXES: tl.constexpr):
    if BOXES:
        out.store([batch, row, column], x.reshape(1, SIDE, SIDE))
    else:
        rows, columns = row + tl.arange(0, SIDE)[:, None], column + tl.arange(0, SIDE)[None, :]
        tl.store(_pointers(out, batch, rows, columns), x, mask=(rows < m) & (columns < n))


@triton.jit(do_not_specialize=["batches"])
def symmetric(
    p, q, r, d, out, batches, m, k, alpha, beta,
    SIDE: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
    ADD: tl.constexpr, BOXES: tl.constexpr, SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``alpha P Qᵀ + beta D``, symmetric but for rounding; Q is q in boxes of 2 SIDE rows, r in halves.

    The matrix is cut into squares of two tiles. First come the squares below the diagonal, a tile a
    program, then those on it, three halves of a tile each: these fill the gaps that the others leave.
    """
    index = tl.program_id(0)
    squares = tl.cdiv(m, 2 * SIDE)
    tiles = squares * (squares - 1)
    if index < batches * tiles:
        batch, index = index // tiles, index % tiles
        row, column = below_diagonal(index // 2, squares, BAND)
        row, column = (2 * row + index % 2) * SIDE, 2 * column * SIDE
        if row < m:
            acc = _product(
                p, q, batch, row, column, m, m, k, SIDE, 2 * SIDE, DEPTH, BOXES, SWAPPED, SWAPPED, PRECISION
            )
            left, right = _squares(acc, SIDE)
            x = _combined(left, d, out, batch, row, column, m, m, alpha, beta, SIDE, ADD, BOXES, False)
            _store(out, x, batch, row, column, m, m, SIDE, BOXES)
            _store(out, x.T, batch, column, row, m, m, SIDE, BOXES)
            column += SIDE
            x = _combined(right, d, out, batch, row, column, m, m, alpha, beta, SIDE, ADD, BOXES, False)
            _store(out, x, batch, row, column, m, m, SIDE, BOXES)
            _store(out, x.T, batch, column, row, m, m, SIDE, BOXES)
    else:
        index -= batches * tiles
        batch, index = index // (3 * squares), index % (3 * squares)
        row = (index // 3 * 2 + (index % 3 + 1) // 2) * SIDE
        column = (index // 3 * 2 + index % 3 // 2) * SIDE
        if row < m:
            half = r if BOXES else q
            acc = _product(
                p, half, batch, row, column, m, m, k, SIDE, SIDE, DEPTH, BOXES, SWAPPED, SWAPPED, PRECISION
            )
            x = _combined(acc, d, out, batch, row, column, m, m, alpha, beta, SIDE, ADD, BOXES, False)
            if row == column:
                i = tl.arange(0, SIDE)
                x = tl.where(i[:, None] >= i[None, :], x, x.T)
            else:
                _store(out, x.T, batch, column, row, m, m, SIDE, BOXES)
            _store(out, x, batch, row, column, m, m, SIDE, BOXES)


@triton.jit(do_not_specialize=["batches"])
def rectangular(
    p, q, d, out, batches, m, n, k, alpha, beta,
    SIDE: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr, BOXES: tl.constexpr,
    P_SWAPPED: tl.constexpr, Q_SWAPPED: tl.constexpr, D_SWAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``alpha P Qᵀ + beta D``."""
    rows, columns = tl.cdiv(m, SIDE), tl.cdiv(n, 2 * SIDE)
    index = tl.program_id(0)
    batch, index = index // (rows * columns), index % (rows * columns)
    row, column = in_bands(index, rows, columns, 2 * BAND)
    row, column = row * SIDE, 2 * column * SIDE
    acc = _product(
        p, q, batch, row, column, m, n, k, SIDE, 2 * SIDE, DEPTH, BOXES, P_SWAPPED, Q_SWAPPED, PRECISION
    )
    left, right = _squares(acc, SIDE)
    x = _combined(left, d, out, batch, row, column, m, n, alpha, beta, SIDE, True, BOXES, D_SWAPPED)
    _store(out, x, batch, row, column, m, n, SIDE, BOXES)
    column += SIDE
    x = _combined(right, d, out, batch, row, column, m, n, alpha, beta, SIDE, True, BOXES, D_SWAPPED)
    _store(out, x, batch, row, column, m, n, SIDE, BOXES)
