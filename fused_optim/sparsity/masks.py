"""Masks of N:M sparsity: which weights are kept, one bit each, and how they change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.compiled_masks import unpack
from ..kernels.finders import Blocks, Groups
from ..kernels.layout import memory_order
from ..recipe import check_pattern
from ..storage import has_memory


def nm_mask(w: Tensor, n: int = 2, m: int = 4, dim: int = -1) -> Tensor:
    """The mask that keeps ``n`` of every ``m`` neighbours along a dimension, those of largest magnitude.

    Of equal magnitudes the first along ``dim`` is kept; a NaN counts as larger than every number, and all
    NaNs are equal. Exactly ``n`` of each group are kept.

    Args:
        w: weights of any shape, strides and floating dtype, on any device; no gradient flows.
        n: weights that are kept of each group.
        m: weights of a group, from 2 to 32; the width of ``dim`` is a multiple of it.
        dim: the dimension along which groups lie: -1 for the inputs of ``Linear``, 1 for those of ``Conv2d``.

    Returns:
        A bool tensor of the shape of ``w``, and of its strides where they are dense.

    Raises:
        ValueError: not ``0 < n < m <= 32``, no such dimension, a width that is no multiple of ``m``.
        TypeError: no tensor of a floating dtype, ``n``, ``m`` or ``dim`` no integer.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import nm_mask
        >>> nm_mask(torch.tensor([0.1, -3.0, 2.0, 2.0, 0.0, 0.0, 0.0, 1.0])).int().tolist()
        [0, 1, 1, 0, 1, 0, 0, 1]

    Source:
        Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.
    """
    check_groups(w, n, m, dim)
    return Groups(m, dim % w.ndim).find(w.detach(), n)


def transposable_mask(w: Tensor) -> Tensor:
    """The mask that keeps two of four along rows and columns at once, so that the transpose is 2:4 as well.

    Of every block of 4x4 weights it keeps those 8 whose sum of magnitudes is the largest, among the 90 ways
    to keep two in each row and column. Sums are taken in fp32 in the order of weights, row by row; a NaN
    counts as zero. Of equal sums the first way is taken, ways in ascending order of the numbers whose bit
    ``4 * row + column`` is set for a kept weight.

    Args:
        w: weights ``[..., rows, columns]`` of any floating dtype on any device; rows and columns are
            multiples of 4.

    Returns:
        A contiguous bool tensor of the shape of ``w``.

    Raises:
        ValueError: fewer than two dimensions, or one of the last two that is no multiple of 4.
        TypeError: no tensor of a floating dtype.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import transposable_mask
        >>> transposable_mask(torch.eye(4) + torch.eye(4).flip(0)).int().tolist()
        [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]

    Source:
        Hubara et al., Accelerated Sparse Neural Training, arXiv 2102.08124; Hu et al., Accelerating
        Transformer Pre-training with 2:4 Sparsity, arXiv 2404.01847.
    """
    _check_weights(w)
    if w.ndim < 2 or w.shape[-2] % 4 or w.shape[-1] % 4:
        raise ValueError(
            f"a transposable mask is for blocks of 4x4 weights, got shape {tuple(w.shape)}; the last two "
            "dimensions must be multiples of 4: leave this weight out, or use nm_mask"
        )
    return Blocks().find(w.detach(), 2)


def pack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as one bit per weight, as optimizers keep masks in their state.

    Weight ``i`` in the memory order of ``like`` is bit ``i % 8`` of byte ``i // 8``.

    Args:
        mask: a bool tensor.
        like: the weights, of the same shape.

    Returns:
        A flat uint8 tensor of ``ceil(numel / 8)`` bytes; bits behind the last weight are zero.

    Raises:
        ValueError: different shapes.
        TypeError: ``mask`` is no bool tensor.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import pack_mask
        >>> pack_mask(torch.tensor([True, False, True, True]), like=torch.zeros(4)).tolist()
        [13]
    """
    given: Any = mask
    if not isinstance(given, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {_kind(mask)}; compare with zero: mask != 0")
    if mask.shape != like.shape:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit weights of shape {tuple(like.shape)}"
        )
    places = mask.permute(memory_order(like)).reshape(-1)
    places = torch.nn.functional.pad(places.view(torch.uint8), (0, -len(places) % 8))
    # The product brings bit 0 of byte i to bit i of the highest byte.
    return (places.view(torch.int64) * 0x0102040810204080).view(torch.uint8)[7::8].clone()


def unpack_mask(bits: Tensor, like: Tensor) -> Tensor:
    """The bool tensor that :func:`pack_mask` packed.

    Args:
        bits: a flat uint8 tensor of ``ceil(numel / 8)`` bytes, such as ``optimizer.state[p]["mask"]``.
        like: the weights.

    Returns:
        A bool tensor of the shape of ``like``, in its memory order.

    Raises:
        ValueError: a number of bytes that does not fit ``like``.
        TypeError: ``bits`` is no uint8 tensor.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import unpack_mask
        >>> unpack_mask(torch.tensor([13], dtype=torch.uint8), like=torch.zeros(4)).tolist()
        [True, False, True, True]
    """
    _check_bits("bits", bits)
    if bits.shape != ((like.numel() + 7) // 8,):
        raise ValueError(
            f"a mask of {tuple(bits.shape)} bytes does not fit weights of shape {tuple(like.shape)}: "
            f"one bit each makes {(like.numel() + 7) // 8} bytes"
        )
    return unpack(bits, like)


def count_flips(bits: Tensor, other: Tensor) -> Tensor:
    """How many weights two packed masks disagree on; divided by the number of weights, the flip rate.

    Args:
        bits: a packed mask, uint8.
        other: another one of the same shape on the same device.

    Returns:
        An int64 tensor without dimensions on that device; nothing waits for it.

    Raises:
        ValueError: different shapes.
        TypeError: no uint8 tensors.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import count_flips
        >>> one, two = torch.tensor([[0b0011], [0b0110]], dtype=torch.uint8)
        >>> count_flips(one, two)
        tensor(2)
    """
    _check_bits("bits", bits)
    _check_bits("other", other)
    if bits.shape != other.shape:
        raise ValueError(
            f"masks of {tuple(bits.shape)} and {tuple(other.shape)} bytes are not of the same weights"
        )
    x = bits ^ other
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).sum(dtype=torch.int64)


def check_mask(w: Tensor, n: int = 2, m: int = 4, dim: int = -1) -> bool:
    """Whether every group of ``m`` neighbours along a dimension has at most ``n`` weights that are not zero.

    Args:
        w: weights, or a bool mask.
        n: how many may differ from zero; a NaN does.
        m: weights of a group.
        dim: the dimension along which groups lie.

    Raises:
        ValueError: not ``0 < n < m <= 32``, no such dimension, a width that is no multiple of ``m``.
        TypeError: no tensor of a floating dtype or bools, ``n``, ``m`` or ``dim`` no integer.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import check_mask
        >>> check_mask(torch.tensor([1.0, 0.0, 0.0, 2.0])), check_mask(torch.ones(4))
        (True, False)
    """
    check_groups(w, n, m, dim)
    return bool((group_counts(w, m, dim) <= n).all())


def group_counts(w: Tensor, m: int, dim: int) -> Tensor:
    """How many weights of each group are not zero; the dimension is shorter by the factor ``m``."""
    groups = (w.detach() != 0).view(torch.uint8).unflatten(dim, (-1, m))
    return groups.movedim(dim % w.ndim + 1, 0).sum(0, dtype=torch.uint8)


def check_groups(w: Any, n: Any, m: Any, dim: Any) -> None:
    """Checks that a tensor has groups.

    Raises:
        ValueError: no pattern, no such dimension, or a width that is no multiple of ``m``.
        TypeError: no weights, or numbers that are no integers.
    """
    check_pattern(n, m)
    if not isinstance(w, Tensor) or w.dtype != torch.bool:
        _check_weights(w)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if not -w.ndim <= dim < w.ndim:
        raise ValueError(f"dim={dim} is none of the dimensions of shape {tuple(w.shape)}")
    if w.shape[dim] % m:
        raise ValueError(
            f"dimension {dim} of shape {tuple(w.shape)} has {w.shape[dim]} weights, no multiple of m={m}; "
            "choose another dim or m, or leave this weight dense"
        )


def _check_weights(w: Any) -> None:
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise TypeError(
            f"weights must be a tensor of a floating dtype, got {_kind(w)}; there are no masks of integers "
            "and complex numbers: convert with .float()"
        )
    if not has_memory(w):
        raise TypeError(
            f"weights must be a plain tensor, got a {type(w).__name__}; of a DTensor give .full_tensor(), or "
            ".to_local() if shards hold whole groups"
        )


def _check_bits(name: str, bits: Any) -> None:
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
        raise TypeError(f"{name} must be a uint8 tensor from pack_mask, got {_kind(bits)}")


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else repr(value)
