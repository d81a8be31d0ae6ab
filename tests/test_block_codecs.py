"""Codecs with a scale per block: maps, nearest encoding by brute force, exact repetition, error bounds."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_optim import SGD, AdamW
from fused_optim.kernels import lookup
from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.native import cpu
from fused_optim.kernels.reference.blocks import BLOCK_CODECS, BlockCodec
from tests.oracles.block_codecs import VALUES, distance_to_nearest, dynamic_map

TABLES = {True: "dynamic_signed", False: "dynamic_unsigned"}
SCALES = (2.0**-126, 1e-30, 0.37, 1.0, 3e7, 2.0**127, 3e38)
BLOCKS = pytest.mark.parametrize("codec", BLOCK_CODECS.values(), ids=lambda codec: codec.name)


def _written_codes(codec: BlockCodec) -> Tensor:
    """Every code that encoding may give, as decoding reads it."""
    codes = torch.arange(256 if CODECS[codec.name].planes[0].per == 1 else 16)
    codes = codes[torch.from_numpy(~np.isnan(VALUES[codec.name]))]
    return codes.to(torch.int8).int() if codec.name == "int8_companded" else codes.int()


def _index(codes: Tensor) -> np.ndarray:
    return codes.numpy() & 255


def _table(codec: BlockCodec) -> np.ndarray:
    """What each code stands for, as stored: the definition rounded to fp32."""
    table = np.full(len(VALUES[codec.name]), np.nan)
    codes = _written_codes(codec)
    table[_index(codes)] = codec.value(codes).double()
    return table


def _is_signed(codec: BlockCodec) -> bool:
    return not codec.name.endswith("_unsigned")


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_dynamic_maps_are_the_papers_and_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    ours = lookup.dynamic_map(signed)
    assert len(set(ours.tolist())) == 256
    np.testing.assert_allclose(ours, dynamic_map(signed), rtol=3e-7)
    assert np.array_equal(ours, functional.create_dynamic_map(signed).numpy())


@pytest.mark.parametrize("codec", [BLOCK_CODECS["int8"], BLOCK_CODECS["int8_unsigned"]], ids=lambda c: c.name)
def test_the_kernels_table_tells_every_nearest_code(codec: BlockCodec) -> None:
    """For each upper half of a number's bits, and on both sides of each middle between two entries."""
    signed = _is_signed(codec)
    steps = lookup.table(TABLES[signed], torch.device("cpu"))
    steps = steps[lookup.STEPS : lookup.LINES].view(torch.int32).numpy().view(np.uint32)
    upper = np.arange(2**16, dtype=np.uint32) << 16
    middle = lookup.middles(lookup.magnitudes(signed)).view(np.uint32)
    beside = np.concatenate([middle, middle + 1, middle | 1 << 31, middle + 1 | 1 << 31])
    bits = np.concatenate([upper, upper | 1, upper | 0x7FFF, upper | 0xFFFF, beside])
    sums = steps[bits >> 16] + bits
    codes = (sums >> 16 & 255) ^ np.where((sums >> 31 == 1) & signed, 255, 0)
    n = torch.from_numpy(bits.view(np.float32))
    # Normalised values exceed 1 by their rounding; a block without a finite scale makes NaN.
    n = torch.where(n.isfinite(), n, 0.0)
    known = n.abs() < 2
    assert torch.equal(torch.from_numpy(codes.astype(np.int32))[known], codec.code(n)[known])


def _beside_every_middle(signed: bool) -> np.ndarray:
    """Magnitudes where the code or the line that leads to it changes, with their neighbours, up to 1."""
    points = np.concatenate([lookup.middles(lookup.magnitudes(signed)), np.ldexp(1.0, np.arange(-149, 1))])
    points = np.append(points, 0.0).astype(np.float32)
    beside = [points, np.nextafter(points, np.float32(2)), np.nextafter(points, np.float32(-1))]
    return np.unique(np.clip(np.concatenate(beside), 0, np.float32(1 + 2**-23)))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_lines_tell_every_nearest_code(signed: bool) -> None:
    """Rounded lines rise, so that they are right between the numbers where they are."""
    x, table = _beside_every_middle(signed), lookup.table(TABLES[signed], torch.device("cpu"))
    rows, middles = np.split(table[lookup.LINES :].numpy(), [256])
    rows, planes = rows.view(np.float32), middles[1024:].reshape(4, -1)
    inner = np.ascontiguousarray(planes.T).view(np.float32).ravel()
    row = np.maximum(x.view(np.uint32), 102 << 23) >> 24 & 15
    both = [rows[i + row].astype(np.float64) * x + rows[i + 16 + row] for i in (0, 32)]
    count = np.minimum(*both).astype(np.float32).astype(np.int32)
    count += x > inner[count]
    assert np.array_equal(count, np.searchsorted(lookup.middles(lookup.magnitudes(signed)), x))


@pytest.mark.parametrize("isa", cpu.isas())
def test_every_instruction_set_finds_every_nearest_code(isa: str) -> None:
    """A first momentum is the gradient, and without averages a second moment its square."""
    signed, unsigned = (_beside_every_middle(sign) for sign in (True, False))
    roots = np.sqrt(unsigned)
    tries = np.concatenate([signed, -signed, roots, np.nextafter(roots, 2), np.nextafter(roots, -1)])
    grad = torch.ones(-(-len(tries) // 255), 256)
    grad.view(-1)[torch.arange(grad.numel()) % 256 != 0] = torch.nn.functional.pad(
        torch.from_numpy(tries.astype(np.float32)), (0, len(grad) * 255 - len(tries))
    )
    states = []
    for backend in ("native", "reference"):
        for make in (partial(SGD, momentum=0.9), partial(AdamW, betas=(0.0, 0.0))):
            w = Parameter(torch.zeros_like(grad))
            w.grad = grad.clone()
            optimizer = make([w], lr=0.1, state_codec="int8", keep_fp32=0, backend=backend)
            with cpu._forced_isa(isa):
                optimizer.step()
            states.append([plane for plane in optimizer.state[w].values() if plane.dtype is torch.uint8])
    found, expected = [*states[0], *states[1]], [*states[2], *states[3]]
    assert len(found) == 3 and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("isa", cpu.isas())
def test_every_instruction_set_reads_every_code(isa: str) -> None:
    """In any order, in whole blocks and in a short one; weights show what was read."""
    shuffled = torch.cat([torch.randperm(256, generator=torch.Generator().manual_seed(i)) for i in range(9)])
    found: list[list[Tensor]] = []
    for backend in ("native", "reference"):
        w = Parameter(torch.linspace(-1, 1, len(shuffled) - 101))
        optimizer = AdamW([w], lr=0.1, state_codec="int8", keep_fp32=0, backend=backend)
        for step in range(2):
            w.grad = torch.ones_like(w) if step == 0 else torch.zeros_like(w)
            with cpu._forced_isa(isa):
                optimizer.step()
            for shift, plane in enumerate(optimizer.state[w].values()):
                if step == 0 and plane.dtype is torch.uint8:
                    plane.view(-1).copy_(shuffled.roll(shift)[: plane.numel()])
        found.append([w.detach(), *optimizer.state[w].values()])
    assert sum(plane.dtype is torch.uint8 for plane in found[0]) == 2
    assert all(map(torch.equal, *found))


@BLOCKS
def test_codes_stand_for_their_values(codec: BlockCodec) -> None:
    codes = _written_codes(codec)
    np.testing.assert_allclose(codec.value(codes).double(), VALUES[codec.name][_index(codes)], rtol=3e-7)


@BLOCKS
@pytest.mark.parametrize("scale", SCALES, ids="{:.0e}".format)
def test_a_code_comes_back_under_the_same_scale(codec: BlockCodec, scale: float) -> None:
    codes, scale_ = _written_codes(codec), torch.tensor(scale)
    values = codec.value(codes) * scale_
    again = codec.code(values * (torch.ones(()) / scale_))
    zero = codec.value(codes) == 0
    assert torch.equal(again[~zero], codes[~zero])
    assert (codec.value(again[zero]) == 0).all()


def _blocks_of_every_code(codec: BlockCodec, scale: float) -> Tensor:
    """Decoded blocks in which every code occurs beside the one that the scale stands for."""
    block = CODECS[codec.name].block
    codes = _written_codes(codec)
    values = codec.value(codes) * torch.tensor(scale).to(_scale_dtype(codec)).float()
    rows = -(-len(values) // (block - 1))
    largest = codec.value(codes).abs().max() * torch.tensor(scale).to(_scale_dtype(codec)).float()
    padding = largest.expand(rows * (block - 1) - len(values))
    return torch.cat([torch.cat([values, padding]).view(rows, -1), largest.expand(rows, 1)], 1).flatten()


def _scale_dtype(codec: BlockCodec) -> torch.dtype:
    return getattr(torch, CODECS[codec.name].planes[1].dtype)


@BLOCKS
@pytest.mark.parametrize("scale", SCALES[:-1], ids="{:.0e}".format)
def test_decoded_blocks_are_encoded_as_before(codec: BlockCodec, scale: float) -> None:
    """Also without the scale, because the largest value of a block is stored exactly."""
    values = _blocks_of_every_code(codec, scale)
    planes = codec.encode(values)
    decoded = codec.decode([plane.flatten() for plane in planes])[: len(values)]
    assert torch.equal(decoded, values)
    again = codec.encode(decoded)
    assert all(torch.equal(a, b) for a, b in zip(planes, again, strict=True))


def test_a_block_led_by_a_negative_value_shrinks_under_bitsandbytes_map() -> None:
    """Its map has no -1: the documented exception, which checkpoints avoid by carrying scales."""
    codec, values = BLOCK_CODECS["int8"], torch.tensor([-1.0, 0.5, 0.25])
    once = codec.decode(codec.encode(values))
    assert once[0].item() == pytest.approx(-0.99297, abs=1e-5)
    four_bits = BLOCK_CODECS["int4"]
    assert four_bits.decode(four_bits.encode(values))[0].item() == -1.0


def _probes(codec: BlockCodec) -> Tensor:
    """Normalised values: a fine grid, all decades, and the fp32 numbers around every boundary."""
    rng = np.random.default_rng(1)
    table = VALUES[codec.name]
    ladder = np.sort(np.abs(table[~np.isnan(table)]))
    edges = ((ladder[1:] + ladder[:-1]) / 2).astype(np.float32)
    near = [edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(2))]
    decades = 10.0 ** -rng.uniform(0, 9, 20_000)
    points = np.concatenate([*near, decades, np.linspace(0, 1, 50_001), ladder]).astype(np.float32)
    points = points[points <= 1]
    return torch.from_numpy(np.concatenate([points, -points]) if _is_signed(codec) else points)


@BLOCKS
def test_encoding_takes_the_nearest_code(codec: BlockCodec) -> None:
    n = _probes(codec)
    codes = codec.code(n)
    given, least = distance_to_nearest(codec.name, _table(codec), n.numpy(), _index(codes))
    # All others round on the way to their code: the value itself, or a boundary.
    computed = codec.name not in ("int8", "int8_unsigned")
    allowed = least + 3e-7 * computed
    kept = (given > allowed) & (n.numpy() > 0) & (_index(codes) == 1)
    assert not _is_signed(codec) or not kept.any()
    wrong = (given > allowed) & ~kept
    assert not wrong.any(), f"{n[torch.from_numpy(wrong)][:5].tolist()} are not encoded as the nearest"


@BLOCKS
def test_encoding_is_monotone(codec: BlockCodec) -> None:
    n = _probes(codec).unique()
    values = codec.value(codec.code(n))
    assert (values[1:] >= values[:-1]).all()


@BLOCKS
@pytest.mark.parametrize("seed", range(3))
def test_the_error_stays_below_the_catalogues_bound(codec: BlockCodec, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 40 * CODECS[codec.name].block
    x = torch.randn(size, generator=generator) * 10 ** torch.empty(size).uniform_(-6, 3, generator=generator)
    x = x if _is_signed(codec) else x.abs()
    decoded = codec.decode(codec.encode(x))
    blocks, error = x.view(40, -1), (decoded - x).abs().view(40, -1)
    bound = CODECS[codec.name].relative_error
    assert (error <= bound * blocks.abs().amax(1, keepdim=True)).all()
    assert (error.amax(1) > 0.1 * bound * blocks.abs().amax(1)).any(), "a bound that is never felt"


@pytest.mark.parametrize(
    "codec", [codec for codec in BLOCK_CODECS.values() if not _is_signed(codec)], ids=lambda codec: codec.name
)
def test_a_positive_second_moment_never_becomes_zero(codec: BlockCodec) -> None:
    x = torch.tensor([1.0, *(10.0**-e for e in range(1, 30)), 0.0])
    decoded = codec.decode(codec.encode(x))[: len(x)]
    assert (decoded[:-1] > 0).all()
    # The four-bit code has no zero at all; what it keeps instead is next to nothing.
    assert decoded[-1] <= (2e-5 if codec.name == "int4_unsigned" else 0)


@BLOCKS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(codec: BlockCodec, value: float) -> None:
    block = CODECS[codec.name].block
    x = torch.ones(3 * block)
    x[block + 5] = value
    planes = codec.encode(x)
    decoded = codec.decode(planes)
    assert (decoded[:block] == 1).all() and (decoded[2 * block :] == 1).all()
    assert not decoded[block : 2 * block].isfinite().any()
    again = codec.encode(decoded)
    assert not codec.decode(again)[block : 2 * block].isfinite().any()


@BLOCKS
def test_blocks_of_zeros_and_denormals_are_zero(codec: BlockCodec) -> None:
    for x in (torch.zeros(300), torch.full((300,), 1e-40), -torch.zeros(300)):
        decoded = codec.decode(codec.encode(x))[:300]
        assert (decoded == 0).all()


@BLOCKS
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 127, 129, 255, 257])
def test_short_last_blocks(codec: BlockCodec, size: int) -> None:
    x = torch.linspace(0.1, 1, size)
    planes = codec.encode(x)
    for plane, spec in zip(planes, CODECS[codec.name].planes, strict=True):
        assert plane.numel() == -(-size // spec.per)
    whole = codec.encode(torch.nn.functional.pad(x, (0, 256 - size % 256)))
    for plane, longer in zip(planes, whole, strict=True):
        assert torch.equal(plane, longer.flatten()[: plane.numel()]) or CODECS[codec.name].planes[0].per == 2
    assert (codec.decode(planes)[:size] - x).abs().max() <= CODECS[codec.name].relative_error * x.abs().max()
