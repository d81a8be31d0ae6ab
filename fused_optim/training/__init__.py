"""Training with these optimizers: :func:`plan` says what fits, ``pretrain`` is all of it in one command."""

from .planner import Plan, plan
from .storages import Memory, Storage

__all__ = ["Memory", "Plan", "Storage", "plan"]
