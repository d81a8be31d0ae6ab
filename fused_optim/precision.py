"""Which parameters keep their states in fp32 although a codec of 8 or 4 bits was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Any, TypeAlias
from weakref import ref

from torch import Tensor, nn

KeepFp32: TypeAlias = "int | str | Sequence[int | str] | Callable[[str, Tensor], bool]"
"""A size, a name pattern, several of these, or a predicate of name and parameter."""

SMALL = 4096
"""Parameters with fewer elements save next to nothing; bitsandbytes and torchao draw the same line."""

_MARK = "_fused_optim_keep_fp32"


class Marked:
    """Parameters with a mark, which their copies get as well: ``copy.deepcopy`` of a parameter loses it.

    An object that owns parameters keeps one of these, and is copied with it. It keeps none of them alive:
    ``fully_shard`` replaces parameters, and their memory must go.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params: list[ref[Tensor]] = []
        for param in params:
            setattr(param, _MARK, True)
            self._params.append(ref(param))

    def _alive(self) -> list[Tensor]:
        return [param for param in (get() for get in self._params) if param is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> Marked:
        return Marked([deepcopy(param, memo) for param in self._alive()])

    def __reduce__(self) -> tuple[Any, ...]:
        return Marked, (self._alive(),)


def marks_of(params: Iterable[Tensor]) -> Marked:
    """The marks of those that have one, for a copy of what holds them."""
    return Marked(param for param in params if getattr(param, _MARK, False))


def keep_fp32(module: nn.Module) -> nn.Module:
    """Marks all parameters of a module: their states stay in fp32 whatever codec of 8 or 4 bits is chosen.

    Copies of the module have the marks too. ``fully_shard`` makes new parameters: mark the module after it.

    Args:
        module: for instance an embedding, whose rarely used rows share blocks with frequent ones.

    Returns:
        The module itself.

    Example:
        >>> from torch import nn
        >>> embedding = keep_fp32(nn.Embedding(1000, 64))
    """
    # Each part has its own, because it may be copied alone.
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if own:
            setattr(part, _MARK, Marked(own))
    return module


def check_keep_fp32(value: Any) -> None:
    """Checks the option ``keep_fp32``.

    Raises:
        TypeError: it is not a size, a pattern, a sequence of these or a function.
        ValueError: a negative size.
    """
    if callable(value):
        return
    for item in _items(value):
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise TypeError(
                "keep_fp32 must be a number of elements, a name pattern such as '*embed*', a sequence of "
                f"these, or a function of name and parameter; got {value!r}"
            )
        if isinstance(item, int) and item < 0:
            raise ValueError(f"keep_fp32={value!r}: a number of elements cannot be negative")


def keeps_full_precision(name: str, param: Tensor, rule: Any) -> bool:
    """Whether a parameter's states stay in fp32: marked, smaller than a size, or named by the rule."""
    if getattr(param, _MARK, False):
        return True
    if callable(rule):
        return bool(rule(name, param))
    return any(
        param.numel() < item if isinstance(item, int) else fnmatchcase(name, item) for item in _items(rule)
    )


def patterns_of(rule: Any) -> list[str]:
    """The name patterns of an option ``keep_fp32``, which need names."""
    return [item for item in _items(rule) if isinstance(item, str)]


def _items(rule: Any) -> Sequence[Any]:
    return rule if isinstance(rule, list | tuple) else (rule,)
