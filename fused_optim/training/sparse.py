"""The recipes of ``pretrain --sparsity``, fitted to the length of a run, and what they leave behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..optimizer import FusedOptimizer
from ..recipe import Sparsity, Transposable
from ..sparsity import (
    CAST,
    SRSTE,
    MaskDecay,
    MaskedDecay,
    OneShot,
    StructureDecay,
    check_mask,
    listing,
    save_sparse,
)
from ..sparsity.state import NOT_MEANT
from .data import UsageError


@dataclass(frozen=True)
class Recipe:
    """How a recipe follows from a run's options.

    ``dense_share`` is the part of the steps before anything is pruned, ``decay`` the pull on pruned weights,
    where a recipe has one; ``lr_factor`` multiplies the learning rate of masked matrices.
    """

    build: Callable[[Any, int, int], Sparsity]
    dense_share: float | None = None
    decay: float | None = None
    lr_factor: float = 1.0


def _one_shot(config: Any, n: int, m: int) -> Sparsity:
    return OneShot(n=n, m=m, at=config.dense_steps)


def _sr_ste(config: Any, n: int, m: int) -> Sparsity:
    return SRSTE(n=n, m=m, decay=config.pruned_decay, dense_steps=config.dense_steps)


def _mask_decay(config: Any, n: int, m: int) -> Sparsity:
    end = max(1, config.steps * 3 // 4)
    if config.dense_steps >= end:
        raise UsageError(f"--dense-steps {config.dense_steps} must be below {end}, where the decay ends")
    return MaskDecay(n=n, m=m, dense_steps=config.dense_steps, decay_steps=end - config.dense_steps)


def _structure_decay(config: Any, n: int, m: int) -> Sparsity:
    return StructureDecay(n=n, m=m, dense_steps=config.dense_steps, total_steps=config.steps * 3 // 4)


def _masked_decay(config: Any, n: int, m: int) -> Sparsity:
    return MaskedDecay(n=n, m=m, total_steps=config.steps, decay=config.pruned_decay)


def _cast(config: Any, n: int, m: int) -> Sparsity:
    # Not all of the remaining steps: what is kept learns without the others while the learning rate falls.
    return CAST(n=n, m=m, total_steps=max(1, (config.steps - config.dense_steps) // 2))


RECIPES = {
    "one-shot": Recipe(_one_shot, dense_share=0.5),
    "sr-ste": Recipe(_sr_ste, dense_share=0.5, decay=2e-3),
    "mask-decay": Recipe(_mask_decay, dense_share=0.4),
    "structure-decay": Recipe(_structure_decay, dense_share=0.0),
    "masked-decay": Recipe(_masked_decay, decay=1e-4),
    "cast": Recipe(_cast, dense_share=0.4, decay=1e-3, lr_factor=0.4),
}
"""AdamS of CAST normalises by the momentum and not by the gradient: its steps are up to 4 times as long."""


def retraining_step(config: Any) -> int:
    """Steps after which an optimizer of its own takes the dense model over: CAST starts from trained ones."""
    return config.dense_steps if config.sparsity == "cast" else 0


def parse_pattern(text: str) -> tuple[int, int]:
    """``"2:4"`` as two numbers.

    Raises:
        UsageError: something else.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise UsageError(f"--pattern {text} is not N:M, such as 2:4: N weights are kept of M neighbours")
    return int(found[1]), int(found[2])


def build_recipe(config: Any) -> Sparsity | None:
    """The recipe of a run, None for dense ones.

    Raises:
        UsageError: a pattern or a step count that the recipe refuses.
    """
    if config.sparsity is None:
        return None
    try:
        return RECIPES[config.sparsity].build(config, *parse_pattern(config.pattern))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--sparsity {config.sparsity} --pattern {config.pattern}: {error}") from error


def lr_factor(config: Any) -> float:
    """What the learning rate of masked matrices is multiplied by beside that of the others."""
    return 1.0 if config.sparsity is None else RECIPES[config.sparsity].lr_factor


def separate(groups: list[dict[str, Any]], recipe: Sparsity, others_lr: float) -> list[dict[str, Any]]:
    """Parameters with masks in groups of their own, the first ones; all others learn at ``others_lr``."""
    masked, others = [], []
    for group in groups:
        means = [recipe.means(name, p) and recipe.unfit(p) is None for name, p in group["params"]]
        for found, wanted, lr in ((masked, True, {}), (others, False, {"lr": others_lr})):
            params = [item for item, mean in zip(group["params"], means, strict=True) if mean is wanted]
            found += [{**group, **lr, "params": params}] if params else []
    return masked + others


def check_masked(optimizer: FusedOptimizer, config: Any) -> None:
    """Refuses a run in which nothing would be sparse.

    Raises:
        UsageError: no matrix fits the pattern.
    """
    places = listing(optimizer)
    if not any(place.pattern != "dense" for place in places):
        reason = next(place.reason for place in places if place.reason != NOT_MEANT)
        raise UsageError(
            f"--pattern {config.pattern} fits no matrix: {reason}; give another pattern or width"
        )


def keeps_pattern(config: Any, before: float, now: float) -> bool:
    """Whether as many weights of a group had a place in the mask all the time, and not all of them."""
    recipe = build_recipe(config)
    return recipe is not None and recipe.kept(before) == recipe.kept(now) < recipe.largest_group


def outcome(optimizer: FusedOptimizer, model: nn.Module, config: Any) -> dict[str, Any]:
    """What is left of every masked matrix of a trained model, counted in the model itself.

    ``density`` is the share of masked matrices' weights that are not zero, ``share`` their share of all
    weights, ``wrong`` names those that have groups with too many; recipes that end dense have no ``wrong``.
    """
    recipe = build_recipe(config)
    assert recipe is not None
    weights = dict(model.named_parameters())
    masked = [place.name for place in listing(optimizer) if place.pattern != "dense"]
    numel = sum(weights[name].numel() for name in masked)
    dense = recipe.kept(config.steps) >= recipe.m
    dims = (-1, -2) if isinstance(recipe, Transposable) and recipe.transposable else (-1,)
    fits = {name: all(check_mask(weights[name], recipe.n, recipe.m, dim) for dim in dims) for name in masked}
    return {
        "recipe": config.sparsity,
        "pattern": config.pattern,
        "ends_dense": dense,
        "matrices": len(masked),
        "share": numel / sum(p.numel() for p in weights.values()),
        "density": sum(int(weights[name].count_nonzero()) for name in masked) / numel,
        "wrong": [name for name in masked if not fits[name] and not dense],
    }


def export(model: nn.Module, found: dict[str, Any], path: Path) -> None:
    """Writes a model that is N:M without its zeros, and notes in its outcome how large the file is."""
    if found and not found["ends_dense"] and not found["wrong"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_sparse(model, path, *parse_pattern(found["pattern"]))
        dense = sum(tensor.nbytes for tensor in model.state_dict().values())
        found |= {"file": str(path), "file_bytes": path.stat().st_size, "dense_bytes": dense}


def sentence(found: dict[str, Any]) -> str:
    """The outcome for the terminal."""
    of = f"{found['matrices']} matrices with {100 * found['share']:.1f} % of the weights"
    if found["ends_dense"]:
        return f"{found['recipe']} ends dense: {of} are {100 * found['density']:.1f} % full"
    if found["wrong"]:
        return f"NOT {found['pattern']}: {', '.join(found['wrong'])}"
    left = f"{found['pattern']} in {of}, checked group by group; {100 * found['density']:.2f} % of them left"
    return f"{left}\n{found['file']}  {found['file_bytes'] / found['dense_bytes']:.3f} of the model's bytes"
