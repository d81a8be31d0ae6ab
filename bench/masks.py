"""``python -m bench masks``: times the search for N:M masks, masked steps and exported layers."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fused_optim
from fused_optim.kernels.reference import masking
from fused_optim.sparsity import (
    SRSTE,
    OneShot,
    load_sparse,
    nm_mask,
    prune,
    save_sparse,
    to_semi_structured,
    transposable_mask,
)

from .comparison import Absent, Case, Contender, Later, Suites, compare, parser_of
from .newton_schulz import DTYPES

ASP = "apex ASP, six patterns"
FORWARD_ERROR = 0.01
"""Of a product in bf16, relative: two that add in another order are off by 0.003 or less."""
SIXES = [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
PATTERNS = [(2, 4), (1, 4), (4, 8), (2, 16), (16, 32)]


def argsorted(w: Tensor, n: int, m: int) -> Tensor:
    """SR-STE's: the smallest of each group by ``argsort`` (aojunzz/NM-sparsity)."""
    magnitudes = w.abs().view(-1, m)
    smallest = magnitudes.argsort(dim=1)[:, : m - n]
    return torch.ones_like(magnitudes).scatter_(1, smallest, 0).view(w.shape)


def topped(w: Tensor, n: int, m: int) -> Tensor:
    """The largest of each group by ``topk``."""
    magnitudes = w.abs().view(-1, m)
    largest = magnitudes.topk(n, dim=1, sorted=False).indices
    return torch.zeros_like(magnitudes).scatter_(1, largest, 1).view(w.shape)


def scored(w: Tensor, patterns: Tensor) -> Tensor:
    """ASP's ``m4n2_1d``: the best of six patterns by the product of magnitudes and patterns (NVIDIA/apex)."""
    best = (w.abs().view(-1, 4) @ patterns.t()).argmax(1)
    return patterns[best].view(w.shape)


def convolved(w: Tensor, patterns: Tensor) -> Tensor:
    """The published search of blocks: products with 90 patterns, then ``argmax`` (huyz2023/2by4-pretrain)."""
    blocks = w.abs().view(w.shape[0] // 4, 4, -1, 4).transpose(1, 2).reshape(-1, 16)
    best = (blocks @ patterns.t()).argmax(1)
    return patterns[best].view(w.shape[0] // 4, -1, 4, 4).transpose(1, 2).reshape(w.shape)


def _differing(function: Callable[[], Tensor], expected: Tensor) -> float:
    """The share of weights on which two masks disagree: ties are broken otherwise, sums rounded otherwise."""
    return (function().bool() != expected).float().mean().item()


def _case(
    name: str, expected: Tensor, contenders: dict[str, Callable[[], Tensor]], limits: dict[str, float]
) -> Case:
    """Contenders, the first of which is ours: it is not timed unless it is right."""
    ours = next(iter(contenders))
    if not torch.equal(contenders[ours](), expected):
        raise RuntimeError(f"{name}: {ours} found another mask than the reference; not timed")
    errors = {label: partial(_differing, function, expected) for label, function in contenders.items()}
    listed = [Contender(label, function, errors[label]) for label, function in contenders.items()]
    return Case(name, listed, {label: limits.get(label, 1.0) for label in contenders if label != ours})


def groups(args: argparse.Namespace, device: torch.device) -> Iterator[Later]:
    """Groups along the last dimension of a matrix."""
    for dtype_name in DTYPES:
        for n, m in PATTERNS:
            name = f"{n}:{m} of {args.rows}x{args.columns} {dtype_name}"
            yield Later(name, partial(_group, name, args, device, dtype_name, n, m))


def _weights(args: argparse.Namespace, device: torch.device, dtype_name: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(args.rows, args.columns, device=device).to(DTYPES[dtype_name])


def _group(name: str, args: argparse.Namespace, device: torch.device, dtype: str, n: int, m: int) -> Case:
    w = _weights(args, device, dtype)
    parts = [masking.largest_of_groups(part.float().flatten(), m, n) for part in w.split(64)]
    contenders: dict[str, Callable[[], Tensor]] = {
        "fused_optim": partial(nm_mask, w, n, m),
        "argsort": partial(argsorted, w, n, m),
        "topk": partial(topped, w, n, m),
    }
    limits: dict[str, float] = {}
    if (n, m) == (2, 4):
        limits = {"argsort": 0.2, "topk": 0.2, ASP: 1 / 3}
        contenders[ASP] = partial(scored, w, torch.tensor(SIXES, device=device, dtype=w.dtype))
    return _case(name, torch.cat(parts).view(w.shape), contenders, limits)


def transposable(args: argparse.Namespace, device: torch.device) -> Iterator[Later]:
    """Blocks of 4x4, two kept in every row and column."""
    for dtype_name in DTYPES:
        name = f"transposable of {args.rows}x{args.columns} {dtype_name}"
        yield Later(name, partial(_blocks, name, args, device, dtype_name))


def _blocks(name: str, args: argparse.Namespace, device: torch.device, dtype: str) -> Case:
    w, places = _weights(args, device, dtype), masking.block_patterns().to(device)
    patterns = torch.zeros(len(places), 16, dtype=w.dtype, device=device).scatter_(1, places, 1)
    contenders: dict[str, Callable[[], Tensor]] = {
        "fused_optim": partial(transposable_mask, w),
        "2by4-pretrain, 90 patterns": partial(convolved, w, patterns),
    }
    return _case(name, masking.best_of_blocks(w.float()), contenders, {"2by4-pretrain, 90 patterns": 0.5})


class Masked:
    """A masked step as it is written around an optimizer of torch's; ``decay`` of pruned weights or none."""

    def __init__(self, weights: list[Tensor], optimizer: torch.optim.Optimizer, decay: float | None) -> None:
        self._weights, self._optimizer, self._decay = weights, optimizer, decay
        self._masks = [topped(w, 2, 4) for w in weights]

    def __call__(self) -> None:
        with torch.no_grad():
            if self._decay is None:
                grads = [w.grad for w in self._weights if w.grad is not None]
                torch._foreach_mul_(grads, self._masks)
                self._optimizer.step()
                torch._foreach_mul_(self._weights, self._masks)
                return
            for w in self._weights:
                assert w.grad is not None
                w.grad.add_((1 - topped(w, 2, 4)) * w, alpha=self._decay)
            self._optimizer.step()
            self._shown = [w * topped(w, 2, 4) for w in self._weights]


def steps(args: argparse.Namespace, device: torch.device) -> Iterator[Later]:
    """AdamW on matrices in fp32: dense, masked in place, with dense weights beside what the model sees."""
    name = f"AdamW, {args.tensors} of {args.rows}x{args.columns}"
    for kind, make in (("one mask for good", _one_mask), ("new masks in every step", _new_masks)):
        title = f"{name}: {kind}"
        yield Later(title, partial(make, title, args, device))


def _parameters(args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    shape = (args.rows, args.columns)
    made = [torch.randn(shape, device=device).requires_grad_() for _ in range(args.tensors)]
    for w in made:
        w.grad = torch.randn_like(w)
    return made


def _ours(args: argparse.Namespace, device: torch.device, **options: Any) -> Callable[[], None]:
    return fused_optim.AdamW(_parameters(args, device), lr=1e-3, **options).step


def _torchs(args: argparse.Namespace, device: torch.device, decay: float | None) -> Masked:
    params = _parameters(args, device)
    return Masked(params, torch.optim.AdamW(params, lr=1e-3, fused=True), decay)


def _one_mask(name: str, args: argparse.Namespace, device: torch.device) -> Case:
    contenders = [
        Contender("masked", _ours(args, device, sparsity=OneShot())),
        Contender("dense", _ours(args, device)),
        Contender("torch fused and three passes (apex ASP)", _torchs(args, device, None)),
    ]
    return Case(name, contenders, {"dense": 1.05 if device.type == "cuda" else 1.15})


def _new_masks(name: str, args: argparse.Namespace, device: torch.device) -> Case:
    contenders = [
        Contender("masked (SR-STE)", _ours(args, device, sparsity=SRSTE())),
        Contender("dense", _ours(args, device)),
        Contender("torch fused around SR-STE", _torchs(args, device, 2e-4)),
    ]
    return Case(name, contenders)


def _layer(weight: Tensor) -> nn.Sequential:
    """A linear layer without a bias, in a model: exports name its weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer)


def _exported(weight: Tensor) -> nn.Sequential:
    """A pruned layer after ``save_sparse`` and ``load_sparse``."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        save_sparse(_layer(weight), file.name)
        return _layer(load_sparse(file.name, weight.device)["0.weight"])


def _compressed(model: nn.Module, x: Tensor, expected: Tensor) -> Contender | Absent:
    """The forward pass through torch's compressed weights, if this machine can take it and it is right."""
    label = "2:4 through torch's semi-structured tensors"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            to_semi_structured(model)
            error = (torch.dist(model(x).float(), expected) / expected.norm()).item()
    except ValueError as unfit:
        return Absent(label, "missing", str(unfit))
    except (RuntimeError, NotImplementedError) as failure:
        return Absent(label, "failed", f"{type(failure).__name__}: {failure}"[:300])
    if not error <= FORWARD_ERROR:
        return Absent(label, "wrong", f"relative error {error:.1e}, allowed {FORWARD_ERROR:.0e}")
    return Contender(label, partial(model, x), lambda: error)


def forward(args: argparse.Namespace, device: torch.device) -> Iterator[Later]:
    """An exported layer on as many tokens as it has inputs: its compressed weight, and the same one dense."""
    name = f"forward of a 2:4 layer, {args.columns} tokens, {args.rows}x{args.columns} bf16"
    yield Later(name, partial(_forward, name, args, device))


@torch.no_grad()
def _forward(name: str, args: argparse.Namespace, device: torch.device) -> Case:
    weight = torch.randn(args.rows, args.columns, device=device).bfloat16()
    prune(dense := _layer(weight))
    x = torch.randn(args.columns, args.columns, device=device).bfloat16()
    expected = dense(x).float()
    found = _compressed(_exported(weight), x, expected)
    plain = Contender("dense", partial(dense, x))
    if isinstance(found, Absent):
        return Case(name, [plain], absent=[found])
    return Case(name, [found, plain], {"dense": 1.0})


SUITES: Suites = {"step": steps, "forward": forward, "groups": groups, "transposable": transposable}
"""What a step costs first: a run may hit its time limit."""


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("masks", __doc__, SUITES)
    parser.add_argument("--rows", type=int, help="of the matrix, a multiple of 4; by device")
    parser.add_argument("--columns", type=int, help="of the matrix, a multiple of 32; by device")
    parser.add_argument("--tensors", type=int, default=4, help="matrices of that size in a step")
    return parser


def main(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.columns, args.rounds = 16, 64, 3
    size = 8192 if args.device.startswith("cuda") else 1024
    args.rows, args.columns = args.rows or size, args.columns or size
    if args.rows % 4 or args.columns % 32 or min(args.rows, args.columns) < 1:
        parser.error(f"--rows {args.rows} --columns {args.columns}: rows are a multiple of 4, columns of 32")
    return compare("masks", SUITES, args, argv)
