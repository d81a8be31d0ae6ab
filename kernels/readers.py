"""The gradients of a step, read only if they and their parameters are what a plan was made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .guards import Guards
from .launch import addresses_of
from .native.objects import SHARD, Parameters


class Reader:
    """Type, dtype, sizes, strides and flags of parameters and gradients, and the parameters' addresses.

    ``local`` gives the tensor that a kernel sees: a shard, or the real view of a complex tensor.
    """

    def __init__(self, params: Sequence[Tensor], local: Callable[[Tensor], Tensor]) -> None:
        plain = (Tensor, torch.nn.Parameter)
        self.plain = all(type(p) in plain and not p.is_complex() for p in params)
        self._params, self._local = params, local
        grads = [local(p.grad) for p in params if p.grad is not None]
        locals_ = list(map(local, params))
        self._param_guards, self._grad_guards = Guards(params if self.plain else locals_), Guards(grads)
        self._param_addresses = addresses_of(locals_).tobytes()
        sharded = all(type(getattr(p, SHARD, None)) is Tensor and not p.is_complex() for p in params)
        self._in_c = Parameters.of(params, sharded) if self.plain or sharded else None

    def read(self) -> tuple[list[Tensor], np.ndarray] | None:
        """The gradients and their addresses; None if a tensor is missing or not what it was."""
        found = None if self._in_c is None else self._in_c.gradients()
        # DLPack knows nothing of a flag that negates; this comparison does.
        if found is not None and self._grad_guards.check(found[0]):
            return found
        grads = [p.grad for p in self._params]
        same = self.plain and self._grad_guards.check(grads)
        if not same:
            grads = [None if grad is None else self._local(grad) for grad in grads]
            same = self._grad_guards.check(grads)
        present = [grad for grad in grads if grad is not None]
        params = self._params if self.plain else list(map(self._local, self._params))
        if not same or not self._param_guards.check(params):
            return None
        try:
            same = addresses_of(params).tobytes() == self._param_addresses
            return (present, addresses_of(present)) if same else None
        except RuntimeError:
            # A tensor whose memory is gone: planning anew says which.
            return None
