"""Pruning, checking and reporting models; files that hold them bit for bit; torch's compressed weights."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from fused_optim.sparsity import (
    check_mask,
    load_sparse,
    mask_forward,
    nm_mask,
    prune,
    report,
    save_sparse,
    to_semi_structured,
    transposable_mask,
    unmask_forward,
    verify,
)


class Model(nn.Module):
    """Everything that a model may have: ties, experts, convolutions, odd widths, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(8, 4, 3)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, dtype=torch.bfloat16)
        self.again = self.up
        self.experts = nn.Parameter(torch.randn(3, 8, 16))
        self.odd = nn.Linear(6, 3)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(6))


PRUNED = ["experts", "conv.weight", "up.weight", "down.weight"]


def test_prune() -> None:
    model = Model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    places = [param.data_ptr() for param in model.parameters()]
    assert prune(model) == PRUNED == verify(model)
    assert [param.data_ptr() for param in model.parameters()] == places
    for name, param in model.named_parameters():
        dim = 1 if name == "conv.weight" else -1
        expected = before[name] * nm_mask(before[name], dim=dim) if name in PRUNED else before[name]
        assert torch.equal(param, expected), name


def test_what_is_pruned_can_be_said() -> None:
    model = Model()
    assert prune(model, 1, 8, apply_to="up.*weight") == ["up.weight"]
    assert check_mask(model.up.weight, 1, 8)
    assert prune(model, 1, 3, apply_to=lambda name, param: name == "odd.weight") == ["odd.weight"]
    assert prune(model, 4, 8, dim=0, apply_to=["*down.weight", "experts*"][:1]) == ["down.weight"]
    assert check_mask(model.down.weight, 4, 8, dim=0)
    assert prune(model, apply_to="again.weight") == ["up.weight"]
    assert prune(model, dim=2) == ["experts"]


def test_tied_heads_are_embeddings() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output_projection = nn.Linear(8, 20, bias=False)
            self.embedding = nn.Embedding(20, 8)
            self.embedding.weight = self.output_projection.weight
            self.hidden = nn.Linear(8, 8)

    assert prune(Tied()) == ["hidden.weight"]


def test_nan_is_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([[math.nan, math.inf, 1.0, math.nan]])
    prune(model)
    assert model[0].weight.isnan().tolist() == [[True, False, False, True]]
    assert model[0].weight[0, 1:3].tolist() == [0.0, 0.0]


def test_the_first_offending_group_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(8, 3, 2), nn.ReLU(), nn.Linear(8, 2))
    prune(model)
    with torch.no_grad():
        model[0].weight[2, 4:7, 0, 1] = 1.0
        model[0].weight[2, 7, 0, 1] = 0.0
        model[2].weight[1, :4] = 2.0
    with pytest.raises(
        ValueError, match=r"0.weight\[2, 4:8, 0, 1\] has more than 2 .*\[1.0, 1.0, 1.0, 0.0\]; 1 of"
    ):
        verify(model)
    with pytest.raises(ValueError, match=r"2.weight\[1, 0:4\] has more than 2"):
        verify(model, apply_to="2.*")


def test_report() -> None:
    model = Model()
    prune(model, apply_to=["conv*weight", "up.weight"])
    rows = {row.name: row for row in report(model).rows}
    assert {name: row.pattern for name, row in rows.items()} == {
        "experts": "dense",
        "embed.weight": "left out",
        "conv.weight": "2:4",
        "up.weight": "2:4",
        "down.weight": "dense",
        "odd.weight": "left out",
    }
    assert rows["up.weight"].density == 0.5 and rows["up.weight"].energy == pytest.approx(1.0)
    w = model.experts.detach().double()
    kept = (w * nm_mask(w)).square().sum() / w.square().sum()
    assert rows["experts"].energy == pytest.approx(kept.item(), rel=1e-6)
    assert rows["embed.weight"].energy is None
    lines = str(report(model)).splitlines()
    assert lines[0].split() == ["weight", "shape", "density", "energy", "kept", "pattern"]
    sparse, total = 288 + 128, 384 + 160 + 288 + 128 + 128 + 18
    assert lines[-1] == f"2:4: {sparse / total:.1%} of {total} weights in matrices"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-50, 1e-25, 1.0, 1e25])
def test_energy_of_weights_whose_squares_have_no_number(scale: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data = (torch.tensor([[3.0, 4.0, 1.0, 2.0]], dtype=torch.float64) * scale).to(dtype)
    (row,) = report(model).rows
    small = dtype != torch.float64 and scale == 1e-50
    assert row.energy == pytest.approx(1.0 if small else 25 / 30, rel=1e-2)


def test_folders_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = nn.Sequential(nn.Linear(8, 8)), tmp_path / "folder"
    prune(model)
    folder.mkdir()
    with pytest.raises(ValueError, match="folder is a folder; give a file in it"):
        save_sparse(model, folder)
    with pytest.raises(ValueError, match="folder is a folder; give the file"):
        load_sparse(folder)

    def failing(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr("os.replace", failing)
    with pytest.raises(PermissionError):
        save_sparse(model, folder / "file")
    assert list(tmp_path.rglob("*")) == [folder]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 8), (5, 8), (1, 2)])
def test_files_hold_every_bit(n: int, m: int, tmp_path: Path) -> None:
    model = Model()
    prune(model, n, m)
    with torch.no_grad():
        model.up.weight[0] = 0.0
        model.down.weight[0, :m] = torch.where(nm_mask(torch.ones(m), n, m), math.nan, 0.0)
    names = save_sparse(model, tmp_path / "model.safetensors", n, m)
    assert sorted(names) == sorted(verify(model, n, m))
    found, expected = load_sparse(tmp_path / "model.safetensors"), model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        same = found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        assert found[name].dtype == tensor.dtype and torch.equal(*same), name
    assert found["embed.weight"] is found["lm_head.weight"]
    Model().load_state_dict(found)
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]


def test_the_format_is_the_documented_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 2, bias=False))
    model[0].weight.data = torch.tensor([[0.0, 3, 0, 4, 5, 6, 0, 0], [0, 0, 0, 0, 0, 0, 0, 7]])
    path = tmp_path / "model.safetensors"
    save_sparse(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        values, indices = file.get_tensor("0.weight.values"), file.get_tensor("0.weight.indices")
    assert values.tolist() == [[3, 4, 5, 6], [0, 0, 0, 7]]
    assert indices.tolist() == [0b01_00_11_01, 0b11_00_01_00]
    assert json.loads(metadata["layers"]) == {"0.weight": {"shape": [2, 8], "dim": 1}}
    assert {key: metadata[key] for key in ("format", "version", "n", "m", "tied")} == {
        **{"format": "fused_optim.nm", "version": "1"},
        **{"n": "2", "m": "4", "tied": "{}"},
    }
    save_sparse(model, path, 4, 8)
    with safe_open(path, "pt") as file:
        assert file.get_tensor("0.weight.indices").tolist() == [[1, 3, 4, 5], [0, 1, 2, 7]]


def test_files_are_as_small_as_documented(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False).bfloat16())
    prune(model)
    save_sparse(model, tmp_path / "sparse")
    save_file(model.state_dict(), tmp_path / "dense")
    sizes = [(tmp_path / name).stat().st_size for name in ("sparse", "dense")]
    assert sizes[0] - 1000 < sizes[1] * 9 / 16 < sizes[0]


def test_what_is_not_sparse_is_stored_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune(model, apply_to="0.weight")
    assert save_sparse(model, tmp_path / "file") == ["0.weight"]
    found = load_sparse(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_overlapping_tensors_are_stored_apart(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(4, 8, bias=False))
    model[1].weight.data = model[0].weight.data[:, :4]
    prune(model)
    save_sparse(model, tmp_path / "file")
    found = load_sparse(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


class _Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None: ...


def test_files_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with pytest.raises(ValueError, match=r"no weight of the model is 2:4; prune\(model, 2, 4\) first"):
        save_sparse(nn.Sequential(nn.Linear(8, 8)), path)
    clash = nn.Module()
    clash.w = nn.Parameter(torch.zeros(8, 8))
    monkeypatch.setattr(clash, "state_dict", lambda: {"w": clash.w.detach(), "w.values": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"w.values would be in the file twice"):
        save_sparse(clash, path)
    with pytest.raises(TypeError, match="_extra_state in the model's state is no tensor but dict"):
        save_sparse(nn.Sequential(_Extra(8, 8)), path)
    assert not path.exists()
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"has format None.*safetensors.torch.load_file"):
        load_sparse(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'fused_optim\[sparse\]'"):
        load_sparse(path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model: prune(model, 4, 4), ValueError, "n=4, m=4"),
        (lambda model: prune(model.state_dict()), TypeError, "model must be a torch.nn.Module"),
        (lambda model: prune(model, dim=1.0), TypeError, "dim must be an integer or None"),
        (lambda model: prune(model, apply_to=3), TypeError, "apply_to must be"),
        (
            lambda model: prune(model, apply_to="odd.weight"),
            ValueError,
            "odd.weight: dimension 1 .* apply_to says",
        ),
        (lambda model: prune(model, apply_to="odd.weight", dim=5), ValueError, "odd.weight: dim=5 is none"),
        (lambda model: verify(model, 1, 32), ValueError, "no weight of the model has groups of 32"),
        (lambda model: save_sparse(model, "never", 3, 3), ValueError, "n=3, m=3"),
        (lambda model: to_semi_structured(nn.Sequential(nn.Conv2d(4, 4, 1))), ValueError, "no Linear layer"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    model = Model()
    with pytest.raises(error, match=message):
        call(model)
    assert model.up.weight.count_nonzero() == 128


def test_masked_layers_must_be_unmasked_first(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    mask_forward(model[0])
    for call in (prune, verify, report, lambda model: save_sparse(model, tmp_path / "file")):
        with pytest.raises(ValueError, match=r"0.parametrizations.weight.original is .* call unmask_forward"):
            call(model)
    unmask_forward(model[0])
    assert save_sparse(model, tmp_path / "file") == ["0.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [nm_mask, transposable_mask])
def test_masks_fit_sparse_tensor_cores(mask: Any, dtype: torch.dtype) -> None:
    """Torch's own conversion to CUTLASS's layout, which runs on a CPU, finds at most two in each group."""
    w = torch.randn(64, 128).to(dtype)
    w[3, :8] = 0.0
    w = w * mask(w)
    values, metadata = sparse_semi_structured_from_dense_cutlass(w)
    assert values.shape == (64, 64)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, metadata), w)
    if mask is transposable_mask:
        back = sparse_semi_structured_from_dense_cutlass(w.t().contiguous())
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(*back), w.t())


def test_semi_structured_says_what_is_missing() -> None:
    model = nn.Sequential(nn.Linear(64, 64).half())
    with pytest.raises(
        ValueError, match=r"0.weight is on cpu; .*move the model there first; or leave it out"
    ):
        to_semi_structured(model)
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_models_compute_the_same(dtype: torch.dtype) -> None:
    shared = nn.Linear(256, 256)
    model = nn.Sequential(nn.Linear(128, 256), shared, shared, nn.Linear(256, 6)).to("cuda", dtype)
    meant = ["0.weight", "1.weight"]
    with pytest.raises(ValueError, match=r"0.weight is not 2:4; prune\(model\) first"):
        to_semi_structured(model, apply_to=meant)
    prune(model, apply_to=meant)
    x = torch.randn(64, 128, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(ValueError, match=r"3.weight has shape \(6, 256\)"):
            to_semi_structured(model)
        assert to_semi_structured(model, apply_to=meant) == ["0.weight", "1.weight", "1.weight"]
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    assert model[1].weight is model[2].weight


@pytest.mark.gpu
def test_files_of_models_on_a_gpu(tmp_path: Path) -> None:
    model = Model().cuda()
    prune(model)
    save_sparse(model, tmp_path / "file")
    found: dict[str, Tensor] = load_sparse(tmp_path / "file", device="cuda")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
