"""Damaged files of sparse models: refused by the name of what does not fit, never loaded as other weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fused_optim.sparsity import load_sparse, prune, save_sparse


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(8, 8)), tmp_path / "model.safetensors"
    prune(model)
    save_sparse(model, path)
    whole = path.read_bytes()
    for content in (b"", whole[:20], whole[:-1], b"nonsense" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors cannot be read as a safetensors file"):
            load_sparse(path)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    cases: list[tuple[dict[str, Any], dict[str, str], str]] = [
        ({"0.weight.indices": None}, {}, "it lacks '0.weight.indices'"),
        ({"0.weight.indices": torch.zeros(3, dtype=torch.uint8)}, {}, "not those of a weight of shape"),
        ({"0.weight.values": torch.zeros(2)}, {}, "not those of a weight of shape"),
        ({}, {"layers": "{"}, "Expecting"),
        ({}, {"n": "5"}, "n=5, m=4"),
        ({}, {"layers": '{"0.weight": {"shape": [8, 8]}}'}, "it lacks 'dim'"),
        ({}, {"tied": '{"other": "missing"}'}, "it lacks 'missing'"),
    ]
    for parts, other, message in cases:
        changed = {name: part for name, part in {**tensors, **parts}.items() if part is not None}
        save_file(changed, path, {**metadata, **other})
        with pytest.raises(ValueError, match=rf"model.safetensors is damaged: .*{message}"):
            load_sparse(path)
    prune(model, 1, 8)
    save_sparse(model, path, 1, 8)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({**tensors, "0.weight.indices": tensors["0.weight.indices"] + 8}, path, metadata)
    with pytest.raises(ValueError, match=r"is damaged: the indices of '0.weight' go beyond groups of 8"):
        load_sparse(path)


def _weight(shape: Any, dim: Any) -> dict[str, str]:
    return {"layers": json.dumps({"0.weight": {"shape": shape, "dim": dim}})}


@pytest.mark.parametrize(
    ("parts", "other", "message"),
    [
        ({}, _weight([8, 16], 0), r"the values .* along dimension 0, which are \(16, 4\)"),
        ({}, _weight([16, 8], 1), r"the values .*\(8, 8\).* a weight of shape \[16, 8\]"),
        ({}, _weight([-8, -16], 1), r"cannot have shape \[-8, -16\]"),
        ({}, _weight([8, 16.0], 1), r"cannot have shape \[8, 16.0\]"),
        ({}, _weight("ab", 1), "cannot have shape 'ab'"),
        ({}, _weight([8, 16], -1), "along dimension -1"),
        ({}, _weight([8, 16], True), "along dimension True"),
        ({}, _weight([8, 16], "1"), "along dimension '1'"),
        ({"indices": lambda part: torch.zeros_like(part)}, {}, "indices .* places come twice"),
        ({"indices": lambda part: 255 - part}, {}, "indices .* do not ascend"),
        ({"indices": lambda part: part.view(2, -1)}, {}, r"the indices .* are \(2, 8\)"),
        ({"values": lambda part: part.int()}, {}, "the values .* torch.int32"),
        ({"values": lambda part: part.view(-1, 1)}, {}, r"the values .* are \(64, 1\)"),
    ],
)
def test_parts_that_are_not_of_one_weight(
    parts: dict[str, Any], other: dict[str, str], message: str, tmp_path: Path
) -> None:
    model, path = nn.Sequential(nn.Linear(16, 8)), tmp_path / "model.safetensors"
    prune(model)
    save_sparse(model, path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for part, change in parts.items():
        tensors[f"0.weight.{part}"] = change(tensors[f"0.weight.{part}"])
    save_file(tensors, path, {**metadata, **other})
    with pytest.raises(ValueError, match=rf"model.safetensors is damaged: .*{message}") as caught:
        load_sparse(path)
    assert "'0.weight'" in str(caught.value)


def test_indices_of_bytes_ascend_as_well(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(16, 8)), tmp_path / "file"
    prune(model, 4, 8)
    save_sparse(model, path, 4, 8)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(
        {**tensors, "0.weight.indices": tensors["0.weight.indices"].flip(1).contiguous()}, path, metadata
    )
    with pytest.raises(ValueError, match=r"the indices of '0.weight' do not ascend"):
        load_sparse(path)


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (2, 0, 4)])
def test_weights_without_values(size: tuple[int, ...], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    prune(model)
    model.empty = nn.Parameter(torch.zeros(size))
    save_sparse(model, tmp_path / "file")
    assert load_sparse(tmp_path / "file")["empty"].shape == size
