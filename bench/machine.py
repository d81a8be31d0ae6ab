"""What a result must say about where it comes from: machine, versions, sources."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import fused_optim
import fused_optim.kernels
from fused_optim.training.origin import commit_of, processor, run

PACKAGES = (
    *(
        "torch",
        "triton",
        "numpy",
        "bitsandbytes",
        "torchao",
        "torch-optimi",
        "lion-pytorch",
        "pytorch-optimizer",
    ),
    *("heavyball", "flashoptim", "deepspeed", "muonium", "gram-newton-schulz", "flash-muon", "quack-kernels"),
)
_ROOT = Path(__file__).resolve().parents[1]
_SOURCES = ("fused_optim", "kernels", "csrc", "bench", ":!bench/results")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache in front of the memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1024, "M": 1024**2}
    sizes = [file.read_text().strip() for file in _CACHES.glob("index*/size")]
    return max(
        (int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=32 * 1024**2
    )


def source_digest() -> str:
    """A hash of the package that was imported and of csrc/: names what ran, also without git."""
    # Not fused_optim's __path__, which has the whole checkout in an editable installation.
    roots = [Path(fused_optim.__file__).parent, *map(Path, fused_optim.kernels.__path__)]
    files = {file.resolve() for root in roots for file in root.rglob("*.py")}
    files |= {file for file in (_ROOT / "csrc").glob("*") if file.is_file()}
    digest = hashlib.sha256()
    for name, content in sorted((file.name, file.read_bytes()) for file in files):
        digest.update(name.encode() + content)
    return digest.hexdigest()[:12]


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "fused_optim": fused_optim.__version__,
    }
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {**versions, "cuda": torch.version.cuda}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    query = "driver_version,clocks.sm,clocks.mem,power.limit"
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        query: run(
            _ROOT, "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"
        ),
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Everything that a figure depends on besides the code."""
    return {
        "device": device.type,
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "last_level_cache_bytes": last_level_cache(device),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": _versions(),
        "commit": commit_of(_ROOT, _SOURCES),
        "sources": source_digest(),
    }


def present(name: str) -> str:
    """The name of a device that is here, for a command line.

    Raises:
        argparse.ArgumentTypeError: it is unknown, or not here.
    """
    allowed = "allowed are cpu and, with a GPU, cuda or cuda:NUMBER"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"unknown device {name!r}: {allowed}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"nothing runs on {name!r}: {allowed}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"only {count} of them" if count else "no GPU: give cpu, or install a torch with CUDA"
        raise argparse.ArgumentTypeError(f"{name!r} is not here, torch sees {there}")
    return name


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench machine", description=__doc__)
    parser.add_argument(
        "device",
        nargs="?",
        type=present,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:NUMBER (default: the GPU where there is one)",
    )
    print(json.dumps(describe(torch.device(parser.parse_args(argv).device)), indent=2))
    return 0
