"""Torch's hooks around a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` with torch's hooks and profiler range, which cost 50 us, only where somebody listens."""
    heard = Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        global_hooks = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
        profiling = torch.autograd.profiler._is_profiler_enabled or torch.autograd._profiler_enabled()
        return (heard if hooks or global_hooks or profiling else step)(self, *args, **kwargs)

    # With this mark torch leaves the function alone instead of wrapping it in profile_hook_step.
    wrapper.hooked = True  # pyright: ignore[reportAttributeAccessIssue]
    return wrapper
