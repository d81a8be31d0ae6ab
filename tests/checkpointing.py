"""Optimizers, parameters and comparisons for the tests of checkpoints."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim import FusedOptimizer
from tests.cases import assert_same_bits, bits, normal

CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (fused_optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW-amsgrad": (fused_optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "Adam": (fused_optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "Lion": (fused_optim.Lion, {"lr": 0.01}),
    "SGD": (fused_optim.SGD, {"lr": 0.01}),
    "SGD-momentum": (fused_optim.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.5}),
}
TORCH: dict[str, tuple[Any, dict[str, Any]]] = {
    name: (getattr(torch.optim, cls.__name__), options)
    for name, (cls, options) in CLASSES.items()
    if cls is not fused_optim.Lion
}
STORAGES = ["auto", "bf16", "fp16", "mapping", "int8", "int8_companded", "int4", "bf16_kahan"]
SHAPES = ((3, 5), (17,), (), (0,))


def options(name: str, storage: str) -> dict[str, Any]:
    options = CLASSES[name][1]
    if storage != "mapping":
        # Blocks also for the smallest of the tensors here.
        return {**options, "state_codec": storage, "keep_fp32": 0}
    first = {"Lion": "exp_avg", "SGD": None, "SGD-momentum": "momentum_buffer"}.get(name, "exp_avg")
    return {**options, "state_codec": {first: "bf16"} if first else {}}


def params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(normal(shape, dtype, seed)) for seed, shape in enumerate(SHAPES)]


def train(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: range) -> None:
    """Deterministic gradients; the second parameter gets its first one in step 2."""
    for step in steps:
        for index, param in enumerate(params):
            late = index == 1 and step < 2
            param.grad = None if late else normal(tuple(param.shape), param.dtype, 100 * step + index)
        optimizer.step()


def assert_same_training(a: Any, a_params: list[Parameter], b: Any, b_params: list[Parameter]) -> None:
    for index, (p, q) in enumerate(zip(a_params, b_params, strict=True)):
        assert_same_bits(p, q, f"parameter {index}")
        assert set(a.state[p]) == set(b.state[q])
        for key, value in a.state[p].items():
            assert_same_bits(value, b.state[q][key], f"{key} of parameter {index}")


def written_and_read(state_dict: Any) -> Any:
    """Through torch.save and the safe loader."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def frozen(optimizer: FusedOptimizer) -> Any:
    """Everything that a refused load must leave alone, comparable with ==."""
    return (
        [[bits(p).tolist() for p in group["params"]] for group in optimizer.param_groups],
        [
            {key: (value.dtype, value.data_ptr(), bits(value).tolist()) for key, value in entry.items()}
            for entry in optimizer.state.values()
        ],
        [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups],
        optimizer.skipped_steps,
    )


def groups(**options: Any) -> FusedOptimizer:
    own = params()
    optimizer = fused_optim.AdamW(own, lr=0.01, **options)
    train(optimizer, own, range(3))
    return optimizer


def through_helpers(model: torch.nn.Module, make: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
    """An optimizer, its copy by torch's distributed helpers, and the parameters of both."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    how = StateDictOptions(**options)
    other = copy.deepcopy(model)
    params, others = list(model.parameters()), list(other.parameters())
    optimizer, loaded = make(params), make(others)
    for param in params:
        param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    with torch.no_grad():
        for param, copied in zip(params, others, strict=True):
            copied.copy_(param)
    saved = get_optimizer_state_dict(model, optimizer, options=how)
    set_optimizer_state_dict(other, loaded, saved, options=how)
    return optimizer, params, loaded, others


def shards_through_helpers(cases: list[tuple[torch.dtype, dict[str, Any]]]) -> None:
    """What each process of a group does: FSDP2, in shards, whole and flat."""
    from torch.distributed.fsdp import fully_shard

    ways = [{}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}]
    if torch.__version__ < "2.9":
        # Its flattened form asks for the same states of all parameters, and short ones stay in fp32.
        ways.pop()
    for dtype, options in cases:
        for how in ways:
            torch.manual_seed(0)
            model = torch.nn.Linear(65, 65).to(dtype)
            fully_shard(model)
            _same_shards(model, options, how)


def _same_shards(model: torch.nn.Module, options: dict[str, Any], how: dict[str, Any]) -> None:
    """The same model takes the states back: FSDP's modules cannot be copied."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    params = list(model.parameters())
    optimizer, loaded = (fused_optim.AdamW(params, **options) for _ in range(2))
    for param in params:
        param.grad = torch.full_like(param, 0.3)
    optimizer.step()
    for param in params:
        # The helpers take the states of an optimizer that has gradients for complete.
        param.grad = None
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**how))
    set_optimizer_state_dict(model, loaded, saved, options=StateDictOptions(**how))
    for param in params:
        entry, other = optimizer.state[param], loaded.state[param]
        assert set(entry) == set(other), (options, how, set(entry) ^ set(other))
        for key, value in entry.items():
            assert_same_bits(_local(value), _local(other[key]), f"{key} {options} {how}")


def _local(value: Tensor) -> Tensor:
    return value.to_local() if hasattr(value, "to_local") else value  # pyright: ignore[reportAttributeAccessIssue]
