"""bench/machine_follow.py on a few instructions: which way a block goes, and what it moves."""

from __future__ import annotations

import pytest

from bench.machine_follow import Block, Way
from bench.machine_kernel import Kernel
from bench.machine_operands import UnknownCodeError, decoded
from bench.machine_words import THREADS

WARPS = THREADS // 32


class Given:
    """Bank 0 by offset, bank 2 as a table of jumps, and no memory."""

    def __init__(self, constants: dict[int, int] | None = None) -> None:
        self.constants = constants or {}

    def constant(self, bank: int, offset: int, width: int) -> int | None:
        return self.constants.get(offset) if bank == 0 else 0x40 + 4 * offset

    def load(self, address: int, width: int) -> int | None:
        return None


def _follow(text: str, constants: dict[int, int] | None = None) -> Way:
    """Through instructions that stand 0x10 apart, one a line."""
    lines = [line.strip() for line in text.strip().splitlines()]
    sass = "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))
    return Block(Kernel("kernel", decoded(sass)), Given(constants)).follow()


DISPATCH = """
    LDC R2, c[0x0][0x210]
    IMAD.SHL.U32 R3, R2, 0x4, RZ
    LDC R4, c[0x2][R3]
    BRX R4 -0x40
    NOP
    EXIT
    EXIT
"""


@pytest.mark.parametrize(("codec", "executed"), [(0, 6), (1, 5), (2, 5)])
def test_a_launch_decides(codec: int, executed: int) -> None:
    way = _follow(DISPATCH, {0x210: codec})
    assert way.per_thread == executed and way.issued == WARPS * executed and not way.guessed


def test_a_jump_that_nothing_decides_is_an_error() -> None:
    with pytest.raises(UnknownCodeError, match=r"kernel at 0x30: BRX.*where it jumps to is not known"):
        _follow(DISPATCH)


RARE = """
    LDG.E.EF R2, [R4.64]
    FCHK P0, R2, R3
    @!P0 BRA 0x60
    MOV R8, 0x50
    CALL.REL.NOINC 0x80
    BRA 0x70
    FFMA R2, R2, R3, R2
    EXIT
    RET.REL.NODEC R8 0x0
"""


def test_rare_cases_are_left_out() -> None:
    way = _follow(RARE)
    assert way.per_thread == 5 and way.guessed == {0x20}


def test_no_elements_behind_what_is_not_known() -> None:
    """Nor another codec."""
    with pytest.raises(UnknownCodeError, match=r"at 0x20: BRA 0x60.*depend on an unknown branch"):
        _follow(RARE.replace("MOV R8, 0x50", "STG.E.EF [R4.64], R2"))
    with pytest.raises(UnknownCodeError, match=r"at 0x10: STG.*which elements it moves is not known"):
        _follow("LDG.E R4, [R2.64]\nSTG.E.EF [R4.64], R2\nEXIT")


def test_an_unknown_instruction_is_an_error() -> None:
    with pytest.raises(UnknownCodeError, match=r"kernel at 0x0: UTMALDG.2D.*this instruction is not known"):
        _follow("UTMALDG.2D R2, R3\nEXIT")


def test_threads_part_and_meet() -> None:
    """Thread 0 prepares what all read, and one warp issues what it does."""
    way = _follow(
        """
        S2R R0, SR_TID.X
        BSSY B0, 0x60
        ISETP.NE.AND P0, PT, R0, RZ, PT
        @P0 BRA 0x50
        STS.64 [RZ], R6
        BSYNC B0
        BAR.SYNC.DEFER_BLOCKING 0x0
        LDS.64 R2, [RZ]
        ISETP.EQ.AND P1, PT, R2, RZ, PT
        @P1 EXIT
        NOP
        EXIT
        """
    )
    assert way.issued == WARPS * 9 + 1


def test_one_scale_for_a_block_of_elements() -> None:
    """Threads have addresses of their own, beyond 32 bits, and the first of sixteen stores."""
    way = _follow(
        """
        S2R R0, SR_TID.X
        LDC.64 R4, c[0x0][0x210]
        LOP3.LUT P0, RZ, R0, 0xf, RZ, 0xc0, !PT
        LEA R2, P1, R0, R4, 0x3
        LEA.HI.X R3, R0, R5, RZ, 0x3, P1
        STG.E.EF.64 desc[UR6][R2.64], R8
        SHF.R.U32.HI R0, RZ, 0x4, R0
        IADD3 R2, P1, R4, -R0, RZ
        IMAD.X R3, R5, 0x1, ~RZ, P1
        @!P0 STG.E.EF.U16 desc[UR6][R2.64], R8
        EXIT
        """,
        {0x210: 0x3FFFFFFF8},
    )
    wide = {access.address for access in way.accesses if access.width == 8}
    assert wide == {0x3FFFFFFF8 + 8 * i for i in range(THREADS)}
    assert {a.address for a in way.accesses if a.width == 2} == {
        0x3FFFFFFF8 - i for i in range(THREADS // 16)
    }


def test_predicates_in_the_bits_of_a_register() -> None:
    """Bits beside them that are not known do no harm."""
    text = """
        LDG.E R2, [R4.64]
        FSETP.GT.AND P1, PT, R2, RZ, PT
        LDC R3, c[0x0][0x210]
        ISETP.NE.AND P0, PT, R3, RZ, PT
        LOP3.LUT R2, R2, 0xfffffffe, RZ, 0xc0, !PT
        @P0 LOP3.LUT R2, R2, 0x1, RZ, 0xfc, !PT
        @P1 LOP3.LUT R2, R2, 0x4, RZ, 0xfc, !PT
        P2R R6, PR, R2, 0x2
        R2P PR, R6, 0x1
        @P0 EXIT
        NOP
        EXIT
    """
    assert _follow(text, {0x210: 1}).per_thread == 10
    assert _follow(text, {0x210: 0}).per_thread == 12
    assert not _follow(text, {0x210: 0}).guessed


SUMS = """
    LDC R2, c[0x0][0x210]
    PRMT R3, R2, 0x9010, RZ
    SHF.R.S32.HI R3, RZ, 0x4, R3
    VIMNMX R3, PT, PT, R3, -0x7, PT
    IMAD.WIDE R4, R3, 0x3, RZ
    SEL R4, R4, R5, P6
    ISETP.EQ.AND P0, PT, R4, -0x1, PT
    ISETP.GT.U32.OR P0, PT, R4, 0x5, !P0
    @P0 EXIT
    NOP
    EXIT
"""


def test_signed_and_unsigned_integers() -> None:
    """0x8070 is made negative by PRMT's copy of a sign; its smaller one times 3 has an upper half of ones."""
    assert _follow(SUMS, {0x210: 0x8070}).per_thread == 9
    assert _follow(SUMS.replace("0x5, !P0", "0xffffffff, !P0"), {0x210: 0x8070}).per_thread == 11
