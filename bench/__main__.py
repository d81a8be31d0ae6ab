"""``python -m bench <command> [options]``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "step": "time optimizer steps beside other libraries",
    "newton_schulz": "time orthogonalisation, spectral clipping and their products",
    "masks": "time the search for N:M masks, and masked steps",
    "sparse_learning": "train with every recipe for N:M sparsity, and compare what they learn",
    "static": "count what the compiled GPU kernels do, without a GPU",
    "static_cuda": "count what the CUDA C++ kernels of the built library take, without a GPU",
    "products": "time the matrix products beside torch.matmul on a GPU",
    "static_products": "count what their compiled kernels do, without a GPU",
    "report": "draw every result file: one HTML page and its charts",
    "machine": "print what a result file says about this machine",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        lines = [f"  {name:<17}{text}" for name, text in COMMANDS.items()]
        print("usage: python -m bench COMMAND [options]", *lines, sep="\n")
        return 0 if argv in ([], ["-h"], ["--help"]) else 2
    return importlib.import_module(f"bench.{argv[0]}").main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
