// A value in registers of a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

using F = float;
using U = uint32_t;
using H = uint16_t;
using B = uint8_t;
using Mask = bool;

FO_INLINE F select(bool mask, F yes, F no) { return mask ? yes : no; }
FO_INLINE U select(bool mask, U yes, U no) { return mask ? yes : no; }
FO_INLINE F larger(F a, F b) { return a > b ? a : b; }
FO_INLINE U where_above_zero(F x, U yes) { return x > 0 ? yes : 0; }
FO_INLINE U as_bits(F x) { return __float_as_uint(x); }
FO_INLINE F as_float(U x) { return __uint_as_float(x); }
FO_INLINE U widen(H x) { return x; }
FO_INLINE U widen(B x) { return x; }
FO_INLINE H narrow(U x) { return static_cast<H>(x); }
FO_INLINE H high_half(U x) { return static_cast<H>(x >> 16); }
FO_INLINE B low_byte(U x) { return static_cast<B>(x); }
FO_INLINE U sign_extend(B x) { return static_cast<U>(static_cast<int8_t>(x)); }
FO_INLINE U sign_extend(H x) { return static_cast<U>(static_cast<int16_t>(x)); }
// In the fast arithmetic a written a * b may become part of another operation, and a / b an approximation.
FO_INLINE F product(F a, F b) { return __fmul_rn(a, b); }
FO_INLINE F sum(F a, F b) { return __fadd_rn(a, b); }
FO_INLINE F difference(F a, F b) { return __fsub_rn(a, b); }
FO_INLINE F quotient(F a, F b) { return __fdiv_rn(a, b); }
#ifdef __CUDA_ARCH__
FO_INLINE F rough_reciprocal(F x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
FO_INLINE F rough_reciprocal_root(F x) {
  asm("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
FO_INLINE F rough_root(F x) {
  asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
// Four bytes of `a` and then `b`, by the digits of `numbers`; with 8 added copies of their signs.
FO_INLINE U bytes_of(U a, U b, U numbers) {
  asm("prmt.b32 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(numbers));
  return a;
}
#else
FO_INLINE U bytes_of(U a, U b, U numbers) {
  U bytes = 0;
  for (int i = 0; i < 4; ++i) {
    U number = numbers >> 4 * i, from = (number & 4 ? b : a) >> 8 * (number & 3) & 0xff;
    bytes |= (number & 8 ? (from & 0x80 ? 0xff : 0) : from) << 8 * i;
  }
  return bytes;
}
FO_INLINE F rough_reciprocal(F x) { return 1.0f / x; }
FO_INLINE F rough_reciprocal_root(F x) { return 1.0f / sqrtf(x); }
FO_INLINE F rough_root(F x) { return sqrtf(x); }
#endif
#if FO_EXACT
FO_INLINE F ratio(F a, F b) { return a / b; }
FO_INLINE F root(F x) { return sqrtf(x); }
FO_INLINE F normal(F x) { return x; }
#else
// nvcc's own, for all numbers, are 9 and 5 instructions. Here denormals and what is above 2^126 count as zero
// and infinity, and so what makes a divisor positive must be a normal number.
FO_INLINE F ratio(F a, F b) { return a * rough_reciprocal(b); }
FO_INLINE F root(F x) { return rough_root(x); }
FO_INLINE F normal(F x) { return fmaxf(x, 0x1p-126f); }
#endif
// Quotient and root of a codec's values, none of which is large, with b from 1 to 254. One correction is
// enough for them (tests/test_triton.py tries all quotients of codes), and there are no calls for operands
// from the ends of the range, which cost registers wherever they may happen.
FO_INLINE F small_quotient(F a, F b) {
  F rough = rough_reciprocal(b), q = product(a, rough);
  return __fmaf_rn(rough, __fmaf_rn(-b, q, a), q);
}
FO_INLINE F small_root(F x) {
  F rough = rough_reciprocal_root(x), root = product(x, rough);
  return __fmaf_rn(__fmaf_rn(-root, root, x), product(rough, 0.5f), root);
}
FO_INLINE bool above(U a, U b) { return static_cast<int32_t>(a) > static_cast<int32_t>(b); }
FO_INLINE U at_most(U x, U limit) { return above(x, limit) ? limit : x; }
FO_INLINE U at_least(U x, U limit) { return above(limit, x) ? limit : x; }
FO_INLINE F to_float(U x) { return __int2float_rn(static_cast<int32_t>(x)); }
FO_INLINE U round_to_integer(F x) { return static_cast<U>(__float2int_rn(x)); }
// Of the lower half of `a`.
FO_INLINE uint64_t product(uint64_t a, uint32_t b) { return (a & 0xffffffffu) * b; }
// The bits of a result of arithmetic, every NaN made one: to a GPU there is one NaN, of all bits but the
// sign.
#ifdef __CUDA_ARCH__
FO_INLINE U canonical(F x) { return static_cast<U>(min(__float_as_int(x), 0x7fc00000)); }
#else
FO_INLINE U canonical(F x) { return x != x ? 0x7fc00000u : as_bits(x); }
#endif
FO_INLINE F look_up(const float* table, U index) { return __ldg(table + index); }
// The same byte of four words, and their signs.
template <U number>
FO_INLINE U four_bytes(const U* x) {
  constexpr U two = number | (number + 4) << 4;
  return bytes_of(bytes_of(x[0], x[1], two), bytes_of(x[2], x[3], two), 0x5410);
}
FO_INLINE U signs_of_four(const U* x) { return four_bytes<11>(x); }
FO_INLINE U signed_byte(U x) { return static_cast<U>(static_cast<int8_t>(x)); }
FO_INLINE F pick(const float (&table)[16], U index) { return table[index]; }
FO_INLINE H float_to_bfloat(F x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#ifdef __CUDA_ARCH__
FO_INLINE U bfloat_pair(F low, F high) {
  U pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#else
FO_INLINE U bfloat_pair(F low, F high) { return float_to_bfloat(low) | float_to_bfloat(high) << 16; }
#endif
FO_INLINE F half_to_float(H x) { return __half2float(__ushort_as_half(x)); }
FO_INLINE H float_to_half(F x) { return __half_as_ushort(__float2half_rn(x)); }

}  // namespace
