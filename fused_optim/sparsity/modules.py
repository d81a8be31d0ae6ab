"""What a layer computes with while it is made sparse: masked weights, scaled weights, a teacher's answers."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..recipe import check_pattern, input_dim
from .masks import check_groups, nm_mask

_Layer = TypeVar("_Layer", bound=nn.Module)


class _Masked(torch.autograd.Function):
    """Weights times their mask; the gradient is that of the masked weights, for all of them."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, n: int, m: int, dim: int, scale: float) -> Tensor:
        return torch.where(nm_mask(w, n, m, dim), w, w * scale if scale else 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *grads, None, None, None, None


class MagnitudeMask(nn.Module):
    """A parametrization by :func:`mask_forward`: what the magnitude mask leaves of a weight.

    ``w * (mask + (1 - mask) * scale)``, the mask found anew in each forward pass. ``scale`` may be changed at
    any time.

    Args:
        n: weights that are kept of each group.
        m: weights of a group.
        dim: the dimension along which groups lie; by default that of a layer's inputs, the second of
            convolutions and the last of everything else, as for :func:`prune` and recipes.
        scale: what remains of pruned weights, from 0 to 1.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import MagnitudeMask
        >>> MagnitudeMask(scale=0.5)(torch.tensor([4.0, -3.0, 2.0, 1.0]))
        tensor([ 4.0000, -3.0000,  1.0000,  0.5000])
    """

    def __init__(self, n: int = 2, m: int = 4, dim: int | None = None, scale: float = 0.0) -> None:
        super().__init__()
        check_pattern(n, m)
        given: Any = scale
        if isinstance(given, bool) or not isinstance(given, float | int):
            raise TypeError(f"scale must be a number, got {given!r}")
        if not 0.0 <= scale <= 1.0:
            raise ValueError(
                f"scale={scale} must be from 0 (pruned weights are zero) to 1 (they are not pruned)"
            )
        self.n, self.m, self.dim, self.scale = n, m, dim, scale

    def forward(self, w: Tensor) -> Tensor:
        """The masked weight."""
        dim = input_dim(w) if self.dim is None else self.dim
        return cast(Tensor, _Masked.apply(w, self.n, self.m, dim, self.scale))

    def right_inverse(self, w: Tensor) -> Tensor:
        """What is assigned to the layer's weight becomes the dense one."""
        return w

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"{self.n}:{self.m}, dim={self.dim}, scale={self.scale}"


def mask_forward(
    module: nn.Module,
    name: str = "weight",
    n: int = 2,
    m: int = 4,
    dim: int | None = None,
    scale: float = 0.0,
) -> MagnitudeMask:
    """Lets a module compute with the masked weight while the dense one is trained, by any optimizer.

    In the forward pass the weight is ``w * (mask + (1 - mask) * scale)`` with the magnitude mask of the ``w``
    of that moment, in the backward pass the gradient reaches all of ``w`` as it is (straight-through: neither
    masked nor scaled). ``module.<name>`` is the masked weight; the dense one stays the same parameter, under
    ``module.parametrizations.<name>.original``. Costs the mask, and a second weight, in each forward pass.

    Args:
        module: a layer.
        name: of its weight.
        n: weights that are kept of each group.
        m: weights of a group, at most 32.
        dim: the dimension along which groups lie; by default that of a layer's inputs, the second of
            convolutions and the last of everything else, as for :func:`prune` and recipes.
        scale: what remains of pruned weights; MdGf lets it fall from 1 to 0 in the course of training.

    Returns:
        The parametrization, whose ``scale`` may be changed.

    Raises:
        ValueError: no such parameter, one that is masked already, a pattern that does not fit it.
        TypeError: numbers or weights of the wrong type.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import check_mask, mask_forward, unmask_forward
        >>> layer = torch.nn.Linear(8, 2)
        >>> mask = mask_forward(layer)
        >>> check_mask(layer.weight)
        True
        >>> layer(torch.ones(8)).sum().backward()
        >>> layer.parametrizations.weight.original.grad.unique()
        tensor([1.])
        >>> _ = unmask_forward(layer)

    Source:
        Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, arXiv
        2102.04010; Bambhaniya et al., Progressive Gradient Flow, arXiv 2402.04744 (``scale``).
    """
    weight = _parameter(module, name)
    dim = input_dim(weight) if dim is None else dim
    mask = MagnitudeMask(n, m, dim, scale)
    check_groups(weight, n, m, dim)
    if any(isinstance(other, MagnitudeMask) for other in _parametrizations(module, name)):
        raise ValueError(f"{name} of {type(module).__name__} is masked already; call unmask_forward first")
    parametrize.register_parametrization(module, name, mask)
    return mask


def unmask_forward(module: _Layer, name: str = "weight", leave_parametrized: bool = True) -> _Layer:
    """Takes back :func:`mask_forward`.

    Args:
        module: the layer.
        name: of its weight.
        leave_parametrized: the parameter becomes the masked weight; otherwise it stays dense.

    Returns:
        The layer. Its parameter is the same object, in the same memory.

    Raises:
        ValueError: the weight is not masked, or has other parametrizations beside the mask.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import mask_forward, unmask_forward
        >>> layer = torch.nn.Linear(4, 1)
        >>> mask = mask_forward(layer)
        >>> int((unmask_forward(layer).weight == 0).sum())
        2
    """
    _remove(module, name, MagnitudeMask, "mask_forward", leave_parametrized)
    return module


class WeightScale(nn.Module):
    """CAST's learned scales of a weight, as a parametrization of a layer.

    ``W'[r, c] = W[r, c] * A[r, c // (C / parts)]``. ``A`` is a parameter ``[R, parts]`` beside ``W``, 1 at
    first, for the ordinary optimizer to learn; in fp32 for bf16 and fp16 weights, where steps of 2e-5 would
    be lost. 2:4 patterns are the same before and after.

    Args:
        weight: the weight ``W``, ``[R, C]``.
        parts: into how many parts a row is divided, each with its own scale.
        m: weights of a sparse group, which no part may cut.

    Raises:
        ValueError: no matrix, columns that do not divide into parts of whole groups.
        TypeError: ``parts`` or ``m`` no integer, weights of no floating dtype.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import WeightScale
        >>> layer = torch.nn.Linear(8, 3)
        >>> scale = WeightScale.attach(layer)
        >>> scale.A.shape
        torch.Size([3, 2])
        >>> [name for name, _ in WeightScale.fold(layer).named_parameters()]
        ['bias', 'weight']

    Source:
        CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training, arXiv 2509.25996.
    """

    def __init__(self, weight: Tensor, parts: int = 2, m: int = 4) -> None:
        super().__init__()
        numbers: dict[str, Any] = {"parts": parts, "m": m}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not weight.is_floating_point():
            raise TypeError(f"weights have a floating dtype, got {weight.dtype}")
        if weight.ndim != 2 or weight.shape[1] % (parts * m):
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} has no rows of {parts} parts of whole groups of {m}"
                f": its columns must be a multiple of {parts * m}; choose other parts, or leave it out"
            )
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.A = nn.Parameter(torch.ones(len(weight), parts, dtype=dtype, device=weight.device))

    def forward(self, w: Tensor) -> Tensor:
        """The scaled weight, in the dtype of the weight."""
        parts = w.unflatten(1, (self.A.shape[1], -1))
        return (parts * self.A.unsqueeze(2)).flatten(1).to(w.dtype)

    @staticmethod
    def attach(module: nn.Module, name: str = "weight", parts: int = 2, m: int = 4) -> WeightScale:
        """Scales a module's weight; ``module.<name>`` is ``W'`` from then on. Returns the parametrization.

        Raises:
            ValueError: no such parameter, one that is scaled already, parts that do not fit.
            TypeError: numbers or weights of the wrong type.
        """
        scale = WeightScale(_parameter(module, name), parts, m)
        if any(isinstance(other, WeightScale) for other in _parametrizations(module, name)):
            raise ValueError(
                f"{name} of {type(module).__name__} is scaled already; call WeightScale.fold first"
            )
        parametrize.register_parametrization(module, name, scale)
        return scale

    @staticmethod
    def fold(module: _Layer, name: str = "weight") -> _Layer:
        """Multiplies the scales into a module's weight, which stays the same parameter, and removes them.

        Raises:
            ValueError: the weight is not scaled, or has other parametrizations as well.
        """
        _remove(module, name, WeightScale, "WeightScale.attach", leave_parametrized=True)
        return module


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    eta: float = 1 / 3,
    temperature: float = 1.0,
) -> Tensor:
    """A language model's loss beside that of a teacher, such as the dense model it started from.

    ``eta * KL(teacher || student) + (1 - eta) * CE(labels, student)``, each a mean over the tokens whose
    label is not -100; in fp32. Both distributions of the divergence are ``softmax(logits / temperature)``.

    Args:
        student_logits: ``[..., tokens, vocabulary]``, already shifted against the labels.
        teacher_logits: of the same shape; no gradient flows into them.
        labels: ``[..., tokens]``, int64; -100 for tokens that do not count.
        eta: the weight of the divergence, from 0 to 1.
        temperature: flattens both distributions; there is no further factor ``temperature ** 2``.

    Returns:
        A tensor without dimensions; zero if no token counts.

    Raises:
        ValueError: shapes that do not belong together, ``eta`` or ``temperature`` out of range.

    Example:
        >>> import torch
        >>> from fused_optim.sparsity import distillation_loss
        >>> logits, labels = torch.zeros(2, 3, 10), torch.tensor([[1, 2, -100], [4, -100, -100]])
        >>> round(distillation_loss(logits, logits, labels).item(), 4)  # 2 / 3 * log(10)
        1.5351

    Source:
        CAST, arXiv 2509.25996.
    """
    shapes = [tuple(x.shape) for x in (student_logits, teacher_logits, labels)]
    if shapes[0] != shapes[1] or shapes[0][:-1] != shapes[2]:
        raise ValueError(
            f"student_logits {shapes[0]}, teacher_logits {shapes[1]} and labels {shapes[2]} do not belong "
            "together: both logits are [..., vocabulary], labels [...]"
        )
    if not 0.0 <= eta <= 1.0 or not temperature > 0.0:
        raise ValueError(f"eta={eta} must be from 0 to 1 and temperature={temperature} positive")
    counts = labels != -100
    student, answers = student_logits[counts].float(), labels[counts]
    teacher = (teacher_logits.detach()[counts].float() / temperature).log_softmax(-1)
    tempered = (student / temperature).log_softmax(-1)
    # Where the teacher is certain that a token does not come, 0 * log(0 / q) is 0.
    divergence = teacher.exp() * (teacher - tempered).masked_fill(teacher == -torch.inf, 0.0)
    entropy = nn.functional.cross_entropy(student, answers, reduction="sum")
    return (eta * divergence.sum() + (1 - eta) * entropy) / max(len(answers), 1)


def _parametrizations(module: nn.Module, name: str) -> list[nn.Module]:
    if not parametrize.is_parametrized(module, name):
        return []
    return list(cast(Any, module.parametrizations)[name])


def _parameter(module: nn.Module, name: str) -> Tensor:
    """A module's weight as it computes with it."""
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        known = [known for known, _ in module.named_parameters(recurse=False)]
        raise ValueError(
            f"{type(module).__name__} has no parameter {name!r}; it has {', '.join(known) or 'none'}"
        )
    return weight


def _remove(module: nn.Module, name: str, kind: type, maker: str, leave_parametrized: bool) -> None:
    """Removes the only parametrization of a weight, in the parameter's own memory."""
    found = _parametrizations(module, name)
    if not any(isinstance(other, kind) for other in found):
        raise ValueError(f"{name} of {type(module).__name__} has no {kind.__name__}; {maker} makes one")
    if len(found) > 1:
        others = ", ".join(type(other).__name__ for other in found)
        raise ValueError(
            f"{name} of {type(module).__name__} has several parametrizations ({others}) that depend on each "
            "other; torch.nn.utils.parametrize.remove_parametrizations removes all of them"
        )
    with torch.no_grad():
        effective = getattr(module, name)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        if leave_parametrized:
            getattr(module, name).copy_(effective)
