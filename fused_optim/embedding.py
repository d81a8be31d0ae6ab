"""An embedding that narrow optimizer states do not disturb."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .precision import keep_fp32


class StableEmbedding(nn.Embedding):
    """An embedding with a layer norm behind it, Xavier initialisation and optimizer states in fp32.

    Rare and frequent tokens share blocks of a quantised state, and their gradients differ by orders of
    magnitude; the norm keeps the largest of them in bounds. Its parameters stay marked when it is moved,
    converted or loaded; after ``fully_shard`` mark it again, see :func:`fused_optim.keep_fp32`.

    Takes the arguments of ``torch.nn.Embedding``. Input: integer indices of any shape; output: that shape
    plus ``embedding_dim``, in the dtype of the weight.

    Example:
        >>> import torch, fused_optim
        >>> embedding = fused_optim.StableEmbedding(1000, 64)
        >>> embedding(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])

    Source:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, section 2.3, arXiv 2110.02861.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **options)
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device, dtype=self.weight.dtype)
        keep_fp32(self)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> StableEmbedding:
        """Torch's way to move and convert modules, which may make new parameters."""
        super()._apply(fn, recurse)
        keep_fp32(self)
        return self

    def reset_parameters(self) -> None:
        """Xavier's uniform distribution; the padding row is zero."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """The normalised rows of the weight."""
        return self.norm(super().forward(input))
