"""Newton–Schulz iterations on other libraries' kernels, checked against float64 before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from . import ceiling
from .comparison import Absent, Contender
from .muons import JORDAN, checked, distance, polynomials
from .peers import MissingPeerError, imported

Iterate = Callable[[Tensor], Sequence[Tensor] | Tensor]


@dataclass(frozen=True)
class Iteration:
    """Another library's kernels: ``make`` turns its functions into Jordan's five steps for a batch."""

    package: str
    module: str
    functions: tuple[str, ...]
    make: Callable[..., Iterate]
    device: str = "cuda"

    def found(self, X: Tensor) -> Iterate:
        """The iteration.

        Raises:
            MissingPeerError: it is not here, or does not run here.
        """
        if X.device.type != self.device:
            raise MissingPeerError(f"{self.package} runs on {self.device}, not on {X.device.type}")
        return self.make(*(imported(self.package, self.module, name) for name in self.functions))


def _flash_muon(fast_newtonschulz: Callable[..., Tensor]) -> Iterate:
    """It has Jordan's coefficients itself, and takes one matrix at a time."""
    return lambda X: [fast_newtonschulz(matrix, steps=ceiling.STEPS) for matrix in X]


def _quack(gemm_symmetric: Callable[..., Tensor], gemm_add: Callable[..., Tensor]) -> Iterate:
    """The standard form, normalized as torch does it."""
    a, b, c = JORDAN

    def iterate(X: Tensor) -> Tensor:
        Y = (X if X.shape[-2] <= X.shape[-1] else X.mT).bfloat16()
        Y = Y / Y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        for _ in range(ceiling.STEPS):
            A = gemm_symmetric(Y, Y.mT)
            Y = gemm_add(gemm_symmetric(A, A, C=A, alpha=c, beta=b), Y, C=Y, beta=a)
        return Y if X.shape[-2] <= X.shape[-1] else Y.mT

    return iterate


ITERATIONS: Mapping[str, Iteration] = {
    "flash-muon": Iteration("flash-muon", "flash_muon", ("fast_newtonschulz",), _flash_muon),
    "quack": Iteration("quack-kernels", "quack.gemm_interface", ("gemm_symmetric", "gemm_add"), _quack),
}
"""github.com/nil0x9/flash-muon, github.com/Dao-AILab/quack; both compute one triangle of symmetric ones."""


def _each(iterate: Iterate, batches: Sequence[Tensor]) -> None:
    for X in batches:
        iterate(X)


def admit(label: str, peer: Iteration, batches: Sequence[Tensor]) -> Contender | Absent:
    """A contender that is right for the first matrix of each batch, or the reason to leave it out."""

    def check() -> tuple[Callable[[], None], float]:
        iterate = peer.found(batches[0])
        error = max(distance(iterate(X)[0], polynomials(X[0], ceiling.STEPS)) for X in batches)
        return partial(_each, iterate, batches), error

    return checked(label, check, ceiling.triangles(batches))
