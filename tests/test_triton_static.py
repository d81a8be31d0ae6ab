"""What the compiled Triton kernels do, counted without a GPU: bytes, vectors, spills, instructions."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from bench.compiled import CAPABILITIES
from bench.static import Report, _parser
from bench.static_masks import SEARCHES
from fused_optim.kernels.codecs import CODECS, OF_DTYPE
from fused_optim.kernels.rules import CAST_ADAM, RULES
from fused_optim.kernels.spec import Codec
from fused_optim.kernels.triton.budget import (
    CODEC_INSTRUCTIONS,
    EXACT_INSTRUCTIONS,
    MANY_PROGRAMS,
    MASK_INSTRUCTIONS,
    TILES_OF_A_PROGRAM,
    USABLE_SHARE,
    instructions_per_byte,
    launch_shape,
    span,
)
from tests.compiling import ROOT, compiled, python

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("static"), "static")


@pytest.fixture(scope="module")
def kernels(everything: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a step and of its norm."""
    return [kernel for kernel in everything if kernel["kernel"] not in SEARCHES]


def _named(kernel: dict[str, Any]) -> str:
    return " ".join(str(kernel[key]) for key in ("kernel", "group", "storage", "arithmetic", "sm"))


def test_every_rule_is_compiled_in_both_arithmetics(kernels: list[dict[str, Any]]) -> None:
    compiled = {(k["kernel"], k["arithmetic"]) for k in kernels}
    assert compiled >= {(rule, arithmetic) for rule in RULES for arithmetic in ("exact", "fast")}
    assert {k["sm"] for k in kernels} == {80, 90, 100}


def test_one_pass(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert [kernel["read"], kernel["written"]] == kernel["model"], _named(kernel)


def _codecs(kernel: dict[str, Any]) -> list[Codec]:
    return [CODECS[name] for name in kernel["storage"].split("/")]


def _is_plain(kernel: dict[str, Any]) -> bool:
    return all(codec.name in OF_DTYPE.values() for codec in _codecs(kernel))


def test_full_tiles_move_in_vectors(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if not kernel["strided"]:
            dense = [p for codec in _codecs(kernel) for p in codec.planes if p.per <= 8]
            widths = {plane.bits // plane.per for plane in dense}
            # As many elements of every plane as make 16 bytes of the widest; threads may share a mask's byte.
            expected = {max(1, 16 * width // max(widths)) for width in widths}
            assert set(kernel["access"]) == expected, _named(kernel)


def test_scales_and_tables_are_read_once(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        codecs = _codecs(kernel)
        blocks = sum(codec.block > 1 for codec in codecs)
        # At most once each way for the neighbours that a thread has.
        assert kernel["scales"] <= 2 * blocks / launch_shape(codecs).vector, _named(kernel)
        # A value, and what tells the code.
        assert kernel["gathered"] == 2 * sum(codec.lookup is not None for codec in codecs), _named(kernel)


def test_nothing_spills(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["spilled"] == 0, _named(kernel)
        # In a masked chunk neighbours that share a byte or a counter are in different threads.
        shares = any(c.random or c.block > 1 < c.planes[0].per for c in _codecs(kernel))
        assert kernel["shared"] == 0 or kernel["kernel"] == "square_sum" or shares, _named(kernel)
        # With 168 there are three programs a multiprocessor. On sm_100 exact 4-bit states need them as well.
        three = kernel["group"] is not None or (kernel["sm"] == 100 and kernel["arithmetic"] == "exact")
        assert kernel["registers"] <= (168 if three else 128), _named(kernel)


def test_searches_for_masks_read_once(everything: list[dict[str, Any]]) -> None:
    searches = [kernel for kernel in everything if kernel["kernel"] in SEARCHES]
    assert {kernel["kernel"] for kernel in searches} == {*SEARCHES}
    for kernel in searches:
        assert [kernel["read"], kernel["written"]] == kernel["model"] == [4, 1 / 8], _named(kernel)
        assert kernel["spilled"] == kernel["shared"] == 0 and 16 in kernel["access"], _named(kernel)
        # All sums of 90 ways; a few comparisons.
        assert kernel["executed"] <= (70 if kernel["group"] is None else 16), _named(kernel)


SLACK = {"executed": 1.03, "registers": 1, "spilled": 1, "shared": 1}
"""By how much of itself each count may grow: where one instruction changes, others are ordered anew."""


@pytest.mark.parametrize("file", ["tested.json", "sm_90.json"])
def test_no_kernel_grows(file: str, everything: list[dict[str, Any]]) -> None:
    """Beside the committed counts, of what they have in common with the tests."""
    recorded = json.loads((ROOT / "bench" / "results" / "static" / file).read_text())
    compiler, own = recorded["machine"]["versions"]["triton"], importlib.metadata.version("triton")
    if compiler != own:
        pytest.skip(f"{file} was counted with Triton {compiler}, and {own} is installed")
    keys = ("kernel", "group", "storage", "strided", "arithmetic", "sm")
    before = {tuple(k[key] for key in keys): k for k in recorded["kernels"]}
    now = {tuple(k[key] for key in keys): k for k in everything}
    assert before.keys() & now.keys()
    faults = [
        f"{_named(k)}: {name} {before[key][name]:.5g} has become {k[name]:.5g}"
        for key, k in now.items()
        for name, slack in SLACK.items()
        if key in before and k[name] > slack * before[key][name]
    ]
    if file == "tested.json":
        faults += [f"{_named(k)}: not in the file" for key, k in now.items() if key not in before]
    assert not faults, "\n".join([*faults, f"If this is wanted, count anew: {recorded['command']}"])


def test_budgets_of_gpus() -> None:
    """As computed by hand from the facts in budget.py."""
    assert [instructions_per_byte(sm) for sm in (*CAPABILITIES, 120)] == [10.7, 6.9, 4.9, 6.9]


def test_a_kernel_that_spills_or_moves_more_is_at_fault() -> None:
    zeros = dict.fromkeys((field.name for field in fields(Report)), 0)
    good = Report(
        **{**zeros, "read": 4.0, "written": 2.0, "model": (4.0, 2.0), "executed": 41, "budget": 41.4}
    )
    assert good.fault is None and good.bound == "memory"
    assert replace(good, executed=42).bound == "instructions"
    assert replace(good, spilled=8).fault == "spills 8 bytes"
    assert replace(good, written=2.25).fault == "moves 4 + 2.25 bytes, not 4 + 2"


def test_storages_are_chosen_by_name() -> None:
    chosen = _parser().parse_args(["--storages", "bf16_split8/int4", "fp32/bf16/bf16"]).storages
    assert chosen == [("bf16_split8", "int4", "bf16"), ("fp32", "bf16", "bf16")]
    with pytest.raises(SystemExit):
        _parser().parse_args(["--storages", "int8/fp32"])


def test_exact_kernels_round_every_operation(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if kernel["arithmetic"] == "exact" and kernel["kernel"] != "square_sum":
            assert kernel["contracted"] == kernel["approximate"] == 0, _named(kernel)


def test_fast_codecs_round_every_operation(kernels: list[dict[str, Any]]) -> None:
    """Only the rule's operations are contracted: as many for an element as with plain storage."""
    contracted: dict[tuple[object, ...], set[float]] = {}
    for kernel in kernels:
        # The lines that are 4-bit values meet them contracted or not.
        if kernel["arithmetic"] == "fast" and "int4" not in kernel["storage"].split("/"):
            shape = launch_shape(_codecs(kernel))
            elements = (shape.tile + shape.chunk) / (32 * shape.warps)
            rule = kernel["kernel"], kernel["group"]
            contracted.setdefault(rule, set()).add(kernel["contracted"] / elements)
    assert all(len(counts) == 1 for counts in contracted.values()), contracted


def _share(kernel: dict[str, Any]) -> float:
    """What of the budget a fast kernel may use."""
    codecs = _codecs(kernel)
    if not any(codec.block > 1 for codec in codecs):
        return USABLE_SHARE
    if "int4" in [codec.name for codec in codecs]:
        # So few bytes that instructions set the time: 0.9 with fp32, 1.7 with random rounding.
        return 0.95 if codecs[0].name == "fp32" else 1.8
    return 0.65 if codecs[0].name == "fp32" else 0.8


def test_instructions_leave_memory_the_bottleneck(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if not kernel["strided"] and "exact" in (kernel["auto"], kernel["kernel"]):
            assert kernel["share"] <= USABLE_SHARE or not _is_plain(kernel), _named(kernel)
        # Of an H200's budget; that of a B200 is smaller, and the code nearly the same.
        if kernel["arithmetic"] == "fast" and kernel["sm"] == 90:
            assert kernel["share"] <= _share(kernel), (_named(kernel), kernel["share"])


def test_programs_of_large_launches_work_on_several_tiles() -> None:
    assert span(0, 2048) == span(MANY_PROGRAMS * 2048, 2048) == 2048
    assert span(2 * MANY_PROGRAMS * 2048, 2048) == span(4 * MANY_PROGRAMS * 2048 - 1, 2048) == 2 * 2048
    assert span(2**40, 4096) == TILES_OF_A_PROGRAM * 4096


def test_a_mask_of_two_in_four_adds_few_instructions(kernels: list[dict[str, Any]]) -> None:
    def key(kernel: dict[str, Any], storage: str) -> tuple[object, ...]:
        return kernel["kernel"], storage, kernel["arithmetic"], kernel["sm"]

    executed = {
        key(k, k["storage"]): k["executed"] for k in kernels if k["group"] is None and not k["strided"]
    }
    twins = [(k["executed"], key(k, k["storage"].replace("mask/", ""))) for k in kernels if k["group"] == 4]
    added = [count - executed[twin] for count, twin in twins if twin in executed]
    assert len(added) == 4
    assert max(added) <= 25, added


def test_exact_costs_are_those_counted(kernels: list[dict[str, Any]]) -> None:
    counted = set(EXACT_INSTRUCTIONS)
    assert counted == {*RULES, CAST_ADAM.name}, "python -m bench static counts a new rule's instructions"
    dear = {name for name in CODECS if name not in ("fp32", "bf16", "fp16", "fp64", "blank", "mask")}
    assert set(CODEC_INSTRUCTIONS) == dear, "python -m bench static counts a new codec's instructions"
    exact = [k for k in kernels if k["arithmetic"] == "exact" and not k["strided"]]
    for rule in RULES:
        bound = EXACT_INSTRUCTIONS[rule]
        counts = [k["executed"] for k in exact if k["kernel"] == rule and _is_plain(k)]
        assert 0.8 * bound <= max(counts) <= bound, (rule, max(counts))
    for kernel in exact:
        if kernel["kernel"] != "square_sum":
            costs = sum(CODEC_INSTRUCTIONS.get(codec.name, 0) for codec in _codecs(kernel))
            costs += 0 if kernel["group"] is None else MASK_INSTRUCTIONS[kernel["group"]]
            assert kernel["executed"] <= EXACT_INSTRUCTIONS[kernel["kernel"]] + costs, _named(kernel)


_TWINS = """
import sys
from pathlib import Path
from fused_optim.kernels.triton.driver import _sources
text = "import triton\\n@triton.jit\\ndef encode(x):\\n    return x + {}\\n"
twins = []
for number in (1, 2):
    folder = Path(sys.argv[1]) / str(number)
    folder.mkdir()
    (folder / "twin.py").write_text(text.format(number))
    sys.path.insert(0, str(folder))
    sys.modules.pop("twin", None)
    twins.append(__import__("twin").encode)
    sys.path.pop(0)
assert str((twins[0], 1)) == str((twins[1], 1)), "Triton tells them apart by itself now: SOURCES may go"
assert _sources(twins[0]) != _sources(twins[1])
"""


def test_a_changed_codec_is_compiled_anew(tmp_path: Path) -> None:
    python(tmp_path, "-c", _TWINS, str(tmp_path))
