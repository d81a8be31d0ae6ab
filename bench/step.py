"""``python -m bench step``: times optimizer steps, checked first, beside other libraries."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fused_optim.kernels.codecs import CODECS, OF_DTYPE
from fused_optim.kernels.rules import RULES

from .base import compare
from .cases import SUITES, Case, suite
from .machine import present
from .peers import PEERS, Contender
from .record import Record, add_out, begin, save
from .run import free, measure
from .shapes import parse, shrink
from .tables import case_record, case_table, show, show_circumstances, target_table, variant_table

_TAKEN: Mapping[str, tuple[str, ...]] = {
    "shapes": ("catalogue", "variants"),
    "rules": ("catalogue", "gpu", "variants"),
    "peers": ("issue", "codecs", "catalogue", "gpu", "scaling"),
}
"""The suites that an option is for; the others have their own."""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of rounds, 1 or more")
    return int(text)


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
        "--shapes", help="of catalogue and variants: 8x4Mi, 300x16, … (default: llama-1.1b, on a CPU 8x4Mi)"
    )
    parser.add_argument("--rules", help="of catalogue, gpu and variants (comma-separated; default: all)")
    parser.add_argument(
        "--peers",
        help="all, some (without the slow ones; the default), none, or names: " + ", ".join(PEERS),
    )
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    parser.add_argument(
        "--grads", choices=("fresh", "kept"), help="new gradient tensors every step, or the same"
    )
    parser.add_argument("--rounds", type=_count, default=40)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per case")
    parser.add_argument("--deadline", type=float, help="seconds after which no further case starts")
    parser.add_argument("--device", type=present, default="cuda" if torch.cuda.is_available() else "cpu")
    add_out(parser)
    parser.add_argument(
        "--base", metavar="REF", help="time our steps beside those of this commit instead of other libraries"
    )
    parser.add_argument("--samples", action="store_true", help="keep every sample in the JSON")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--quick", action="store_true", help="tiny tensors, three rounds: does it run?")
    return parser


def _chosen(given: str, known: Sequence[str], what: str) -> list[str]:
    names = given.split(",")
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"--{what} {given!r}: there is no {', '.join(unknown)!r}; known: {', '.join(known)}")
    return names


def _peers(given: str) -> list[str]:
    if given in ("all", "none", "some"):
        return [name for name, peer in PEERS.items() if given == "all" or (given == "some" and not peer.slow)]
    return _chosen(given, list(PEERS), "peers")


def _plain(contender: Contender) -> Contender:
    """A peer, by the dtype of its parameters: it knows nothing of our codecs."""
    if contender.is_ours:
        return contender
    return replace(contender, param=OF_DTYPE[CODECS[contender.param].planes[0].dtype])


def _named_as_stored(case: Case) -> Case:
    """The same case: no codec in a peer's label, and no states in the name where a rule has none."""
    plain = {contender.label: _plain(contender) for contender in case.contenders}
    targets = [
        replace(t, against=plain[t.against].label if t.against in plain else t.against) for t in case.targets
    ]
    name, first = case.name, case.contenders[0]
    if first.is_ours and not RULES[first.rule].slots:
        name = name.replace(f"{first.param}/{first.states}", first.param)
    return replace(case, name=name, contenders=tuple(plain.values()), targets=tuple(targets))


def _check(args: argparse.Namespace, name: str) -> None:
    """Refuses what would be ignored."""
    for option, suites in _TAKEN.items():
        given = getattr(args, option)
        if given is not None and name not in suites:
            raise ValueError(
                f"--{option} {given}: the suite {name} has its own; leave it out, or give --suite with one "
                f"of {', '.join(suites)}"
            )
    for option, default in (("peers", "none"), ("deadline", None), ("samples", False)):
        if args.base is not None and getattr(args, option) not in (None, default):
            raise ValueError(
                f"--{option} with --base, which times our own steps alone: leave one of them out"
            )


def select(args: argparse.Namespace) -> list[Case]:
    """The cases to time.

    Raises:
        ValueError: an argument is wrong, or would be ignored, or leaves no case.
    """
    on_gpu = args.device.startswith("cuda")
    name = args.suite or ("gpu" if on_gpu else "issue")
    _check(args, name)
    shapes = args.shapes or ("llama-1.1b" if on_gpu else "8x4Mi")
    if not all(map(math.prod, parse(shapes) or [(0,)])):
        raise ValueError(f"--shapes {shapes}: no elements to step over; use COUNTxSIZE of 1 or more each")
    rules = list(RULES) if args.rules is None else _chosen(args.rules, list(RULES), "rules")
    cases = suite(name, _peers("some" if args.peers is None else args.peers), rules, shapes)
    cases = [_named_as_stored(case) for case in cases]
    if args.grads is not None:
        cases = [replace(case, grads=args.grads) for case in cases]
    found = [case for case in cases if args.cases.lower() in case.name.lower()]
    if not found:
        names = "; ".join([*(case.name for case in cases[:8]), *["…"] * (len(cases) > 8)])
        raise ValueError(
            f"--cases {args.cases!r} is in no name of the {len(cases)} cases of the suite {name}: {names} "
            "(--list prints all)"
        )
    return found


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
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        cases = select(args)
    except ValueError as error:
        parser.error(str(error))
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
