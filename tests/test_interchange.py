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
from fused_optim.sparsity import SRSTE
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


@pytest.mark.parametrize("shape", [(16, 32, 4, 3), (4, 4, 3, 3)], ids=["int8", "fp32"])
def test_channels_last_there_and_back(shape: tuple[int, ...]) -> None:
    """What goes there is contiguous, as their parameters are; states of 8 bits are rounded twice."""
    param = Parameter(normal(shape, torch.float32, 1).to(memory_format=torch.channels_last))
    ours = fused_optim.AdamW8bit([param])
    checkpointing.train(ours, [param], range(3))
    saved = to_bitsandbytes(ours)
    wrapped = saved["state"][0]["__bnb_optimizer_quant_state__"]
    assert wrapped["state1"].is_contiguous() and wrapped["state2"].is_contiguous()
    theirs = bitsandbytes.optim.AdamW8bit([Parameter(param.detach().contiguous())])
    theirs.load_state_dict(saved)
    copied = Parameter(param.detach().clone())
    other = fused_optim.AdamW8bit([copied])
    other.load_state_dict(from_bitsandbytes(other, theirs.state_dict()))
    for name in ("exp_avg", "exp_avg_sq"):
        codec = for_slot("int8" if param.numel() >= 4096 else "fp32", name == "exp_avg")
        before = states.decode(param, ours.state[param], name, codec)
        after = states.decode(copied, other.state[copied], name, codec)
        bound = 2 * codec.relative_error * before.abs().max()
        assert (before - after).abs().max() <= bound, name
        assert (before - after).norm() <= 0.03 * before.norm(), name


def test_codes_that_are_not_contiguous_are_refused() -> None:
    """On a GPU they mean their memory, on a CPU their dimensions: bitsandbytes does not say which."""
    param = Parameter(normal((16, 32, 4, 3), torch.float32, 1).to(memory_format=torch.channels_last))
    theirs = bitsandbytes.optim.AdamW8bit([param])
    checkpointing.train(theirs, [param], range(2))
    ours = fused_optim.AdamW8bit([Parameter(param.detach().clone())])
    with pytest.raises(ValueError, match=r"state1 of parameter 0 of group 0 has strides .*contiguous\(\)"):
        from_bitsandbytes(ours, theirs.state_dict())


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


def _without(part: str) -> Any:
    def change(saved: Any) -> None:
        entry = saved["state"][0]
        del (entry if part == "step" else entry["__bnb_optimizer_quant_state__"])[part]

    return change


@pytest.mark.parametrize("part", ["absmax1", "qmap1", "state1", "step", "absmax2"])
def test_missing_parts_are_named(part: str) -> None:
    ours, saved = _broken(_without(part))
    with pytest.raises(
        ValueError, match=rf"{part.replace('step', 'step count')}.* for parameter 0 of group 0"
    ):
        from_bitsandbytes(ours, saved)


@pytest.mark.parametrize("part", ["state", "param_groups"])
def test_missing_halves_are_named(part: str) -> None:
    ours, saved = _broken(lambda saved: saved.pop(part))
    with pytest.raises(ValueError, match=rf"has no '{part}'; give what optimizer.state_dict"):
        from_bitsandbytes(ours, saved)


def test_momentum_is_not_made_up() -> None:
    theirs, params, ours, _ = _pair("SGD8bit")
    checkpointing.train(theirs, params, range(2))
    saved = theirs.state_dict()
    del saved["param_groups"][0]["betas"]
    with pytest.raises(ValueError, match=r"group 0 of the bitsandbytes state dict has betas \(\)"):
        from_bitsandbytes(ours, saved)


@pytest.mark.parametrize("name", ["Lion8bit", "SGD8bit"])
def test_states_of_another_optimizer_are_refused(name: str) -> None:
    theirs, params, _, _ = _pair("AdamW8bit")
    checkpointing.train(theirs, params, range(2))
    ours = _pair(name)[2]
    with pytest.raises(ValueError, match=r"has a state2 for parameter 0 of group 0.*of another optimizer"):
        from_bitsandbytes(ours, theirs.state_dict())


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        ("Muon", {}, r"group 0 of Muon \(states: momentum_buffer\) has no counterpart in bitsandbytes"),
        ("AdamW", {"amsgrad": True}, r"max_exp_avg_sq\) has no counterpart.*AdamW and Adam without amsgrad"),
        ("SGD", {"lr": 0.1}, r"group 0 of SGD \(states: none\) has no counterpart"),
    ],
)
def test_optimizers_that_they_do_not_have(cls: str, options: dict[str, Any], message: str) -> None:
    param = Parameter(normal((80, 70), torch.float32, 1))
    ours = getattr(fused_optim, cls)([param], state_codec="int8", **options)
    checkpointing.train(ours, [param], range(2))
    with pytest.raises(ValueError, match=message):
        to_bitsandbytes(ours)
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(ours, {"state": {}, "param_groups": []})


def test_masks_stay_here() -> None:
    param = Parameter(normal((80, 72), torch.float32, 1))
    ours = fused_optim.AdamW8bit([param], sparsity=SRSTE())
    checkpointing.train(ours, [param], range(2))
    with pytest.raises(
        ValueError, match="parameter 0 of group 0 has a mask, which bitsandbytes does not have"
    ):
        to_bitsandbytes(ours)


def test_what_they_do_not_have_stays_behind() -> None:
    param = Parameter(normal((80, 72), torch.bfloat16, 1))
    ours = fused_optim.AdamH([param], state_codec="int8", param_codec="bf16_split8")
    checkpointing.train(ours, [param], range(2))
    entry = to_bitsandbytes(ours)["state"][0]
    assert {"param.lo", "radius"} < ours.state[param].keys()
    parts = {f"{part}{number}" for part in ("state", "absmax", "qmap") for number in (1, 2)}
    assert entry["__bnb_optimizer_quant_state__"].keys() == parts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda saved: saved["state"].__setitem__(7, saved["state"][0]),
            r"a parameter 7 that is in none of its groups \(there are \[0, 1, 2, 3\]\)",
        ),
        (
            lambda saved: saved["state"][0].__setitem__("step", "a"),
            r"step count 'a' for parameter 0 of group 0",
        ),
        (_drop_block, r"state2 of parameter 0 of group 0 has 16 blocks for 4200 values.*256"),
        (_other_map, r"state1 of parameter 0 of group 0 has another map"),
        (_one_state, r"no state2 for parameter 0 of group 0.*another optimizer"),
        (lambda saved: saved["param_groups"][0]["params"].pop(), r"groups of \[3\] parameters.*\[4\]"),
    ],
    ids=["index", "step", "blocks", "map", "rule", "groups"],
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
