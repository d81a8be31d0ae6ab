"""Marks of parameters whose states stay in fp32: kept when torch moves, converts, loads and swaps."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import nn

import fused_optim

FULL, NARROW = torch.float32, torch.uint8


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    torch.__future__.set_swap_module_params_on_conversion(False)


def _dtypes(module: nn.Module) -> list[torch.dtype]:
    """Of a first moment after a step, parameter by parameter."""
    optimizer = fused_optim.AdamW(module.parameters(), state_codec="int8", keep_fp32=0)
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return [optimizer.state[param]["exp_avg"].dtype for param in module.parameters()]


def _values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.randn(value.shape) for name, value in module.state_dict().items()}


def _materialised(module: nn.Module) -> None:
    module.to("meta")
    module.to_empty(device="cpu")
    module.load_state_dict(_values(module))


def _assigned(module: nn.Module) -> None:
    module.load_state_dict(_values(module), assign=True)


def _overwritten(module: nn.Module) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    module.half()


def _swapped(module: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    module.half()


def _loaded_by_swaps(module: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    module.load_state_dict(_values(module))


CHANGES = [_materialised, _assigned, _overwritten, _swapped, _loaded_by_swaps]


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copied"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_a_stable_embedding_stays_marked(change: Callable[[nn.Module], None], copied: bool) -> None:
    """New parameters came without marks, silently: the states of the embedding had 8 bits."""
    embedding = fused_optim.StableEmbedding(100, 64)
    model: Any = nn.Sequential(copy.deepcopy(embedding) if copied else embedding, nn.Linear(64, 64))
    change(model)
    assert _dtypes(model) == [FULL, FULL, FULL, NARROW, NARROW]
    assert isinstance(model[0], fused_optim.StableEmbedding)


@pytest.mark.parametrize("change", [_assigned, _loaded_by_swaps, _materialised])
def test_what_a_marked_module_loads_is_marked(change: Callable[[nn.Module], None]) -> None:
    model = nn.Sequential(fused_optim.keep_fp32(nn.Embedding(100, 64)), nn.Linear(64, 64, bias=False))
    change(model)
    assert _dtypes(model) == [FULL, NARROW]
    again = pickle.loads(pickle.dumps(model))
    _assigned(again)
    assert _dtypes(again) == [FULL, NARROW]


def test_marking_twice_hooks_once() -> None:
    embedding = fused_optim.StableEmbedding(10, 8).double().float()
    assert len(embedding._load_state_dict_post_hooks) == 1


def test_marked_parameters_can_be_swapped() -> None:
    """torch.utils.swap_tensors refuses tensors with weak references: sharded models could not move."""
    embedding = fused_optim.keep_fp32(nn.Embedding(10, 4))
    torch.utils.swap_tensors(embedding.weight, nn.Parameter(torch.zeros(10, 4)))
    optimizer = fused_optim.AdamW(fused_optim.keep_fp32(embedding).parameters())
    for holder in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not hasattr(holder, "_marks")
        (param,) = holder.param_groups[0]["params"]
        torch.utils.swap_tensors(param, nn.Parameter(torch.ones(10, 4)))


def test_a_copied_optimizer_keeps_no_parameter_alive() -> None:
    embedding = fused_optim.keep_fp32(nn.Embedding(10, 4))
    copied = copy.deepcopy(fused_optim.AdamW(embedding.parameters()))
    gone = weakref.ref(copied.param_groups[0]["params"][0])
    copied.param_groups[0]["params"][:] = []
    gc.collect()
    assert gone() is None


def test_what_took_the_place_of_a_marked_parameter_is_copied_as_it_is() -> None:
    """A mark that only the copy had would make a copied optimizer refuse its own states."""
    embedding = fused_optim.keep_fp32(nn.Embedding(100, 64))
    embedding.weight = nn.Parameter(torch.randn(100, 64))
    assert _dtypes(embedding) == [NARROW]
    assert _dtypes(copy.deepcopy(embedding)) == [NARROW]
    assert _dtypes(pickle.loads(pickle.dumps(embedding))) == [NARROW]


def test_marks_reach_other_processes() -> None:
    """Torch's own pickler for processes leaves out what a parameter has beside its values."""
    embedding = fused_optim.keep_fp32(nn.Embedding(100, 64))
    assert _dtypes(ForkingPickler.loads(ForkingPickler.dumps(embedding))) == [FULL]


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")
def test_scripted_modules_have_no_hooks() -> None:
    scripted = torch.jit.trace(nn.Embedding(100, 64), torch.zeros(1, dtype=torch.long))
    assert _dtypes(fused_optim.keep_fp32(scripted)) == [FULL]
