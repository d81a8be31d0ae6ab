"""Optimizers in place of ``torch.optim``: the whole step in one pass over memory, on GPU and CPU."""

from .adam import Adam
from .adamw import AdamW
from .lion import Lion
from .optimizer import FusedOptimizer
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "FusedOptimizer", "Lion"]
__version__ = "0.1.0"
