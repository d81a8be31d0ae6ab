"""Compiled Triton kernels, run instruction by instruction without a GPU, equal the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.compiling import python
from tests.ptx import Machine

pytest.importorskip("triton")

# Every codec in its own role, the main rules, both arithmetics.
CASES = {
    "int8": ("adam/fp32/int8/exact", "adam/bf16/int8/fast", "adam/bf16_split8/int8_companded/exact"),
    "masks": ("sr_ste/bf16/int8/exact", "cast/fp32/fp32/exact"),
    "modes": (
        "amsgrad/fp32/fp32/exact",
        "nesterov/fp32/bf16/exact",
        "careful/fp32/int8/exact",
        "spectral/fp32/fp32/exact",
        "adam/bf16_split8/int4/strided",
        "adam/bf16/int8/strided",
        "lion/fp16/fp8/fast",
    ),
    "others": (
        "adam/fp16/fp8/exact",
        "lion/bf16_split16/fp32/exact",
        "adam/bf16_sr/int4/exact",
        "sgd_momentum/fp16_kahan/bf16_sr/exact",
        "lion/bf16_kahan/fp16/exact",
    ),
}


@pytest.mark.parametrize(
    "cases", [pytest.param(c, id=n, marks=[pytest.mark.slow] * (n == "modes")) for n, c in CASES.items()]
)
def test_compiled_kernels_equal_the_reference(cases: tuple[str, ...], tmp_path: Path) -> None:
    """Programs of several tiles, tails, tensors off boundaries, blocks with NaN, Inf and zeros."""
    assert python(tmp_path, "-m", "tests.emulated", *cases) == ""


def _run(body: str, *arguments: np.ndarray) -> None:
    """Runs PTX for 64 threads; each argument's address is in %a0, %a1 ..., offset by the thread's word."""
    load = "".join(
        f"ld.param.u64 %b{i}, [kernel_param_{i}]; add.s64 %a{i}, %b{i}, %o;" for i in range(len(arguments))
    )
    head = "mov.u32 %t, %tid.x; mul.wide.u32 %o, %t, 4;"
    ptx = f".visible .entry kernel()\n{{\n{head}{load}{body} ret;\n}}"
    Machine(ptx, 1, 64, [x.ctypes.data for x in arguments], 0).run()


def test_threads_that_branch_apart_meet_again() -> None:
    x, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    body = """
        ld.global.b32 {%x}, [%a0]; setp.lt.u32 %p, %x, 40; mov.u32 %s, 0;
        @%p bra $L1; add.s32 %s, %x, 1000; bra $L2;
        $L1: add.s32 %s, %s, %x; add.s32 %x, %x, 16; setp.lt.u32 %p, %x, 40; @%p bra $L1;
        $L2: shfl.sync.bfly.b32 %y, %s, 1, 31, -1; st.global.b32 [%a1], {%y};
    """
    _run(body, x, out)
    looped = [sum(range(i, 40, 16)) if i < 40 else i + 1000 for i in range(64)]
    assert out.tolist() == [looped[i ^ 1] for i in range(64)]


def test_bytes_are_permuted_and_signs_repeated() -> None:
    x, out = np.full(64, 0x81F27304, np.uint32), np.zeros(64, np.uint32)
    _run("ld.global.b32 {%x}, [%a0]; prmt.b32 %y, %x, 0x4B000000, 0x7B94; st.global.b32 [%a1], {%y};", x, out)
    assert (out == 0x4BFF0000).all()


def test_products_of_bytes_are_added() -> None:
    x, out = np.full(64, 0xFE03_80FF, np.uint32), np.zeros(64, np.int32)
    dots = {
        "dp4a.u32.u32 %y, %x, 0x02010181, 7": 0xFF * 0x81 + 0x80 + 3 + 2 * 0xFE + 7,
        "dp2a.lo.s32.s32 %y, 0x0100FFFF, %x, -5": 1 - 0x100 * 0x80 - 5,
        "dp2a.hi.s32.s32 %y, 0x01000002, %x, 9": 2 * 3 - 0x100 * 2 + 9,
        "lop3.b32 %y, %x, 0x100, 0xF, 0xEA": 0xF,
    }
    for dot, expected in dots.items():
        _run(f"ld.global.b32 {{%x}}, [%a0]; {dot}; st.global.b32 [%a1], {{%y}};", x, out)
        assert (out == expected).all(), dot


def test_what_is_not_known_is_refused() -> None:
    x = np.zeros(65, np.uint32)
    with pytest.raises(NotImplementedError, match="popc"):
        _run("popc.b32 %x, %t;", x)
    with pytest.raises(AssertionError, match="not aligned"):
        _run("ld.global.v2.b32 {%x, %y}, [%a0];", x)
