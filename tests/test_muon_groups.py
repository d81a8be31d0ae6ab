"""Which parameters Muon takes itself, and what groups of other algorithms have."""

from __future__ import annotations

import pytest
import torch

import fused_optim
from fused_optim.spectral import SpectralClip


def test_a_group_of_muons_is_not_clipped() -> None:
    with pytest.raises(ValueError, match="clips what Muon makes orthogonal"):
        fused_optim.Muon([{"params": [torch.zeros(4, 4)], "spectral": SpectralClip()}])
    named = [("up.weight", torch.zeros(4, 4)), ("norm", torch.zeros(4))]
    optimizer = fused_optim.Muon(named, others="adamw")
    with pytest.raises(ValueError, match="clips what Muon makes orthogonal"):
        optimizer.add_param_group(
            {"params": [("down.weight", torch.zeros(4, 4))], "algorithm": "muon", "spectral": SpectralClip()}
        )
    optimizer.add_param_group(
        {"params": [("head.weight", torch.zeros(4, 4))], "algorithm": "adamw", "spectral": SpectralClip()}
    )


def test_relatives_need_what_makes_them_differ() -> None:
    weight = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"NorMuon needs beta2, such as 0\.95; for none, use Muon"):
        fused_optim.NorMuon([weight], beta2=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"MuonH needs radius='fixed' or 'current'; .* use Muon"):
        fused_optim.MuonH([weight], radius=None)


def test_groups_that_name_their_algorithm() -> None:
    """They have what it needs: the others' options where it is theirs, else its own."""
    named = [("up.weight", torch.zeros(4, 4)), ("norm", torch.zeros(4))]
    optimizer = fused_optim.Muon(named, others="adamw", others_lr=0.5, others_eps=1e-5)
    optimizer.add_param_group({"params": [("a", torch.zeros(3))], "algorithm": "adamw", "weight_decay": 0.25})
    optimizer.add_param_group({"params": [("b", torch.zeros(3))], "algorithm": "lion", "lr": 0.125})
    alike, other = optimizer.param_groups[2:]
    assert [alike[key] for key in ("lr", "eps", "betas", "weight_decay")] == [0.5, 1e-5, (0.9, 0.95), 0.25]
    assert [other[key] for key in ("lr", "betas")] == [0.125, (0.9, 0.98)]


NAMES = {
    "layers.0.attn.qkv.weight": True,
    "layers.0.mlp.shared_experts.up.weight": True,
    "encoder.layer.0.output.dense.weight": True,
    "model.embed_tokens.weight": False,
    "shared.weight": False,
    "model.shared.weight": False,
    "_orig_mod.module.output.weight": False,
    "model.output.weight": False,
    "classifier.weight": False,
    "classifier.out_proj.weight": False,
    "score.weight": False,
    "vit.class_token": False,
    "heads.head.weight": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_hidden_matrices(name: str) -> None:
    named = [(name, torch.zeros(4, 4)), ("blocks.0.weight", torch.zeros(4, 4)), ("norm", torch.zeros(4))]
    muon, others = fused_optim.Muon(named, others="adamw").param_groups
    assert (name in muon["param_names"], name in others["param_names"]) == (NAMES[name], not NAMES[name])
