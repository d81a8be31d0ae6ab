"""Where the memory of training goes, counted from shapes alone and exact to the byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from ..kernels.rules import RULES
from ..precision import SMALL, KeepFp32, check_keep_fp32
from ..recipe import Sparsity
from ..recipes import CAST
from ..sparsity.state import NOT_MEANT, why_dense
from .counter import Counter, count_peer, parameters_of
from .model import DTYPES
from .peers import PEERS
from .plan_rules import NAMES, find_rule
from .storages import SHARDS, Memory, Storage

Shapes: TypeAlias = "Mapping[str, Sequence[int]]"

CARDS = (24, 48, 80, 141)
"""Memory of common GPUs in GB of 10**9 bytes."""

DEFAULT_RULES = ("adam", "lion")
DEFAULT_STORAGES = (
    "fp32",
    "split16",
    "bf16",
    "fp32+int8",
    "kahan+int8",
    "split16+int8",
    "split8+int8",
    "split8+int8_companded",
    "split8+int4",
    "bf16+int8",
    "sr+int4",
)


@dataclass(frozen=True)
class Entry:
    """One way to train the model.

    Attributes:
        rule: the rule or the class, or None for another library.
        storage: the storage, or the other library's optimizer.
        memory: of the whole model.
        on_each: of one GPU.
    """

    rule: str | None
    storage: str
    memory: Memory
    on_each: Memory

    @property
    def fits(self) -> tuple[int, ...]:
        """The cards of ``CARDS`` that hold one GPU's share."""
        return tuple(card for card in CARDS if self.on_each.total <= card * 10**9)


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found; ``str()`` gives the table.

    Attributes:
        model: what was planned for.
        parameters: values in the model's parameters.
        tensors: how many parameters those are.
        gpus: among how many GPUs.
        shard: what they share.
        entries: every rule with every storage, then other libraries.
        notes: what the numbers leave out.

    Example:
        >>> from fused_optim.training import plan
        >>> found = plan({"weight": (4096, 4096), "bias": (4096,)}, rules=["lion"], storages=["fp32"])
        >>> found.tensors, found.parameters
        (2, 16781312)
        >>> [entry.storage for entry in found.entries if entry.rule]
        ['fp32']
    """

    model: str
    parameters: int
    tensors: int
    gpus: int
    shard: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        from .plan_report import table

        return table(self)


def plan(
    model: nn.Module | Shapes,
    *,
    rules: str | Sequence[str] = DEFAULT_RULES,
    storages: str | Storage | Sequence[str | Storage] = DEFAULT_STORAGES,
    grad_dtype: str | None = None,
    gpus: int = 1,
    shard: str = "none",
    keep_fp32: KeepFp32 = SMALL,
    sparsity: Sparsity | None = None,
    peers: bool = True,
    name: str | None = None,
) -> Plan:
    """The memory that training a model takes, under every rule and storage.

    Nothing is allocated: a module on the ``meta`` device will do. State bytes are those of every
    tensor in ``optimizer.state`` after the first step, but for step counts and orders of dimensions (a few
    bytes on the CPU for each parameter).

    Args:
        model: a module, whose parameters count as they are (frozen ones have neither gradients nor
            states), or the shapes of its parameters by name, then in fp32 under storage ``auto``.
        rules: one or more names of rules and classes (``python -m fused_optim list``). ``muon``, ``normuon``
            and ``muonh`` have ``others="adamw"`` for whatever is no hidden matrix by its name and shape.
        storages: one or more, as :meth:`Storage.parse` takes them, or ``Storage`` objects.
        grad_dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``; None for each parameter's own dtype.
        gpus: GPUs that train together.
        shard: what they share, see :meth:`Memory.on_each`.
        keep_fp32: which states stay in fp32, as in the optimizer.
        sparsity: a recipe, as in the optimizer; parameters go by the names that they have here.
        peers: whether other libraries' AdamW is listed, too.
        name: of the model in the table.

    Raises:
        ValueError: a name that does not exist, a storage that does not fit a parameter, no parameters, a
            recipe that masks none of them or goes with other rules.
        TypeError: a model that is neither a module nor shapes, or parameters that cannot be updated.

    Example:
        >>> from fused_optim.training import plan
        >>> found = plan({"weight": (4096, 4096)}, rules=["adam"], storages=["split8+int8"], peers=False)
        >>> found.entries[0].memory.kept / found.parameters
        5.03125
    """
    rules = (rules,) if isinstance(rules, str) else rules
    storages = (storages,) if isinstance(storages, str | Storage) else storages
    _check(rules, grad_dtype, gpus, shard, keep_fp32, sparsity)
    wanted = [Storage.parse(item) if isinstance(item, str) else item for item in storages]
    if not rules or not wanted:
        raise ValueError("there is nothing to plan; give at least one rule and one storage")
    params = parameters_of(model)
    numels = [param.numel() for param in params.values()]
    if not sum(numels):
        raise ValueError("the model has no parameters; pass one that has, or the shapes of its parameters")
    counter = Counter(params, grad_dtype, keep_fp32, sparsity)
    found = [(rule, item.name, counter.count(rule, item)) for rule in rules for item in wanted]
    theirs = [(None, key, count_peer(params, peer)) for key, peer in PEERS.items()] if peers else []
    entries = [
        Entry(rule, item, memory, memory.on_each(gpus, shard)) for rule, item, memory in [*found, *theirs]
    ]
    label = name or (type(model).__name__ if isinstance(model, nn.Module) else "shapes")
    notes = [*_notes_on_masks(counter, sum(numels), peers), *_notes(wanted, peers)]
    return Plan(label, sum(numels), len(numels), gpus, shard, tuple(entries), tuple(notes))


def _check(
    rules: Sequence[str], grad_dtype: str | None, gpus: int, shard: str, keep_fp32: Any, sparsity: Any
) -> None:
    for given in rules:
        if given not in NAMES:
            raise ValueError(f"rule {given!r} is unknown; allowed: {', '.join(NAMES)}")
    if grad_dtype is not None and grad_dtype not in DTYPES:
        raise ValueError(f"grad_dtype={grad_dtype!r} is unknown; allowed: None, {', '.join(DTYPES)}")
    if isinstance(gpus, bool) or not isinstance(gpus, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"gpus must be an integer, got {gpus!r}")
    if gpus < 1:
        raise ValueError(f"gpus={gpus}: at least one GPU is needed")
    if shard not in SHARDS:
        raise ValueError(f"shard={shard!r} is unknown; allowed: {', '.join(SHARDS)}")
    check_keep_fp32(keep_fp32)
    if not isinstance(sparsity, Sparsity | None):
        raise TypeError(f"sparsity must be a recipe of fused_optim.sparsity or None, got {sparsity!r}")
    if isinstance(sparsity, CAST) and any(find_rule(given) != RULES["adam"] for given in rules):
        raise ValueError("CAST is for CASTAdamS, which keeps what 'adam' keeps; give that rule alone")


def _notes_on_masks(counter: Counter, parameters: int, peers: bool) -> list[str]:
    recipe = counter.sparsity
    if recipe is None:
        return []
    masked = counter.masked()
    if not masked:
        reasons = {name: why_dense(recipe, name, param) for name, param in counter.params.items()}
        found = [f"{name}: {why or 'it is frozen'}" for name, why in reasons.items() if why != NOT_MEANT]
        raise ValueError(
            f"{type(recipe).__name__} {recipe.n}:{recipe.m} masks no parameter: "
            f"{found[0] if found else 'none is meant by apply_to'}; give another pattern or apply_to"
        )
    share = sum(param.numel() for param in masked) / parameters
    dense = ", the dense weights behind them under master" if recipe.keeps_dense else ""
    notes = [f"Masked: {len(masked)} tensors, {share:.1%} of the parameters; masks are under states{dense}."]
    return [*notes, "Other libraries train dense weights."] if peers else notes


def _notes(storages: Sequence[Storage], peers: bool) -> list[str]:
    notes = [
        "Activations, buffers of communication and what the allocator wastes are not included.",
        "GB and the cards' memory are 10^9 bytes.",
    ]
    if peers:
        notes.append("bitsandbytes and torchao update bf16 weights in place, without a master copy.")
    if any(storage.param_codec == "bf16" for storage in storages):
        notes.append(
            "Plain bf16 weights lose updates smaller than their last bit; sr, kahan and split keep them."
        )
    return notes
