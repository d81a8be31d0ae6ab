"""Sharded parameters: two gloo processes update their shards as one process updates the whole."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fused_optim

ROWS, COLUMNS = 5, 7  # uneven: 3 rows on the first rank, 2 on the second
CLASSES = {
    "adamw": (fused_optim.AdamW, {"amsgrad": True}),
    "lion": (fused_optim.Lion, {"state_codec": "bf16", "weight_decay": 0.1}),
    "sgd": (fused_optim.SGD, {"momentum": 0.9}),
}


def _train(param: torch.nn.Parameter, gradients: list[torch.Tensor], name: str) -> None:
    cls, options = CLASSES[name]
    optimizer = cls([param], lr=0.1, **options)
    for step, gradient in enumerate(gradients):
        param.grad = gradient
        optimizer.step()
        if step == 1:
            resumed = cls([param], lr=0.1, **options)
            resumed.load_state_dict(optimizer.state_dict())
            optimizer = resumed


def _worker(rank: int, port: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    gradients = [torch.randn(ROWS, COLUMNS) for _ in range(4)]
    for name in CLASSES:
        whole = torch.nn.Parameter(weight.clone())
        _train(whole, gradients, name)
        for placement in (Shard(0), Shard(1), Replicate()):
            shard = torch.nn.Parameter(distribute_tensor(weight.clone(), mesh, [placement]))
            _train(shard, [distribute_tensor(g, mesh, [placement]) for g in gradients], name)
            assert torch.equal(shard.detach().full_tensor(), whole.detach()), (name, placement)
    param = torch.nn.Parameter(distribute_tensor(weight.clone(), mesh, [Shard(0)]))
    optimizer = fused_optim.AdamW([param], clip_grad_norm=1.0)
    param.grad = distribute_tensor(gradients[0], mesh, [Shard(0)])
    with pytest.raises(ValueError, match="reduces over all ranks"):
        optimizer.step()
    param.grad = distribute_tensor(gradients[0], mesh, [Replicate()])
    optimizer.param_groups[0]["clip_grad_norm"] = None
    with pytest.raises(ValueError, match="not sharded in the same way"):
        optimizer.step()
    assert torch.equal(param.detach().full_tensor(), weight)
    dist.destroy_process_group()


def test_shards_are_updated_like_the_whole() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_worker, args=(port,), nprocs=2, start_method="spawn")
