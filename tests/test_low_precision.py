"""Split, compensated and stochastically rounded bf16: exhaustive where finite, and whether weights move."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fused_optim
from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.reference.codecs import CODECS as REFERENCE
from fused_optim.kernels.reference.philox import Stream, philox, random_16_bits
from tests.cases import assert_same_bits

STREAM = Stream(seed=11, step=7, ordinal=3, slot=0)


def _all_upper_halves(lower: list[int]) -> Tensor:
    """Every sign, exponent and upper mantissa with some lower halves, as fp32."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    bits = (upper.unsqueeze(1) + torch.tensor(lower)).flatten()
    return bits.to(torch.int32).view(torch.float32)


EDGES = [0, 1, 0x7F, 0x80, 0x81, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFF80, 0xFF81, 0xFFFE, 0xFFFF]


def _round_trip(name: str, x: Tensor) -> tuple[list[Tensor], Tensor]:
    planes = list(REFERENCE[name].encode(x, STREAM))
    return planes, REFERENCE[name].decode(planes)


def test_split16_is_exact() -> None:
    """All upper halves with the lower halves at every boundary, and all lower halves of some exponents."""
    low = torch.arange(1 << 16, dtype=torch.int64)
    some = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3FFF, 0x7F7E, 0x7F7F, 0xBF81, 0xFF7F, 0x8000]
    dense = torch.cat([((top << 16) + low).to(torch.int32).view(torch.float32) for top in some])
    for x in (_all_upper_halves(EDGES), dense):
        (high, _), decoded = _round_trip("bf16_split16", x)
        assert_same_bits(decoded, x)
        finite = x.isfinite()
        # The weight that the model sees is a correctly rounded one; ties go away from zero.
        half_step = (high.float() - x.double()).abs()
        nearest = (x.bfloat16().float() - x.double()).abs()
        fine = finite & high.isfinite() & x.bfloat16().isfinite()
        assert (half_step[fine] == nearest[fine]).all()


def test_split8_rounds_to_24_bits() -> None:
    x = _all_upper_halves([*EDGES, *range(0x1200, 0x1400, 37)])
    (high, _), decoded = _round_trip("bf16_split8", x)
    assert torch.equal(decoded.isnan(), x.isnan()) and torch.equal(high.isnan(), x.isnan())
    normal = x.isfinite() & (x.abs() >= 2.0**-126) & decoded.isfinite()
    error = (decoded.double() - x.double()).abs()
    assert (error <= CODECS["bf16_split8"].relative_error * x.double().abs())[normal].all()
    _, again = _round_trip("bf16_split8", decoded)
    assert_same_bits(again, decoded)
    # Each of the 2**24 numbers is its own nearest: no pattern of the two planes is lost.
    exact = _all_upper_halves([0, 0x100, 0x7F00, 0x8000, 0x8100, 0xFF00])
    assert_same_bits(_round_trip("bf16_split8", exact)[1], exact)


@pytest.mark.parametrize(("name", "dtype"), [("bf16_kahan", torch.bfloat16), ("fp16_kahan", torch.float16)])
def test_compensation_doubles_the_mantissa(name: str, dtype: torch.dtype) -> None:
    x = _all_upper_halves(EDGES)
    (p, c), decoded = _round_trip(name, x)
    assert_same_bits(p, x.to(dtype))
    # Far from the format's smallest number, where the lost part is a number of that format too.
    lowest = 2.0**-100 if dtype is torch.bfloat16 else 2.0**-2
    normal = p.isfinite() & (x.abs() >= lowest)
    error = (decoded.double() - x.double()).abs()
    assert (error <= CODECS[name].relative_error * x.double().abs())[normal].all()
    assert (c[~p.isfinite()] == 0).all()
    assert_same_bits(decoded[p.isinf()], p.float()[p.isinf()])


@pytest.mark.parametrize("name", ["bf16_split8", "bf16_split16", "bf16_kahan", "fp16_kahan", "bf16_sr"])
def test_zero_is_zero_in_every_plane(name: str) -> None:
    for plane in REFERENCE[name].encode(torch.zeros(20), STREAM):
        assert (plane.view(torch.uint8) == 0).all()


def test_philox_gives_the_published_words() -> None:
    """The known answers for philox4x32 with ten rounds that its authors distribute (Random123)."""
    known = {
        ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
            *(0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    }
    for (counter, key), expected in known.items():
        words = philox(tuple(torch.tensor([word]) for word in counter), key)
        assert tuple(word.item() for word in words) == expected


def test_random_bits_depend_on_seed_step_parameter_slot_and_element() -> None:
    streams = [STREAM, *(STREAM._replace(**{field: 12345}) for field in Stream._fields)]
    bits = [random_16_bits(stream, 4096, torch.device("cpu")) for stream in streams]
    for i, first in enumerate(bits):
        assert len(first.unique()) > 3500
        assert all((first == other).float().mean() < 0.01 for other in bits[i + 1 :])
    assert torch.equal(random_16_bits(STREAM, 77, torch.device("cpu")), bits[0][:77])


def test_stochastic_rounding_leaves_bf16_values_and_special_ones_alone() -> None:
    x = _all_upper_halves([0])
    (rounded,) = REFERENCE["bf16_sr"].encode(x, STREAM)
    assert_same_bits(rounded, x.bfloat16())


def test_stochastic_rounding_gives_one_of_the_neighbours_without_bias() -> None:
    """The share that is rounded up is binomial: six standard deviations fail once in 5e8 honest runs."""
    count = 1 << 18
    for fraction in (0.01, 0.25, 0.5, 0.9, 0.999):
        for low in (1.0, -3.0, 1e-30, -(2.0**100)):
            step = torch.tensor(low).abs().log2().floor().exp2().item() * 2.0**-7
            start = torch.tensor(low).bfloat16().item()
            x = torch.full((count,), start + math.copysign(fraction * step, start))
            true = (x[0].double().item() - start) / math.copysign(step, start)
            (rounded,) = REFERENCE["bf16_sr"].encode(x, STREAM)
            up = (rounded.double() - start).abs() / step
            assert ((up == 0) | (up == 1)).all()
            deviation = math.sqrt(true * (1 - true) / count)
            assert abs(up.mean().item() - true) < 6 * deviation + 2.0**-16


@pytest.mark.parametrize("codec", ["auto", "bf16_sr", "bf16_kahan", "bf16_split8", "bf16_split16"])
def test_small_steps_add_up_except_in_plain_bf16(codec: str) -> None:
    """2000 steps of 1e-3 from 16.0: plain bf16 (steps of 0.125 there) stands still."""
    p = torch.full((4096,), 16.0, dtype=torch.bfloat16, requires_grad=True)
    optimizer = fused_optim.SGD([p], lr=1e-3, param_codec=codec)
    p.grad = torch.ones_like(p)
    for _ in range(2000):
        optimizer.step()
    mean = p.double().mean().item()
    if codec == "auto":
        assert mean == 16.0
    elif codec == "bf16_sr":
        # A random walk: the variance of each of 2000 steps is at most step * spacing (1e-3 * 0.125).
        assert abs(mean - 14.0) < 6 * math.sqrt(2000 * 1e-3 * 0.125 / 4096)
    else:
        # With 24 bits the spacing below 16 is 2**-12: a step of 1e-3 is four of these, not 4.096.
        lost = 2000 * (1e-3 - 4 * 2.0**-12) if codec == "bf16_split8" else 0.0
        # Compensation is bf16 too: its spacing is 2**-13 where it is largest, and it is rounded every step.
        drift = 2000 * 2.0**-14 if codec == "bf16_kahan" else 2e-3
        # The weight that is read here is rounded to bf16, whose spacing is 2**-4.
        assert abs(mean - (14.0 + lost)) <= 2.0**-5 + drift
