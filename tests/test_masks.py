"""Masks against their definition: every group, dimension, dtype, stride and special value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.pruning import WeightNormSparsifier

from bench import masks as bench
from fused_optim.kernels import compiled_masks, magnitude_masks
from fused_optim.kernels.native import cpu
from fused_optim.kernels.reference import masking
from fused_optim.sparsity import (
    check_mask,
    count_flips,
    nm_mask,
    pack_mask,
    transposable_mask,
    unpack_mask,
)
from tests.oracles import masks as oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-40, 65504.0, 1e38]


# Both ways in every test but those that run a benchmark.
@pytest.fixture(autouse=True, params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to find a mask: compiled functions where they fit, torch's operations everywhere."""
    if request.param == "torch":
        monkeypatch.setattr(compiled_masks, "_module", lambda w: None)
    return request.param


def _values(*shape: int) -> Tensor:
    """Few different values, many ties, all special ones."""
    return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]


def _expected(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    moved = w.double().movedim(dim, -1)
    mask = torch.from_numpy(oracle.nm_mask(moved.reshape(-1, m).numpy(), n, m))
    return mask.view(moved.shape).movedim(-1, dim)


def _patterns() -> list[tuple[int, int]]:
    """Every pattern of small groups, and the ends of large ones, whose ways are too many."""
    small = [(n, m) for m in (2, 3, 4, 5, 8) for n in range(1, m)]
    return [*small, (1, 16), (2, 16), (15, 16), (1, 32), (31, 32), (2, 7), (3, 31)]


@pytest.mark.parametrize(("n", "m"), _patterns())
def test_masks_are_the_definition(n: int, m: int) -> None:
    dtype = DTYPES[(n + m) % len(DTYPES)]
    for w in (torch.randn(5, 2 * m), _values(5, 2 * m)):
        w = w.to(dtype)
        mask = nm_mask(w, n, m)
        assert mask.dtype == torch.bool and torch.equal(mask, _expected(w, n, m, -1))
        assert (mask.unflatten(-1, (-1, m)).sum(-1) == n).all()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_masks_of_any_shape_and_strides(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 6))
    n = data.draw(st.integers(1, m - 1))
    shape = data.draw(st.lists(st.integers(0, 3), min_size=0, max_size=3))
    dim = data.draw(st.integers(0, len(shape)))
    shape.insert(dim, m * data.draw(st.integers(1, 2)))
    order = data.draw(st.permutations(range(len(shape))))
    step = data.draw(st.integers(1, 2))
    numbers = st.sampled_from(SPECIAL)
    size = math.prod(shape)
    flat = torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size)), dtype=torch.float32)
    dense = flat.view(shape).permute(order).contiguous().permute([order.index(i) for i in range(len(shape))])
    w = dense.repeat_interleave(step, -1)[..., ::step]
    mask = nm_mask(w, n, m, dim - len(shape) if data.draw(st.booleans()) else dim)
    assert torch.equal(mask, _expected(dense, n, m, dim))
    assert torch.equal(unpack_mask(pack_mask(mask, w), w), mask)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("m", [2, 4, 8, 16])
def test_masks_are_what_steps_make(m: int, dtype: torch.dtype) -> None:
    w = torch.cat([_values(512), torch.randn(512)]).to(dtype)
    for n in range(1, m):
        assert torch.equal(nm_mask(w, n, m), masking.largest_of_groups(w.float(), m, n))


def test_a_tensor_of_many_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [torch.randn(24, 40, 3).transpose(0, 1), torch.randn(24, 40, 2, 2).bfloat16(), torch.randn(960)]
    masks = [nm_mask(w, 3, 8, dim=0) for w in whole]
    blocks = transposable_mask(whole[1][..., 0, 0])
    monkeypatch.setattr(magnitude_masks, "_portion", lambda device: 100)
    assert all(torch.equal(nm_mask(w, 3, 8, dim=0), mask) for w, mask in zip(whole, masks, strict=True))
    assert torch.equal(transposable_mask(whole[1][..., 0, 0]), blocks)


def test_masks_have_the_strides_of_weights_and_no_gradient() -> None:
    w = torch.randn(8, 4, 3, 3, requires_grad=True).to(memory_format=torch.channels_last)
    mask = nm_mask(w, dim=1)
    assert mask.stride() == w.stride() and not mask.requires_grad
    assert nm_mask(torch.randn(1, 8).expand(3, 8)).shape == (3, 8)


def test_the_compiled_function_is_used_for_neighbours_in_memory(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    compiled = cpu.nm_mask

    def spy(x: Tensor, group: int, kept: int) -> Tensor:
        calls.append((group, kept))
        return compiled(x, group, kept)

    monkeypatch.setattr(cpu, "nm_mask", spy)
    convolution = torch.randn(3, 8, 2, 2).to(memory_format=torch.channels_last)
    for w, dim in ((torch.randn(6, 8), 1), (torch.randn(8, 6).t(), 1), (convolution, 1), (convolution, -3)):
        w = w.bfloat16()
        assert torch.equal(nm_mask(w, 1, 4, dim), _expected(w, 1, 4, dim))
    assert calls == ([(4, 1)] * 3 if way == "compiled" else [])
    nm_mask(torch.randn(8).double())
    nm_mask(torch.randn(4, 8)[:, ::2])
    assert len(calls) == (3 if way == "compiled" else 0)


def test_torchs_sparsifier_and_topk_agree() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    w = model[0].weight.detach().clone()
    sparsifier = WeightNormSparsifier(1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    assert torch.equal(model[0].parametrizations.weight[0].mask.bool(), nm_mask(w))
    top = w.abs().unflatten(1, (-1, 16)).topk(5, -1).indices
    expected = torch.zeros(32, 4, 16, dtype=torch.bool).scatter_(-1, top, True).flatten(1)
    assert torch.equal(nm_mask(w, 5, 16), expected)


def _block(kind: str) -> Tensor:
    return {
        "normal": torch.randn(4, 4),
        "ties": torch.randint(-2, 3, (4, 4)).float(),
        "special": _values(4, 4),
        "near ties": 1 + torch.randint(0, 4, (4, 4)) * 2.0**-23,
        "rounding": torch.tensor([1.0, 2.0**-24, 3 * 2.0**-24, 0.5])[torch.randint(4, (4, 4))],
        "bf16": torch.randn(4, 4).bfloat16().float(),
        "sparse": torch.randn(4, 4) * (torch.rand(4, 4) < 0.4),
        "zeros": torch.zeros(4, 4),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["normal", "ties", "special", "near ties", "rounding", "bf16", "sparse", "zeros"]
)
def test_transposable_masks_are_the_definition(kind: str) -> None:
    assert len(oracle.patterns()) == 90
    blocks = [_block(kind) for _ in range(1 if kind == "zeros" else 30)]
    expected = [torch.from_numpy(oracle.transposable_mask(block.numpy())) for block in blocks]
    mask = transposable_mask(torch.cat(blocks, 1))
    assert torch.equal(mask, torch.cat(expected, 1))
    assert torch.equal(transposable_mask(torch.stack(blocks)), torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposable_masks_are_sparse_both_ways(dtype: torch.dtype) -> None:
    w = torch.randn(3, 16, 24, dtype=dtype)
    mask = transposable_mask(w)
    assert check_mask(mask) and check_mask(mask, dim=1) and int(mask.sum()) == w.numel() // 2
    assert torch.equal(transposable_mask(w.transpose(1, 2).contiguous().transpose(1, 2)), mask)
    assert transposable_mask(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 64, 1001])
def test_packed_masks_are_the_definition(numel: int) -> None:
    mask = torch.rand(numel) < 0.5
    packed = pack_mask(mask, torch.empty(numel))
    assert torch.equal(packed, torch.from_numpy(oracle.bits(mask.numpy())))
    assert torch.equal(unpack_mask(packed, torch.empty(numel)), mask)


def test_packed_masks_lie_as_their_weights() -> None:
    like = torch.empty(2, 3, 4).permute(2, 0, 1)
    mask = torch.rand(4, 2, 3) < 0.5
    packed = pack_mask(mask, like)
    expected = oracle.bits(mask.permute(1, 2, 0).reshape(-1).numpy())
    assert torch.equal(packed, torch.from_numpy(expected))
    assert unpack_mask(packed, like).stride() == like.stride()


@pytest.mark.parametrize("size", [0, 1, 5, 4097])
def test_flips_are_counted(size: int) -> None:
    one, two = (torch.randint(256, (size,), dtype=torch.uint8) for _ in range(2))
    flips = count_flips(one, two)
    assert flips.dtype == torch.int64 and flips.ndim == 0
    assert int(flips) == int(np.unpackbits(one.numpy() ^ two.numpy()).sum())
    every = torch.arange(256, dtype=torch.uint8)
    assert int(count_flips(every, torch.zeros_like(every))) == 1024


def test_check_mask() -> None:
    w = torch.tensor([[1.0, 0.0, -0.0, math.nan], [0.0, 0.0, 0.0, 0.0]])
    assert check_mask(w) and not check_mask(w, 1)
    assert check_mask(w, 1, 2, dim=0) and not check_mask(torch.ones(2, 4), 1, 2, dim=0)
    assert check_mask(nm_mask(torch.randn(6, 30), 3, 5), 3, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(8), 4, 4), ValueError, "n=4, m=4"),
        ((torch.zeros(8), 0, 4), ValueError, "0 < n < m <= 32"),
        ((torch.zeros(66), 2, 33), ValueError, "m=33"),
        ((torch.zeros(8), 2.0, 4), TypeError, "n must be an integer, got 2.0"),
        ((torch.zeros(8), 2, True), TypeError, "m must be an integer"),
        ((torch.zeros(3, 6),), ValueError, "has 6 weights, no multiple of m=4"),
        ((torch.zeros(3, 8), 2, 4, 2), ValueError, r"dim=2 is none of the dimensions of shape \(3, 8\)"),
        ((torch.zeros(8), 2, 4, "0"), TypeError, "dim must be an integer"),
        ((torch.zeros(()),), ValueError, "dim=-1 is none"),
        ((torch.zeros(8, dtype=torch.int32),), TypeError, "torch.int32"),
        ((torch.zeros(8, dtype=torch.complex64),), TypeError, "floating"),
        (([1.0, 2.0, 3.0, 4.0],), TypeError, "must be a tensor"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nm_mask(*arguments)
    with pytest.raises(error, match=message):
        check_mask(*arguments)


def test_wrong_arguments_of_the_others() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 6\)"):
        transposable_mask(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="multiples of 4"):
        transposable_mask(torch.zeros(8))
    with pytest.raises(TypeError, match="floating"):
        transposable_mask(torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(TypeError, match="bool"):
        pack_mask(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="does not fit"):
        pack_mask(torch.zeros(4, dtype=torch.bool), torch.zeros(5))
    with pytest.raises(ValueError, match="makes 2 bytes"):
        unpack_mask(torch.zeros(1, dtype=torch.uint8), torch.zeros(9))
    with pytest.raises(TypeError, match="uint8"):
        unpack_mask(torch.zeros(2), torch.zeros(9))
    with pytest.raises(TypeError, match="other"):
        count_flips(torch.zeros(2, dtype=torch.uint8), torch.zeros(2))
    with pytest.raises(ValueError, match="not of the same weights"):
        count_flips(torch.zeros(2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_on_a_gpu_are_the_same(dtype: torch.dtype) -> None:
    w = torch.cat([_values(32, 96), torch.randn(32, 96)]).to(dtype)
    for n, m, dim in ((2, 4, 1), (1, 32, 1), (5, 16, 0), (7, 8, 0)):
        mask = nm_mask(w, n, m, dim)
        assert torch.equal(nm_mask(w.cuda(), n, m, dim).cpu(), mask)
        packed = pack_mask(mask.cuda(), w.cuda())
        assert torch.equal(packed.cpu(), pack_mask(mask, w))
        assert torch.equal(unpack_mask(packed, w.cuda()).cpu(), mask)
        assert int(count_flips(packed, torch.zeros_like(packed))) == int(mask.sum())
    assert torch.equal(transposable_mask(w.cuda()).cpu(), transposable_mask(w))


def test_the_benchmark_runs_and_refuses_wrong_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "masks.json"
    monkeypatch.setattr(bench, "PATTERNS", [(2, 4)])
    assert (
        bench.main(["--quick", "--device", "cpu", "--suites", "groups,transposable", "--out", str(out)]) == 0
    )
    result = json.loads(out.read_text())
    assert result["kind"] == "masks" and len(result["cases"]) == 4
    rows = {case["name"]: [row["label"] for row in case["rows"]] for case in result["cases"]}
    assert rows["2:4 of 16x64 bf16"] == ["fused_optim", "argsort", "topk", "apex ASP, six patterns"]
    assert rows["transposable of 16x64 fp32"] == ["fused_optim", "2by4-pretrain, 90 patterns"]
    for case in result["cases"]:
        # In bf16 there are ties, and products are rounded to bf16.
        allowed = 0.0 if "fp32" in case["name"] else 0.3
        assert all(row["error"] <= allowed for row in case["rows"]) and case["rows"][0]["error"] == 0.0
    assert "Figures to reach" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown suites x"):
        bench.main(["--suites", "x"])
    monkeypatch.setattr(bench, "nm_mask", lambda w, n, m: torch.ones_like(w, dtype=torch.bool))
    assert bench.main(["--quick", "--device", "cpu", "--suites", "groups,forward", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    # What is wrong is not timed, and stops no other case.
    assert [case["name"][:7] for case in result["failed"]] == ["2:4 of "] * 2 and len(result["cases"]) == 1
    assert "found another mask than the reference" in result["failed"][0]["reason"]
    assert "FAILED: 2:4 of 16x64 fp32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--rows 7 --columns 33", "--rows 7 --columns 33: rows are a multiple of 4, columns of 32"),
        ("--device cuda:99", "'cuda:99' is not here, torch sees"),
    ],
)
def test_the_benchmark_refuses_in_one_line(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--device", "cpu", *arguments.split()])
    assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_a_deadline_leaves_cases_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "masks.json"
    options = ["--quick", "--device", "cpu", "--suites", "forward,step", "--deadline", "-1"]
    assert bench.main([*options, "--out", str(out)]) == 0
    names = json.loads(out.read_text())["left_out"]
    assert [name.partition(" ")[0] for name in names] == ["forward", "AdamW,", "AdamW,"]
    assert "left out for lack of time: forward of a 2:4 layer" in capsys.readouterr().out


def test_the_benchmark_of_steps_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--quick", "--device", "cpu", "--suites", "step"]) == 0
    assert "SR-STE" in capsys.readouterr().out
