"""Which parameters keep their states in fp32 although a codec of 8 or 4 bits was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.jit import ScriptModule

KeepFp32: TypeAlias = "int | str | Sequence[int | str] | Callable[[str, Tensor], bool]"
"""A size, a name pattern, several of these, or a predicate of name and parameter."""

SMALL = 4096
"""Parameters with fewer elements save next to nothing; bitsandbytes and torchao draw the same line."""

_MARK = "_fused_optim_keep_fp32"


class Marked:
    """Parameters with a mark, which their copies get as well: ``copy.deepcopy`` of a parameter loses it.

    Whoever owns parameters keeps one of these, and is copied with it. It holds a module's own dict of them:
    what is replaced there leaves memory, and ``torch.utils.swap_tensors`` meets no weak reference.
    """

    def __init__(
        self, params: Mapping[Any, Tensor | None], names: Iterable[Any], now: Iterable[Any] | None = None
    ) -> None:
        self._params, self._names = params, list(names)
        self._mark(self._names if now is None else now)

    def renew(self) -> None:
        """Marks what stands under these names by now."""
        self._mark(self._names)

    def _mark(self, names: Iterable[Any]) -> None:
        for param in map(self._find, names):
            if param is not None:
                setattr(param, _MARK, True)

    def _find(self, name: Any) -> Tensor | None:
        # That of a scripted module is no dict and has no get.
        return dict(self._params.items()).get(name)

    def __reduce__(self) -> tuple[Any, ...]:
        # For pickle and deepcopy. What took a marked one's place has no mark; neither has its copy.
        now = [name for name in self._names if getattr(self._find(name), _MARK, False)]
        return Marked, (self._params, self._names, now)


def marks_of(params: Iterable[Tensor]) -> Marked:
    """The marks of those that have one, for a copy of what holds them; it holds them too, and must go."""
    marked = dict(enumerate(param for param in params if getattr(param, _MARK, False)))
    return Marked(marked, marked)


def keep_fp32(module: nn.Module) -> nn.Module:
    """Marks all parameters of a module: their states stay in fp32 whatever codec of 8 or 4 bits is chosen.

    Mark a module last, right before the optimizer is made: ``fully_shard``, ``to_empty`` of a meta or sharded
    module and an assignment make new parameters, which have no mark. Copies of the module have the marks,
    and so have the parameters that its ``load_state_dict`` puts in, also with ``assign=True``.

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
        names = [name for name, _ in part.named_parameters(recurse=False)]
        # Scripted modules have no hooks.
        if names and _MARK not in vars(part) and not isinstance(part, ScriptModule):
            part.register_load_state_dict_post_hook(_after_loading)
        if names:
            setattr(part, _MARK, Marked(part._parameters, names))
    return module


def _after_loading(module: nn.Module, _incompatible: Any) -> None:
    """Torch's hook; a function with a name, because modules are pickled with it."""
    getattr(module, _MARK).renew()


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
