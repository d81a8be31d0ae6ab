"""Masks of the largest magnitudes, found by few operations on many groups at once, on any device.

They equal ``reference/masking.py`` for any dimension, strides and dtype. ``argmax`` and comparisons
would take most of the time on a CPU: integers are subtracted instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITY = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}
_PAIRS = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""Two of a row's four places, in the order of the numbers whose bits they are."""
_GPU_PORTION = 1 << 22


def _portion(device: torch.device) -> int:
    """Weights to work on at a time: what a core's cache holds, or what keeps a GPU busy in bounded memory."""
    return 1 << 16 if device.type == "cpu" else _GPU_PORTION


def magnitude_keys(x: Tensor) -> Tensor:
    """Integers in the order of magnitudes, contiguous; a NaN is above every number, all NaNs are equal."""
    if x.dtype not in _INFINITY:
        x = x.float()
    bits = x.view(_INTEGERS[x.itemsize])
    keys = torch.empty(bits.shape, dtype=bits.dtype, device=bits.device)
    torch.bitwise_and(bits, torch.iinfo(bits.dtype).max, out=keys)
    return keys.clamp_(max=_INFINITY[x.dtype] + 1)


def largest_of_groups(w: Tensor, m: int, kept: Tensor | int, dim: int) -> Tensor:
    """Which weights are among the ``kept`` largest of their group of ``m`` along a dimension.

    Of equal magnitudes the first count as larger. The width of the dimension is a multiple of ``m``.
    """
    w = w.detach()
    mask = torch.empty_like(w, dtype=torch.bool)
    if not w.numel():
        return mask
    groups, keep = (x.unflatten(dim, (-1, m)).movedim(dim % w.ndim + 1, 0) for x in (w, mask))
    # Dimensions in the order in which they lie, so that a portion is a run of memory.
    order = sorted(range(1, groups.ndim), key=lambda i: (groups.stride(i), groups.shape[i]), reverse=True)
    groups, keep = groups.permute(0, *order), keep.permute(0, *order)
    steps = max(1, _portion(w.device) * groups.shape[1] // w.numel())
    for part, out in zip(groups.split(steps, 1), keep.split(steps, 1), strict=True):
        out.copy_(_beaten(magnitude_keys(part)) < kept)
    return mask


def _beaten(keys: Tensor) -> Tensor:
    """How many of its group are larger than each of ``[m, ...]``."""
    index = torch.arange(len(keys), dtype=keys.dtype, device=keys.device)
    beaten = index.view(-1, *[1] * (keys.ndim - 1)).repeat(1, *keys.shape[1:])
    for shift in range(1, len(keys)):
        # -1 where the later one is larger: then it is not beaten by the earlier one.
        later = (keys[:-shift] - keys[shift:]).bitwise_right_shift_(8 * keys.itemsize - 1)
        beaten[shift:] += later
        beaten[:-shift] -= later
    return beaten


class _Blocks(NamedTuple):
    """The 90 patterns of a 4x4 block, each an upper half of two rows and a lower one that completes it.

    Halves are numbered in the order of patterns: six times the second row's pair plus the first row's.
    """

    pairs: Tensor
    """``[2, 6]``: the places of a row's pair."""
    singles: Tensor
    """``[1, 6]``: upper halves that no other has the same columns as."""
    twins: Tensor
    """``[2, 12]``: upper halves of the same columns."""
    fours: Tensor
    """``[6, 1]``: upper halves with a weight in each column."""
    columns: Tensor
    """``[36]``: where the upper halves that complete a lower one are in (singles, twins, fours)."""
    uppers: Tensor
    """``[6, 36]``: those upper halves, the last one repeated."""
    lowers: Tensor
    """``[4, 36]``: the places of a lower half."""
    words: Tensor
    """``[36 * 6, 4]``: the pattern of lower half and upper one, four bools in an int32."""


@cache
def _blocks(device: torch.device) -> _Blocks:
    def columns(half: tuple[int, ...], sign: int) -> tuple[int, ...]:
        taken = [*_PAIRS[half[0]], *_PAIRS[half[1]]]
        return tuple(1 + sign * (taken.count(column) - 1) for column in range(4))

    halves = list(product(range(6), repeat=2))
    by_columns: dict[tuple[int, ...], list[int]] = {}
    for number, half in enumerate(halves):
        by_columns.setdefault(columns(half, 1), []).append(number)
    classes = sorted(by_columns, key=lambda found: len(by_columns[found]))
    fitting = [by_columns[columns(half, -1)] for half in halves]
    uppers = [[*found, *[found[-1]] * (6 - len(found))] for found in fitting]
    words = [
        [
            sum(1 << 8 * column for column in _PAIRS[pair])
            for pair in (*reversed(halves[upper]), *reversed(lower))
        ]
        for lower, found in zip(halves, uppers, strict=True)
        for upper in found
    ]
    sizes = [[by_columns[found] for found in classes if len(by_columns[found]) == size] for size in (1, 2, 6)]
    lowers = [[4 * i + place for i, pair in ((2, b), (3, a)) for place in _PAIRS[pair]] for a, b in halves]

    def across(table: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(table, device=device).t().contiguous()

    return _Blocks(
        pairs=across(_PAIRS),
        singles=across(sizes[0]),
        twins=across(sizes[1]),
        fours=across(sizes[2]),
        columns=torch.tensor([classes.index(columns(half, -1)) for half in halves], device=device),
        uppers=across(uppers),
        lowers=across(lowers),
        words=torch.tensor(words, dtype=torch.int32, device=device),
    )


def best_of_blocks(w: Tensor) -> Tensor:
    """Masks of ``[..., 4 m, 4 n]`` weights that keep two of four in every row and column of 4x4 blocks.

    The sum of magnitudes is the largest of the 90 ways: added in the order of places, in fp32, a NaN counting
    as zero. Of equal ones the first wins, patterns ascending as numbers whose bit ``i`` is place ``i``.
    """
    rows = w.detach().reshape(-1, w.shape[-1])
    mask = torch.empty(rows.shape, dtype=torch.bool, device=w.device)
    if w.numel():
        steps = 4 * max(1, _portion(w.device) // (4 * rows.shape[1]))
        for part, out in zip(rows.split(steps), mask.split(steps), strict=True):
            blocks = part.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).permute(1, 3, 0, 2)
            words = out.view(torch.int32).unflatten(0, (-1, 4))
            best = _best_patterns(blocks.float().abs().reshape(16, -1))
            words.copy_(best.view(len(words), -1, 4).transpose(1, 2))
    return mask.view(w.shape)


def _best_patterns(x: Tensor) -> Tensor:
    """``[16, blocks]`` magnitudes to ``[blocks, 4]`` words of four bools.

    Rounding keeps the order of sums, so a lower half's best sum is that of the largest upper half that it
    completes. A smaller one may round to the same: which is first is found for the best lower half alone.
    """
    x = x.nan_to_num_(nan=0.0, posinf=float("inf"))
    tables = _blocks(x.device)
    first, second = ([x[4 * row :][:4].index_select(0, pair) for row in range(4)] for pair in tables.pairs)
    upper = first[0] + second[0] + first[1].unsqueeze(1)
    upper = upper.add_(second[1].unsqueeze(1)).flatten(0, 1)
    classes = (tables.singles, tables.twins, tables.fours)
    members = [upper.index_select(0, table.flatten()).unflatten(0, table.shape) for table in classes]
    largest = torch.cat([halves.amax(0) for halves in members])
    total = largest.index_select(0, tables.columns).unflatten(0, (6, 6))
    total.add_(first[2]).add_(second[2]).add_(first[3].unsqueeze(1)).add_(second[3].unsqueeze(1))
    total = total.flatten(0, 1)
    best = total.amax(0)
    lower = _first(total, best)
    candidates = upper.gather(0, tables.uppers.gather(1, lower.expand(6, -1)))
    for summand in x.gather(0, tables.lowers.gather(1, lower.expand(4, -1))):
        candidates += summand
    return tables.words.index_select(0, 6 * lower + _first(candidates, best))


def _first(sums: Tensor, best: Tensor) -> Tensor:
    """The first of the sums that is the best, overwriting them: the bits of positive numbers are in order."""
    off = sums.view(torch.int32).sub_(best.view(torch.int32)).clamp_(min=-1).mul_(-64)
    return (
        off.add_(torch.arange(len(sums), dtype=torch.int32, device=sums.device).unsqueeze(1)).amin(0).long()
    )
