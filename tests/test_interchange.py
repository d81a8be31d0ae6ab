"""Checkpoints of bitsandbytes, of the installed package, in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim import states
from fused_optim.interchange import from_bitsandbytes, to_bitsandbytes
from fused_optim.kernels.codecs import for_slot
from tests import checkpointing
from tests.cases import assert_same_bits, normal

bitsandbytes = pytest.importorskip("bitsandbytes")

CLASSES: dict[str, dict[str, Any]] = {
    "AdamW8bit": {"lr": 0.01, "weight_decay": 0.1},
    "Adam8bit": {"lr": 0.01},
    "Lion8bit": {"lr": 0.01},
    "SGD8bit": {"lr": 0.01, "momentum": 0.9},
}
SHAPES = ((70, 60), (4099,), (5, 7), (4096,))


def _pair(name: str) -> tuple[Any, list[Parameter], Any, list[Parameter]]:
    """Theirs and ours, from the same weights."""
    params = [Parameter(normal(shape, torch.float32, seed)) for seed, shape in enumerate(SHAPES)]
    copies = [Parameter(p.detach().clone()) for p in params]
    theirs = getattr(bitsandbytes.optim, name)(params, **CLASSES[name])
    return theirs, params, getattr(fused_optim, name)(copies, **CLASSES[name]), copies


def _values(optimizer: Any, param: Tensor, slot: Any) -> Tensor:
    """Decoded as bitsandbytes would."""
    entry, number = optimizer.state[param], slot
    codes = entry[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes
    scale = entry[f"absmax{number}"].repeat_interleave(256)[: codes.numel()]
    return (entry[f"qmap{number}"][codes.flatten().int()] * scale).view(codes.shape)


@pytest.mark.parametrize("name", CLASSES)
def test_their_checkpoint_here_and_back(name: str) -> None:
    theirs, params, ours, copies = _pair(name)
    checkpointing.train(theirs, params, range(4))
    ours.load_state_dict(from_bitsandbytes(ours, checkpointing.written_and_read(theirs.state_dict())))
    slots = ours._rule(ours.param_groups[0]).slots
    for param, copied in zip(params, copies, strict=True):
        for number, slot in enumerate(slots, 1):
            codec = for_slot("int8" if param.numel() >= 4096 else "fp32", slot.signed)
            decoded = states.decode(copied, ours.state[copied], slot.name, codec)
            assert_same_bits(decoded, _values(theirs, param, number), slot.name)
        assert ours.state[copied]["step"] == theirs.state[param]["step"]
    back = to_bitsandbytes(ours)
    for param, (index, entry) in zip(params, theirs.state_dict()["state"].items(), strict=True):
        returned = back["state"][index]
        assert returned["step"] == entry["step"]
        wrapped = entry["__bnb_optimizer_quant_state__"]
        for key, value in returned["__bnb_optimizer_quant_state__"].items():
            assert_same_bits(value, wrapped[key], f"{key} of {tuple(param.shape)}")


@pytest.mark.parametrize("name", CLASSES)
def test_our_checkpoint_there(name: str) -> None:
    """The loaded optimizer goes on as ours does, but for the place of weight decay and of eps."""
    theirs, params, ours, copies = _pair(name)
    checkpointing.train(ours, copies, range(4))
    theirs.load_state_dict(to_bitsandbytes(ours))
    with torch.no_grad():
        for param, copied in zip(params, copies, strict=True):
            param.copy_(copied)
    before = [param.detach().clone() for param in params]
    checkpointing.train(ours, copies, range(4, 5))
    checkpointing.train(theirs, params, range(4, 5))
    for param, copied, old in zip(params, copies, before, strict=True):
        moved = (copied - old).abs().max()
        assert (param - copied).abs().max() < 0.02 * moved


def test_parameters_whose_memory_runs_otherwise() -> None:
    param = Parameter(normal((80, 70), torch.float32, 1).t())
    ours = fused_optim.AdamW8bit([param])
    checkpointing.train(ours, [param], range(3))
    wrapped = to_bitsandbytes(ours)["state"][0]["__bnb_optimizer_quant_state__"]
    scale = wrapped["absmax1"].repeat_interleave(256)[: param.numel()]
    theirs = (wrapped["qmap1"][wrapped["state1"].flatten().int()] * scale).view(param.shape)
    own = states.decode(param, ours.state[param], "exp_avg", for_slot("int8", True))
    assert (theirs - own).abs().max() < 0.01 * own.abs().max()
    other = fused_optim.AdamW8bit([Parameter(param.detach().clone())])
    other.load_state_dict(from_bitsandbytes(other, to_bitsandbytes(ours)))


def _broken(change: Any) -> Any:
    theirs, params, ours, _ = _pair("AdamW8bit")
    checkpointing.train(theirs, params, range(3))
    saved = theirs.state_dict()
    change(saved)
    return ours, saved


def _drop_block(saved: Any) -> None:
    wrapped = saved["state"][0]["__bnb_optimizer_quant_state__"]
    wrapped["absmax2"] = wrapped["absmax2"][:-1]


def _other_map(saved: Any) -> None:
    wrapped = saved["state"][0]["__bnb_optimizer_quant_state__"]
    wrapped["qmap1"] = torch.linspace(-1, 1, 256)


def _one_state(saved: Any) -> None:
    del saved["state"][0]["__bnb_optimizer_quant_state__"]["state2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_block, r"state2 of parameter 0 of group 0 has 16 blocks for 4200 values.*256"),
        (_other_map, r"state1 of parameter 0 of group 0 has another map"),
        (_one_state, r"no state2 for parameter 0 of group 0.*another optimizer"),
        (lambda saved: saved["param_groups"][0]["params"].pop(), r"groups of \[3\] parameters.*\[4\]"),
    ],
    ids=["blocks", "map", "rule", "groups"],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    ours, saved = _broken(change)
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(ours, saved)


def test_other_codecs_are_refused() -> None:
    param = Parameter(normal((80, 70), torch.float32, 1))
    ours = fused_optim.AdamW([param], state_codec="int4")
    checkpointing.train(ours, [param], range(2))
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 of group 0 is stored as 'int4'.*int8"):
        to_bitsandbytes(ours)
