"""Muon: momentum whose update is made orthogonal, matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .cuts import (
    WORKSPACE_BYTES,
    Split,
    WholeMatrices,
    check_matrices,
    is_hidden_matrix,
    rows_of_parts,
)
from .hypersphere import RADIUS, along_sphere
from .kernels.matrix import MatrixCut
from .kernels.spec import Hyper, Per, Rule
from .matrix_functions import orthogonalize
from .newton_schulz import ALGORITHMS, SCALES, triples
from .optimizer import FusedOptimizer
from .options import Options


@dataclass(frozen=True)
class Orthogonalize(WholeMatrices):
    """The nearest orthogonal matrix takes the place of an update, times a factor for its shape."""

    coefficients: Any = "jordan"
    steps: int = 5
    scale: str = "original"
    dtype: torch.dtype | None = None
    normalizes_rows: bool = False
    radius: str | None = None

    @property
    def shared(self) -> tuple[tuple[str, Per], ...]:
        """NorMuon's average of squares, MuonH's radius."""
        rows = (("row_second_moment", Per.ROW),) if self.normalizes_rows else ()
        return (*rows, RADIUS) if self.radius == "fixed" else rows

    def bytes_per_element(self, param: Tensor) -> float:
        """Iterates in float32 take more than those in 16 bits."""
        return super().bytes_per_element(param) + (8 if self.dtype is torch.float32 else 0)

    def reads_params(self) -> bool:
        """Where they keep their norm."""
        return self.radius is not None

    def scalars(self, hyper: Hyper, step: Any, decay: Any) -> tuple[Any, ...]:
        """For rows and norms."""
        return hyper["beta2"] or 0.0, hyper["lr"], decay

    def update(self, u: Tensor, scalars: Sequence[Any], shared: Sequence[Tensor], p: Tensor | None) -> Tensor:
        """Orthogonal matrices in place of updates."""
        beta2, lr, decay = scalars
        u = orthogonalize(u, self.coefficients, self.steps, dtype=self.dtype)
        if self.normalizes_rows:
            u = _normalize_rows(u, beta2, shared[0])
        if self.radius is None:
            return u.mul_(SCALES[self.scale](*u.shape[-2:]))
        assert p is not None
        return along_sphere(u, p, lr, decay, shared[-1] if self.radius == "fixed" else None, 1e-8)


def _normalize_rows(u: Tensor, beta2: Any, second_moment: Tensor) -> Tensor:
    """Every row divided by the root of its average square, the whole matrix back at its norm."""
    weight = 1 - (beta2.view(-1, 1, 1) if isinstance(beta2, Tensor) else beta2)
    squares = u.square().mean(-1, keepdim=True)
    second_moment.add_((squares - second_moment) * weight)
    norm = torch.linalg.matrix_norm(u, keepdim=True)
    u = u / (second_moment.sqrt() + 1e-10)
    return u * (norm / (torch.linalg.matrix_norm(u, keepdim=True) + 1e-10))


# No defaults of the class: torch's schedulers cycle betas where there are any, and Muon's momentum where not.
_OWN: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95), "eps": 1e-8},
    "lion": {"betas": (0.9, 0.98)},
}


_CLIPPED_ANYWAY = "spectral clips what Muon makes orthogonal anyway; it is for others=..., or AdamW"


class Muon(FusedOptimizer):
    """Momentum orthogonalised by Newton–Schulz iterations, for the hidden matrices of a model.

    For a gradient ``G`` of a matrix with ``m`` rows and ``n`` columns::

        B = momentum * B + (1 - momentum) * G
        U = (1 - momentum) * G + momentum * B       (B itself without nesterov)
        O = U V^T  of the singular value decomposition  U S V^T, approximately
        p = p - lr * scale(m, n) * O - lr * weight_decay * p

    ``scale`` is ``sqrt(max(1, m / n))`` (``adjust_lr_fn`` None or ``"original"``), ``0.2 * sqrt(max(m, n))``
    (``"match_rms_adamw"``: learning rates and decay tuned for AdamW can stay) or ``sqrt(m / n)``
    (``"spectral_unclamped"``). All matrices of one shape are multiplied together. ``O`` does not depend on
    the gradient's magnitude, however small; a zero gradient gives zero.

    The state ``momentum_buffer`` (B) has the parameter's shape and is stored as ``state_codec`` says: 4
    bytes per parameter in fp32, 1.016 in int8, 0.53 in int4. Beside the matrix products a step moves 20
    bytes per fp32 parameter for the momentum and 12 to move the parameters.

    With ``others`` one optimizer serves a whole model: hidden matrices follow Muon and everything else
    AdamW or Lion, in groups of their own (``optimizer.param_groups`` then has up to twice as many, each
    with its ``algorithm``). ``OneCycleLR`` and ``CyclicLR`` cycle the momentum of Muon, not the others'
    ``betas``. Give it ``model.named_parameters()``, so that embeddings and heads are known by
    their names (``*embed*``, ``*wte*``, ``*wpe*``, ``shared.*``, ``*_token``, ``*lm_head*``, ``head.*``,
    ``*.head.*``, ``output.*``, ``classifier.*``, ``*.classifier.*``, ``score.*``, ``*.score.*``, after
    ``model.``, ``module.`` and ``_orig_mod.``).

    Args:
        params: tensors, named tensors or groups, as for ``torch.optim``; float32, bfloat16 or float16, with
            two dimensions and more. Of three, a stack of matrices (experts); of four or five, a
            convolution, whose matrix is ``[outputs, everything else]``.
        lr: learning rate; a float or a one-element tensor.
        weight_decay: decoupled decay per step, relative to ``lr`` without the factor for the shape.
        momentum: how much of the average is kept.
        nesterov: look ahead along the momentum.
        ns_coefficients: ``(a, b, c)`` of every iteration, one triple for each (the last one is
            repeated as often as needed), or the name of a schedule: ``"jordan"``, ``"polar_express"``,
            ``"you"``, ``"cubic"``.
        eps: accepted for source compatibility; has no effect (magnitudes are divided out exactly).
        ns_steps: number of iterations, less than 100.
        adjust_lr_fn: the factor for the shape, see above.
        maximize: ascend instead of descend.
        capturable: step counts live on the device, so that a CUDA graph may capture ``step()``.
        ns_dtype: of the matrices in the iterations: ``torch.float32``, ``torch.float16``, or
            ``torch.bfloat16``, which ``None`` stands for.
        beta2: decay of the average of squares that every row of ``O`` is divided by (NorMuon), see
            :class:`fused_optim.NorMuon`; ``None`` for none.
        radius: ``"fixed"`` or ``"current"`` keeps the norm of every matrix (MuonH), see
            :class:`fused_optim.MuonH`; ``adjust_lr_fn`` has no effect then. ``None`` lets norms change.
        others: ``"adamw"`` or ``"lion"`` for parameters that are not hidden matrices; ``None`` refuses them.
        others_lr: their learning rate.
        others_betas: their ``betas``; by default (0.9, 0.95), Lion's (0.9, 0.98).
        others_eps: AdamW's ``eps``.
        others_weight_decay: their decoupled decay.
        hidden: which parameters are Muon's, a function of name and parameter, instead of the names above.
        split: fused matrices, such as ``{"*.qkv_proj.*": 3}`` or ``{"*.qkv*": (2048, 512, 512)}`` rows.
        workspace_bytes: memory for the matrices that are worked on together; a larger one is alone, and the
            updates of one parameter (4 bytes per element, 8 with a radius) are there whatever this says.
        **options: storage, clipping, skipping and backend, see :class:`fused_optim.options.Options`;
            ``spectral`` is for the others.

    Raises:
        ValueError: a value out of range, a parameter that holds no matrices, storage that does not fit it.
        TypeError: a value of the wrong type, or an unknown option.

    Example:
        >>> import torch, fused_optim
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 1))
        >>> optimizer = fused_optim.Muon(model.named_parameters(), lr=0.02, others="adamw")
        >>> [group["algorithm"] for group in optimizer.param_groups]
        ['muon', 'adamw']

    Source:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; Liu et al., Muon is
        Scalable for LLM Training, arXiv 2502.16982; Amsel et al., The Polar Express, arXiv 2505.16932.
    """

    _unknown_to_torch = frozenset(
        {"step", "maximize", "capturable", "differentiable", "betas", "decoupled_weight_decay"}
        | {"algorithm", "split", "workspace_bytes", "ns_dtype", "beta2", "radius"}
    )
    _planned_options = (
        *("algorithm", "ns_coefficients", "ns_steps", "adjust_lr_fn", "split", "workspace_bytes"),
        *("ns_dtype", "beta2", "radius"),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[Any] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        maximize: bool = False,
        capturable: bool = False,
        ns_dtype: torch.dtype | None = None,
        beta2: float | None = None,
        radius: Literal["fixed", "current"] | None = None,
        others: Literal["adamw", "lion"] | None = None,
        others_lr: float | Tensor = 3e-4,
        others_betas: tuple[float, float] | None = None,
        others_eps: float = 1e-8,
        others_weight_decay: float = 0.1,
        hidden: Callable[[str, Tensor], bool] = is_hidden_matrix,
        split: Split | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
        **options: Unpack[Options],
    ) -> None:
        if others not in (None, "adamw", "lion"):
            raise ValueError(f"others={others!r} is unknown; allowed: 'adamw', 'lion', None")
        if options.get("spectral") is not None and others is None:
            raise ValueError(_CLIPPED_ANYWAY)
        if not callable(hidden):
            raise TypeError(f"hidden must be a function of name and parameter, got {hidden!r}")
        self._hidden = hidden
        self._others: dict[str, Any] | None = None
        if others is not None:
            betas = _OWN[others]["betas"] if others_betas is None else others_betas
            self._others = {"algorithm": others, "lr": others_lr, "weight_decay": others_weight_decay}
            self._others |= {"betas": betas, "eps": others_eps}
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": False,
            "ns_dtype": ns_dtype,
            "beta2": beta2,
            "radius": radius,
            "decoupled_weight_decay": True,
            "algorithm": "muon",
            "split": {} if split is None else split,
            "workspace_bytes": workspace_bytes,
        }
        super().__init__(params, defaults, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, with ``others`` in a group for each algorithm unless the group names its own.

        Options of the group hold for both; its ``lr`` for Muon only.

        Raises:
            ValueError: an option out of range, or a parameter that its algorithm cannot update.
            TypeError: a value or a tensor of a type that no rule updates.
        """
        if self._stays_whole(param_group):
            super().add_param_group(self._completed(param_group))
            return
        count, (hidden, rest) = len(self.param_groups), self._sorted(param_group["params"])
        own = {key: value for key, value in param_group.items() if key != "lr"}
        others: dict[str, Any] = {**(self._others or {}), **own}
        try:
            if hidden:
                super().add_param_group({**param_group, "algorithm": "muon", "params": hidden})
            if rest:
                super().add_param_group({**others, "params": rest})
        except (TypeError, ValueError, RuntimeError):
            del self.param_groups[count:]
            raise

    def _completed(self, group: Any) -> Any:
        """A group with what its own algorithm needs, which is that of the others if they share it."""
        if not isinstance(group, dict):
            return group
        algorithm = group.get("algorithm", "muon")
        if algorithm == "muon" and group.get("spectral") is not None:
            raise ValueError(_CLIPPED_ANYWAY)
        if self._others is not None and self._others["algorithm"] == algorithm:
            return {**self._others, **group}
        return {**_OWN.get(algorithm, {}), **group}

    def _stays_whole(self, group: Any) -> bool:
        """Whether a group is not to be divided; torch says what is wrong with one that is no dict."""
        if self._others is None or not isinstance(group, dict) or "algorithm" in group:
            return True
        return isinstance(group["params"], set)

    def _sorted(self, params: Any) -> tuple[list[Any], list[Any]]:
        """Hidden matrices, then all others, as they were given."""
        items = [params] if isinstance(params, Tensor) else list(params)
        parts: tuple[list[Any], list[Any]] = ([], [])
        for item in items:
            name, param = item if isinstance(item, tuple) else ("", item)
            if not name and isinstance(param, Tensor) and param.ndim > 1 and self._hidden is is_hidden_matrix:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} came without a name, and embeddings and "
                    "heads are known by theirs; give model.named_parameters(), or hidden=function"
                )
            hidden = isinstance(param, Tensor) and self._hidden(name, param)
            parts[0 if hidden else 1].append(item)
        return parts

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_hidden": self._hidden, "_others": self._others}

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return ALGORITHMS[group["algorithm"]]

    def _cut(self, group: Mapping[str, Any], name: str, own_name: str, param: Tensor) -> MatrixCut | None:
        if group["algorithm"] != "muon":
            return super()._cut(group, name, own_name, param)
        if param.is_complex():
            raise RuntimeError(f"Muon does not support complex parameters: {name} has dtype {param.dtype}")
        if not 2 <= param.ndim <= 5:
            raise ValueError(
                "Muon only supports 2D parameters, and stacks and convolutions of them, whereas we found a "
                f"parameter with size: {tuple(param.shape)}, {name}; others='adamw' takes care of the rest"
            )
        rows = rows_of_parts(name, own_name, param, group["split"])
        check_matrices(name, param, rows)
        coefficients = group["ns_coefficients"]
        if not isinstance(coefficients, str):
            coefficients = tuple(tuple(step) for step in triples(coefficients))
        scale = group["adjust_lr_fn"] or "original"
        if rows and group["radius"] is not None:
            raise ValueError(f"split and radius do not go together ({name}): a parameter has one norm")
        return Orthogonalize(
            rows,
            group["workspace_bytes"],
            coefficients,
            group["ns_steps"],
            scale,
            group["ns_dtype"],
            normalizes_rows=group["beta2"] is not None,
            radius=group["radius"],
        )
