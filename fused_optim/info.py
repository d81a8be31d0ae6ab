"""What runs here and what is missing (``info``), and what can be combined (``list``)."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import torch

from .kernels import dispatch
from .kernels.codecs import CODECS, PARAM_CODECS, STATE_CODECS
from .kernels.native import cpu, library
from .kernels.rules import RULES

Section = dict[str, str]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _openmp_runtimes() -> list[str]:
    """The OpenMP libraries mapped into this process; more than one would mean two thread pools."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    found = re.findall(r"/\S*/lib(?:gomp|iomp|omp)[^/\s]*\.so\S*", maps.read_text())
    return sorted(set(found))


def _cpu() -> Section:
    missing = cpu.unavailable()
    paths = () if missing else cpu.isas()
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} logical cores",
        "library": missing or str(library.path("cpu")),
        "paths": ", ".join([f"{paths[0]} (in use)", *paths[1:]]) if paths else "none",
        "OpenMP": ", ".join(_openmp_runtimes()) or "none loaded",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
    }


def _cuda() -> Section:
    opened = library.load("cuda")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "library": opened if isinstance(opened, str) else str(library.path("cuda")),
        "torch": f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA",
        "GPUs": "; ".join(
            f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus
        )
        or "none that torch can see",
    }


def report() -> dict[str, Section]:
    """Versions, libraries, devices and backends, as `python -m fused_optim info` prints them.

    Returns:
        Sections by title; each maps a label to its text. A backend that cannot run has the reason and the
        remedy there.

    Example:
        >>> from fused_optim.info import report
        >>> report()["backends"]["reference"]
        'ready'
    """
    # The native libraries come first: the section on the CPU shows which OpenMP runtime they found.
    backends = {name: missing or "ready" for name, missing in dispatch.available().items()}
    return {
        "versions": {
            "fused_optim": _version("fused_optim"),
            "python": platform.python_version(),
            # With the CUDA version that it was built for, which its package does not tell.
            "torch": torch.__version__,
            **{name: _version(name) for name in ("triton", "numpy")},
        },
        "CPU": _cpu(),
        "CUDA": _cuda(),
        "backends": backends,
    }


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def info() -> str:
    """The text of `python -m fused_optim info`.

    Example:
        >>> from fused_optim.info import info
        >>> print(info().splitlines()[0])
        versions
    """
    lines: list[str] = []
    for title, section in report().items():
        lines += [title, *(f"  {line}" for line in _columns(section.items()))]
    return "\n".join(lines)


def catalogue() -> str:
    """The text of `python -m fused_optim list`: every rule and codec, its bytes, and what goes together.

    Example:
        >>> from fused_optim.info import catalogue
        >>> print(catalogue().splitlines()[0])
        Codecs: bytes per value, largest relative error of encoding, tensors in memory,
    """
    header = ("codec", "bytes", "error", "planes", "for", *RULES)
    rows: list[tuple[str, ...]] = []
    for codec in (codec for codec in CODECS.values() if not codec.write_only):
        error = f"{codec.relative_error:.1g}" if codec.relative_error else "0"
        planes = ", ".join(plane.dtype for plane in codec.planes)
        known = (("param", PARAM_CODECS), ("state", STATE_CODECS))
        use = ", ".join(kind for kind, names in known if codec.name in names) or "-"
        states = [f"{len(rule.slots) * codec.bytes_per_value:.4g}" for rule in RULES.values()]
        if codec.name not in STATE_CODECS:
            states = ["-"] * len(RULES)
        rows.append((codec.name, f"{codec.bytes_per_value:.4g}", error, planes, use, *states))
    return "\n".join(
        [
            "Codecs: bytes per value, largest relative error of encoding, tensors in memory,",
            "whether param_codec and state_codec may name them, and bytes per parameter of each",
            "rule's states if all of them are stored like this",
            *(f"  {line}" for line in _columns([header, *rows])),
            "Rules and their states, and classes that plan knows beside them",
            *(f"  {line}" for line in _columns(_states_of_rules())),
            "Any rule works with every codec for param whose first plane has the parameter's dtype,",
            "and with every codec for state, for each of its states its own; float64 and complex",
            "parameters and their states stay in their own precision.",
            "No option names *_unsigned, which take the place of their namesakes for states that",
            "are never negative, and mask, which is for the masks of sparsity=.",
        ]
    )


def _states_of_rules() -> list[tuple[str, str]]:
    # Only this command needs the planner.
    from .training.plan_rules import CLASSES, states_of

    return [(name, states_of(name)) for name in (*RULES, *CLASSES)]
