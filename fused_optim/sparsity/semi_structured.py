"""2:4 weights in the form that sparse tensor cores multiply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    to_sparse_semi_structured,
)

from ..cuts import ApplyTo
from .masks import check_mask
from .pruning import weights

DTYPES = (torch.float16, torch.bfloat16)


def to_semi_structured(model: nn.Module, *, apply_to: ApplyTo | None = None) -> list[str]:
    """Replaces the 2:4 weights of a model's ``Linear`` layers by torch's compressed ones, for inference.

    ``torch.sparse.to_sparse_semi_structured`` does it, with cuSPARSELt or CUTLASS; compressed weights cannot
    be trained or saved (:func:`fused_optim.sparsity.save_sparse` goes before). Either all weights that are
    meant are replaced or none.

    Args:
        model: a module on an NVIDIA GPU of compute capability 8.0 or higher.
        apply_to: which weights, as for :func:`fused_optim.sparsity.prune`; without it those that
            :func:`fused_optim.sparsity.prune` would choose.

    Returns:
        The names of the replaced weights.

    Raises:
        ValueError: a weight that is not 2:4, on another device, of another dtype than fp16 and bf16, of a
            shape that the kernels do not take; no weight at all.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import prune, to_semi_structured
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 128)).half()
        >>> _ = prune(model)
        >>> to_semi_structured(model)
        Traceback (most recent call last):
        ValueError: 0.weight is on cpu; ...
    """
    chosen = {weight.param: weight.name for weight in weights(model, 4, None, apply_to)}
    layers = [
        (chosen[module.weight], module)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight in chosen
    ]
    if not layers:
        raise ValueError("the model has no Linear layer with a weight that is meant; see apply_to")
    for name, layer in layers:
        reason = _unfit(layer.weight)
        if reason is not None:
            raise ValueError(f"{name} {reason}; or leave it out with apply_to")
    compressed: dict[Tensor, nn.Parameter] = {}
    for _, layer in layers:
        if layer.weight not in compressed:
            sparse: Any = to_sparse_semi_structured(layer.weight.detach())
            compressed[layer.weight] = nn.Parameter(sparse, requires_grad=False)
        layer.weight = compressed[layer.weight]
    return [name for name, _ in layers]


def _unfit(weight: Tensor) -> str | None:
    """Why sparse tensor cores cannot multiply a weight."""
    if weight.device.type != "cuda":
        return f"is on {weight.device}; sparse tensor cores are an NVIDIA GPU's: move the model there first"
    if (capability := torch.cuda.get_device_capability(weight.device)) < (8, 0):
        return "is on a GPU of compute capability {}.{}; sparse tensor cores came with 8.0".format(
            *capability
        )
    if weight.dtype not in DTYPES:
        return f"has dtype {weight.dtype}; 2:4 is for fp16 and bf16: convert with .bfloat16() or .half()"
    form = (
        SparseSemiStructuredTensorCUTLASS
        if SparseSemiStructuredTensor._FORCE_CUTLASS
        else SparseSemiStructuredTensorCUSPARSELT
    )
    least = form._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    if weight.shape[0] % least.sparse_min_rows or weight.shape[1] % least.sparse_min_cols:
        return (
            f"has shape {tuple(weight.shape)}; {form.BACKEND} takes multiples of {least.sparse_min_rows} "
            f"rows and {least.sparse_min_cols} columns"
        )
    if not weight.is_contiguous():
        return f"has strides {weight.stride()}; the kernels take contiguous weights: call .contiguous()"
    if not check_mask(weight, 2, 4):
        return "is not 2:4; prune(model) first"
    return None
