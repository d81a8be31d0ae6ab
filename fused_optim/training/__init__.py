"""Training with these optimizers: :func:`plan` says what fits, ``pretrain`` is all of it in one command."""

from .planner import Memory, Plan, Storage, plan

__all__ = ["Memory", "Plan", "Storage", "plan"]
