// The 8-bit dynamic map by permutations of AVX-512 registers: a gather takes as long as 16 loads, and on
// AMD's processors longer. Tables are those of lookup.h.
#pragma once

#include "pack.h"

namespace {

FO_INLINE __m512 sixteen(const float* table) { return _mm512_maskz_loadu_ps(ALL, table); }

// Entries of a table of SIZE, by as many of the index's lowest bits.
template <int SIZE>
FO_INLINE __m512 permuted(const float* table, __m512i index) {
  if constexpr (SIZE == 16) {
    return _mm512_maskz_permutexvar_ps(ALL, index, sixteen(table));
  } else if constexpr (SIZE == 32) {
    return _mm512_permutex2var_ps(sixteen(table), index, sixteen(table + 16));
  } else {
    __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(SIZE / 2));
    return _mm512_mask_blend_ps(upper, permuted<SIZE / 2>(table, index),
                                permuted<SIZE / 2>(table + SIZE / 2, index));
  }
}
template <int SIZE>
FO_INLINE F permuted(const float* table, U index) {
  F r;
  r.part[0] = permuted<SIZE>(table, reinterpret_cast<__m512i>(index.part[0]));
  return r;
}

// How many of SIZE middles are below x >= 0: two lines by x's exponent are too low by one at most.
template <int SIZE>
FO_INLINE U count_below(F x, const float* lines) {
  U exponent = at_least(as_bits(x), U(102u << 23)) >> 24;
  auto line = [&](const float* at) {
    F slope = permuted<16>(at, exponent), offset = permuted<16>(at + 16, exponent);
    return _mm512_fmadd_ps(slope.part[0], x.part[0], offset.part[0]);
  };
  __m512i count = _mm512_maskz_cvttps_epi32(ALL, _mm512_maskz_min_ps(ALL, line(lines), line(lines + 32)));
  __mmask16 more = _mm512_cmp_ps_mask(x.part[0], permuted<SIZE>(lines + 64, count), _CMP_GT_OQ);
  U r;
  r.part[0] = reinterpret_cast<U::Part>(_mm512_mask_add_epi32(count, more, count, _mm512_set1_epi32(1)));
  return r;
}

}  // namespace
