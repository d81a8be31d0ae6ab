"""The 16-bit codecs of every backend against the definition of their formats, exhaustively."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.control import Control
from fused_optim.kernels.rules import RULES
from tests import cases
from tests.arena import Bed
from tests.cases import Case, Target, assert_same_bits
from tests.oracles.codecs import every_value, nearest


def _sent_through(target: Target, rule: str, param: str, grad: str, state: str, values: Tensor) -> Tensor:
    """Values that went, undisturbed, from the gradient into a zero parameter (sgd) or a new buffer."""
    case = Case(RULES[rule], CODECS[param], CODECS[grad], (CODECS[state],) * len(RULES[rule].slots))
    bed = Bed(case, target, [len(values)], odd_sizes=())
    bed.hypers = [
        {**group, "lr": 1.0, "weight_decay": 0.0, "maximize": rule == "sgd"} for group in bed.hypers
    ]
    (member,) = bed.members
    member.param.tensor.zero_()
    bed.gradient = lambda index, step: values.clone()
    bed.step(Control([1.0, 1.0], None))
    bed.assert_intact()
    return (member.param.tensor if rule == "sgd" else member.state["momentum_buffer"]).cpu()


@pytest.mark.parametrize("target", cases.EVERY_TARGET)
@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_every_16_bit_pattern_is_decoded_by_definition(codec: str, target: Target) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    grads = patterns.view(cases.DTYPES[codec])
    expected = torch.from_numpy(every_value(codec)).float()
    state = _sent_through(target, "sgd_momentum", "fp32", codec, "fp32", grads)
    # The rule adds 0 * buffer to the gradient, so that a negative zero ends as a positive one.
    assert_same_bits(state, expected + 0.0)


def _around_every_tie(codec: str) -> Tensor:
    """All finite values of a format, the midpoints between neighbours, and the fp32 numbers next to those."""
    table = every_value(codec)
    finite = np.sort(table[np.isfinite(table)])
    half_step = (finite[-1] - finite[-2]) / 2
    ladder = np.concatenate(
        [[finite[0] - half_step], (finite[1:] + finite[:-1]) / 2, [finite[-1] + half_step]]
    )
    with np.errstate(over="ignore"):
        ties = ladder.astype(np.float32)
        upper, lower = (np.nextafter(ties, np.float32(end)) for end in (np.inf, -np.inf))
    special = np.array([np.nan, np.inf, -np.inf, 0.0])
    points = [finite, ties, upper, lower, special]
    return torch.from_numpy(np.concatenate(points).astype(np.float32))


@pytest.mark.parametrize("target", cases.EVERY_TARGET)
@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_encoding_rounds_to_the_nearest_even_around_every_tie(codec: str, target: Target) -> None:
    values = _around_every_tie(codec)
    patterns = torch.from_numpy(nearest(codec, values.numpy())).to(torch.int16)
    for rule, param in (("sgd", codec), ("sgd_momentum", "fp32")):
        result = _sent_through(target, rule, param, "fp32", codec, values)
        actual = torch.where(result.isnan(), -1, result.view(torch.int16))
        # A result of zero has the sign that the rule's additions gave it, not the value's.
        zero = result == 0
        assert torch.equal(zero, (patterns & 0x7FFF) == 0), f"{codec} after {rule}: zeros differ"
        wrong = (actual != patterns) & ~zero
        first = values[wrong][:4].tolist()
        assert not wrong.any(), f"{codec} after {rule}: {int(wrong.sum())} wrong, first for {first}"
