"""``python -m bench step --base REF``: this version's steps beside those of another commit.

Two versions cannot live in one process: each gets one of its own, both run the same worker on the same
inputs, and they take turns, A B then B A.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fused_optim
from fused_optim.kernels import dispatch
from fused_optim.kernels.native import cpu, library

from .cases import Case
from .machine import last_level_cache
from .peers import Contender, recipes
from .record import Record, begin, save
from .shapes import parse, shrink
from .tables import Table, rounded, show, show_circumstances
from .timing import Samples, ratio

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("this", "base")


class BaseError(Exception):
    """Why a commit cannot be compared with."""


def _git(*arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise BaseError("--base needs git on the PATH") from None
    except subprocess.CalledProcessError as error:
        raise BaseError(error.stderr.decode().strip()) from None


def commit_of(ref: str) -> str:
    """The commit that a name means."""
    return _git("rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}").decode().strip()


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home or Path.home() / ".cache") / "fused_optim" / "commits"


def instruction_set() -> str:
    """The best instruction set of this machine as csrc/ is asked for it; empty if there is no library."""
    # What permutes is built with what gathers.
    return "" if cpu.unavailable() else cpu.isas()[0].removesuffix("_permute")


def compile_libraries(sources: Path, lib: Path, with_cuda: bool) -> None:
    """Builds csrc/ as an installation does, for this machine's best instruction set alone."""
    scripts = sysconfig.get_path("scripts")
    cmake = shutil.which("cmake", path=f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}")
    if cmake is None:
        raise BaseError("--base builds csrc/ and needs CMake: pip install cmake")
    with tempfile.TemporaryDirectory() as build:
        switches = [f"-DFUSED_OPTIM_CUDA={'ON' if with_cuda else 'OFF'}"]
        if isa := instruction_set():
            switches.append(f"-DFUSED_OPTIM_ISAS={isa}")
        for command in (["-S", sources, "-B", build, *switches], ["--build", build, "--parallel"]):
            done = subprocess.run([cmake, *command], capture_output=True, text=True)
            if done.returncode:
                raise BaseError(f"{sources} could not be built:\n{(done.stdout + done.stderr)[-2000:]}")
        lib.mkdir()
        for built in Path(build).glob("*.so"):
            shutil.copy(built, lib)


def _same_csrc(commit: str) -> bool:
    """Whether this checkout's csrc/ is that commit's: what was built of it serves both."""
    changed = _git("status", "--porcelain", "--", "csrc")
    return not changed and _git("rev-parse", f"{commit}:csrc") == _git("rev-parse", "HEAD:csrc")


def checkout(commit: str, cuda: bool) -> Path:
    """A folder to import that commit's package from, its libraries built; kept for the next time."""
    kept = _cache() / "-".join(filter(None, (commit, instruction_set(), "cuda" if cuda else "")))
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        source, site = Path(folder, "source"), Path(folder, "site")
        with tarfile.open(fileobj=io.BytesIO(_git("archive", commit))) as archive:
            archive.extractall(source, filter="data")
        shutil.copytree(source / "fused_optim", site / "fused_optim")
        shutil.copytree(source / "kernels", site / "fused_optim" / "kernels")
        if _same_csrc(commit):
            _copy_libraries(site)
        else:
            print(f"building csrc/ of {commit[:12]} (kept in {kept})", flush=True)
            compile_libraries(source / "csrc", site / "fused_optim" / "lib", cuda)
        try:
            site.rename(kept)
        except OSError:
            # Another run was faster.
            if not kept.is_dir():
                raise
    return kept


def _copy_libraries(site: Path) -> None:
    (site / "fused_optim" / "lib").mkdir()
    for file in filter(None, map(library.path, ("cpu", "cuda"))):
        shutil.copy(file, site / "fused_optim" / "lib")


def _this_version(site: Path) -> Path:
    """A folder with what this process imports."""
    # Not by __path__: that of an editable installation has the whole checkout.
    for module, name in ((fused_optim, "fused_optim"), (dispatch, "fused_optim/kernels")):
        assert module.__file__ is not None
        hidden = shutil.ignore_patterns("lib", "kernels", "__pycache__")
        shutil.copytree(Path(module.__file__).parent, site / name, ignore=hidden)
    _copy_libraries(site)
    return site


@dataclass
class Worker:
    """A process that steps with one version."""

    name: str
    process: subprocess.Popen[str]

    def ask(self, **question: Any) -> Record:
        """One line of JSON there, one back."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise BaseError(f"the process of {self.name!r} ended; its errors are above")
        return json.loads(answer)


@contextmanager
def _worker(name: str, site: Path) -> Iterator[Worker]:
    # -S: without the hook of an editable installation, which would find this version in both processes.
    path = os.pathsep.join(map(str, [site, ROOT, *filter(None, sys.path)]))
    command = [sys.executable, "-S", "-P", "-m", "bench.base_worker"]
    environment = {**os.environ, "PYTHONPATH": path}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            yield Worker(name, process)
        finally:
            process.kill()


def _order(case: Case, contender: Contender, args: argparse.Namespace) -> Record:
    """What a worker must know of a contender."""
    shapes = parse(case.shapes)
    device = torch.device(args.device)
    storage = {"param_codec": contender.param, "state_codec": contender.states}
    return {
        "optimizer": recipes()[contender.rule].cls.__name__,
        "options": {**contender.hyper(), **storage, **dict(contender.options)},
        "shapes": shrink(shapes) if args.quick else shapes,
        "kept": case.grads == "kept",
        "device": args.device,
        "sweep_bytes": 2 * last_level_cache(device) if case.cold and not args.quick else 0,
        "threads": torch.get_num_threads(),
    }


def _measure(case: Case, contender: Contender, workers: Sequence[Worker], args: argparse.Namespace) -> Record:
    """One contender in both versions."""
    order = _order(case, contender, args)
    elements = sum(torch.Size(shape).numel() for shape in order["shapes"])
    storage = contender.label.removeprefix("fused_optim ")
    name = case.name if storage in case.name else f"{case.name}: {storage}"
    sizes = {"shapes": case.shapes, "tensors": len(order["shapes"]), "elements": elements}
    record: Record = {"name": name, **sizes, "gradients": case.grads, "status": "ok"}
    answers = [worker.ask(do="make", **order) for worker in workers]
    failed = [f"{w.name}: {a['failed']}" for w, a in zip(workers, answers, strict=True) if "failed" in a]
    if failed:
        return record | {"status": "missing", "reason": "; ".join(failed)}
    samples = {worker.name: Samples() for worker in workers}
    spent = 0.0
    rounds = 3 if args.quick else args.rounds
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            answer = worker.ask(do="step")
            samples[worker.name].by_round[number] = answer["ms"]
            spent += answer["spent_s"]
        if spent > args.budget and number >= 2:
            break
    found, q1, q3 = ratio(*(samples[side] for side in SIDES))
    return record | {
        "rounds": len(samples["this"].by_round),
        "ms": {side: rounded(samples[side].summary()) for side in SIDES},
        "ratio": round(found, 4),
        "quartiles": [round(q1, 4), round(q3, 4)],
        "same_bits": answers[0]["digest"] == answers[1]["digest"],
    }


def table(cases: Sequence[Record], ref: str) -> Table:
    """Every case in one line."""
    lines = []
    for case in cases:
        if case["status"] != "ok":
            lines.append([case["name"], "", "", "", "", case["reason"]])
            continue
        medians = [f"{case['ms'][side]['median']:.4g}" for side in SIDES]
        spread = "–".join(f"{value:.3g}" for value in case["quartiles"])
        same = "the same" if case["same_bits"] else "DIFFERENT"
        lines.append([case["name"], *medians, f"{case['ratio']:.3g}", spread, same])
    header = ["case", "this ms", f"{ref} ms", "ratio", "q1–q3 of rounds", "bits after 3 steps"]
    return Table(f"This version's time over that of {ref}", header, lines)


def _ours(cases: Sequence[Case]) -> Iterator[tuple[Case, Contender]]:
    seen: set[tuple[Any, ...]] = set()
    for case in cases:
        for contender in (c for c in case.contenders if c.is_ours):
            key = contender, case.shapes, case.grads, case.cold
            if key not in seen:
                seen.add(key)
                yield case, contender


def compare(args: argparse.Namespace, argv: Sequence[str], cases: Sequence[Case]) -> int:
    """Times our contenders of the cases in both versions; 1 if nothing could be compared."""
    device = torch.device(args.device)
    try:
        commit = commit_of(args.base)
        site = checkout(commit, device.type == "cuda")
        result: Record = {
            **begin("step", argv, device, args.quick),
            "kind": "base",
            "base": {"ref": args.base, "commit": commit},
            "cases": [],
        }
        with ExitStack() as stack:
            this = _this_version(Path(stack.enter_context(tempfile.TemporaryDirectory()), "site"))
            sites = zip(SIDES, (this, site), strict=True)
            workers = [stack.enter_context(_worker(side, folder)) for side, folder in sites]
            for case, contender in _ours(cases):
                result["cases"].append(_measure(case, contender, workers, args))
                save(result, args.out)
    except BaseError as error:
        print(f"--base {args.base}: {error}", file=sys.stderr)
        return 1
    show(table(result["cases"], args.base))
    show_circumstances(result, args.device)
    return 0 if any(case["status"] == "ok" for case in result["cases"]) else 1
