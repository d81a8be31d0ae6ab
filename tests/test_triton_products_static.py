"""What the compiled kernels of the matrix products do, counted without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compiling import compiled

triton = pytest.importorskip("triton")

TENSOR = {80: "mma.", 90: "wgmma.mma_async.", 100: "tcgen05.mma"}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("static"), "static_products", "--workers", "1")


def _named(kernel: dict[str, Any]) -> str:
    return " ".join(str(kernel[key]) for key in ("product", "dtype", "tile", "fed_by", "sm"))


def test_tensor_cores_multiply_every_tile_once(kernels: list[dict[str, Any]]) -> None:
    assert {k["sm"] for k in kernels} == {80, 90, 100}
    for kernel in kernels:
        assert kernel["tensor"], _named(kernel)
        assert all(name.startswith(TENSOR[kernel["sm"]]) for name in kernel["tensor"]), _named(kernel)
        # Those of sm_100 have their sizes in registers.
        assert kernel["multiplied"] == kernel["expected"] or kernel["sm"] == 100, _named(kernel)


def test_nothing_spills(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        # The oldest Triton keeps 160 bytes of one kernel for A100 in memory.
        allowed = 160 if triton.__version__ < "3.7" and kernel["sm"] == 80 else 0
        assert kernel["spilled"] <= allowed, _named(kernel)
        assert kernel["resident"] >= (1 if kernel["tile"].startswith("128") else 2), _named(kernel)


def test_memory_is_accessed_in_boxes_or_vectors(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        for access in kernel["accesses"]:
            if kernel["fed_by"] == "boxes":
                assert access == "cp.async.bulk.tensor", (_named(kernel), access)
            else:
                assert access == "cp.async.cg.shared.global" or ".v4.b32" in access, (_named(kernel), access)


def test_instructions_leave_tensor_cores_the_bottleneck(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        # fp32 is split into parts between its multiplications.
        share = 0.75 if kernel["dtype"] == "fp32" else 0.4
        assert 0 < kernel["issued"] <= share * kernel["tensor_clocks"], (_named(kernel), kernel["issued"])
