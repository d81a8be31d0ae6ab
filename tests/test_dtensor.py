"""Sharded parameters: two gloo processes update their shards as one process updates the whole."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fused_optim
from fused_optim.sparsity import SRSTE, FlipRate, MaskedDecay, OneShot
from fused_optim.spectral import SpectralClip
from tests.checkpointing import shards_through_helpers
from tests.readme import code_of

ROWS, COLUMNS = 5, 7  # uneven: 3 rows on the first rank, 2 on the second
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (fused_optim.AdamW, {"amsgrad": True}),
    "lion": (fused_optim.Lion, {"state_codec": "bf16", "weight_decay": 0.1}),
    "sgd": (fused_optim.SGD, {"momentum": 0.9}),
    "lion-split": (fused_optim.Lion, {"param_codec": "bf16_split16"}),
}
BLOCKS = ("int8", "int8_companded", "int4")
HELPED: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.bfloat16, {"param_codec": "bf16_split8"}),
    (torch.bfloat16, {"param_codec": "bf16_split16"}),
    (torch.bfloat16, {"param_codec": "bf16_kahan"}),
    (torch.float32, {"state_codec": "int8"}),
]
"""Goes through torch.distributed.checkpoint's helpers in shards."""


def _train(param: torch.nn.Parameter, gradients: list[torch.Tensor], name: str) -> None:
    cls, options = CLASSES[name]
    optimizer = cls([param], lr=0.1, **options)
    for step, gradient in enumerate(gradients):
        param.grad = gradient
        optimizer.step()
        if step in (1, 2):
            resumed = cls([param], lr=0.1, **options)
            portable = step == 2 and "param_codec" not in options
            resumed.load_state_dict(optimizer.state_dict(portable=portable))
            optimizer = resumed


def _check_blocks(mesh: Any) -> None:
    """Blocks of a shard are its own; a checkpoint has none, and loads under another sharding."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(1)
    weight, gradient = torch.randn(90, 70), torch.randn(90, 70)
    for codec in BLOCKS:
        params = {}
        for placement in (Shard(0), Shard(1), Replicate()):
            param = torch.nn.Parameter(distribute_tensor(weight.clone(), mesh, [placement]))
            optimizer = fused_optim.AdamW([param], lr=0.1, state_codec=codec)
            param.grad = distribute_tensor(gradient.clone(), mesh, [placement])
            optimizer.step()
            params[placement] = param, optimizer, optimizer.state_dict()
        for param, _, saved in params.values():
            entry = saved["state"][0]
            assert set(entry) == {"step", "exp_avg", "exp_avg_sq"} and entry["exp_avg"].shape == (90, 70)
            first = next(iter(params.values()))[0]
            assert torch.equal(param.detach().full_tensor(), first.detach().full_tensor())
            for slot, scale in (("exp_avg", 0.1), ("exp_avg_sq", 1e-3)):
                exact = scale * (gradient if slot == "exp_avg" else gradient.square())
                error = (entry[slot].full_tensor() - exact).abs().max()
                assert error <= 0.13 * exact.abs().max(), (codec, slot)
        _, _, saved = params[Shard(0)]
        _, other, _ = params[Shard(1)]
        resharded = {**saved, "state": {0: {key: _moved(v, mesh) for key, v in saved["state"][0].items()}}}
        other.load_state_dict(resharded)
        again = other.state_dict()["state"][0]
        for slot in ("exp_avg", "exp_avg_sq"):
            before, after = saved["state"][0][slot].full_tensor(), again[slot].full_tensor()
            assert (before - after).abs().max() <= 0.13 * before.abs().max()
        other.step()


def _moved(value: torch.Tensor, mesh: Any) -> Any:
    from torch.distributed.tensor import DTensor, Shard

    return value.redistribute(mesh, [Shard(1)]) if isinstance(value, DTensor) else value


def _check_random_bits(mesh: Any) -> None:
    """Shards of whole rows draw those of the whole; others draw bits of their own."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    options: dict[str, Any] = {"lr": 1e-3, "param_codec": "bf16_sr", "state_codec": "bf16_sr"}

    def stepped(values: torch.Tensor, placement: Any) -> torch.Tensor:
        shown = distribute_tensor(values.clone(), mesh, [placement])
        params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), torch.nn.Parameter(shown)]
        optimizer = fused_optim.AdamW(params, **options)
        for _ in range(3):
            for param in params:
                param.grad = torch.full_like(param, 0.3)
            optimizer.step()
        found = params[1]
        assert isinstance(found.data, DTensor)
        return found.detach().full_tensor()  # pyright: ignore[reportCallIssue]

    # Three rows of eight numbers: the first rank has two of them.
    for rows in (3, 4, 1024):
        values = torch.full((rows, 8), 16.0, dtype=torch.bfloat16)
        assert torch.equal(stepped(values, Shard(0)), stepped(values, Replicate())), rows
    moved = stepped(torch.full((64, 512), 1.0, dtype=torch.bfloat16), Shard(1))
    halves = moved.chunk(2, 1)
    assert len(moved.unique()) > 1 and not torch.equal(*halves)


def _check_masks(mesh: Any) -> None:
    """Groups that no shard cuts are masked as in one process, also after a resume."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(2)
    weight = torch.randn(8, 24)
    gradients = [torch.randn(8, 24) for _ in range(4)]
    for recipe in (OneShot(), SRSTE(n=1, m=4), SRSTE(m=3), MaskedDecay(total_steps=9, every=2)):
        CLASSES["masked"] = fused_optim.AdamW, {"sparsity": recipe}
        whole = torch.nn.Parameter(weight.clone())
        _train(whole, [gradient.clone() for gradient in gradients], "masked")
        assert (whole == 0).any()
        for placement in (Shard(0), Shard(1), Replicate()):
            shard = torch.nn.Parameter(distribute_tensor(weight.clone(), mesh, [placement]))
            _train(shard, [distribute_tensor(g, mesh, [placement]) for g in gradients], "masked")
            assert torch.equal(shard.detach().full_tensor(), whole.detach()), (recipe, placement)
    param = torch.nn.Parameter(distribute_tensor(torch.randn(8, 20), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="dimension 1 of a shard has 10 weights"):
        fused_optim.AdamW([param], sparsity=SRSTE(strict=True))


def _check_flips(mesh: Any) -> None:
    """Every rank knows what part of the whole mask changed."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(4)
    weight, gradient, recipe = torch.randn(12, 24), torch.randn(12, 24), SRSTE()
    for sparsity in (recipe, None):
        rates = []
        for placement in (None, Shard(0), Shard(1), Replicate()):
            parts = [
                t.clone() if placement is None else distribute_tensor(t.clone(), mesh, [placement])
                for t in (weight, gradient)
            ]
            param = torch.nn.Parameter(parts[0])
            optimizer = fused_optim.AdamW([("w", param)], lr=0.5, sparsity=sparsity)
            flips = FlipRate(optimizer, recipe)
            param.grad = parts[1]
            optimizer.step()
            rates.append((flips.measure().item(), flips.by_name()["w"].item()))
        assert rates[0][0] > 0 and rates == [rates[0]] * 4, rates


def _check_norms(mesh: Any) -> None:
    """The norm is that of all ranks' gradients, also where one has none; a NaN on one of them stops all."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.manual_seed(5)
    shapes = [(1, 9), (6, 4), (5,), (3, 3)]
    weights = [torch.randn(shape) for shape in shapes]
    # Norms of 0.5 and 20: below and above what is allowed.
    gradients = [[scale * torch.randn(shape) for shape in shapes] for scale in (0.1, 4.0)]
    gradients.append([gradient.clone() for gradient in gradients[0]])
    gradients[2][1][5, 3] = torch.nan
    options: dict[str, Any] = {"lr": 0.1, "clip_grad_norm": 2.0, "skip_nonfinite": True}

    def train(place: Any) -> tuple[list[torch.Tensor], int]:
        params = [torch.nn.Parameter(place(i, weight)) for i, weight in enumerate(weights)]
        optimizer = fused_optim.SGD(params, **options)
        for some in (*gradients, gradients[0]):
            for i, (param, gradient) in enumerate(zip(params, some, strict=True)):
                param.grad = place(i, gradient)
            optimizer.step()
        return [getattr(p.detach(), "full_tensor", p.detach)() for p in params], optimizer.skipped_steps

    expected, skipped = train(lambda i, tensor: tensor.clone())
    assert skipped == 1
    square = init_device_mesh("cpu", (1, 2))
    layouts = [
        # The first tensor has one row: the second rank gets nothing of it.
        [(mesh, [Shard(0)])] * 4,
        [(mesh, [Shard(0)]), (mesh, [Replicate()]), None, (mesh, [Shard(1)])],
        [(square, [Replicate(), Shard(0)]), (mesh, [Shard(0)]), None, (square, [Shard(0), Replicate()])],
        [None, (square, [Shard(0), Shard(1)]), (square, [Replicate(), Replicate()]), None],
        [(mesh, [Shard(0)]), None, None, None],
    ]
    for layout in layouts:
        places: Any = layout
        found, skipped = train(
            lambda i, tensor, places=places: (
                tensor.clone() if places[i] is None else distribute_tensor(tensor.clone(), *places[i])
            )
        )
        assert skipped == 1, layout
        for tensor, other in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-6, atol=1e-7)


def _check_matrices(mesh: Any) -> None:
    """Matrices are put together from all ranks' shards, each by one rank, and end as in one process."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.manual_seed(6)
    # Three alike for two ranks; one that leaves the second rank nothing; experts, filters, three in one.
    shapes = dict.fromkeys("abc", (5, 8)) | {"row": (1, 9), "experts": (3, 4, 6), "conv": (4, 3, 2, 2)}
    shapes |= {"bias": (7,), "qkv": (12, 8)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    gradients = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)]
    clip = SpectralClip(post=0.5, pre=1.0)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (fused_optim.Muon, {"others": "adamw", "split": {"qkv": 3}, "clip_grad_norm": 1.0}),
        (fused_optim.NorMuon, {"others": "lion"}),
        (fused_optim.AdamH, {}),
        (fused_optim.Lion, {"spectral": clip, "state_codec": "bf16"}),
        (fused_optim.AdamW, {"spectral": clip, "sparsity": SRSTE()}),
    ]

    def train(cls: Any, options: dict[str, Any], layout: Any) -> list[torch.Tensor]:
        def place(tensor: torch.Tensor) -> torch.Tensor:
            if layout is None:
                return tensor.clone()
            placements = [p if p.is_replicate() or p.dim < tensor.ndim else Shard(0) for p in layout[1]]
            return distribute_tensor(tensor.clone(), layout[0], placements, src_data_rank=None)

        params = {name: torch.nn.Parameter(place(weight)) for name, weight in weights.items()}
        optimizer = cls(params.items(), lr=0.1, **options)
        for step, some in enumerate(gradients):
            for name, param in params.items():
                param.grad = place(some[name])
            optimizer.step()
            if step == 1:
                saved = optimizer.state_dict()
                optimizer = cls(params.items(), lr=0.1, **options)
                optimizer.load_state_dict(saved)
        return [getattr(p.detach(), "full_tensor", p.detach)() for p in params.values()]

    square = init_device_mesh("cpu", (1, 2))
    layouts = [(mesh, [Shard(0)]), (mesh, [Shard(1)]), (mesh, [Replicate()])]
    layouts += [(square, [Replicate(), Shard(0)]), (square, [Shard(0), Shard(1)])]
    for cls, options in cases:
        expected = train(cls, options, None)
        for layout in layouts:
            for found, whole in zip(train(cls, options, layout), expected, strict=True):
                torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


def _check_that_moved_shards_are_found(mesh: Any) -> None:
    """A step reads shards in C: also one that lies elsewhere now, and a gradient that no longer is one."""
    from torch.distributed.tensor import Shard, distribute_tensor

    weight, gradient = torch.randn(4, 6), torch.randn(4, 6)
    results = []
    for moves in (False, True):
        param = torch.nn.Parameter(distribute_tensor(weight.clone(), mesh, [Shard(0)]))
        optimizer = fused_optim.SGD([param], lr=0.1, momentum=0.9)
        for step in range(4):
            param.grad = distribute_tensor(gradient * step, mesh, [Shard(0)])
            if moves and step == 2:
                keep = param._local_tensor.data  # pyright: ignore[reportAttributeAccessIssue]
                param._local_tensor.data = keep.clone()  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
        results.append(param.detach().full_tensor())
        assert optimizer._plan is not None
        reader = optimizer._plan.buckets[0]._reader
        assert reader._in_c is not None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
        assert reader.read() is not None
        param.grad = None
        assert reader.read() is None
    assert torch.equal(*results)


class _Layers(torch.nn.Module):
    """A model as the README's recipe takes it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(65, 65) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square()


def _check_the_recipe() -> None:
    """What the README does with FSDP2 is a step of the whole model."""
    model, whole, batch = _Layers(), _Layers(), torch.randn(4, 65)
    exec(code_of("FSDP2"), {"model": model, "batch": batch, "torch": torch, "fused_optim": fused_optim})
    optimizer = fused_optim.AdamW(whole.parameters(), lr=3e-4, state_codec="int8", clip_grad_norm=1.0)
    whole(batch).mean().backward()
    optimizer.step()
    fresh = _Layers()
    for ours, expected, before in zip(*(m.parameters() for m in (model, whole, fresh)), strict=True):
        # A gradient near zero differs by its rounding, and the first step only knows its sign.
        torch.testing.assert_close(ours.detach().full_tensor(), expected.detach(), rtol=0, atol=1e-5)
        assert (expected - before).abs().max() > 2e-4


def _check_marks() -> None:
    """A sharded model gets its memory by swaps, which weak references to marked parameters forbade."""
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Embedding(40, 64), fused_optim.StableEmbedding(40, 64))
    fully_shard(model)
    fused_optim.keep_fp32(model[0])
    model.to_empty(device="cpu")
    fused_optim.keep_fp32(model[0])
    optimizer = fused_optim.AdamW(model.parameters(), state_codec="int8", keep_fp32=0)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}


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
        dtype = torch.bfloat16 if "param_codec" in CLASSES[name][1] else torch.float32
        own, grads = weight.to(dtype), [gradient.to(dtype) for gradient in gradients]
        whole = torch.nn.Parameter(own.clone())
        _train(whole, [gradient.clone() for gradient in grads], name)
        for placement in (Shard(0), Shard(1), Replicate()):
            shard = torch.nn.Parameter(distribute_tensor(own.clone(), mesh, [placement]))
            _train(shard, [distribute_tensor(g, mesh, [placement]) for g in grads], name)
            assert torch.equal(shard.detach().full_tensor(), whole.detach()), (name, placement)
    _check_blocks(mesh)
    _check_masks(mesh)
    _check_flips(mesh)
    _check_norms(mesh)
    _check_matrices(mesh)
    _check_that_moved_shards_are_found(mesh)
    _check_the_recipe()
    _check_marks()
    _check_random_bits(mesh)
    shards_through_helpers(HELPED)
    param = torch.nn.Parameter(distribute_tensor(weight.clone(), mesh, [Shard(0)]))
    optimizer = fused_optim.AdamW([param])
    param.grad = distribute_tensor(gradients[0], mesh, [Replicate()])
    with pytest.raises(ValueError, match="not sharded in the same way"):
        optimizer.step()
    assert torch.equal(param.detach().full_tensor(), weight)
    # A process that leaves while the other still talks to it may be aborted.
    dist.barrier()
    dist.destroy_process_group()


def test_shards_are_updated_like_the_whole() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_worker, args=(port,), nprocs=2, start_method="spawn")
