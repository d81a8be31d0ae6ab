"""Checkpoints: exact resume, torch.optim in both directions, dtypes kept, copies and hooks."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim import full_precision
from fused_optim.kernels.codecs import for_slot
from tests import checkpointing
from tests.cases import assert_same_bits, normal
from tests.checkpointing import CLASSES, STORAGES, TORCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", CLASSES)
def test_resume_is_bit_exact(name: str, storage: str, dtype: torch.dtype) -> None:
    optimizer_class, options = CLASSES[name][0], checkpointing.options(name, storage)
    params = checkpointing.params(dtype)
    optimizer = optimizer_class(params, **options)
    checkpointing.train(optimizer, params, range(4))
    checkpoint = checkpointing.written_and_read(optimizer.state_dict())
    copies = [Parameter(p.detach().clone()) for p in params]
    resumed = optimizer_class(copies, **options)
    resumed.load_state_dict(checkpoint)
    checkpointing.assert_same_training(resumed, copies, optimizer, params)
    checkpointing.train(optimizer, params, range(4, 8))
    checkpointing.train(resumed, copies, range(4, 8))
    checkpointing.assert_same_training(resumed, copies, optimizer, params)


def test_a_checkpoint_is_a_snapshot() -> None:
    """Saving, training on, and loading the saved dict goes back; step counts are no views of live ones."""
    params = checkpointing.params()
    optimizer = fused_optim.AdamW(params, lr=0.01)
    checkpointing.train(optimizer, params, range(3))
    saved = optimizer.state_dict()
    steps = [entry["step"].item() for entry in saved["state"].values()]
    checkpointing.train(optimizer, params, range(3, 5))
    assert [entry["step"].item() for entry in saved["state"].values()] == steps


@pytest.mark.parametrize("name", CLASSES)
def test_loaded_tensors_are_not_aliased(name: str) -> None:
    optimizer_class, options = CLASSES[name]
    params, others = checkpointing.params(), checkpointing.params()
    optimizer, loaded = optimizer_class(params, **options), optimizer_class(others, **options)
    checkpointing.train(optimizer, params, range(3))
    saved = optimizer.state_dict()
    loaded.load_state_dict(saved)
    before = {
        index: {key: value.clone() for key, value in entry.items()} for index, entry in saved["state"].items()
    }
    checkpointing.train(loaded, others, range(3, 5))
    for index, entry in before.items():
        for key, value in entry.items():
            assert_same_bits(saved["state"][index][key], value, key)


@pytest.mark.parametrize("name", CLASSES)
def test_load_on_an_optimizer_that_already_stepped(name: str) -> None:
    optimizer_class, options = CLASSES[name]
    params = checkpointing.params()
    optimizer = optimizer_class(params, **options)
    checkpointing.train(optimizer, params, range(3))
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    checkpointing.train(optimizer, params, range(3, 6))
    expected = [p.detach().clone() for p in params]
    for _ in range(2):
        optimizer.load_state_dict(saved)
        for param, weight in zip(params, weights, strict=True):
            param.data.copy_(weight)
        checkpointing.train(optimizer, params, range(3, 6))
        for param, value in zip(params, expected, strict=True):
            assert_same_bits(param, value)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_dtypes_are_kept_on_load(dtype: torch.dtype, storage: str) -> None:
    """torch issue 43706: its load casts states to the parameter's dtype."""
    options = checkpointing.options("AdamW", storage)
    params, others = checkpointing.params(dtype), checkpointing.params(dtype)
    optimizer, loaded = fused_optim.AdamW(params, **options), fused_optim.AdamW(others, **options)
    checkpointing.train(optimizer, params, range(3))
    loaded.load_state_dict(checkpointing.written_and_read(optimizer.state_dict()))
    for param, other in zip(params, others, strict=True):
        for key, value in optimizer.state[param].items():
            assert loaded.state[other][key].dtype == value.dtype
            assert_same_bits(loaded.state[other][key], value, key)
    first, second = {"auto": ("fp32", "fp32"), "mapping": ("bf16", "fp32")}.get(storage, (storage, storage))
    for key, codec in (("exp_avg", for_slot(first, True)), ("exp_avg_sq", for_slot(second, False))):
        assert loaded.state[others[0]][key].dtype == getattr(torch, codec.planes[0].dtype)


def _assert_close(params: list[Parameter], others: list[Parameter]) -> None:
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TORCH)
def test_from_torch(name: str) -> None:
    """A run that torch began goes on here as it would have there."""
    (theirs_class, options), ours_class = TORCH[name], CLASSES[name][0]
    params = checkpointing.params()
    theirs = theirs_class(params, **options)
    checkpointing.train(theirs, params, range(4))
    copies = [Parameter(p.detach().clone()) for p in params]
    ours = ours_class(copies, lr=0.5)
    ours.load_state_dict(checkpointing.written_and_read(theirs.state_dict()))
    for key, value in options.items():
        assert ours.param_groups[0][key] == value, "options come from the checkpoint, as in torch"
    for param, copied in zip(params, copies, strict=True):
        for key, value in theirs.state[param].items():
            if value is not None:
                assert_same_bits(ours.state[copied][key], value, key)
    checkpointing.train(theirs, params, range(4, 9))
    checkpointing.train(ours, copies, range(4, 9))
    _assert_close(copies, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", TORCH)
def test_portable_to_torch(name: str, storage: str, dtype: torch.dtype) -> None:
    (theirs_class, options), ours_class = TORCH[name], CLASSES[name][0]
    params = checkpointing.params(dtype)
    ours = ours_class(params, **checkpointing.options(name, storage))
    checkpointing.train(ours, params, range(4))
    saved = checkpointing.written_and_read(ours.state_dict(portable=True))
    copies = [Parameter(p.detach().float().clone()) for p in params]
    theirs = theirs_class(copies, lr=0.5)
    theirs.load_state_dict(saved)
    for index, (param, copied) in enumerate(zip(params, copies, strict=True)):
        if name == "SGD":
            continue
        for key, value in theirs.state[copied].items():
            if value is not None:
                step = key == "step"
                expected = ours.state[param][key] if step else full_precision(ours, param, key)
                assert_same_bits(torch.as_tensor(value), expected.float(), f"{key} of parameter {index}")
    plain = ours_class([Parameter(p.detach().clone()) for p in copies], **options)
    plain.load_state_dict(saved)
    ours_params = plain.param_groups[0]["params"]
    checkpointing.train(theirs, copies, range(4, 9))
    checkpointing.train(plain, ours_params, range(4, 9))
    _assert_close(ours_params, copies)


@pytest.mark.parametrize("name", TORCH)
def test_portable_has_the_keys_that_torch_keeps(name: str) -> None:
    """A step count that torch.optim.SGD would carry along without counting came back stale."""
    (theirs_class, options), ours_class = TORCH[name], CLASSES[name][0]
    params = checkpointing.params()
    ours, theirs = ours_class(params, **options), theirs_class(params, **options)
    checkpointing.train(ours, params, range(3))
    checkpointing.train(theirs, params, range(3))
    saved, expected = ours.state_dict(portable=True), theirs.state_dict()
    assert set(saved["param_groups"][0]) == set(expected["param_groups"][0])
    kept = {
        index: {k for k, v in entry.items() if v is not None} for index, entry in expected["state"].items()
    }
    assert {index: set(entry) for index, entry in saved["state"].items() if entry} == {
        index: keys for index, keys in kept.items() if keys
    }


@pytest.mark.parametrize("name", ["AdamW", "SGD-momentum"])
def test_portable_into_another_codec(name: str) -> None:
    optimizer_class, options = CLASSES[name]
    params = checkpointing.params()
    optimizer = optimizer_class(params, **options)
    checkpointing.train(optimizer, params, range(3))
    copies = [Parameter(p.detach().clone()) for p in params]
    narrow = optimizer_class(copies, **options, state_codec="bf16")
    narrow.load_state_dict(optimizer.state_dict(portable=True))
    for param, copied in zip(params, copies, strict=True):
        for key, value in optimizer.state[param].items():
            if key != "step":
                assert_same_bits(narrow.state[copied][key], value.bfloat16(), key)


@pytest.mark.parametrize("name", CLASSES)
def test_an_optimizer_that_never_stepped_saves_and_loads(name: str) -> None:
    optimizer_class, options = CLASSES[name]
    params, others = checkpointing.params(), checkpointing.params()
    fresh = checkpointing.written_and_read(optimizer_class(params, **options).state_dict())
    loaded = optimizer_class(others, **options)
    loaded.load_state_dict(fresh)
    optimizer = optimizer_class(params, **options)
    checkpointing.train(optimizer, params, range(3))
    checkpointing.train(loaded, others, range(3))
    checkpointing.assert_same_training(loaded, others, optimizer, params)


def test_torch_sgd_before_its_first_momentum() -> None:
    """torch keeps ``momentum_buffer: None`` until the first gradient."""
    theirs_params, params = checkpointing.params(), checkpointing.params()
    theirs = torch.optim.SGD(theirs_params, lr=0.1, momentum=0.9, dampening=0.5)
    checkpointing.train(theirs, theirs_params, range(1))
    ours = fused_optim.SGD(params, lr=0.1)
    for param, other in zip(params, theirs_params, strict=True):
        param.data.copy_(other.data)
    saved = theirs.state_dict()
    saved["state"][1] = {"momentum_buffer": None}
    ours.load_state_dict(saved)
    checkpointing.train(theirs, theirs_params, range(1, 5))
    checkpointing.train(ours, params, range(1, 5))
    _assert_close(params, theirs_params)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", CLASSES)
def test_deepcopy_and_pickle(name: str, copier: Any) -> None:
    optimizer_class = CLASSES[name][0]
    params = checkpointing.params()
    optimizer = optimizer_class(params, **checkpointing.options(name, "mapping"), skip_nonfinite=True)
    checkpointing.train(optimizer, params, range(3))
    params[0].grad = torch.full_like(params[0], float("nan"))
    optimizer.step()
    other = copier(optimizer)
    others = other.param_groups[0]["params"]
    assert all(p is not q for p, q in zip(params, others, strict=True))
    assert other.skipped_steps == optimizer.skipped_steps == 1
    checkpointing.train(optimizer, params, range(3, 6))
    assert all(not torch.equal(p, q) for p, q in zip(params, others, strict=True) if p.numel())
    checkpointing.train(other, others, range(3, 6))
    checkpointing.assert_same_training(other, others, optimizer, params)


def test_skipped_steps_are_saved() -> None:
    params = checkpointing.params()
    optimizer = fused_optim.AdamW(params, skip_nonfinite=True)
    checkpointing.train(optimizer, params, range(1))
    params[0].grad = torch.full_like(params[0], float("inf"))
    optimizer.step()
    loaded = fused_optim.AdamW(checkpointing.params(), skip_nonfinite=True)
    loaded.load_state_dict(checkpointing.written_and_read(optimizer.state_dict()))
    assert loaded.skipped_steps == 1
    loaded.load_state_dict(fused_optim.AdamW(checkpointing.params()).state_dict())
    assert loaded.skipped_steps == 0


def test_load_hooks() -> None:
    seen: list[str] = []
    optimizer, saved = checkpointing.groups(), checkpointing.groups().state_dict()
    keys = set(saved)

    def pre(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre")
        state_dict["param_groups"][0]["lr"] = 0.25
        return state_dict

    optimizer.register_load_state_dict_pre_hook(pre)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(f"post {opt.param_groups[0]['lr']}"))
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert seen == ["pre", "post 0.25"]
    assert set(saved) == keys


def test_save_hooks() -> None:
    optimizer = checkpointing.groups()
    optimizer.register_state_dict_pre_hook(lambda opt: opt.param_groups[0].update(lr=0.5))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "extra": 1})
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["lr"] == 0.5
    assert saved["extra"] == 1


def test_param_names_survive() -> None:
    named = [("a", Parameter(torch.ones(2))), ("b", Parameter(torch.ones(3)))]
    optimizer = fused_optim.AdamW(named)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["a", "b"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b"]


def test_engine_options_stay_this_process_s_own() -> None:
    """A checkpoint written on a GPU does not bring its backend to a CPU."""
    saved = fused_optim.AdamW(checkpointing.params(), lr=0.3, backend="reference").state_dict()
    optimizer = fused_optim.AdamW(checkpointing.params(), lr=0.1, backend="native", arithmetic="exact")
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["backend"], group["arithmetic"], group["lr"]) == ("native", "exact", 0.3)


def test_strided_parameters_resume() -> None:
    """States follow the parameter's memory order, whatever order the file has."""
    base = normal((6, 8), torch.float32, 1)
    param = Parameter(base.t()[1:7])
    optimizer = fused_optim.AdamW([param], lr=0.1)
    checkpointing.train(optimizer, [param], range(2))
    saved = checkpointing.written_and_read(optimizer.state_dict())
    copied = Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    resumed = fused_optim.AdamW([copied], lr=0.1)
    resumed.load_state_dict(saved)
    checkpointing.train(optimizer, [param], range(2, 4))
    checkpointing.train(resumed, [copied], range(2, 4))
    checkpointing.assert_same_training(resumed, [copied], optimizer, [param])


def test_distributed_checkpoint_helpers() -> None:
    """torch.distributed.checkpoint's view of an optimizer, on one process."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).bfloat16()

    first, second = model(), model()
    options = {"lr": 0.01, "state_codec": {"exp_avg": "bf16"}}
    optimizer, loaded = (fused_optim.AdamW(m.parameters(), **options) for m in (first, second))
    checkpointing.train(optimizer, list(first.parameters()), range(3))
    saved = get_optimizer_state_dict(first, optimizer)
    assert "0.weight" in saved["state"]
    second.load_state_dict(first.state_dict())
    set_optimizer_state_dict(second, loaded, saved)
    checkpointing.train(optimizer, list(first.parameters()), range(3, 6))
    checkpointing.train(loaded, list(second.parameters()), range(3, 6))
    checkpointing.assert_same_training(loaded, list(second.parameters()), optimizer, list(first.parameters()))


def test_options_that_a_file_does_not_have_stay() -> None:
    """torch.optim knows nothing of these; loading set them back to the defaults of the class."""
    param = Parameter(torch.ones(3))
    group = {"params": [param], "clip_grad_norm": 1.0, "skip_nonfinite": True, "seed": 5, "mine": "a"}
    optimizer = fused_optim.AdamW([group], lr=0.25)
    for saved in (optimizer.state_dict(portable=True), torch.optim.AdamW([param], lr=0.5).state_dict()):
        optimizer.load_state_dict(checkpointing.written_and_read(saved))
        found = optimizer.param_groups[0]
        assert {key: found[key] for key in ("clip_grad_norm", "skip_nonfinite", "seed", "mine")} == {
            key: group[key] for key in ("clip_grad_norm", "skip_nonfinite", "seed", "mine")
        }
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_distributed_checkpoint_file(tmp_path: Path) -> None:
    """flashoptim issue 3: a round trip through DCP took the loss from 2.4 to 1785."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = torch.nn.Linear(3, 4)
    optimizer = fused_optim.AdamW(model.parameters(), lr=0.01, state_codec="bf16")
    checkpointing.train(optimizer, list(model.parameters()), range(3))
    other = torch.nn.Linear(3, 4)
    other.load_state_dict(model.state_dict())
    loaded = fused_optim.AdamW(other.parameters(), lr=0.5, state_codec="bf16")
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    target = {"optimizer": get_optimizer_state_dict(other, loaded)}
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, loaded, target["optimizer"])
    checkpointing.train(optimizer, list(model.parameters()), range(3, 6))
    checkpointing.train(loaded, list(other.parameters()), range(3, 6))
    checkpointing.assert_same_training(loaded, list(other.parameters()), optimizer, list(model.parameters()))


def _total_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_a_checkpoint_is_as_small_as_the_states() -> None:
    params = [Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = fused_optim.AdamW(params, state_codec="bf16")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    states = [v for entry in optimizer.state.values() for v in entry.values()]
    assert _total_bytes(states) == 3 * (2000 + 2000 + 4)
    assert len(file.getvalue()) < _total_bytes(states) + 8000
