"""What ``plan`` knows by name: the catalogue's rules, and classes that follow several or keep more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ..kernels.rules import RULES
from ..kernels.spec import Rule
from ..muon import Muon
from ..muon_family import AdamH, MuonH, NorMuon
from ..optimizer import FusedOptimizer
from ..recipe import Sparsity

_ALIASES = {"adamw": "adam", "adamw_amsgrad": "adam_amsgrad"}

_CLASSES: Mapping[str, Callable[..., FusedOptimizer]] = {
    "muon": partial(Muon, others="adamw"),
    "normuon": partial(NorMuon, others="adamw"),
    "muonh": partial(MuonH, others="adamw"),
    "adamh": AdamH,
}

CLASSES = tuple(_CLASSES)
NAMES = (*RULES, *_ALIASES, *CLASSES)
"""What may be planned. Muon and its relatives leave embeddings, heads and vectors to AdamW."""

RuleOf: TypeAlias = "Callable[[str], Rule]"
"""From a parameter's name to its rule, with the states of its matrices and masks."""


def find_rule(name: str) -> Rule | None:
    """The rule of this name, or of a class's in lower case; None for classes with several."""
    return RULES.get(_ALIASES.get(name, name))


def rules_of_class(name: str, params: Iterable[tuple[str, Tensor]], sparsity: Sparsity | None) -> RuleOf:
    """The rules of named parameters, as the class itself finds them.

    Raises:
        ValueError: a parameter that the class cannot update.
    """
    # A group, because torch refuses an empty list, which a model without trained parameters gives.
    optimizer = _CLASSES[name]([{"params": list(params)}], sparsity=sparsity, backend="reference")
    found = {
        optimizer._parameter_name(group, position): optimizer._key(group, position, param).rule
        for group, position, param in optimizer._parameters()
    }
    return found.__getitem__


def states_of(name: str) -> str:
    """The states of a rule or a class, for tables: of matrices, then of all others where they differ."""
    rule = find_rule(name)
    if rule is not None:
        return _states(rule)
    params = {"matrix": torch.empty(1, 1, device="meta"), "vector": torch.empty(1, device="meta")}
    rules = rules_of_class(name, params.items(), None)
    matrix, vector = _states(rules("matrix")), _states(rules("vector"))
    return matrix if matrix == vector else f"{matrix}; others: {vector}"


def _states(rule: Rule) -> str:
    names = [slot.name for slot in rule.slots] + [key for key, _ in rule.shared]
    return ", ".join(names) or "no states"
