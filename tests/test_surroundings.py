"""What surrounds an optimizer: default devices, numbers of other libraries, options set by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fused_optim
from fused_optim.sparsity import SRSTE


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_matter(device: str) -> None:
    """Nor does it while a plan is made; the first step and a clipped one make tables and sums."""
    results = []
    for default in ("cpu", device):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 40, device="cpu").view(5, 8))
        options: dict[str, Any] = {
            "clip_grad_norm": 1.0,
            "sparsity": SRSTE(),
            "state_codec": "int8",
            "keep_fp32": 0,
        }
        with torch.device(default):
            optimizer = fused_optim.AdamW([("w", param)], **options)
            for step in range(3):
                param.grad = torch.full((5, 8), 0.5 + step, device="cpu")
                optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_numbers_of_numpy() -> None:
    results = []
    for number in (float, np.float32, np.float64):
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        fused_optim.AdamW([param], lr=number(0.5), weight_decay=number(0.25), eps=number(0.0)).step()
        results.append(param.detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_learning_rate_that_requires_grad_is_read() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    fused_optim.SGD([param], lr=torch.tensor(0.5, requires_grad=True)).step()
    assert torch.equal(param.detach(), torch.full((4,), 0.5))


def test_an_option_set_to_none_by_hand() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = fused_optim.AdamW([param])
    param.grad = torch.ones(4)
    optimizer.param_groups[0]["eps"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(4))


def test_a_state_that_is_no_tensor() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = fused_optim.AdamW([("weight", param)])
    param.grad = torch.ones(4)
    optimizer.step()
    before = param.detach().clone()
    optimizer.state[param]["exp_avg"] = 0.0
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 of group 0 \('weight'\) is 0\.0"):
        optimizer.step()
    assert torch.equal(param.detach(), before)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_module_must_have_seen_an_input() -> None:
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 belongs to a lazy module .*run the model"):
        fused_optim.AdamW(torch.nn.LazyLinear(4).parameters())


def test_a_group_that_cannot_be_added_is_not() -> None:
    optimizer = fused_optim.AdamW8bit([torch.nn.Parameter(torch.ones(4))])

    def fails(name: str, param: torch.Tensor) -> bool:
        raise KeyError(name)

    with pytest.raises(KeyError):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(4))], "keep_fp32": fails})
    assert len(optimizer.param_groups) == 1


def test_patterns_need_names() -> None:
    param = torch.nn.Parameter(torch.ones(64, 64))
    with pytest.raises(ValueError, match=r"keep_fp32 has the name patterns .*named_parameters"):
        fused_optim.AdamW8bit([param], keep_fp32=(4096, "*embed*"))
    fused_optim.AdamW8bit([("embed", param)], keep_fp32=(4096, "*embed*"))
