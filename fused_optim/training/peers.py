"""Bytes that other libraries' AdamW keeps, from their sources: what the planner compares with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class PeerState:
    """How a library stores one of AdamW's two states.

    Attributes:
        bits: of a value's code.
        block: values that share a scale; 0 for plain values.
        scale_bytes: of a scale.
        smallest: tensors with fewer values are stored plainly.
        whole_blocks: tensors that are no multiple of a block are stored plainly, too.
        plain_bytes: of a value that is stored plainly.
        table_bytes: of the codes' values, kept for every tensor.
        shared_table_bytes: of the codes' values, kept once.
    """

    bits: int
    block: int = 0
    scale_bytes: int = 0
    smallest: int = 0
    whole_blocks: bool = False
    plain_bytes: int = 4
    table_bytes: int = 0
    shared_table_bytes: int = 0

    def _plain(self, numel: int) -> bool:
        ragged = self.whole_blocks and numel % self.block > 0
        return not self.block or numel < self.smallest or ragged

    def stored(self, numels: Iterable[int]) -> int:
        """Bytes of this state for tensors of these sizes.

        Args:
            numels: values of each tensor.

        Example:
            >>> from fused_optim.training.peers import PEERS
            >>> PEERS["torchao AdamW8bit"].state.stored([4096]) - 4096  # 16 scales, the codes' 256 values
            1088
        """
        total, shared = 0, 0
        for numel in numels:
            if self._plain(numel):
                total += numel * self.plain_bytes
            else:
                total += -(-numel * self.bits // 8) + -(-numel // self.block) * self.scale_bytes
                total += self.table_bytes
                shared = self.shared_table_bytes
        return total + shared


@dataclass(frozen=True)
class Peer:
    """What another AdamW keeps for one parameter.

    Attributes:
        state: of each of its two states.
        weight_bytes: of a weight, and of its gradient.
        master_bytes: of what makes a weight more precise than the model's own copy.
        source: where the numbers come from.
    """

    state: PeerState
    weight_bytes: int
    master_bytes: int
    source: str


_FP32 = PeerState(32)

PEERS: dict[str, Peer] = {
    "torch AdamW fp32": Peer(_FP32, 4, 0, "torch.optim.AdamW 2.13: states in the parameter's dtype"),
    "torch AdamW bf16+fp32 master": Peer(
        _FP32, 2, 4, "mixed precision: AdamW steps an fp32 copy of the bf16 weights"
    ),
    "bitsandbytes AdamW8bit": Peer(
        PeerState(8, 256, 4, smallest=4096, shared_table_bytes=1024),
        2,
        0,
        "bitsandbytes 0.50.2, optim/optimizer.py: fp32 absmax for 256 codes, fp32 below 4096 values",
    ),
    "torchao AdamW8bit": Peer(
        PeerState(8, 256, 4, smallest=4096, whole_blocks=True, plain_bytes=2, table_bytes=1024),
        2,
        0,
        "torchao 0.18.0, optim/adam.py and subclass_8bit.py: fp32 scale for 256 codes, a table for each "
        "state; the weights' dtype below 4096 values and for sizes that 256 does not divide",
    ),
    "torchao AdamW4bit": Peer(
        PeerState(4, 128, 4, smallest=4096, whole_blocks=True, plain_bytes=2, table_bytes=64),
        2,
        0,
        "torchao 0.18.0, optim/adam.py and subclass_4bit.py: as AdamW8bit, with blocks of 128",
    ),
    "FlashOptim AdamW 24-bit": Peer(
        PeerState(8, 32, 2),
        2,
        1,
        "flashoptim 0.1.4, optimizers.py: fp16 scale for 32 codes, int8 correction of bf16 weights",
    ),
}
"""Weights in bf16 (torch fp32 apart), gradients in the weights' dtype; every default of the library."""
