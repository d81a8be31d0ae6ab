"""Tensors whose memory is not where their address says, as parameters and as gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, init_device_mesh
from torch.masked import masked_tensor
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

import fused_optim
from fused_optim.sparsity import (
    SRSTE,
    MaskDecay,
    MaskedDecay,
    StructureDecay,
    nm_mask,
    prune,
    report,
    transposable_mask,
    verify,
)


class Opaque(Tensor):
    """Values of its own and no memory, and nothing that says so."""

    @staticmethod
    def __new__(cls) -> Opaque:
        """Of four elements."""
        return Tensor._make_wrapper_subclass(cls, (4,), dtype=torch.float32)  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # pyright: ignore
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls()
        raise NotImplementedError(func)


WITHOUT_MEMORY: dict[str, Any] = {
    "two": lambda: TwoTensor(torch.ones(4), torch.ones(4)),
    "opaque": Opaque,
    "zero": lambda: torch._efficientzerotensor(4),  # pyright: ignore[reportAttributeAccessIssue]
}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """This process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_gradients_without_memory_are_refused(name: str, warm: bool) -> None:
    param = Parameter(torch.ones(4))
    optimizer = fused_optim.AdamW([param], lr=0.1)
    if warm:
        param.grad = torch.ones(4)
        optimizer.step()
    before = param.detach().clone()
    param.grad = WITHOUT_MEMORY[name]()
    with pytest.raises(ValueError, match="without memory of its own; convert it to a plain tensor"):
        optimizer.step()
    assert torch.equal(param, before)
    param.grad = torch.ones(4)
    optimizer.step()
    assert not torch.equal(param, before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_masked_gradients_are_refused() -> None:
    param = Parameter(torch.ones(4))
    param.grad = masked_tensor(torch.ones(4), torch.tensor([True, False, True, True]))
    with pytest.raises(ValueError, match="MaskedTensor without memory"):
        fused_optim.SGD([param], lr=0.1).step()


@pytest.mark.parametrize("name", ["two", "opaque"])
def test_parameters_without_memory_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="whose memory this library does not know"):
        fused_optim.SGD([WITHOUT_MEMORY[name]().requires_grad_()], lr=0.1)


def test_gradients_of_collectives(group: Any) -> None:
    """What is still on its way is waited for, in every step."""
    params = [Parameter(torch.ones(4)) for _ in range(2)]
    ours = fused_optim.AdamW(params[:1], lr=0.1)
    theirs = torch.optim.AdamW(params[1:], lr=0.1)
    for step in range(3):
        grad = torch.arange(4.0) + step
        params[0].grad, params[1].grad = collectives.all_reduce(grad, "sum", group), grad.clone()
        assert isinstance(params[0].grad, collectives.AsyncCollectiveTensor)
        ours.step()
        theirs.step()
    torch.testing.assert_close(params[0].detach(), params[1].detach())


@pytest.mark.usefixtures("group")
def test_dtensor_gradients_of_collectives() -> None:
    mesh = init_device_mesh("cpu", (1,))
    param = Parameter(DTensor.from_local(torch.ones(4), mesh, [Replicate()]))
    plain = Parameter(torch.ones(4))
    ours, theirs = fused_optim.SGD([param], lr=0.1), torch.optim.SGD([plain], lr=0.1)
    for step in range(2):
        grad = torch.arange(4.0) + step
        plain.grad = grad.clone()
        param.grad = DTensor.from_local(grad, mesh, [Partial()]).redistribute(
            placements=[Replicate()], async_op=True
        )
        ours.step()
        theirs.step()
    torch.testing.assert_close(param.to_local().detach(), plain.detach())  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.usefixtures("group")
def test_masks_of_dtensors_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    mesh = init_device_mesh("cpu", (1,))
    model[0].weight = Parameter(DTensor.from_local(torch.ones(8, 8), mesh, [Replicate()]))
    weight = model[0].weight
    for call in (lambda: prune(model), lambda: verify(model), lambda: nm_mask(weight), lambda: report(model)):
        with pytest.raises(TypeError, match=r"plain tensor, got a DTensor; .* \.full_tensor\(\)"):
            call()
    for name in ("zero", "two"):
        with pytest.raises(TypeError, match="weights must be a plain tensor"):
            transposable_mask(WITHOUT_MEMORY[name]().view(2, 2))


RECIPES = {
    "masked_decay": MaskedDecay(total_steps=6, every=2),
    "mask_decay": MaskDecay(dense_steps=0, decay_steps=8),
    "sr_ste": SRSTE(),
    "structure_decay": StructureDecay(total_steps=9),
}


@pytest.mark.parametrize("name", RECIPES)
def test_torchs_helpers_leave_masked_weights(name: str) -> None:
    """They make a state by a step without gradients, which masks weights that were loaded before."""

    def made() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        return model, fused_optim.AdamW(model.named_parameters(), lr=0.05, sparsity=RECIPES[name])

    model, optimizer = made()
    for _ in range(6):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = copy.deepcopy((get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)))
    other, fresh = made()
    set_model_state_dict(other, saved[0])
    set_optimizer_state_dict(other, fresh, saved[1])
    assert torch.equal(other[0].weight, model[0].weight)
