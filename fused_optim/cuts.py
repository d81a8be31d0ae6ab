"""Which matrices a parameter holds, for optimizers that treat them as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor

from .kernels.layout import memory_order
from .kernels.spec import Per
from .storage import is_dtensor

Split: TypeAlias = "Mapping[str, int | Sequence[int]]"
"""From name patterns to how many equal matrices lie below each other, or to the rows of each."""

ApplyTo: TypeAlias = "str | Sequence[str] | Callable[[str, Tensor], bool]"
"""``"matrices"``, ``"all"``, name patterns, or a predicate of name and parameter."""

WORKSPACE_BYTES = 256 << 20

KINDS = ("matrices", "all")

NOT_HIDDEN = (
    *("*embed*", "*wte*", "*wpe*", "shared.*", "*_token", "*lm_head*", "head.*", "*.head.*"),
    *("output.*", "classifier.*", "*.classifier.*", "score.*", "*.score.*"),
)
"""Names of matrices that are looked up or give the model's output: AdamW or Lion suit them better."""

_WRAPPERS = ("module.", "_orig_mod.", "model.")


def applies(apply_to: ApplyTo, name: str, param: Tensor) -> bool:
    """Whether an option is meant for a parameter."""
    if callable(apply_to):
        return bool(apply_to(name, param))
    kinds = {"matrices": param.ndim >= 2, "all": param.ndim >= 1}
    patterns = [apply_to] if isinstance(apply_to, str) else apply_to
    return any(
        kinds.get(pattern, False) or (param.ndim >= 1 and fnmatchcase(name, pattern)) for pattern in patterns
    )


def check_named(option: str, patterns: Sequence[str], name: str, own_name: str) -> None:
    """Refuses name patterns of an option for a parameter that came without a name: they would do nothing.

    Raises:
        ValueError: there are patterns and no name.
    """
    if patterns and not own_name:
        raise ValueError(
            f"{option} has the name patterns {list(patterns)}, but {name} came without a name; "
            "give the optimizer model.named_parameters()"
        )


def check_names_of(apply_to: ApplyTo, name: str, own_name: str) -> None:
    """Refuses an option ``apply_to`` that asks for the name of a parameter without one.

    Raises:
        ValueError: there are name patterns and no name.
    """
    given = [] if callable(apply_to) else [apply_to] if isinstance(apply_to, str) else apply_to
    check_named("apply_to", [each for each in given if each not in KINDS], name, own_name)


def is_hidden_matrix(name: str, param: Tensor) -> bool:
    """Whether a parameter holds matrices, a stack of them or a convolution in the middle of a model."""
    # Of wrapped models, which add their own beginnings: of torch.compile and DDP, say.
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return param.ndim >= 2 and not any(fnmatchcase(name, pattern) for pattern in NOT_HIDDEN)


def check_apply_to(apply_to: Any) -> None:
    """Checks an option ``apply_to``.

    Raises:
        TypeError: not names, patterns or a function.
    """
    patterns = apply_to if isinstance(apply_to, list | tuple) else [apply_to]
    if not callable(apply_to) and not (patterns and all(isinstance(pattern, str) for pattern in patterns)):
        raise TypeError(
            "apply_to must be 'matrices', 'all', name patterns or a function of name and parameter, "
            f"got {apply_to!r}"
        )


@dataclass(frozen=True)
class WholeMatrices:
    """What every cut needs: where the matrices are, and how many may be worked on at a time.

    A vector is a matrix of one row, a tensor of three dimensions a stack of matrices (experts), one of
    four or five a convolution's weight, whose matrix is ``[outputs, everything else]``.
    """

    rows: tuple[int, ...] = ()
    workspace_bytes: int = WORKSPACE_BYTES

    def bytes_per_element(self, param: Tensor) -> float:
        """The update itself, copies in the iterations, and the parameter where it is read."""
        return 32 if self.reads_params() else 20

    @property
    def shared(self) -> tuple[tuple[str, Per], ...]:
        """States of whole rows or matrices."""
        return ()

    def reads_gradients(self) -> bool:
        """Not unless a subclass says so."""
        return False

    def reads_params(self) -> bool:
        """Not unless a subclass says so."""
        return False

    def gradient(self, g: Tensor, scalars: Sequence[Any]) -> Tensor:
        """The gradients themselves."""
        return g

    def matrices(self, batch: Tensor) -> Sequence[Tensor]:
        """``[parameters, *shape]`` as views ``[parameters, ..., m, n]`` of the matrices in it."""
        if batch.ndim == 2:
            return [batch.unsqueeze(1)]
        if batch.ndim > 4:
            order = [dim for dim in memory_order(batch) if dim > 1]
            matrix = batch.permute(0, 1, *order).flatten(2)
            assert matrix.data_ptr() == batch.data_ptr()
            return [matrix]
        return batch.split(list(self.rows), dim=-2) if self.rows else [batch]


def check_matrices(name: str, param: Tensor, rows: Sequence[int]) -> None:
    """Refuses parameters that hold no matrices.

    Raises:
        ValueError: scalars, complex or float64 parameters, shards of shards, convolutions whose outputs are
            not outermost in memory, rows that do not add up.
    """
    if is_dtensor(param):
        placements: Any = param.placements  # pyright: ignore[reportAttributeAccessIssue]
        if not all(each.is_replicate() or type(each).__name__ == "Shard" for each in placements):
            raise ValueError(
                f"{name} is a DTensor with placements {list(placements)}; matrices are put together "
                "from Shard and Replicate: leave it out of the spectral option, or shard it in one way only"
            )
    if param.ndim == 0:
        raise ValueError(
            f"{name} is a scalar, shape (); matrices and vectors have singular values: leave it out of the "
            "spectral option (apply_to='matrices' does)"
        )
    if param.is_complex() or param.dtype.itemsize == 8:
        raise ValueError(
            f"{name} has dtype {param.dtype}; whole matrices are computed in float32 and below: convert it, "
            "or leave it to an optimizer (or a group without spectral=) that works element by element"
        )
    if param.ndim > 3 and max(param.stride()) != param.stride(0):
        raise ValueError(
            f"{name} has strides {param.stride()}: for a matrix [first dimension, all others] the first must "
            "be outermost in memory; use .contiguous() or channels_last"
        )
    if rows and (param.ndim not in (2, 3) or sum(rows) != param.shape[-2]):
        raise ValueError(
            f"split={list(rows)} does not fit {name} of shape {tuple(param.shape)}; "
            "the parts must add up to the rows of a matrix, or of every matrix of a stack"
        )


def rows_of_parts(name: str, own_name: str, param: Tensor, split: Split) -> tuple[int, ...]:
    """The rows of each matrix in a parameter, by the first pattern that its name matches."""
    check_named("split", list(split), name, own_name)
    for pattern, parts in split.items():
        if fnmatchcase(own_name, pattern):
            if isinstance(parts, int):
                if param.ndim not in (2, 3) or param.shape[-2] % parts:
                    raise ValueError(
                        f"split={{{pattern!r}: {parts}}} does not fit {name} of shape {tuple(param.shape)}; "
                        "give the rows of each part"
                    )
                return (param.shape[-2] // parts,) * parts
            return tuple(parts)
    return ()


def check_shared(split: Any, workspace_bytes: Any) -> None:
    """Checks options that all cuts share.

    Raises:
        TypeError: not a mapping from patterns to numbers, not an integer.
        ValueError: parts without rows, no room at all.
    """
    if not isinstance(split, Mapping):
        raise TypeError(f"split must map name patterns to numbers of parts or to their rows, got {split!r}")
    for pattern, parts in split.items():
        numbers = parts if isinstance(parts, list | tuple) else [parts]
        if not isinstance(pattern, str) or any(
            isinstance(n, bool) or not isinstance(n, int) for n in numbers
        ):
            raise TypeError(f"split must map name patterns to integers, got {{{pattern!r}: {parts!r}}}")
        if not numbers or min(numbers) < 1:
            raise ValueError(f"split={{{pattern!r}: {parts!r}}}: a part has at least one row")
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes must be an integer, got {workspace_bytes!r}")
    if workspace_bytes < 1:
        raise ValueError(
            f"workspace_bytes={workspace_bytes} leaves no room; the default is {WORKSPACE_BYTES}"
        )
