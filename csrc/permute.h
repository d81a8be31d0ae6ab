// The 8-bit dynamic map, 64 codes at a time, by permutations of AVX-512 registers: a gather takes as long as
// 16 loads, and on AMD's processors longer. The table is that of kernels/lookup.py.
#pragma once

#include "blocks.h"

namespace {

// A permutation finds bytes in two registers, so a table is kept as four planes, one for each byte of its
// entries. Interleaving what four planes gave, and packing numbers to bytes, both stay within the four lanes
// of a register: they agree on an order in which words 0, 4, 8, 12 of 16 come first ("transposed").
constexpr int MANY = 64;

// Parts of a table, in bytes: lines that lead to a magnitude's code, planes of the values of all codes, and
// of the middles between those that are not negative.
constexpr int LINES = STEPS + (4 << 16), VALUE_PLANES = LINES + 4 * 64,
              MIDDLE_PLANES = VALUE_PLANES + 4 * 256;

FO_INLINE __m512i bytes_at(const char* from) { return _mm512_maskz_loadu_epi8(-1, from); }
FO_INLINE __m512i transposed(__m512i words) {
  const __m512i columns = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_maskz_permutexvar_epi32(ALL, columns, words);
}

// Entries of a table of SIZE, which is 128 or 256, for the bytes of `index`, transposed.
template <int SIZE>
FO_INLINE void entries(const char* planes, __m512i index, F (&found)[4]) {
  __m512i byte[4];
  FO_UNROLL for (int i = 0; i < 4; ++i) {
    const char* plane = planes + i * SIZE;
    byte[i] = _mm512_permutex2var_epi8(bytes_at(plane), index, bytes_at(plane + MANY));
    if (SIZE == 128) continue;
    __m512i upper = _mm512_permutex2var_epi8(bytes_at(plane + 128), index, bytes_at(plane + 192));
    byte[i] = _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), byte[i], upper);
  }
  __m512i halves[4] = {_mm512_unpacklo_epi8(byte[0], byte[1]), _mm512_unpacklo_epi8(byte[2], byte[3]),
                       _mm512_unpackhi_epi8(byte[0], byte[1]), _mm512_unpackhi_epi8(byte[2], byte[3])};
  FO_UNROLL for (int i = 0; i < 4; i += 2) {
    found[i].part[0] = reinterpret_cast<__m512>(_mm512_unpacklo_epi16(halves[i], halves[i + 1]));
    found[i + 1].part[0] = reinterpret_cast<__m512>(_mm512_unpackhi_epi16(halves[i], halves[i + 1]));
  }
}

FO_INLINE __m512 sixteen(const char* table, __m512i index) {
  return _mm512_maskz_permutexvar_ps(ALL, index, _mm512_maskz_loadu_ps(ALL, table));
}

// How many middles are below x >= 0, or one less: that of two lines by x's exponent.
FO_INLINE __m512i about_below(F x, const char* lines) {
  __m512i exponent = reinterpret_cast<__m512i>((at_least(as_bits(x), U(102u << 23)) >> 24).part[0]);
  auto line = [&](const char* at) {
    return _mm512_fmadd_ps(sixteen(at, exponent), x.part[0], sixteen(at + 64, exponent));
  };
  return _mm512_maskz_cvttps_epi32(ALL, _mm512_maskz_min_ps(ALL, line(lines), line(lines + 128)));
}

// A bit for each of 64 numbers.
template <class Test>
FO_INLINE __mmask64 bits_of(const F (&x)[4], Test test) {
  __mmask64 bits = 0;
  FO_UNROLL for (int i = 0; i < 4; ++i) {
    bits |= static_cast<__mmask64>(test(reinterpret_cast<__m512i>(x[i].part[0]), i)) << 16 * i;
  }
  return bits;
}

// How many of SIZE middles are below each of 64 numbers that are not negative.
template <int SIZE>
FO_INLINE __m512i count_below(const F (&x)[4], const char* table) {
  __m512i about[4];
  FO_UNROLL for (int i = 0; i < 4; ++i) about[i] = about_below(x[i], table + LINES);
  __m512i counts =
      _mm512_packus_epi16(_mm512_packus_epi32(about[0], about[1]), _mm512_packus_epi32(about[2], about[3]));
  F middle[4];
  entries<SIZE>(table + MIDDLE_PLANES, counts, middle);
  // Both are not negative, so their order is that of their bits.
  __mmask64 more = bits_of(x, [&](__m512i bits, int i) {
    return _mm512_cmpgt_epi32_mask(bits, reinterpret_cast<__m512i>(middle[i].part[0]));
  });
  counts = transposed(counts);
  return _mm512_mask_add_epi8(counts, more, counts, _mm512_set1_epi8(1));
}

// But for 1, which has no negative, the signed map is symmetric around the code of zero.
FO_INLINE __m512i codes_of(int8, const F (&n)[4], const char* table) {
  F size[4];
  FO_UNROLL for (int i = 0; i < 4; ++i) size[i] = as_float(magnitude(n[i]));
  const __m512i count = count_below<128>(size, table), zero = _mm512_set1_epi8(127);
  __mmask64 negative = bits_of(n, [](__m512i bits, int) { return _mm512_movepi32_mask(bits); });
  __m512i below = _mm512_maskz_min_epu8(-1, count, zero);
  return _mm512_mask_sub_epi8(_mm512_add_epi8(zero, count), negative, zero, below);
}
FO_INLINE __m512i codes_of(int8_unsigned, const F (&n)[4], const char* table) {
  F size[4];
  FO_UNROLL for (int i = 0; i < 4; ++i) size[i] = not_negative(n[i]);
  const __m512i count = count_below<256>(size, table);
  // As code_above_zero.
  __mmask64 more = bits_of(size, [](__m512i bits, int) { return _mm512_test_epi32_mask(bits, bits); });
  return _mm512_mask_max_epu8(count, more, count, _mm512_set1_epi8(1));
}

// Codes and values that lie one after the other.
FO_INLINE void decode_many(const char* codes, const char* table, F scale, float* values) {
  F x[4];
  entries<256>(table + VALUE_PLANES, transposed(bytes_at(codes)), x);
  FO_UNROLL for (int i = 0; i < 4; ++i) store(values + i * LANES, x[i] * scale);
}
template <class Codec>
FO_INLINE void encode_many(Codec c, const float* values, F times, const char* table, char* codes) {
  F n[4];
  FO_UNROLL for (int i = 0; i < 4; ++i) n[i] = load<float>(values + i * LANES) * times;
  _mm512_storeu_si512(codes, codes_of(c, n, table));
}

}  // namespace
