// A value in registers: F holds 16 neighbouring floats under g++ and one float under nvcc.
//
// Rules and codecs are written once over F (float), U (32 bits), H (16 bits) and B (8 bits). Everything has
// internal linkage: this is compiled once per instruction set, and the linker must never mix those copies.
#pragma once

#include <cstdint>

#include "inline.h"

#ifdef __CUDACC__

#include "pack_cuda.h"

#else

#include <cmath>
#include <cstring>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int PARTS = 1;
// GCC 12 warns of an uninitialised register in the intrinsics without a mask.
constexpr __mmask16 ALL = 0xffff;
#elif defined(__AVX2__)
constexpr int PARTS = 2;
#else
constexpr int PARTS = 4;
#endif

#define FO_EACH_PART _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; ++i)
#define FO_OPERATOR(op)                               \
  friend FO_INLINE Pack operator op(Pack a, Pack b) { \
    FO_EACH_PART a.part[i] = a.part[i] op b.part[i];  \
    return a;                                         \
  }
#define FO_COMPARISON(op)                                      \
  friend FO_INLINE Pack<int32_t> operator op(Pack a, Pack b) { \
    Pack<int32_t> mask;                                        \
    FO_EACH_PART mask.part[i] = a.part[i] op b.part[i];        \
    return mask;                                               \
  }

// As many native registers as 16 values need, because GCC keeps a vector wider than those in memory.
template <class T>
struct Pack {
  typedef T Part __attribute__((vector_size(sizeof(T) * LANES / PARTS)));
  Part part[PARTS];

  Pack() = default;
  FO_INLINE Pack(T x) { FO_EACH_PART part[i] = x - Part{}; }

  FO_OPERATOR(+)
  FO_OPERATOR(-)
  FO_OPERATOR(*)
  FO_OPERATOR(/)
  FO_OPERATOR(&)
  FO_OPERATOR(|)
  FO_OPERATOR(<<)
  FO_OPERATOR(>>)
  FO_OPERATOR(^)
  FO_COMPARISON(<)
  FO_COMPARISON(>)
  FO_COMPARISON(!=)
};
#undef FO_OPERATOR
#undef FO_COMPARISON

// Bytes fill one register of 16 on every instruction set.
template <>
struct Pack<uint8_t> {
  typedef uint8_t Part __attribute__((vector_size(LANES)));
  Part part[1];
};

using F = Pack<float>;
using U = Pack<uint32_t>;
using H = Pack<uint16_t>;
using B = Pack<uint8_t>;
using Mask = Pack<int32_t>;

// Part by part: GCC moves a larger object through the stack in 16-byte pieces.
template <class T>
FO_INLINE Pack<T> load(const void* from) {
  using Part = typename Pack<T>::Part;
  Pack<T> x;
  _Pragma("GCC unroll 4") for (size_t i = 0; i < sizeof x / sizeof(Part); ++i)
      memcpy(&x.part[i], static_cast<const char*>(from) + i * sizeof(Part), sizeof(Part));
  return x;
}
template <class T>
FO_INLINE void store(void* to, Pack<T> x) {
  using Part = typename Pack<T>::Part;
  _Pragma("GCC unroll 4") for (size_t i = 0; i < sizeof x / sizeof(Part); ++i)
      memcpy(static_cast<char*>(to) + i * sizeof(Part), &x.part[i], sizeof(Part));
}

FO_INLINE F select(Mask mask, F yes, F no) {
  FO_EACH_PART yes.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return yes;
}
FO_INLINE U select(Mask mask, U yes, U no) {
  FO_EACH_PART yes.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return yes;
}
// b for a NaN in a.
FO_INLINE F larger(F a, F b) {
#if defined(__AVX512F__)
  a.part[0] = _mm512_maskz_max_ps(ALL, a.part[0], b.part[0]);
#else
  FO_EACH_PART a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
#endif
  return a;
}
FO_INLINE U where_above_zero(F x, U yes) {
#if defined(__AVX512F__)
  __mmask16 mask = _mm512_cmp_ps_mask(x.part[0], _mm512_setzero_ps(), _CMP_GT_OQ);
  yes.part[0] =
      reinterpret_cast<U::Part>(_mm512_maskz_mov_epi32(mask, reinterpret_cast<__m512i>(yes.part[0])));
#else
  FO_EACH_PART yes.part[i] &= reinterpret_cast<U::Part>(x.part[i] > F::Part{});
#endif
  return yes;
}
FO_INLINE U as_bits(F x) {
  U r;
  FO_EACH_PART r.part[i] = reinterpret_cast<U::Part>(x.part[i]);
  return r;
}
FO_INLINE F as_float(U x) {
  F r;
  FO_EACH_PART r.part[i] = reinterpret_cast<F::Part>(x.part[i]);
  return r;
}
FO_INLINE U widen(H x) {
  U r;
#if defined(__AVX512F__)
  r.part[0] =
      reinterpret_cast<U::Part>(_mm512_maskz_cvtepu16_epi32(ALL, reinterpret_cast<__m256i>(x.part[0])));
#elif defined(__AVX2__)
  FO_EACH_PART r.part[i] =
      reinterpret_cast<U::Part>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x.part[i])));
#else
  FO_EACH_PART r.part[i] = __builtin_convertvector(x.part[i], U::Part);
#endif
  return r;
}
FO_INLINE H narrow(U x) {
  H r;
  FO_EACH_PART r.part[i] = __builtin_convertvector(x.part[i], H::Part);
  return r;
}
FO_INLINE H high_half(U x) {
#if defined(__AVX512F__)
  const __m512i odd = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011,
                                       0xf000d, 0xb0009, 0x70005, 0x30001);
  H r;
  __m512i halves = _mm512_maskz_permutexvar_epi16(-1, odd, reinterpret_cast<__m512i>(x.part[0]));
  memcpy(&r, &halves, sizeof r);
  return r;
#elif defined(__AVX2__)
  H r;
  x = x >> 16;
  __m256i mixed =
      _mm256_packus_epi32(reinterpret_cast<__m256i>(x.part[0]), reinterpret_cast<__m256i>(x.part[1]));
  __m256i halves = _mm256_permute4x64_epi64(mixed, 0xd8);
  r.part[0] = reinterpret_cast<H::Part>(_mm256_castsi256_si128(halves));
  r.part[1] = reinterpret_cast<H::Part>(_mm256_extracti128_si256(halves, 1));
  return r;
#else
  return narrow(x >> 16);
#endif
}

FO_INLINE F sqrt(F x) {
#if defined(__AVX512F__)
  x.part[0] = _mm512_maskz_sqrt_ps(ALL, x.part[0]);
#elif defined(__AVX2__)
  FO_EACH_PART x.part[i] = _mm256_sqrt_ps(x.part[i]);
#elif defined(__SSE2__)
  FO_EACH_PART x.part[i] = _mm_sqrt_ps(x.part[i]);
#else
  FO_EACH_PART for (int lane = 0; lane < LANES / PARTS; ++lane) x.part[i][lane] = sqrtf(x.part[i][lane]);
#endif
  return x;
}

FO_INLINE F product(F a, F b) { return a * b; }
FO_INLINE F sum(F a, F b) { return a + b; }
FO_INLINE F difference(F a, F b) { return a - b; }
FO_INLINE F quotient(F a, F b) { return a / b; }
// Of rules, which CUDA's fast arithmetic approximates.
FO_INLINE F ratio(F a, F b) { return a / b; }
FO_INLINE F root(F x) { return sqrt(x); }
FO_INLINE F normal(F x) { return x; }
#if defined(__AVX512F__)
// Quotient and root of a codec's values, none of which is large, with b from 1/4 to 256: approximated and
// corrected, because the divider takes five times as long. What is near 2^-100 is not exact here.
FO_INLINE F small_quotient(F a, F b) {
  const __m512 x = a.part[0], y = b.part[0], rough = _mm512_maskz_rcp14_ps(ALL, y);
  const __m512 inverse = _mm512_fmadd_ps(rough, _mm512_fnmadd_ps(y, rough, _mm512_set1_ps(1.0f)), rough);
  const __m512 q = _mm512_mul_ps(x, inverse);
  a.part[0] = _mm512_fmadd_ps(inverse, _mm512_fnmadd_ps(y, q, x), q);
  return a;
}
FO_INLINE F small_root(F x) {
  const __m512 y = x.part[0];
  const __m512 half = _mm512_set1_ps(0.5f), rough = _mm512_maskz_rsqrt14_ps(ALL, y);
  const __m512 first = _mm512_mul_ps(y, rough), half_rough = _mm512_mul_ps(rough, half);
  const __m512 error = _mm512_fnmadd_ps(half_rough, first, half);
  const __m512 root = _mm512_fmadd_ps(first, error, first);
  const __m512 half_inverse = _mm512_fmadd_ps(half_rough, error, half_rough);
  x.part[0] = _mm512_fmadd_ps(_mm512_fnmadd_ps(root, root, y), half_inverse, root);
  return x;
}
#else
FO_INLINE F small_quotient(F a, F b) { return a / b; }
FO_INLINE F small_root(F x) { return sqrt(x); }
#endif

FO_INLINE U canonical(F x) { return select(x != x, U(0x7fc00000u), as_bits(x)); }

// Not AVX-512's own conversion: that one takes denormals for zero.
FO_INLINE H float_to_bfloat(F x) {
  U bits = as_bits(x), nearest = U(0x7fffu) + ((bits >> 16) & 1u);
  // Of a NaN, which is quiet, rounding could make an infinity.
  return high_half(bits + select(x != x, U(0u), nearest));
}

#if defined(__AVX512F__)
FO_INLINE F half_to_float(H x) {
  F r;
  r.part[0] = _mm512_maskz_cvtph_ps(ALL, reinterpret_cast<__m256i>(x.part[0]));
  return r;
}
FO_INLINE H float_to_half(F x) {
  H r;
  r.part[0] = reinterpret_cast<H::Part>(_mm512_maskz_cvtps_ph(ALL, x.part[0], _MM_FROUND_TO_NEAREST_INT));
  return r;
}
#elif defined(__AVX2__)
FO_INLINE F half_to_float(H x) {
  F r;
  FO_EACH_PART r.part[i] = _mm256_cvtph_ps(reinterpret_cast<__m128i>(x.part[i]));
  return r;
}
FO_INLINE H float_to_half(F x) {
  H r;
  FO_EACH_PART r.part[i] = reinterpret_cast<H::Part>(_mm256_cvtps_ph(x.part[i], _MM_FROUND_TO_NEAREST_INT));
  return r;
}
#else
FO_INLINE F half_to_float(H x) {
  U half = widen(x), sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  // Shifted into a float's fields, the exponent is 112 too small; the product also normalises denormals.
  U finite = as_bits(as_float(magnitude << 13) * F(0x1p112f));
  U special = (magnitude << 13) | 0x7f800000u;
  return as_float(select(magnitude > U(0x7bffu), special, finite) | sign);
}
FO_INLINE H float_to_half(F x) {
  U bits = as_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // One half denormal is the spacing of floats at 0.5, so the addition rounds to it.
  U denormal = as_bits(as_float(magnitude) + F(0.5f)) - 0x3f000000u;
  U special = select(magnitude > U(0x7f800000u), U(0x7e00u), U(0x7c00u));
  U finite = select(magnitude < U(0x38800000u), denormal, normal);
  return narrow(select(magnitude < U(0x47800000u), finite, special) | sign);
}
#endif

}  // namespace

#include "pack_integers.h"
#endif

namespace {

FO_INLINE F maximum(F a, F b) {
  // A NaN in either is the result: in a by the second test, in b because the first one fails.
  return select(a > b, a, select(a != a, a, b));
}
FO_INLINE U magnitude(F x) { return as_bits(x) & U(0x7fffffffu); }
FO_INLINE F bfloat_to_float(H x) { return as_float(widen(x) << 16); }
// What is left of x when it is rounded, if that is finite.
FO_INLINE F cut_off(F x, F rounded) {
  return select(above(U(0x7f800000u), magnitude(rounded)), difference(x, rounded), F(0.0f));
}

// 8-bit floats with 4 exponent bits, without infinities, in the lowest bits. Not more than 448 is converted.
FO_INLINE F e4m3_to_float(U bits) {
  U sign = (bits & 0x80u) << 24, size = bits & 0x7fu;
#ifdef __CUDACC__
  // Shifted into a float's fields, the exponent is 120 too small; the product also normalises denormals.
  F finite = product(as_float((size << 20) | sign), 0x1p120f);
  return size == 0x7fu ? as_float(0x7fc00000u) : finite;
#else
  U normal = (size << 20) + 0x3c000000u, denormal = as_bits(product(to_float(size), F(0x1p-9f)));
  U finite = select(above(U(8u), size), denormal, normal);
  return as_float(select(above(size, U(0x7eu)), U(0x7fc00000u), finite) | sign);
#endif
}
FO_INLINE U float_to_e4m3(F x) {
  U sign = (as_bits(x) >> 24) & 0x80u, size = at_most(magnitude(x), U(0x43e00000u));
  U normal = (size - 0x3c000000u + 0x7ffffu + ((size >> 20) & 1u)) >> 20;
  // One denormal is the spacing of floats at 2^14, so the addition rounds to it.
  U denormal = as_bits(sum(as_float(size), F(0x1p14f))) - 0x46800000u;
  return select(above(U(0x3c800000u), size), denormal, normal) | sign;
}

FO_INLINE F sign(F x) { return select(x > F(0), F(1), select(x < F(0), F(-1), F(0))); }

}  // namespace
