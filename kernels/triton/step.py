"""The kernels: one step for every rule with any codecs, one sum of squares; any number of tensors a launch.

A program works on some tiles of a tensor, one after another: what it reads first (addresses, scalars)
would be a quarter of the instructions of one. A full tile of aligned planes is read and written in vectors
of up to 16 bytes; any other goes in masked chunks. Codecs are ``(decode, encode, addresses, ...)``, in the
order of the table: parameter, states, gradient. tile.py says what places, homes and ``SPREAD`` are, blocks.py
what else belongs to a block codec.
"""

import triton
import triton.language as tl

from .tile import offsets

HEADER = tl.constexpr(6)
ROW_HEADER = tl.constexpr(4)
MAX_DIMS = tl.constexpr(8)
# These vary from bucket to bucket, and nothing is gained from compiling for one of them.
_COUNTS = ["n", "column", "span"]
_TABLES = ["tiles", "table", "rows", "layouts", "partials"]


@triton.jit
def _load_each(ptr, step, COUNT: tl.constexpr):
    values = ()
    for i in tl.static_range(COUNT):
        values += (tl.load(ptr + i * step),)
    return values


@triton.jit
def _elements(table, tiles, n, span):
    """This program's column of the table, its first element, how many they are, and whether aligned."""
    entry = tiles + 2 * tl.program_id(0)
    table += tl.load(entry)
    start = tl.load(entry + 1).to(tl.int64) * span
    count = tl.minimum(tl.load(table) - start, span).to(tl.int32)
    return table, start, count, tl.load(table + 2 * n) != 0


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
def _chunk(layouts, table, n, start, count, CHUNK: tl.constexpr, WARPS: tl.constexpr, STRIDED: tl.constexpr):
    """A masked chunk's place in the parameter, in the (always dense) states and in the gradient."""
    offs = offsets(CHUNK, 32, WARPS)
    mask = offs < count
    if STRIDED:
        layout = layouts + tl.load(table + 3 * n) * (1 + 3 * MAX_DIMS)
        p_offs, g_offs = _walk(layout, start, offs, CHUNK)
        return (0, p_offs, mask), (start, offs, mask, count), (0, g_offs, mask)
    else:
        dense = (start, offs, mask, count)
        return dense, dense, dense


@triton.jit
def _stream(row, table, n):
    """Seed, step, ordinal, counters drawn before: whose random bits. Not loaded if no codec asks for any."""
    words = (row + 2).to(tl.pointer_type(tl.int32))
    ordinal = tl.load(table + 4 * n).to(tl.uint32)
    drawn = tl.load(table + 5 * n).to(tl.uint64)
    return tl.load(words).to(tl.uint32), tl.load(words + 1).to(tl.uint32), ordinal, drawn


@triton.jit
def _update(
    planes, places, stream, g_scale, k,
    RULE: tl.constexpr, CODECS: tl.constexpr, EXACT: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    p_place, dense, g_place = places
    p_home, s_home = (p_place, dense), (dense, dense)
    p = CODECS[0][0](planes[0], p_home, SPREAD, CODECS[0])
    g = CODECS[-1][0](planes[-1], (g_place, dense), SPREAD, CODECS[-1]) * g_scale
    s = ()
    for i in tl.static_range(1, len(CODECS) - 1):
        s += (CODECS[i][0](planes[i], s_home, SPREAD, CODECS[i]),)
    p, s = RULE[0](p, g, s, k, dense[2], SPREAD, EXACT, RULE)
    CODECS[0][1](p, planes[0], p_home, (0, stream), SPREAD, CODECS[0])
    for i in tl.static_range(1, len(CODECS) - 1):
        CODECS[i][1](s[i - 1], planes[i], s_home, (i, stream), SPREAD, CODECS[i])


# SOURCES is a hash of the functions' text: Triton's cache on disk knows functions inside tuples by name only.
@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def step(
    tiles, table, rows, layouts, n, span,
    RULE: tl.constexpr, SCALARS: tl.constexpr, CODECS: tl.constexpr, SOURCES: tl.constexpr,
    STRIDED: tl.constexpr, EXACT: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, SPREAD: tl.constexpr, MASKED_SPREAD: tl.constexpr,
):  # fmt: skip
    table, start, count, aligned = _elements(table, tiles, n, span)
    row = rows + tl.load(table + n) * (ROW_HEADER + SCALARS)
    active = tl.load(row)
    g_scale = tl.load(row + 1)
    k = _load_each(row + ROW_HEADER, 1, SCALARS)
    stream = _stream(row, table, n)
    planes = ()
    column = table + HEADER * n
    for i in tl.static_range(len(CODECS)):
        planes += (_load_each(column, n, CODECS[i][2]),)
        column += CODECS[i][2] * n
    if active != 0:
        if not STRIDED:
            tile = start // TILE
            while aligned & (count >= TILE):
                # Of a sum of starts the compiler would not know that it is a multiple.
                place = (tile * TILE, offsets(TILE, 32 * SPREAD[0], SPREAD[1]), None, None)
                places = (place, place, place)
                _update(planes, places, stream, g_scale, k, RULE, CODECS, EXACT, SPREAD)
                tile, count = tile + 1, count - TILE
            start = tile * TILE
        while count > 0:
            places = _chunk(layouts, table, n, start, count, CHUNK, SPREAD[1], STRIDED)
            _update(planes, places, stream, g_scale, k, RULE, CODECS, EXACT, MASKED_SPREAD)
            start, count = start + CHUNK, count - CHUNK


@triton.jit
def _squares(planes, place, GRAD: tl.constexpr, SPREAD: tl.constexpr):
    g = GRAD[0](planes, (place, place), SPREAD, GRAD)
    mask = place[2]
    if mask is not None:
        g = tl.where(mask, g, 0.0)
    g = g.to(tl.float64)
    return g * g


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def square_sum(
    tiles, table, partials, layouts, n, column,
    GRAD: tl.constexpr, SOURCES: tl.constexpr, STRIDED: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, SPREAD: tl.constexpr, MASKED_SPREAD: tl.constexpr,
):  # fmt: skip
    table, start, count, aligned = _elements(table, tiles, n, TILE)
    planes = _load_each(table + column * n, n, GRAD[2])
    if aligned & (count == TILE) and not STRIDED:
        offs = offsets(TILE, 32 * SPREAD[0], SPREAD[1])
        total = tl.sum(_squares(planes, (start, offs, None), GRAD, SPREAD))
    else:
        squares = tl.zeros((CHUNK,), tl.float64)
        while count > 0:
            place = _chunk(layouts, table, n, start, count, CHUNK, SPREAD[1], STRIDED)[2]
            squares += _squares(planes, place, GRAD, MASKED_SPREAD)
            start, count = start + CHUNK, count - CHUNK
        total = tl.sum(squares)
    tl.store(partials + tl.program_id(0), total)
