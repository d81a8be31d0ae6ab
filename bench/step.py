"""``python -m bench step``: times optimizer steps, checked first, beside other libraries."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from fused_optim.kernels.rules import RULES

from .base import compare
from .cases import SUITES, Case, suite
from .peers import PEERS
from .record import Record, add_out, begin, save
from .run import free, measure
from .shapes import parse, shrink
from .tables import case_record, case_table, show, show_circumstances, target_table, variant_table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__)
    parser.add_argument(
        "--suite", choices=SUITES, help="what to time (default: gpu where there is one, else issue)"
    )
    parser.add_argument(
        "--issue-table",
        dest="suite",
        action="store_const",
        const="issue",
        help="the CPU table with its ratios to reach",
    )
    parser.add_argument(
        "--shapes", default="llama-1.1b", help="of catalogue and variants: 8x4Mi, 300x16, llama-1.1b, …"
    )
    parser.add_argument(
        "--rules", default=",".join(RULES), help="rules of catalogue, gpu and variants (comma-separated)"
    )
    parser.add_argument(
        "--peers",
        default="some",
        help="all, some (without the slow ones), none, or names: " + ", ".join(PEERS),
    )
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    parser.add_argument(
        "--grads", choices=("fresh", "kept"), help="new gradient tensors every step, or the same"
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per case")
    parser.add_argument("--deadline", type=float, help="seconds after which no further case starts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_out(parser)
    parser.add_argument(
        "--base", metavar="REF", help="time our steps beside those of this commit instead of other libraries"
    )
    parser.add_argument("--samples", action="store_true", help="keep every sample in the JSON")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--quick", action="store_true", help="tiny tensors, three rounds: does it run?")
    return parser


def _chosen(given: str, known: Sequence[str], what: str) -> list[str]:
    names = given.split(",") if given else []
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def _peers(given: str) -> list[str]:
    if given in ("all", "none", "some"):
        return [name for name, peer in PEERS.items() if given == "all" or (given == "some" and not peer.slow)]
    return _chosen(given, list(PEERS), "peers")


def select(args: argparse.Namespace) -> list[Case]:
    on_gpu = args.device.startswith("cuda")
    name = args.suite or ("gpu" if on_gpu else "issue")
    shapes = args.shapes or ("llama-1.1b" if on_gpu else "8x4Mi")
    cases = suite(name, _peers(args.peers), _chosen(args.rules, list(RULES), "rules"), shapes)
    if args.grads is not None:
        cases = [Case(c.name, c.shapes, c.contenders, c.targets, args.grads, c.cold) for c in cases]
    return [case for case in cases if args.cases.lower() in case.name.lower()]


def _ceiling_bytes(device: torch.device, quick: bool) -> int:
    if quick:
        return 2**20
    return 2**31 if device.type == "cuda" else 2**28


def run(args: argparse.Namespace, argv: Sequence[str], cases: Sequence[Case]) -> Record:
    """Measures the cases and returns what ``--out`` holds."""
    device = torch.device(args.device)
    result: Record = {**begin("step", argv, device, args.quick), "cases": [], "left_out": []}
    started = time.perf_counter()
    for case in cases:
        if args.deadline is not None and time.perf_counter() - started > args.deadline:
            result["left_out"].append(case.name)
            continue
        shapes = parse(case.shapes)
        rounds = 3 if args.quick else args.rounds
        shapes = shrink(shapes) if args.quick else shapes
        ceiling = _ceiling_bytes(device, args.quick)
        measured = measure(case, shapes, device, rounds, args.budget, ceiling)
        result["cases"].append(case_record(measured, args.samples))
        del measured
        free()
        show(case_table(result["cases"][-1]))
        save(result, args.out)
    return result


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    cases = select(args)
    if args.list:
        for case in cases:
            print(f"{case.name} [{case.shapes}]: " + ", ".join(c.label for c in case.contenders))
        return 0
    if args.base is not None:
        return compare(args, argv, cases)
    result = run(args, argv, cases)
    if any(case["targets"] for case in result["cases"]):
        show(target_table(result["cases"]))
    if args.suite == "variants":
        show(variant_table(result["cases"]))
    if result["left_out"]:
        print(f"left out for lack of time: {', '.join(result['left_out'])}")
    show_circumstances(result, args.device)
    wrong = [
        row["label"]
        for case in result["cases"]
        for row in case["rows"]
        if row["source"] == "fused_optim" and row["status"] in ("wrong", "failed")
    ]
    if wrong:
        print(f"WRONG or FAILED: {', '.join(wrong)}")
    return 1 if wrong else 0
