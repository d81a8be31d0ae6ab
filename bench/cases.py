"""What is measured: cases made from the catalogues, and the ratios that are to be reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fused_optim.kernels.codecs import CODECS
from fused_optim.kernels.rules import RULES

from .peers import PEERS, Contender

OURS = "fused_optim"
MAIN_STORAGES = (
    ("fp32", "fp32"),
    ("bf16", "fp32"),
    ("bf16", "bf16"),
    ("fp32", "int8"),
    ("bf16", "int8"),
    ("bf16_split8", "int8"),
    ("bf16_split8", "int8_companded"),
    ("bf16_split8", "int4"),
)
"""(parameters and gradients, states) that every rule is timed with."""

FIRST = ("adam", "lion")
"""The rules that most models are trained with: a run that hits its time limit has timed these."""
GPU_SHAPES = ("llama-1.1b", "llama-125m", "llama-3b")


@dataclass(frozen=True)
class Target:
    """A figure to reach by ``ours``: ``kind`` is ratio (to ``against``), percent_of_copy or host_us."""

    kind: str
    limit: float
    ours: str
    against: str = ""


@dataclass(frozen=True)
class Case:
    """Optimizers that step over the same shapes; every gradient is a new tensor unless ``kept``."""

    name: str
    shapes: str
    contenders: tuple[Contender, ...]
    targets: tuple[Target, ...] = ()
    grads: str = "fresh"
    cold: bool = True


def _peers_of(rule: str, param: str, names: Sequence[str]) -> list[Contender]:
    return [Contender(name, rule, param) for name in names if rule in PEERS[name].classes]


def _against(
    name: str, shapes: str, ours: Contender, peer: Contender, limit: float | None, extra: Sequence[str],
    **case: Any,
) -> Case:  # fmt: skip
    others = [c for c in _peers_of(ours.rule, ours.param, extra) if c != peer]
    targets = () if limit is None else (Target("ratio", limit, ours.label, peer.label),)
    return Case(name, shapes, (ours, peer, *others), targets, **case)


def issue_table(peers: Sequence[str]) -> list[Case]:
    """The CPU table of the foundation issue."""
    adamw, fused = Contender(OURS), Contender("torch-fused")
    half, fused_half = Contender(OURS, param="bf16"), Contender("torch-fused", param="bf16")
    big, many, tiny = "8x4Mi", "300x16Ki", "300x16"
    return [
        _against("AdamW fp32", big, adamw, fused, 1.03, peers),
        _against("AdamW bf16 parameters, fp32 states", big, half, fused, 0.85, peers),
        _against(
            "AdamW bf16 parameters, bf16 states", big, replace(half, states="bf16"), fused_half, 0.75, peers
        ),
        _against("Lion fp32", big, Contender(OURS, "lion"), fused, 0.78, peers),
        _against("AdamW fp32, many tensors", many, adamw, fused, 0.5, peers),
        # Beside more libraries in the same heap, tensors lie farther apart and are less often in the caches.
        _against("AdamW fp32, host overhead", tiny, adamw, fused, 0.25, (), cold=False),
        Case("AdamW fp32, host overhead, gradients kept", tiny, (adamw, fused), grads="kept", cold=False),
        _against("AdamW fp32, host overhead, caches cold", tiny, adamw, fused, None, peers),
    ]


def codec_table(peers: Sequence[str]) -> list[Case]:
    """The CPU table of the codecs' issue: 16 Mi parameters in 8 bits and fewer, beside torch in fp32."""
    fused, shapes = Contender("torch-fused"), "4x4Mi"
    byte, slow_byte = Contender("bitsandbytes-8bit"), Contender("torchao-8bit")
    lion_byte = Contender("bitsandbytes-8bit", "lion")

    def case(ours: Contender, *limits: tuple[Contender, float]) -> Case:
        wanted = [(other, limit) for other, limit in limits if other == fused or other.source in peers]
        targets = tuple(Target("ratio", limit, ours.label, other.label) for other, limit in wanted)
        others = tuple(dict.fromkeys((fused, *(other for other, _ in wanted))))
        return Case(ours.label.removeprefix(f"{OURS} "), shapes, (ours, *others), targets)

    split = Contender(OURS, param="bf16_split8", states="int8_companded")
    return [
        case(Contender(OURS, states="int8"), (fused, 1.8), (byte, 0.1), (slow_byte, 0.05)),
        case(Contender(OURS, states="int8_companded"), (fused, 1.3)),
        case(Contender(OURS, "lion", states="int8"), (lion_byte, 1 / 12)),
        case(split, (fused, 1.3)),
        *(case(Contender(OURS, states=states)) for states in ("fp8", "int4", "bf16_sr")),
        *(case(Contender(OURS, param=param)) for param in ("bf16_split16", "bf16_kahan", "bf16_sr")),
        case(replace(split, states="int4")),
    ]


def _equal_bytes(ours: Contender) -> Contender | None:
    """The fused optimizer of torch with the same parameters and states, if it exists."""
    same = ours.param == ours.states or not RULES[ours.rule].slots
    exists = same and ours.rule in PEERS["torch-fused"].classes
    return Contender("torch-fused", ours.rule, ours.param) if exists else None


def _storages(rule: str) -> list[tuple[str, str]]:
    """The main storages; a rule without states has one per parameter codec."""
    by_bytes = {(p, s if RULES[rule].slots else ""): (p, s) for p, s in MAIN_STORAGES}
    return list(by_bytes.values())


def catalogue(
    shapes: str, peers: Sequence[str], rules: Sequence[str] = tuple(RULES), once: bool = False
) -> list[Case]:
    """Every rule with the main storages, beside peers that hold as many bytes.

    ``once``: peers other than torch's fused ones are timed with one of the storages that share a dtype.
    """
    cases, seen = [], set()
    for rule in rules:
        for param, states in _storages(rule):
            ours = Contender(OURS, rule, param, states)
            others = _peers_of(rule, param, peers)
            kind = rule, CODECS[param].planes[0].dtype
            if once and kind in seen:
                others = [c for c in others if c.source == "torch-fused"]
            seen.add(kind)
            targets = [Target("percent_of_copy", 90.0, ours.label), Target("host_us", 100.0, ours.label)]
            equal = _equal_bytes(ours)
            if equal is not None:
                others = [equal, *(c for c in others if c != equal)]
                targets.insert(0, Target("ratio", 1.0, ours.label, equal.label))
            name = f"{shapes} {rule} {param}/{states}"
            cases.append(Case(name, shapes, (ours, *others), tuple(targets)))
    return cases


def _most_wanted_first(rules: Sequence[str]) -> list[str]:
    return sorted(rules, key=lambda rule: rule not in FIRST)


def _gpu(peers: Sequence[str], rules: Sequence[str]) -> list[Case]:
    """The catalogue of three models, the most wanted first: a run may hit its time limit."""
    tiny = _against(
        "AdamW fp32, host overhead", "300x16", Contender(OURS), Contender("torch-fused"), 0.25, (), cold=False
    )
    first = [rule for rule in FIRST if rule in rules]
    cases = [tiny]
    for group in (first, [rule for rule in rules if rule not in first]):
        for shapes in GPU_SHAPES:
            # Two optimizers of 3.2 B parameters in fp32 fill 140 GB: there is no room for a third.
            beside = peers if shapes != "llama-3b" else [peer for peer in peers if peer == "torch-fused"]
            cases += catalogue(shapes, beside, group, once=True)
    return cases


def variants(shapes: str, rules: Sequence[str] = tuple(RULES)) -> list[Case]:
    """Both GPU backends in both arithmetics for every rule and main storage, to decide the defaults."""
    cases = []
    for rule in _most_wanted_first(rules):
        for param, states in _storages(rule):
            ours = Contender(OURS, rule, param, states)
            combos = [
                replace(ours, options=(("backend", backend), ("arithmetic", arithmetic)))
                for backend in ("triton", "cuda")
                for arithmetic in ("exact", "fast")
            ]
            equal = _equal_bytes(ours)
            contenders = (*combos, *([equal] if equal else []))
            cases.append(Case(f"{shapes} {rule} {param}/{states}", shapes, contenders))
    return cases


def scaling(peers: Sequence[str]) -> list[Case]:
    """Models of 1 to 64 Mi parameters, and 16 Mi parameters in 4 to 16 Ki tensors."""
    sizes = ("1x1Mi", "4x1Mi", "16x1Mi", "64x1Mi", "4x4Mi", "64x256Ki", "1024x16Ki", "16384x1Ki")
    ours, fused = Contender(OURS), Contender("torch-fused")
    extra = [c for c in _peers_of("adam", "fp32", peers) if c != fused]
    return [Case("AdamW fp32", shapes, (ours, fused, *extra)) for shapes in sizes]


SUITES = ("issue", "codecs", "catalogue", "gpu", "variants", "scaling")


def suite(name: str, peers: Sequence[str], rules: Sequence[str], shapes: str) -> list[Case]:
    """The cases of a suite; ``shapes`` is for ``catalogue`` and ``variants``, the others have their own.

    Raises:
        ValueError: there is no such suite.
    """
    if name == "issue":
        return issue_table(peers)
    if name == "codecs":
        return codec_table(peers)
    if name == "gpu":
        return _gpu(peers, rules)
    if name == "scaling":
        return scaling(peers)
    if name == "variants":
        return variants(shapes, rules)
    if name == "catalogue":
        return catalogue(shapes, peers, rules)
    raise ValueError(f"unknown suite {name!r}; allowed: {', '.join(SUITES)}")
