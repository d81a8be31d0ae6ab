"""Steps with whatever fused_optim is first on the path, as another process asks: a line of JSON each way.

Only the public classes are used here, so that the same worker runs old and new versions.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim

from .timing import Timed

CHECKED_STEPS = 3
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Steps(Timed):
    """An optimizer over parameters and gradients that depend on the order alone."""

    def __init__(self, order: dict[str, Any]) -> None:
        device = torch.device(order["device"])
        super().__init__("steps", device)
        options = dict(order["options"])
        cls = getattr(fused_optim, order["optimizer"])
        self._dtype = _DTYPES.get(options["param_codec"].split("_")[0], torch.bfloat16)
        self._kept, self._count = order["kept"], 0
        self.params = [Parameter(value.mul_(0.1)) for value in self._random(order["shapes"], 0)]
        self._gradients = [self._random(order["shapes"], seed) for seed in (1, 2)]
        options["betas"] = tuple(options["betas"]) if "betas" in options else None
        self.optimizer = cls(self.params, **{k: v for k, v in options.items() if v is not None})
        self._buffer = torch.ones(order["sweep_bytes"] // 4, device=device)

    def _random(self, shapes: Sequence[Sequence[int]], seed: int) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        kind: dict[str, Any] = {"device": self.device, "dtype": self._dtype, "generator": generator}
        return [torch.randn(shape, **kind) for shape in shapes]

    def prepare(self) -> None:
        values = self._gradients[0 if self._kept else self._count % 2]
        if not self._kept:
            torch.autograd.backward(self.params, values)
        elif self._count == 0:
            for param, value in zip(self.params, values, strict=True):
                param.grad = value
        self._count += 1

    def call(self) -> None:
        self.optimizer.step()

    def finish(self) -> None:
        if not self._kept:
            self.optimizer.zero_grad()

    def sweep(self) -> None:
        """Pushes everything out of the caches."""
        self._buffer.sum()

    def digest(self) -> str:
        """Of all parameters after the first steps."""
        for _ in range(CHECKED_STEPS):
            self.prepare()
            self.call()
            self.finish()
        found = hashlib.sha256()
        for param in self.params:
            found.update(param.detach().cpu().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def _make(order: dict[str, Any]) -> tuple[Steps | None, dict[str, Any]]:
    torch.set_num_threads(order["threads"])
    try:
        steps = Steps(order)
        answer = {"digest": steps.digest()}
        # One sample that does not count: a GPU has compiled everything after it.
        steps.sample(-1, steps.sweep)
    except Exception as error:
        # An older version may lack a class, an option or a codec.
        return None, {"failed": f"{type(error).__name__}: {error}"[:300]}
    return steps, answer


def _step(steps: Steps, number: int) -> dict[str, float]:
    begin = time.perf_counter()
    gc.disable()
    steps.sample(number, steps.sweep)
    gc.enable()
    gc.collect()
    return {"ms": steps.time.by_round[number], "spent_s": time.perf_counter() - begin}


def main() -> None:
    """Answers until its input ends; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    steps: Steps | None = None
    for number, line in enumerate(sys.stdin):
        question = json.loads(line)
        if question.pop("do") == "make":
            steps = None
            gc.collect()
            steps, answer = _make(question)
        else:
            assert steps is not None
            answer = _step(steps, number)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
