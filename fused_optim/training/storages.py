"""How parameters and states are kept, and the bytes that all of them take."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from ..kernels.codecs import PARAM_CODECS, STATE_CODECS

SHARDS = ("none", "states", "all")
PARTS = ("weights", "master", "gradients", "states")

_SHORT = {name.removeprefix("bf16_"): name for name in PARAM_CODECS if name.startswith("bf16_")}


@dataclass(frozen=True)
class Storage:
    """How parameters and states are kept: the options ``param_codec`` and ``state_codec`` of an optimizer.

    Attributes:
        name: in tables.
        param_codec: the parameters are converted to its dtype first; ``"auto"`` leaves them as they are.
        state_codec: one codec, or one for each state by name.

    Example:
        >>> from fused_optim.training import Storage, plan
        >>> mixed = Storage("mixed", "bf16_kahan", {"exp_avg": "int8", "exp_avg_sq": "fp32"})
        >>> found = plan({"weight": (4096, 4096)}, rules=["adam"], storages=[mixed], peers=False)
        >>> found.entries[0].memory.kept / found.parameters
        9.015625
    """

    name: str
    param_codec: str = "auto"
    state_codec: str | Mapping[str, str] = "auto"

    def __post_init__(self) -> None:
        """Checks the names.

        Raises:
            ValueError: a codec that does not exist.
        """
        states = self.state_codec.values() if isinstance(self.state_codec, Mapping) else (self.state_codec,)
        check_codecs(self.name, self.param_codec, states)

    @classmethod
    def parse(cls, text: str) -> Storage:
        """The storage that ``PARAM`` or ``PARAM+STATES`` names.

        Args:
            text: a codec of the parameters (``split8``, ``kahan``, ``sr`` … are short for
                ``bf16_split8`` …) and, after a plus, one of the states (default: ``auto``, fp32).

        Raises:
            ValueError: a codec that does not exist.

        Example:
            >>> from fused_optim.training import Storage
            >>> Storage.parse("split8+int8")
            Storage(name='split8+int8', param_codec='bf16_split8', state_codec='int8')
        """
        return cls(text, *split(text))


def split(text: str) -> tuple[str, str]:
    """The codecs of parameters and states that a text names, which need not exist."""
    param, _, states = text.partition("+")
    return _SHORT.get(param, param), _SHORT.get(states, states) or "auto"


def check_codecs(storage: str, param: str, states: Iterable[str], without: Collection[str] = ()) -> None:
    """Refuses codecs that do not exist, and those that are left out."""
    for kind, names, codecs in (("parameters", (param,), PARAM_CODECS), ("states", states, STATE_CODECS)):
        known = ["auto", *(name for name in codecs if name not in without)]
        for name in names:
            if name not in known:
                raise ValueError(
                    f"storage {storage!r}: {kind} cannot be stored as {name!r}; allowed: {', '.join(known)}"
                )


@dataclass(frozen=True)
class Memory:
    """Bytes of training, without activations.

    Attributes:
        weights: the model's parameters.
        master: what the optimizer keeps beside them: more bits, and dense weights behind masked ones.
        gradients: one for each parameter that is trained.
        states: moments, with their scales, and masks.

    Example:
        >>> from fused_optim.training import Memory
        >>> memory = Memory(weights=200, master=100, gradients=200, states=800)
        >>> memory.kept, memory.total
        (1100, 1300)
    """

    weights: int
    master: int
    gradients: int
    states: int

    @property
    def total(self) -> int:
        """All four together."""
        return self.kept + self.gradients

    @property
    def kept(self) -> int:
        """What stays between two steps: weights, master and states."""
        return self.weights + self.master + self.states

    def on_each(self, gpus: int, shard: str) -> Memory:
        """The share of one GPU, rounded up.

        Args:
            gpus: how many share.
            shard: ``"none"`` copies everything, ``"states"`` splits states and master weights (ZeRO-1),
                ``"all"`` splits everything (FSDP).

        Example:
            >>> from fused_optim.training import Memory
            >>> Memory(weights=200, master=100, gradients=200, states=201).on_each(2, "states")
            Memory(weights=200, master=50, gradients=200, states=101)
        """
        shared = {"none": (), "states": ("master", "states"), "all": PARTS}[shard]
        return replace(self, **{part: -(-getattr(self, part) // gpus) for part in shared})
