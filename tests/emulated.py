"""Trains with compiled Triton kernels on CPU tensors (ptx.py), and compares with the reference.

``python -m tests.emulated CASE ...`` with ``RULE/PARAMETER/STATES/exact|fast|strided`` prints nothing if all
agree; ``strided`` is exact as well, on transposed parameters with gradients laid out otherwise.
TRITON_INTERPRET must not be set, so this is a process of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

import fused_optim
from fused_optim.kernels import dispatch
from fused_optim.kernels.triton import budget, driver, step
from fused_optim.sparsity import CAST, SRSTE
from fused_optim.spectral import SpectralClip
from tests.cases import assert_same_bits, normal
from tests.ptx import Machine

SHAPES = ((0,), (1,), (15,), (17,), (255,), (257,), (2047,), (2048,), (4097,), (3 * 2048 + 300,))
MATRICES = ((3, 4), (33, 64), (130, 52))
CAPABILITY = 90
_POINTERS = {torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32", torch.float64: "*fp64"}
_CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (fused_optim.AdamW, {}),
    "lion": (fused_optim.Lion, {"clip_grad_norm": 3.0}),
    "sgd_momentum": (fused_optim.SGD, {"momentum": 0.9}),
    "amsgrad": (fused_optim.Adam, {"amsgrad": True, "capturable": True, "weight_decay": 0.1}),
    "nesterov": (fused_optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "careful": (fused_optim.Lion, {"clip_grad_norm": 3.0, "skip_nonfinite": True}),
    "spectral": (fused_optim.AdamW, {"spectral": SpectralClip(1.0)}),
    "sr_ste": (fused_optim.AdamW, {"sparsity": SRSTE()}),
    "cast": (fused_optim.CASTAdamS, {"sparsity": CAST(total_steps=10)}),
}


class Emulated:
    """A kernel that is compiled for a GPU when it is called and run by a machine that is none."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self._launch(grid[0], arguments)

    def _launch(self, programs: int, arguments: tuple[Any, ...]) -> None:
        constants = dict(zip(self.arg_names, arguments, strict=True))
        given = {name: constants.pop(name) for name in self.arg_names if not _is_constant(name)}
        types = {k: _POINTERS[v.dtype] if isinstance(v, Tensor) else "i32" for k, v in given.items()}
        signature = {name: types.get(name, "constexpr") for name in self.arg_names}
        source = ASTSource(
            self.kernel, signature, {(self.arg_names.index(k),): v for k, v in constants.items()}
        )
        warps = constants["SPREAD"][1]
        options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": not constants.get("EXACT", True)}
        compiled = compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
        words = [v.data_ptr() if isinstance(v, Tensor) else v for v in given.values()]
        Machine(compiled.asm["ptx"], programs, 32 * warps, [*words, 0, 0], compiled.metadata.shared).run()


def _is_constant(name: str) -> bool:
    return name.isupper()


def _train(backend: str, case: str) -> list[Tensor]:
    rule, param_codec, states, arithmetic = case.split("/")
    # A user may ask for fast arithmetic on GPUs only.
    dispatch.choose_exact = lambda *_: arithmetic != "fast"
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(param_codec[:4], torch.bfloat16)
    make, options = _CLASSES[rule]
    strided = arithmetic == "strided"
    shapes = MATRICES if strided or {"sparsity", "spectral"} & options.keys() else SHAPES
    params = [normal(shape, dtype, i) for i, shape in enumerate(shapes)]
    # One that starts off a boundary, so that no access of its own may be wide.
    params.append(normal((1, 2051), dtype, 99)[:, 3:])
    params = [(param.mT if strided else param).requires_grad_() for param in params]
    torch.manual_seed(0)
    options = options | {"param_codec": param_codec, "state_codec": states, "keep_fp32": 0}
    optimizer = make(params, lr=0.01, backend=backend, **options)
    for count in range(3):
        for i, param in enumerate(params):
            param.grad = normal(param.shape, dtype, 100 * count + i)
            flat = param.grad.view(-1)
            if count == 2 and len(flat) > 4096 and "clip_grad_norm" not in options:
                # Blocks that share what is not finite, and blocks of zeros.
                flat[300], flat[700] = float("nan"), float("-inf")
                flat[1024:2048] = 0
        optimizer.step()
    return [tensor for p in params for tensor in (p, *optimizer.state[p].values())]


def compare(case: str) -> None:
    """Raises AssertionError where the compiled kernel and the reference differ."""
    actual, expected = _train("triton", case), _train("reference", case)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if not case.endswith("fast"):
            assert_same_bits(a, b, f"{case}, tensor {i}")
        elif a.dtype.is_floating_point:
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5, equal_nan=True)


def main(cases: list[str]) -> None:
    """Command line."""
    torch.set_num_threads(1)
    driver.unavailable, driver.capability_of = lambda device_type: None, lambda device: CAPABILITY
    budget.MANY_PROGRAMS = 1
    step.step, step.square_sum = Emulated(step.step), Emulated(step.square_sum)
    for case in cases:
        compare(case)


if __name__ == "__main__":
    main(sys.argv[1:])
