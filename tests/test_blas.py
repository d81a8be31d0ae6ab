"""Products by oneDNN, on any CPU whose torch has it, beside float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_optim.kernels.spectral import blas
from fused_optim.spectral import orthogonalize, soft_clip

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 200
LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

# Of a matrix with more rows and columns than are multiplied.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda A: A[:, :SIZE, :SIZE].contiguous(),
    "transposed": lambda A: A[:, :SIZE, :SIZE].contiguous().mT,
    "part": lambda A: A[:, 3 : SIZE + 3, 5 : SIZE + 5],
    "transposed part": lambda A: A[:, 3 : SIZE + 3, 5 : SIZE + 5].mT,
    "expanded": lambda A: A[:1, :SIZE, :SIZE].contiguous().expand(len(A), -1, -1),
}


class Names(TorchDispatchMode):
    """What was called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if LINEAR is None or not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(blas, "_onednn", lambda: LINEAR)


def _near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("second", VIEWS)
@pytest.mark.parametrize("first", VIEWS)
def test_layouts(first: str, second: str, batch: int) -> None:
    A = VIEWS[first](torch.randn(batch, SIZE + 8, SIZE + 8))
    B = VIEWS[second](torch.randn(batch, SIZE + 8, SIZE + 8))
    expected = A.double() @ B.double()
    with Names() as called:
        _near(blas.multiply(A, B), expected)
    assert called.names.count("mkldnn._linear_pointwise.default") == batch
    # Results that are parts of something larger, whose rest stays.
    room = torch.full((batch, SIZE + 8, SIZE + 8), 7.0)
    out = room[:, 2 : SIZE + 2, 4 : SIZE + 4]
    assert blas.multiply(A, B, out=out) is out
    _near(out, expected)
    out.fill_(7.0)
    assert (room == 7.0).all()


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("batch", [0, 1, 3], ids=["no batch", "one", "three"])
@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0, 1), (0, -2.5), (0.5, 1), (1, -1), (-3.0, 0.25)])
def test_sums(batch: int, beta: float, alpha: float) -> None:
    shapes = ((SIZE, SIZE + 40), (SIZE, 300), (300, SIZE + 40))
    C, A, B = (torch.randn(shape if not batch else (batch, *shape)) for shape in shapes)
    expected = beta * C.double() + alpha * (A.double() @ B.double())
    if not beta:
        C.fill_(torch.nan)
    before = C.clone()
    _near(blas.multiply_add(C, A, B, beta=beta, alpha=alpha), expected)
    assert torch.equal(C.nan_to_num(), before.nan_to_num())
    # Into what is added, too.
    assert blas.multiply_add(C, A, B, beta=beta, alpha=alpha, out=C) is C
    _near(C, expected)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_what_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices, other dtypes, CPUs that MKL serves as well, and oneDNN switched off."""
    A = torch.randn(1, SIZE, SIZE)
    with Names() as called:
        monkeypatch.setattr(blas, "_onednn", lambda: LINEAR)
        blas.multiply(A.double(), A.double())
        blas.multiply(A[:, :100], A)
        blas.multiply(A, A[:, :, :1])
        with torch.backends.mkldnn.flags(enabled=False):
            blas.multiply(A, A)
        monkeypatch.setattr(blas, "_onednn", lambda: None)
        blas.multiply_add(A, A, A)
    assert not any("mkldnn" in name for name in called.names)


@pytest.mark.parametrize(
    ("vendor", "capability", "taken"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_whose_cpus(
    vendor: str, capability: str, taken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: X\n")
    monkeypatch.setattr(blas, "_CPUINFO", tmp_path / "cpuinfo")
    assert (blas._onednn.__wrapped__() is not None) == (taken and LINEAR is not None)
    monkeypatch.setattr(blas, "_CPUINFO", tmp_path / "missing")
    assert blas._onednn.__wrapped__() is None


@pytest.mark.usefixtures("onednn")
def test_orthogonalization() -> None:
    found = orthogonalize(torch.randn(3, 260, 600), "polar_express", 9, dtype=torch.float32)
    assert (torch.linalg.svdvals(found.double()) - 1).abs().max() < 1e-3


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [3.0, 30.0, 300.0])
def test_functions_of_singular_values(ratio: float, dtype: torch.dtype) -> None:
    """As accurate as with torch's own products."""
    X = (torch.randn(260, 300) * torch.logspace(0, -3, 260)[:, None]).to(dtype)
    U, S, V = torch.linalg.svd(X.double(), full_matrices=False)
    c = S[0].item() / ratio
    clipped = (U * (S / (1 + (S / c) ** 2).sqrt())) @ V
    error = torch.dist(soft_clip(X, c).double(), clipped) / torch.linalg.vector_norm(clipped)
    assert error < (1e-4 if dtype is torch.float32 else 2e-2)
