"""The kernels: one step for every rule with any codecs, one sum of squares; any number of tensors a launch.

A program works on one tile. A full tile of aligned planes is read and written in vectors of up to 16
bytes; any other goes in masked chunks. Codecs are ``(decode, encode, number of planes)``, in the order
of the table: parameter, states, gradient.
"""

import triton
import triton.language as tl

HEADER = tl.constexpr(5)
ROW_HEADER = tl.constexpr(4)
MAX_DIMS = tl.constexpr(8)
# These vary from bucket to bucket, and nothing is gained from compiling for one of them.
_COUNTS = ["n", "column"]
_TABLES = ["tiles", "table", "rows", "layouts", "partials"]


@triton.jit
def _load_each(ptr, step, COUNT: tl.constexpr):
    values = ()
    for i in tl.static_range(COUNT):
        values += (tl.load(ptr + i * step),)
    return values


@triton.jit
def _tile(table, tiles, n, TILE: tl.constexpr):
    """This program's column of the table, its first element, its length, and whether it needs no mask."""
    entry = tiles + 2 * tl.program_id(0)
    table += tl.load(entry)
    start = tl.load(entry + 1).to(tl.int64) * TILE
    count = tl.minimum(tl.load(table) - start, TILE).to(tl.int32)
    return table, start, count, (count == TILE) & (tl.load(table + 2 * n) != 0)


@triton.jit
def _walk(layout, start, offs, CHUNK: tl.constexpr):
    """Where elements ``start + offs`` of a strided tensor lie in the parameter and in the gradient."""
    p_offs = tl.zeros_like(offs).to(tl.int64)
    g_offs = p_offs
    dim = tl.load(layout)
    # Innermost first. While loops because Triton 3.6 interprets no range whose bound is loaded.
    while dim > 0:
        size = tl.load(layout + dim)
        outer = start // size
        first = start - outer * size
        # offs < CHUNK, so a size beyond CHUNK wraps at most once and the division by element is a 32-bit one.
        wrap = tl.minimum(size, CHUNK)
        carry = (offs + tl.maximum(first - size + wrap, 0).to(tl.int32)) // wrap.to(tl.int32)
        index = first + offs - carry * size
        p_offs += index * tl.load(layout + MAX_DIMS + dim)
        g_offs += index * tl.load(layout + 2 * MAX_DIMS + dim)
        start, offs, dim = outer, carry, dim - 1
    return p_offs, g_offs


@triton.jit
def _chunk(layouts, table, n, start, count, CHUNK: tl.constexpr, STRIDED: tl.constexpr):
    """A masked chunk's place in the parameter, in the (always dense) states and in the gradient."""
    offs = tl.arange(0, CHUNK)
    mask = offs < count
    if STRIDED:
        layout = layouts + tl.load(table + 3 * n) * (1 + 3 * MAX_DIMS)
        p_offs, g_offs = _walk(layout, start, offs, CHUNK)
        return (0, p_offs, mask), (start, offs, mask), (0, g_offs, mask)
    else:
        return (start, offs, mask), (start, offs, mask), (start, offs, mask)


@triton.jit
def _update(
    planes, places, g_scale, k,
    RULE: tl.constexpr, CODECS: tl.constexpr, EXACT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    p_place, s_place, g_place = places
    p = CODECS[0][0](planes[0], p_place, VECTOR)
    g = CODECS[-1][0](planes[-1], g_place, VECTOR) * g_scale
    s = ()
    for i in tl.static_range(1, len(CODECS) - 1):
        s += (CODECS[i][0](planes[i], s_place, VECTOR),)
    p, s = RULE(p, g, s, k, EXACT)
    CODECS[0][1](p, planes[0], p_place, VECTOR)
    for i in tl.static_range(1, len(CODECS) - 1):
        CODECS[i][1](s[i - 1], planes[i], s_place, VECTOR)


# SOURCES is a hash of the functions' text: Triton's cache on disk knows functions inside tuples by name only.
@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def step(
    tiles, table, rows, layouts, n,
    RULE: tl.constexpr, SCALARS: tl.constexpr, CODECS: tl.constexpr, SOURCES: tl.constexpr,
    STRIDED: tl.constexpr, EXACT: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    table, start, count, full = _tile(table, tiles, n, TILE)
    row = rows + tl.load(table + n) * (ROW_HEADER + SCALARS)
    active = tl.load(row)
    g_scale = tl.load(row + 1)
    k = _load_each(row + ROW_HEADER, 1, SCALARS)
    planes = ()
    column = table + HEADER * n
    for i in tl.static_range(len(CODECS)):
        planes += (_load_each(column, n, CODECS[i][2]),)
        column += CODECS[i][2] * n
    if active != 0:
        if full and not STRIDED:
            place = (start, tl.arange(0, TILE), None)
            _update(planes, (place, place, place), g_scale, k, RULE, CODECS, EXACT, VECTOR)
        else:
            while count > 0:
                places = _chunk(layouts, table, n, start, count, CHUNK, STRIDED)
                _update(planes, places, g_scale, k, RULE, CODECS, EXACT, 1)
                start, count = start + CHUNK, count - CHUNK


@triton.jit
def _squares(planes, place, DECODE: tl.constexpr, VECTOR: tl.constexpr):
    g = DECODE(planes, place, VECTOR)
    mask = place[2]
    if mask is not None:
        g = tl.where(mask, g, 0.0)
    g = g.to(tl.float64)
    return g * g


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def square_sum(
    tiles, table, partials, layouts, n, column,
    GRAD: tl.constexpr, SOURCES: tl.constexpr, STRIDED: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    table, start, count, full = _tile(table, tiles, n, TILE)
    planes = _load_each(table + column * n, n, GRAD[2])
    if full and not STRIDED:
        total = tl.sum(_squares(planes, (start, tl.arange(0, TILE), None), GRAD[0], VECTOR))
    else:
        squares = tl.zeros((CHUNK,), tl.float64)
        while count > 0:
            place = _chunk(layouts, table, n, start, count, CHUNK, STRIDED)[2]
            squares += _squares(planes, place, GRAD[0], 1)
            start, count = start + CHUNK, count - CHUNK
        total = tl.sum(squares)
    tl.store(partials + tl.program_id(0), total)
