"""Optimizers in place of ``torch.optim``: the whole step in one pass over memory, on GPU and CPU."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

# Only an installation has them here. With the name, `python -m fused_optim` says this in one line.
if find_spec(f"{__name__}.kernels") is None:
    raise ImportError(
        f"{__path__[0]} is the source folder of fused_optim without its kernels, and hides an installed "
        "fused_optim: run Python from another folder, or `pip install -e .` in the checkout",
        name=__name__,
    )

from .adam import Adam
from .adamw import AdamW
from .cast import CASTAdamS
from .embedding import StableEmbedding
from .lion import Lion
from .master import full_precision, set_full_precision
from .muon import Muon
from .muon_family import AdamH, MuonH, NorMuon
from .optimizer import FusedOptimizer
from .precision import keep_fp32
from .presets import Adam8bit, AdamW4bit, AdamW8bit, Lion4bit, Lion8bit, SGD8bit
from .sgd import SGD

if TYPE_CHECKING:
    from . import info as info
    from . import interchange as interchange
    from . import sparsity as sparsity
    from . import spectral as spectral
    from . import training as training

__all__ = [
    "SGD",
    "Adam",
    "Adam8bit",
    "AdamH",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "CASTAdamS",
    "FusedOptimizer",
    "Lion",
    "Lion4bit",
    "Lion8bit",
    "Muon",
    "MuonH",
    "NorMuon",
    "SGD8bit",
    "StableEmbedding",
    "full_precision",
    "keep_fp32",
    "set_full_precision",
]
__version__ = "0.1.0"

_LAZY = ("info", "interchange", "sparsity", "spectral", "training")
"""Modules that few need, imported when somebody asks for them."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
