"""The spectral functions' operations, reproducibility, agreement with torch, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import ceiling
from bench import newton_schulz as newton_schulz_bench
from fused_optim.kernels.spectral import newton_schulz, products
from fused_optim.kernels.spectral.coefficients import schedule
from fused_optim.spectral import hard_clip, inverse_sqrt, orthogonalize, soft_clip, spectral_norm

CPU_DTYPES = (torch.float32, torch.bfloat16)
TORCHS = (3.4445, -4.7750, 2.0315)


# Small matrices: threads only wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[True, False], ids=["amx", "no_amx"])
def amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of a CPU, on any."""
    monkeypatch.setattr(products, "has_amx", lambda: request.param)
    return request.param


def _onednn_flops(x: tuple[int, ...], w: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * w[0]


# torch counts no products of oneDNN by itself.
counting = partial(
    FlopCounterMode,
    display=False,
    custom_mapping={torch.ops.mkldnn._linear_pointwise: _onednn_flops},
)


def _torchs_muon(X: Tensor, steps: int = 5) -> Tensor:
    """As torch.optim.Muon does it, written down here because it is private there."""
    a, b, c = TORCHS
    Y = X.bfloat16()
    Y = Y / Y.norm().clamp(min=1e-7)
    for _ in range(steps):
        A = Y @ Y.T
        Y = torch.addmm(Y, torch.addmm(A, A, A, beta=b, alpha=c), Y, beta=a)
    return Y


def test_jordan_is_torchs_muon() -> None:
    for m, n in ((64, 64), (48, 192), (192, 48), (256, 640)):
        X = torch.randn(m, n)
        expected = _torchs_muon(X) if m <= n else _torchs_muon(X.T).T
        exact = orthogonalize(X.double(), "jordan", 5, form="standard", dtype=torch.float64)
        found = orthogonalize(X, "jordan", 5)
        assert torch.dist(found, expected.float()) < 0.05 * exact.norm()
        assert torch.dist(found, exact) < 1.4 * torch.dist(expected, exact)


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("name", ["jordan", "cubic", "polar_express"])
@pytest.mark.parametrize(("m", "n"), [(16, 16), (16, 64), (800, 830)])
def test_operations_are_the_formulas(m: int, n: int, name: str, form: Any) -> None:
    for dtype in CPU_DTYPES:
        steps = 5 if m < 100 else 3
        with counting() as counter:
            orthogonalize(torch.randn(2, m, n), name, steps, form=form, dtype=dtype)
        plan = schedule(name, steps).steps
        assert counter.get_total_flops() == 2 * newton_schulz.flops(m, n, plan, dtype, "cpu", form)


def test_gram_form_saves_operations(amx: bool) -> None:
    """At 1024 × 4096 in five steps, as documented; and it is what auto takes there."""
    plan = schedule("jordan", 5).steps
    wide = [newton_schulz.flops(1024, 4096, plan, torch.bfloat16, "cpu", f) for f in ("gram", "standard")]
    # Three of four products with X and its Gram matrix each, or five; of the others eleven, or five.
    triangle = 1.0 if amx else 0.625
    assert wide[0] == 2 * 1024**3 * (12 + triangle * (12 + 11))
    assert wide[1] == 2 * 1024**3 * (20 + triangle * (20 + 5))
    square = [newton_schulz.flops(64, 64, plan, torch.bfloat16, "cpu", f) for f in ("gram", "standard")]
    assert square[0] > square[1]
    for shape, form in (((256, 700), "gram"), ((256, 256), "standard"), ((64, 500), "standard")):
        X = torch.randn(shape)
        assert torch.equal(orthogonalize(X, "jordan"), orthogonalize(X, "jordan", form=form))  # pyright: ignore[reportArgumentType]


def test_one_triangle_is_computed() -> None:
    """A large symmetric product in float32 takes 0.625 of its operations at 1024, and is the product."""
    assert products.triangle_share(1024, torch.float32) == 0.625
    A = torch.randn(1, 900, 910)
    out = torch.empty(1, 900, 900)
    with counting() as counter:
        G = products.gram(A, out=out)
    share = products.triangle_share(900, torch.float32)
    assert G is out and counter.get_total_flops() == round(2 * 900 * 900 * 910 * share)
    assert torch.allclose(G, A @ A.mT, atol=1e-3) and torch.equal(G[0, :256, 256:], G[0, 256:, :256].mT)
    A = G / 900
    for b in (0.0, 2.0):
        expected = b * A + 3 * A @ A
        assert torch.allclose(products.polynomial(A, b, 3.0), expected, atol=1e-4)
        assert torch.allclose(
            products.polynomial(A, b, 3.0, out=torch.full_like(A, torch.nan)), expected, atol=1e-4
        )
    with counting() as counter:
        C = products.multiply_commuting(A, expected, 2.0)
    assert counter.get_total_flops() == round(2 * 900**3 * share)
    assert torch.allclose(C, 2 * A + A @ expected, atol=1e-4)
    assert torch.equal(C[0, :256, 256:], C[0, 256:, :256].mT)


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_every_matrix_of_a_batch(dtype: torch.dtype) -> None:
    """Taken together or one by one, standing or lying."""
    X = torch.randn(3, 800, 790).to(dtype)
    X[1] *= 1e3
    for form in ("standard", "gram"):
        for given in (X, X.mT.contiguous(), X.mT):
            together = orthogonalize(given, "cubic", 3, form=form, dtype=dtype)
            for i in range(3):
                alone = orthogonalize(given[i], "cubic", 3, form=form, dtype=dtype)
                torch.testing.assert_close(together[i], alone, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_products(dtype: torch.dtype) -> None:
    X = torch.randn(3, 20, 30).to(dtype)
    A = products.gram(X)
    assert torch.equal(A, torch.bmm(X, X.mT)) and torch.equal(A, products.gram(X, out=torch.empty_like(A)))
    P = products.polynomial(A, 2.0, 0.5)
    assert torch.allclose(P, 2 * A + 0.5 * A @ A, rtol=2e-2, atol=0.5)
    Y = products.multiply_add(X, A, 3.0)
    assert torch.allclose(Y, 3 * X + A @ X, rtol=2e-2, atol=2.0)
    assert torch.equal(Y, products.multiply_add(X, A, 3.0, out=torch.empty_like(X)))
    assert torch.equal(P, products.polynomial(A, 2.0, 0.5, out=torch.empty_like(A)))
    C = products.multiply_commuting(A, P, 3.0)
    exact = 3 * A.double() + A.double() @ P.double()
    assert torch.dist(C.double(), exact) < 0.01 * exact.norm()


def test_bits_are_reproducible() -> None:
    """The same matrices give the same bits again."""
    X = torch.randn(3, 200, 230)
    X[1] *= 40
    for dtype in CPU_DTYPES:
        given = X.to(dtype)
        for function in (
            orthogonalize,
            lambda x: soft_clip(x, 1.0),
            lambda x: hard_clip(x, 1.0),
            spectral_norm,
        ):
            first = function(given)
            assert torch.equal(first, function(given))
            alone = function(given[1:2])[0]
            assert torch.dist(first[1].float(), alone.float()) < 0.02 * alone.float().norm()


def test_bounds_by_matrix() -> None:
    X = torch.randn(2, 3, 10, 14)
    c = torch.rand(2, 3) + 0.1
    for clip in (soft_clip, hard_clip):
        expected = torch.stack(
            [torch.stack([clip(X[i, j], float(c[i, j])) for j in range(3)]) for i in range(2)]
        )
        assert torch.allclose(clip(X, c), expected, atol=1e-6)
        assert torch.allclose(clip(X, c[:, :1]), clip(X, c[:, :1].expand(2, 3)))
        assert torch.equal(clip(X, torch.tensor(0.5)), clip(X, 0.5))
        assert torch.allclose(clip(X, float("inf")), X, rtol=1e-5, atol=1e-6)


X = torch.ones(2, 3)
REFUSED: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "give a torch.Tensor", lambda: orthogonalize([[1.0]])),  # pyright: ignore[reportArgumentType]
    (TypeError, "int64", lambda: soft_clip(X.long(), 1.0)),
    (TypeError, "complex64", lambda: spectral_norm(X.cfloat())),
    (ValueError, r"shape \(3,\)", lambda: orthogonalize(torch.ones(3))),
    (ValueError, r"shape \(2, 3\); give square", lambda: inverse_sqrt(X)),
    (ValueError, "got 0; give a positive", lambda: soft_clip(X, 0)),
    (ValueError, "got -1.0; give a positive", lambda: hard_clip(X, -1.0)),
    (ValueError, "got nan", lambda: hard_clip(X, float("nan"))),
    (TypeError, "c: got '1'", lambda: soft_clip(X, "1")),  # pyright: ignore[reportArgumentType]
    (ValueError, r"c: got shape \(2,\)", lambda: soft_clip(X, torch.ones(2))),
    (TypeError, "c: got dtype torch.bool", lambda: soft_clip(X, torch.tensor(True))),
    (ValueError, "tolerance: got 0", lambda: soft_clip(X, 1.0, tolerance=0)),
    (ValueError, "max_ratio: got 0.5", lambda: soft_clip(X, 1.0, max_ratio=0.5)),
    (ValueError, "ridge: got -1", lambda: inverse_sqrt(torch.eye(2), ridge=-1)),
    (ValueError, "steps: got 0", lambda: orthogonalize(X, steps=0)),
    (TypeError, "steps: got 2.0", lambda: orthogonalize(X, steps=2.0)),  # pyright: ignore[reportArgumentType]
    (ValueError, "steps: got 0", lambda: spectral_norm(X, steps=0)),
    (ValueError, "got 'newton'; give one of 'polar_express'", lambda: orthogonalize(X, "newton")),
    (ValueError, "exactly three numbers", lambda: orthogonalize(X, [(1.5, -0.5)])),
    (ValueError, "exactly three numbers", lambda: orthogonalize(X, [])),
    (TypeError, "a sequence of", lambda: orthogonalize(X, (1.5, -0.5, 0.0))),  # pyright: ignore[reportArgumentType]
    (ValueError, "form: got 'fast'", lambda: orthogonalize(X, form="fast")),  # pyright: ignore[reportArgumentType]
    (ValueError, "dtype: got torch.int8", lambda: orthogonalize(X, dtype=torch.int8)),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[1])
def test_refusals_say_what_to_do(case: tuple[type[Exception], str, Any]) -> None:
    kind, text, call = case
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize("shape", [(2, 16, 40), (1, 40, 16), (2, 300, 900), (1, 288, 288)])
def test_benchmark_counts_operations(shape: tuple[int, int, int]) -> None:
    """As torch counts them; a whole iteration is five steps of the matmuls that bound it."""
    X = torch.randn(shape)

    def counted(call: Callable[[], Any]) -> int:
        with counting() as counter:
            call()
        return counter.get_total_flops()

    if newton_schulz_bench._muon is not None:
        assert ceiling.full([X, X]) == 2 * counted(lambda: [newton_schulz_bench._torchs(x) for x in X])
    for form in ("auto", "standard", "gram"):
        expected = counted(partial(newton_schulz_bench._ours, X, form))
        assert ceiling.ours([X], newton_schulz_bench.JORDAN, form) == expected
    for matmul in ceiling.matmuls([ceiling.Products(X)]):
        assert matmul.flops == counted(matmul.call) == ceiling.full([X]) / 5
    assert ceiling.full([X]) / 2 < ceiling.triangles([X]) < ceiling.full([X])


def test_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny matrices through every suite: what it writes holds errors, times and targets."""
    out = tmp_path / "result.json"
    assert newton_schulz_bench.main(["--quick", "--ratios", "30", "--device", "cpu", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["kind"] == "newton_schulz" and result["quick"] is True
    cases = {case["name"]: case for case in result["cases"]}
    assert {target["against"] for target in cases["muon all, 1 layers"]["targets"]} == {"torch.optim.Muon"}
    ours, theirs, _ = cases["soft clip 48x64 fp32, ratio 30"]["rows"]
    assert ours["error"] < 1e-4 < theirs["error"] and ours["ms"]["n"] == 3
    muon = cases["muon 256x64, 1 layers"]
    labels = {row["label"] for row in muon["rows"] if row["status"] == "ok"}
    fastest = max(matmul["tflop_per_s"] for matmul in muon["matmuls"])
    for row in muon["rows"]:
        assert ("of_matmul" in row) == (row["label"] in labels)
        if row["label"] in labels:
            assert row["of_matmul"] == pytest.approx(row["tflop_per_s"] / fastest, rel=0.05)
    printed = " ".join(capsys.readouterr().out.split())
    assert "TFLOP/s of matmul" in printed and "torch.bmm, one step" in printed
    with pytest.raises(SystemExit, match="unknown suites x; known: muon, step, clip, products"):
        newton_schulz_bench.main(["--suites", "x"])


def test_a_case_that_fails_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(newton_schulz_bench, "released_soft_clip", out_of_memory)
    out = tmp_path / "result.json"
    arguments = ["--quick", "--suites", "clip,products", "--ratios", "30", "--device", "cpu"]
    assert newton_schulz_bench.main([*arguments, "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert [case["name"] for case in result["cases"]] == ["gram 64", "polynomial 64", "multiply_add 64"]
    assert {case["reason"] for case in result["failed"]} == {"OutOfMemoryError: CUDA out of memory"}
    assert len(result["failed"]) == 4 and "FAILED: soft clip 48x64 fp32" in capsys.readouterr().out
