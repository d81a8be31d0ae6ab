"""The memory of whole matrices stays below ``workspace_bytes``, however many there are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_optim
from fused_optim.spectral import Hypersphere, SpectralClip

WORKSPACE = 4 << 20
CLIPS = {f"post_{post}": partial(SpectralClip, post=post) for post in (0.03, 0.1, 1.0, 10.0)}
CLIPS["both"] = partial(SpectralClip, post=1.0, pre=1.0)
MAKERS: dict[str, Callable[..., Any]] = {
    **{
        name: lambda params, clip=clip: fused_optim.SGD(params, spectral=clip(workspace_bytes=WORKSPACE))
        for name, clip in CLIPS.items()
    },
    "sphere": lambda params: fused_optim.AdamW(params, spectral=Hypersphere(workspace_bytes=WORKSPACE)),
    "muon": partial(fused_optim.Muon, workspace_bytes=WORKSPACE),
    "normuon": partial(fused_optim.NorMuon, workspace_bytes=WORKSPACE),
    "muonh": partial(fused_optim.MuonH, workspace_bytes=WORKSPACE),
    "muon_fp32": partial(fused_optim.Muon, workspace_bytes=WORKSPACE, ns_dtype=torch.float32),
}
SHAPES = ((16, 16), (40, 40), (96, 96), (128, 128), (192, 192), (64, 512), (512, 64), (1, 4096))
STACKS = ((2, 64, 64), (8, 32, 32), (32, 16, 3, 3))


class MostMemory(TorchDispatchMode):
    """The most bytes that tensors made in it have at a time; not what is allocated behind torch's back."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: dict[Any, tuple[StorageWeakRef, int]] = {}
        self._given: dict[Any, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref.cdata not in self._made:
                    self._given[ref.cdata] = ref
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref.cdata not in self._given:
                    self._made[ref.cdata] = ref, tensor.untyped_storage().nbytes()
        self._made = {key: value for key, value in self._made.items() if not value[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return out


@pytest.mark.parametrize("shape", SHAPES + STACKS, ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_workspace_holds_what_matrices_need(make: Callable[..., Any], shape: tuple[int, ...]) -> None:
    # Twice as many as fit together, or some that are alone.
    count = max(2 * WORKSPACE // (100 * torch.Size(shape).numel()), 5)
    params = [Parameter(torch.randn(shape)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(shape)
    optimizer = make(params)
    optimizer.step()
    with MostMemory() as memory:
        optimizer.step()
    alone = 100 * torch.Size(shape).numel()
    assert 0 < memory.most <= max(WORKSPACE, alone)


@pytest.mark.parametrize("name", MAKERS)
def test_a_stack_is_worked_on_in_parts(name: str) -> None:
    """Its weights and updates are there whole; the matrices are those of as many parameters."""
    shape = (80, 64, 128)
    stack = Parameter(torch.randn(shape))
    apart = [Parameter(matrix.clone()) for matrix in stack.detach()]
    stack.grad = torch.randn(shape)
    for param, grad in zip(apart, stack.grad, strict=True):
        param.grad = grad.clone()
    optimizers = MAKERS[name]([stack]), MAKERS[name](apart)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in apart]), rtol=1e-4, atol=1e-5)
    with MostMemory() as memory:
        optimizers[0].step()
    whole = 8 if name in ("sphere", "muonh") else 4
    assert 0 < memory.most <= WORKSPACE + whole * stack.numel()
