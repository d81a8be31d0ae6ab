"""Sparse models in safetensors files: the kept weights and where they were."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..recipe import check_pattern
from .masks import check_mask, nm_mask
from .pruning import weights

FORMAT = "fused_optim.nm"
VERSION = 1
VALUES, INDICES = ".values", ".indices"


def _safetensors() -> Any:
    try:
        import safetensors.torch as module
    except ImportError:
        raise ImportError(
            "sparse models are stored in safetensors files, and safetensors is not installed: "
            "pip install 'fused_optim[sparse]'"
        ) from None
    return module


def save_sparse(
    model: nn.Module, path: str | os.PathLike[str], n: int = 2, m: int = 4, *, dim: int | None = None
) -> list[str]:
    """Writes a model's ``state_dict`` into one safetensors file, weights that are N:M without their zeros.

    Whatever weight is N:M (as for :func:`fused_optim.sparsity.prune`) is stored sparse, everything else as it
    is, so that nothing is lost. 2:4 takes 9/16 of a bf16 weight and 17/32 of an fp32 one. The file holds

    - ``name.values``, ``[rows, columns * n / m]``: the weight with its groups along the last dimension, all
      others in ``rows``, and of each group the ``n`` largest magnitudes in the order of their places;
    - ``name.indices``, uint8: the place of each value in its group, 0 to ``m - 1``. For ``m = 4`` two bits
      each, value ``i`` in bits ``2 * (i % 4)`` of byte ``i // 4``, rows one after the other; else a byte
      each, in the shape of the values;
    - every other tensor under its own name;
    - metadata: ``format`` (``fused_optim.nm``), ``version``, ``n``, ``m``, ``layers`` (JSON: for each name
      its ``shape`` and ``dim``), ``tied`` (JSON: further names of tensors).

    Args:
        model: any module.
        path: of the file, which is replaced once the new one is complete.
        n: weights that are kept of each group.
        m: weights of a group.
        dim: the dimension along which groups lie, if it is not that of a layer's inputs.

    Returns:
        The names of the weights that are stored sparse.

    Raises:
        ValueError: no weight is N:M, a name that would be taken twice, or ``path`` is a folder.
        TypeError: the model's state holds something else than tensors.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile, torch
        >>> from fused_optim.sparsity import load_sparse, prune, save_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = prune(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     names = save_sparse(model, f"{folder}/model.safetensors")
        ...     state = load_sparse(f"{folder}/model.safetensors")
        >>> names, torch.equal(state["0.weight"], model[0].weight)
        (['0.weight'], True)
    """
    check_pattern(n, m)
    if os.path.isdir(path):
        raise ValueError(f"{os.fspath(path)} is a folder; give a file in it, such as model.safetensors")
    module = _safetensors()
    tensors, tied = _tensors(model)
    found = {weight.name: weight.dim for weight in weights(model, m, dim, None)}
    layers: dict[str, dict[str, Any]] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        along = found.get(name)
        if along is None or not check_mask(tensor, n, m, along):
            parts = {name: tensor.contiguous()}
        else:
            layers[name] = {"shape": list(tensor.shape), "dim": along}
            parts = dict(zip((name + VALUES, name + INDICES), compress(tensor, n, m, along), strict=True))
        if taken := sorted(parts.keys() & stored.keys()):
            raise ValueError(f"{taken[0]} would be in the file twice; rename one of the model's tensors")
        stored |= parts
    if not layers:
        raise ValueError(
            f"no weight of the model is {n}:{m}; prune(model, {n}, {m}) first, or save it as a dense model"
        )
    metadata = {"format": FORMAT, "version": str(VERSION), "n": str(n), "m": str(m)}
    metadata |= {"layers": json.dumps(layers), "tied": json.dumps(tied)}
    unfinished = f"{os.fspath(path)}.part"
    try:
        module.save_file(stored, unfinished, metadata)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return list(layers)


def load_sparse(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Reads a file of :func:`save_sparse` into dense tensors, for ``model.load_state_dict``.

    Every value has the bits that it was saved with; what was pruned is +0. Tied names share their tensor.

    Args:
        path: of the file.
        device: where the tensors go.

    Raises:
        ValueError: the file was written by something else or by a later version, or it is damaged.
        OSError: there is no such file.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile, torch
        >>> from fused_optim.sparsity import load_sparse, prune, save_sparse
        >>> model, other = torch.nn.Linear(8, 2), torch.nn.Linear(8, 2)
        >>> _ = prune(model, apply_to=lambda name, param: param.ndim == 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_sparse(model, f"{folder}/model.safetensors")
        ...     other.load_state_dict(load_sparse(f"{folder}/model.safetensors"))
        <All keys matched successfully>
        >>> int((other.weight == 0).sum())
        8
    """
    metadata, stored = _read(os.fspath(path), str(device))
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{os.fspath(path)} has format {metadata.get('format')!r}, version "
            f"{metadata.get('version')!r}; load_sparse reads {FORMAT!r}, version {VERSION}: dense files "
            "are for safetensors.torch.load_file"
        )
    try:
        n, m = int(metadata["n"]), int(metadata["m"])
        check_pattern(n, m)
        for name, layer in json.loads(metadata["layers"]).items():
            values, indices = stored.pop(name + VALUES), stored.pop(name + INDICES)
            _check_layer(name, values, indices, n, m, layer["shape"], layer["dim"])
            stored[name] = expand(values, indices, n, m, layer["shape"], layer["dim"])
        return stored | {other: stored[name] for other, name in json.loads(metadata["tied"]).items()}
    except KeyError as error:
        raise ValueError(f"{os.fspath(path)} is damaged: it lacks {error.args[0]!r}; save it again") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged: {error}; save it again") from error


def _read(path: str, device: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file."""
    _safetensors()
    from safetensors import SafetensorError, safe_open

    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; give the file that save_sparse wrote")
    try:
        with safe_open(path, "pt", device=device) as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file ({error}); save it again") from error


def _check_layer(name: str, values: Tensor, indices: Tensor, n: int, m: int, shape: Any, dim: Any) -> None:
    """Refuses parts that are not those of one weight, or not as :func:`compress` makes them."""
    sizes: list[Any] = shape if isinstance(shape, list) else [None]
    if (
        not all(type(size) is int and size >= 0 for size in (*sizes, dim))
        or dim >= len(sizes)
        or sizes[dim] % m
    ):
        raise ValueError(f"{name!r} cannot have shape {shape!r} and groups of {m} along dimension {dim!r}")
    expected = math.prod(sizes[:dim] + sizes[dim + 1 :]), sizes[dim] // m * n
    packed = (-(-values.numel() // 4),) if m == 4 else expected
    if values.shape != expected or not values.is_floating_point():
        raise ValueError(
            f"the values of {name!r} are {tuple(values.shape)} {values.dtype}, not those of a weight of "
            f"shape {shape} along dimension {dim}, which are {expected} and floating"
        )
    if indices.shape != packed or indices.dtype != torch.uint8:
        raise ValueError(
            f"the indices of {name!r} are {tuple(indices.shape)} {indices.dtype}, not those of a weight of "
            f"shape {shape}, which are {packed} and uint8"
        )
    places = _places(values, indices, n, m)
    if m != 4 and bool((places >= m).any()):
        raise ValueError(f"the indices of {name!r} go beyond groups of {m}")
    if bool((places[:, 1:] <= places[:, :-1]).any()):
        raise ValueError(
            f"the indices of {name!r} do not ascend in every group: places come twice or too early"
        )


def compress(w: Tensor, n: int, m: int, dim: int) -> tuple[Tensor, Tensor]:
    """Values and indices of a weight that is N:M, as :func:`save_sparse` stores them."""
    w = w.detach()
    mask = nm_mask(w, n, m, dim).movedim(dim, -1)
    moved = w.movedim(dim, -1)
    values = moved[mask].view(moved.shape[:-1].numel(), moved.shape[-1] // m * n)
    places = mask.reshape(-1, m).nonzero()[:, 1].to(torch.uint8)
    if m != 4:
        return values, places.view(values.shape)
    places = torch.nn.functional.pad(places, (0, -len(places) % 4)).view(-1, 4)
    return values, places[:, 0] | places[:, 1] << 2 | places[:, 2] << 4 | places[:, 3] << 6


def _places(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """The place of every value in its group, ``[groups, n]``."""
    if m == 4:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=indices.device)
        indices = (indices.unsqueeze(1) >> shifts & 3).flatten()[: values.numel()]
    return indices.reshape(-1, n)


def expand(values: Tensor, indices: Tensor, n: int, m: int, shape: list[int], dim: int) -> Tensor:
    """The dense weight of :func:`compress`."""
    size = torch.Size(shape)
    dense = torch.zeros(size.numel() // m, m, dtype=values.dtype, device=values.device)
    dense.scatter_(1, _places(values, indices, n, m).long(), values.reshape(-1, n))
    moved = [*size[:dim], *size[dim + 1 :], size[dim]]
    return dense.view(moved).movedim(-1, dim).contiguous()


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's state with each tensor once, and the further names of tensors."""
    own: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} in the model's state is no tensor but {type(tensor).__name__}; files hold tensors"
            )
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        known = first.setdefault(place, name) if tensor.numel() else name
        if known != name:
            tied[name] = known
        else:
            own[name] = tensor
    # What overlaps without being the same is stored for itself.
    storages = [tensor.untyped_storage().data_ptr() for tensor in own.values()]
    return {
        name: tensor.clone() if storages.count(place) > 1 else tensor
        for (name, tensor), place in zip(own.items(), storages, strict=True)
    }, tied
