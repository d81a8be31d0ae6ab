"""Whole matrices: functions of singular values, and what optimizers do with them."""

from .hypersphere import Hypersphere
from .matrix_functions import hard_clip, inverse_sqrt, orthogonalize, soft_clip, spectral_norm
from .spectral_clip import ClipSchedule, SpectralClip

__all__ = [
    "ClipSchedule",
    "Hypersphere",
    "SpectralClip",
    "hard_clip",
    "inverse_sqrt",
    "orthogonalize",
    "soft_clip",
    "spectral_norm",
]
