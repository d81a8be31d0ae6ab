"""Settings of the whole suite: what runs where, how many threads, one seed per test."""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # NumPy's threads, too, would wait for those of other workers. It reads this when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@cache
def has_gpu() -> bool:
    """Whether torch sees one; not asked where nothing runs, for to import torch takes seconds."""
    import torch

    return torch.cuda.is_available()


def _only_distributes(config: pytest.Config) -> bool:
    """Whether all tests run in other processes, pytest-xdist's workers."""
    return config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    """Chooses between Triton's compiler and its interpreter, which Triton does when it is imported."""
    if _only_distributes(config):
        return
    if not has_gpu():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _quicken_the_interpreter()


def _quicken_the_interpreter() -> None:
    """Patches Triton's language once a launch, as its interpreter does, but not again at every call in it.

    To look through all of the language at each call of a jitted function takes most of a launch's time.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch_lang = interpreter._patch_lang

    def patch_unless_patched(fn: Any) -> Any:
        langs = [lang for lang in fn.__globals__.values() if lang is tl or lang is tl.core]
        if langs and not any(tl.core.is_builtin(lang.load) for lang in langs):
            return None
        return patch_lang(fn)

    interpreter._patch_lang = patch_unless_patched


BUILDERS = {
    *("test_cuda.py", "test_learning.py", "test_packaging.py", "test_report.py"),
    *("test_triton_products_static.py", "test_triton_static.py", "test_triton_emulated.py"),
}
"""What their first test compiles or learns serves all others."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadgroup``: a builder's tests go to one worker, all others in portions to whoever is free.

    pytest 9.2 has no ``Item._nodeid``, in which pytest-xdist 3.8 keeps the names of its groups: without this
    every worker builds.
    """
    if config.option.dist != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Portions(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            portion = f"{name.partition('[')[0]} {zlib.crc32(name.encode()) % 8}"
            return file if Path(file).name in BUILDERS else f"{file}::{portion}"

    # In the order of collection: builders first.
    config.option.loadscopereorder = False
    return Portions(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs a GPU where there is none; nothing else is ever left out from here."""
    items.sort(key=lambda item: item.path.name not in BUILDERS)
    if has_gpu() or config.option.collectonly:
        return
    # Not skipped: to report four thousand of them takes half a minute.
    without = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=without)
    items[:] = [item for item in items if item.get_closest_marker("gpu") is None]


def pytest_collection_finish() -> None:
    """Python's garbage collector need not look through torch and ten thousand tests again and again."""
    gc.collect()
    gc.freeze()


def pytest_report_header(config: pytest.Config) -> str | None:
    """Says what the run leaves out."""
    if _only_distributes(config):
        return "tests marked gpu are left out (deselected) where torch sees no NVIDIA GPU"
    return (
        None if has_gpu() else "no NVIDIA GPU that torch can see: tests marked gpu are left out (deselected)"
    )


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """A seed that depends on the test's id alone, and threads that leave room for parallel workers."""
    import torch

    # torch.manual_seed keeps seeds for devices that it has not begun to use, and the whole stack with each.
    seed = torch.manual_seed if has_gpu() else torch.default_generator.manual_seed
    seed(zlib.crc32(request.node.nodeid.encode()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else max(2, threads))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(_seeded: None) -> None:
    """Two threads on a shared machine wait for each other longer than they compute."""
    import torch

    torch.set_num_threads(1)
