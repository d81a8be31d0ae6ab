"""Masks that Triton finds: within a step for every size of groups and any strides, and of whole tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fused_optim
from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.masking import GROUPS, masked
from fused_optim.kernels.reference import masking as reference
from fused_optim.kernels.reference.codecs import CODECS as REFERENCE
from fused_optim.kernels.reference.philox import Stream
from fused_optim.kernels.rules import RULES
from fused_optim.kernels.triton import driver
from fused_optim.sparsity import CAST
from tests import cases
from tests.cases import Case, Target, assert_same_bits, normal
from tests.test_product import _compare

TARGETS = [cases.INTERPRETER, cases.GPU[0]]
MASK = CODECS["mask"]


def _plane(keep: Tensor) -> Tensor:
    (plane,) = REFERENCE["mask"].encode(keep.flatten().float(), Stream(0, 0, 0, 0))
    return plane


def _weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Weights with equal magnitudes, zeros, infinities and NaN side by side."""
    x = normal(shape, torch.float32, 1)
    flat = x.view(-1)
    flat[2::6] = 1.0
    flat[8::18] = -1.0
    flat[::7] = 0.0
    flat[5::13] = -torch.inf
    flat[3::11] = torch.nan
    return x.to(dtype)


@pytest.mark.parametrize("target", TARGETS)
def test_cast_looks_at_the_mask(target: Target) -> None:
    """Its rule asks for the mask, also in the form that the class makes of it."""
    params = [normal((33, 64), torch.float32, 7).to(device) for device in (target.device, "cpu")]
    for param, backend in zip(params, (target.backend, "reference"), strict=True):
        param.requires_grad_().grad = normal((33, 64), torch.float32, 8).to(param.device)
        optimizer = fused_optim.CASTAdamS(
            [param], lr=0.1, backend=backend, sparsity=CAST(total_steps=4), arithmetic="exact"
        )
        for _ in range(3):
            optimizer.step()
    assert_same_bits(*params)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("group", [group for group in GROUPS if group != 4])
def test_groups_within_and_across_threads(group: int, codec: str, target: Target) -> None:
    case = Case(masked(RULES["sgd"], group, False), CODECS[codec], CODECS[codec], (MASK,))
    _compare(case, target, (17, 2049), steps=2, seed=9)


@pytest.mark.parametrize("target", TARGETS)
def test_groups_follow_the_walk_through_strides(target: Target) -> None:
    rule, sizes, device = masked(RULES["sgd"], 4, False), (5, 1030), torch.device(target.device)
    p, g = normal(5 * 2100, torch.float32, 1).to(device), normal(5150, torch.float32, 2).to(device)
    plane = torch.full((644,), 0b10110101, dtype=torch.uint8, device=device)
    k = [0.1, 0.2, 0.0, 1.0, 0.02, 0.25, 2.0]
    layout = [2, *sizes, *(1,) * 6, 2100, 2, *(0,) * 6, 1, 5, *(0,) * 6]
    bucket = SimpleNamespace(
        rule=rule, param=CODECS["fp32"], states=(MASK,), grad=CODECS["fp32"], strided=True, exact=True,
        device=device, cache={}, numels=[5150],
        table=torch.tensor(
            [5150, 0, 1, 0, 0, 0, p.data_ptr(), plane.data_ptr(), g.data_ptr()], device=device
        )[:, None],
        rows=torch.tensor([[1.0, 1.0, 0.0, 0.0, *k]], device=device),
        layouts=torch.tensor([layout], device=device),
        tiles=lambda size: torch.tensor(
            [[0, i] for i in range(-(-5150 // size))], dtype=torch.int32, device=device
        ),
    )  # fmt: skip
    own, grad = p.as_strided(sizes, (2100, 2)), g.as_strided(sizes, (1, 5))
    bits = REFERENCE["mask"].decode([plane.cpu()])[:5150]
    expected, (keep,) = reference.rule_of(rule)(
        own.cpu().flatten(), grad.cpu().flatten(), (bits,), torch.tensor(k).unbind()
    )
    driver.step(bucket)
    assert_same_bits(own.flatten(), expected)
    assert_same_bits(plane, _plane(keep))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("group", "dtype", "numel", "first"),
    [
        (2, torch.float32, 1031, 0),
        (4, torch.bfloat16, 2051, 0),
        (8, torch.float16, 1025, 0),
        (16, torch.float32, 77, 1),
        (32, torch.float32, 1061, 0),
        (32, torch.bfloat16, 1061, 0),
        (4, torch.float32, 0, 0),
    ],
)
def test_masks_of_groups(group: int, dtype: torch.dtype, numel: int, first: int, target: Target) -> None:
    from fused_optim.kernels.triton.masks import nm_mask

    x = _weights((numel + first,), dtype).to(target.device)[first:]
    for kept in {1, group // 2}:
        expected = reference.largest_of_groups(x.cpu().float(), group, kept)
        assert_same_bits(nm_mask(x, group, kept), _plane(expected))


def _best_of_blocks(w: Tensor) -> Tensor:
    """By trying all 2**16 masks of a block."""
    shape = (*w.shape[:-2], w.shape[-2] // 4, 4, w.shape[-1] // 4, 4)
    magnitude = w.float().abs().nan_to_num(0.0, torch.inf).view(shape).transpose(-3, -2).reshape(-1, 16)
    bits = torch.arange(2**16)[:, None] >> torch.arange(16) & 1
    square = bits.view(-1, 4, 4)
    keep = bits[(square.sum(1) == 2).all(1) & (square.sum(2) == 2).all(1)].bool()
    total = torch.zeros(len(magnitude), len(keep))
    for place in range(16):
        total = torch.where(keep[:, place], total + magnitude[:, place, None], total)
    best = keep[total.argmax(1)].view(*shape[:-4], shape[-4], shape[-2], 4, 4)
    return best.transpose(-3, -2).reshape(w.shape)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 4), torch.float16),
        ((8, 20), torch.bfloat16),
        ((2, 4, 516), torch.float32),
        ((0, 4), torch.float32),
    ],
)
def test_transposable_masks(shape: tuple[int, ...], dtype: torch.dtype, target: Target) -> None:
    from fused_optim.kernels.triton.masks import transposable_mask

    w = _weights(shape, dtype)
    assert_same_bits(transposable_mask(w.to(target.device)), _plane(_best_of_blocks(w)))
