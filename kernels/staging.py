"""Sends a bucket's changing words to its device in one asynchronous copy per step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Staging:
    """Host memory, its copy on the device, and the pinned buffers between them.

    Words are laid out as ``[fixed columns | gradient addresses | rows]``; a step rewrites the
    addresses and the rows, rarely a fixed column. On a CPU both memories are the same.
    """

    def __init__(self, memory: Tensor, columns: int, n: int, device: torch.device) -> None:
        self._host = memory
        self.host_table: np.ndarray = memory[: columns * n].view(columns, n).numpy()
        self._words = memory.numpy()
        self.device_memory = memory if device.type == "cpu" else memory.to(device)
        self._changing, self._rows = (columns - 1) * n, columns * n
        self._sent = self._words.copy()
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []
        self._captured: list[Tensor] = []

    def send(self, *, with_rows: bool) -> None:
        """Copies the words that may have changed; nothing if none has."""
        if self.device_memory is self._host:
            return
        stop = len(self._words) if with_rows else self._rows
        fixed_changed = not np.array_equal(self._words[: self._changing], self._sent[: self._changing])
        start = 0 if fixed_changed else self._changing
        capturing = self.device_memory.is_cuda and torch.cuda.is_current_stream_capturing()
        # A graph always carries its own copy: eager steps between replays may have sent other words.
        if not capturing and np.array_equal(self._words[start:stop], self._sent[start:stop]):
            return
        self._sent[start:stop] = self._words[start:stop]
        target = self.device_memory[start:stop]
        if capturing:
            buffer = torch.empty(stop - start, dtype=torch.int64, pin_memory=True, device="cpu")
            self._captured.append(buffer)
            target.copy_(buffer.copy_(self._host[start:stop]), non_blocking=True)
        elif self.device_memory.is_cuda:
            self._copy_pinned(target, self._host[start:stop])
        else:
            target.copy_(self._host[start:stop])

    def _copy_pinned(self, target: Tensor, words: Tensor) -> None:
        """Copies through one of two pinned buffers, waiting only for a copy that is two steps old."""
        if len(self._buffers) < 2:
            pinned = torch.empty(len(self._words), dtype=torch.int64, pin_memory=True, device="cpu")
            buffer, event = pinned, torch.cuda.Event()
        else:
            buffer, event = self._buffers.pop(0)
            event.synchronize()
        target.copy_(buffer[: len(words)].copy_(words), non_blocking=True)
        event.record(torch.cuda.current_stream(target.device))
        self._buffers.append((buffer, event))
