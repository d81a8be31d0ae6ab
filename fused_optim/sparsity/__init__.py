"""N:M sparsity: recipes for training, masks, pruning, export."""

from ..progressive import MaskDecay, StructureDecay
from ..recipe import Sparsity
from ..recipes import CAST, SRSTE, MaskedDecay, OneShot
from .decay import choose_decay
from .files import load_sparse, save_sparse
from .flips import FlipRate
from .masks import check_mask, count_flips, nm_mask, pack_mask, transposable_mask, unpack_mask
from .modules import MagnitudeMask, WeightScale, distillation_loss, mask_forward, unmask_forward
from .pruning import Report, prune, report, verify
from .semi_structured import to_semi_structured
from .state import apply_masks, listing, masks_of

__all__ = [
    "CAST",
    "SRSTE",
    "FlipRate",
    "MagnitudeMask",
    "MaskDecay",
    "MaskedDecay",
    "OneShot",
    "Report",
    "Sparsity",
    "StructureDecay",
    "WeightScale",
    "apply_masks",
    "check_mask",
    "choose_decay",
    "count_flips",
    "distillation_loss",
    "listing",
    "load_sparse",
    "mask_forward",
    "masks_of",
    "nm_mask",
    "pack_mask",
    "prune",
    "report",
    "save_sparse",
    "to_semi_structured",
    "transposable_mask",
    "unmask_forward",
    "unpack_mask",
    "verify",
]
