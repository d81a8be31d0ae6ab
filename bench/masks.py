"""``python -m bench masks``: times the search for N:M masks, and masked steps, beside what others do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fused_optim
from fused_optim.kernels.reference import masking
from fused_optim.sparsity import SRSTE, OneShot, nm_mask, transposable_mask

from .comparison import Case, Contender, compare, parser_of
from .newton_schulz import DTYPES

ASP = "apex ASP, six patterns"
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


def groups(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """Groups along the last dimension of a matrix."""
    sixes = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    cases = []
    for dtype_name, dtype in DTYPES.items():
        w = torch.randn(args.rows, args.columns, device=device).to(dtype)
        patterns = sixes.to(device, dtype)
        for n, m in PATTERNS:
            parts = [masking.largest_of_groups(part.float().flatten(), m, n) for part in w.split(64)]
            contenders: dict[str, Callable[[], Tensor]] = {
                "fused_optim": partial(nm_mask, w, n, m),
                "argsort": partial(argsorted, w, n, m),
                "topk": partial(topped, w, n, m),
            }
            limits = {"argsort": 0.2, "topk": 0.2, ASP: 1 / 3} if (n, m) == (2, 4) else {}
            if (n, m) == (2, 4):
                contenders[ASP] = partial(scored, w, patterns)
            expected = torch.cat(parts).view(w.shape)
            cases.append(
                _case(f"{n}:{m} of {args.rows}x{args.columns} {dtype_name}", expected, contenders, limits)
            )
    return cases


def transposable(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """Blocks of 4x4, two kept in every row and column."""
    places = masking.block_patterns().to(device)
    cases = []
    for name, dtype in DTYPES.items():
        w = torch.randn(args.rows, args.columns, device=device).to(dtype)
        patterns = torch.zeros(len(places), 16, dtype=dtype, device=device).scatter_(1, places, 1)
        contenders: dict[str, Callable[[], Tensor]] = {
            "fused_optim": partial(transposable_mask, w),
            "2by4-pretrain, 90 patterns": partial(convolved, w, patterns),
        }
        expected = masking.best_of_blocks(w.float())
        limits = {"2by4-pretrain, 90 patterns": 0.5}
        cases.append(
            _case(f"transposable of {args.rows}x{args.columns} {name}", expected, contenders, limits)
        )
    return cases


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


def steps(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """AdamW on matrices in fp32: dense, masked in place, with dense weights beside what the model sees."""
    shape = (args.rows, args.columns)

    def weights() -> list[Tensor]:
        made = [torch.randn(shape, device=device).requires_grad_() for _ in range(args.tensors)]
        for w in made:
            w.grad = torch.randn_like(w)
        return made

    def ours(**options: Any) -> Callable[[], None]:
        return fused_optim.AdamW(weights(), lr=1e-3, **options).step

    def torchs(decay: float | None) -> Masked:
        params = weights()
        return Masked(params, torch.optim.AdamW(params, lr=1e-3, fused=True), decay)

    dense = Contender("dense", ours())
    name = f"AdamW, {args.tensors} of {args.rows}x{args.columns}"
    return [
        Case(
            f"{name}: one mask for good",
            [
                Contender("masked", ours(sparsity=OneShot())),
                dense,
                Contender("torch fused and three passes (apex ASP)", torchs(None)),
            ],
            {"dense": 1.05 if device.type == "cuda" else 1.15},
        ),
        Case(
            f"{name}: new masks in every step",
            [
                Contender("masked (SR-STE)", ours(sparsity=SRSTE())),
                dense,
                Contender("torch fused around SR-STE", torchs(2e-4)),
            ],
        ),
    ]


SUITES = {"groups": groups, "transposable": transposable, "step": steps}


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("masks", __doc__, SUITES)
    parser.add_argument("--rows", type=int, help="of the matrix, a multiple of 4; by device")
    parser.add_argument("--columns", type=int, help="of the matrix, a multiple of 32; by device")
    parser.add_argument("--tensors", type=int, default=4, help="matrices of that size in a step")
    return parser


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.quick:
        args.rows, args.columns, args.rounds = 16, 64, 3
    size = 8192 if args.device.startswith("cuda") else 1024
    args.rows, args.columns = args.rows or size, args.columns or size
    return compare("masks", SUITES, args, argv)
