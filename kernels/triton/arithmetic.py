"""Arithmetic as the rules need it, exact or fast, and as the codecs need it, the same bits in both."""

import triton
import triton.language as tl

PROPAGATE = tl.constexpr(tl.PropagateNan.ALL)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Adding this rounds |x| < 2**22 to an integer, to nearest even, which is then the sum's lower bits.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def div(x, y, EXACT: tl.constexpr):
    """Correctly rounded, or within 2 ulp for a normal ``y`` of less than 2**126."""
    if EXACT or INTERPRETED:
        return tl.div_rn(x, y)
    else:
        # The compiler's own, for all y, is 9 instructions, a third of AdamW's.
        return x * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sqrt(x, EXACT: tl.constexpr):
    """Correctly rounded, or approximate."""
    if EXACT:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def normal(eps, EXACT: tl.constexpr):
    """What is added to a divisor; in fast arithmetic at least 2**-126, because less counts as zero there."""
    if EXACT:
        return eps
    else:
        return tl.maximum(eps, 2.0**-126)


@triton.jit
def decayed(p, decay, update, EXACT: tl.constexpr):
    """The parameter after a step; in fast arithmetic it is rounded after its decay as well, as torch's is."""
    if EXACT or INTERPRETED:
        return p - (update + decay * p)
    else:
        # Both contracted: one instruction less.
        return (p - decay * p) - update


@triton.jit
def maximum(x, y):
    """The larger one; NaN if either is."""
    return tl.maximum(x, y, propagate_nan=PROPAGATE)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def times(x, y):
    """A product that is rounded before anything is added to it, in fast arithmetic too."""
    if INTERPRETED:
        return x * y
    else:
        # libdevice has this too, but compiled to flush denormals.
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def minus(x, y):
    """A difference of rounded values, in fast arithmetic too."""
    if INTERPRETED:
        return x - y
    else:
        return tl.inline_asm_elementwise(
            "sub.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def magnitude(x):
    """Without its sign; the compiler's own is an instruction where ``x`` comes out of inline PTX."""
    if INTERPRETED:
        return tl.abs(x)
    else:
        return tl.inline_asm_elementwise(
            "abs.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """Correctly rounded; shorter than a division by far."""
    if INTERPRETED:
        return tl.div_rn(1.0, x)
    else:
        return tl.inline_asm_elementwise(
            "rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def quotient(x, y):
    """``x / y`` for ``1 <= y <= 254`` and ``|x| <= 254.5``, rounded correctly unless it is below 2**-20.

    One correction of an approximate reciprocal that is within 2 ulp; the compiler's own division makes
    two and branches for huge and tiny numbers. tests/test_triton.py tries all that the codecs divide.
    """
    if INTERPRETED:
        return tl.div_rn(x, y)
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 r, q, m, e;
            rcp.approx.ftz.f32 r, $2;
            mul.rn.ftz.f32 q, $1, r;
            neg.ftz.f32 m, $2;
            fma.rn.ftz.f32 e, m, q, $1;
            fma.rn.ftz.f32 $0, e, r, q; }""",
            "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def root(x):
    """The square root of ``x < 1.01`` within an ulp, near enough for codes; NaN for 0 and denormals there."""
    if INTERPRETED:
        return tl.sqrt_rn(x)
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 r, h, q, m, e;
            rsqrt.approx.ftz.f32 r, $1;
            mul.rn.ftz.f32 q, $1, r;
            mul.rn.ftz.f32 h, r, 0f3F000000;
            neg.ftz.f32 m, q;
            fma.rn.ftz.f32 e, m, q, $1;
            fma.rn.ftz.f32 $0, e, h, q; }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x):
    """The integer nearest to ``|x| < 2**22``, ties to even."""
    return (x + ROUNDER).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def below(x, y):
    """-1 where ``x < y``, else 0, for integers whose difference is one; comparing would take a predicate."""
    if INTERPRETED:
        return (x - y) >> 31
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .s32 d; sub.s32 d, $1, $2; shr.s32 $0, d, 31; }",
            "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
