// Packs of integers on a CPU: bytes and half bytes, conversions, tables.
#pragma once

namespace {

using Ints = Pack<int32_t>;

FO_INLINE Ints as_signed(U x) {
  Ints r;
  FO_EACH_PART r.part[i] = reinterpret_cast<Ints::Part>(x.part[i]);
  return r;
}
FO_INLINE U as_unsigned(Ints x) {
  U r;
  FO_EACH_PART r.part[i] = reinterpret_cast<U::Part>(x.part[i]);
  return r;
}

// Of what has no other bits.
FO_INLINE U signed_byte(U x) { return (x ^ U(0x80u)) - 0x80u; }

// As signed numbers, because AVX2 compares no others.
FO_INLINE Mask above(U a, U b) { return as_signed(a) > as_signed(b); }
FO_INLINE U at_most(U x, U limit) {
#if defined(__AVX512F__)
  x.part[0] = reinterpret_cast<U::Part>(_mm512_maskz_min_epi32(ALL, reinterpret_cast<__m512i>(x.part[0]),
                                                               reinterpret_cast<__m512i>(limit.part[0])));
  return x;
#else
  return select(above(x, limit), limit, x);
#endif
}
FO_INLINE U at_least(U x, U limit) {
#if defined(__AVX512F__)
  x.part[0] = reinterpret_cast<U::Part>(_mm512_maskz_max_epi32(ALL, reinterpret_cast<__m512i>(x.part[0]),
                                                               reinterpret_cast<__m512i>(limit.part[0])));
  return x;
#else
  return select(above(limit, x), limit, x);
#endif
}

FO_INLINE F to_float(U x) {
  F r;
  FO_EACH_PART r.part[i] = __builtin_convertvector(as_signed(x).part[i], F::Part);
  return r;
}
// Ties to even.
FO_INLINE U round_to_integer(F x) {
  U r;
#if defined(__AVX512F__)
  r.part[0] = reinterpret_cast<U::Part>(_mm512_maskz_cvtps_epi32(ALL, x.part[0]));
#elif defined(__AVX2__)
  FO_EACH_PART r.part[i] = reinterpret_cast<U::Part>(_mm256_cvtps_epi32(x.part[i]));
#elif defined(__SSE2__)
  FO_EACH_PART r.part[i] = reinterpret_cast<U::Part>(_mm_cvtps_epi32(x.part[i]));
#else
  FO_EACH_PART for (int lane = 0; lane < LANES / PARTS; ++lane) r.part[i][lane] = lrintf(x.part[i][lane]);
#endif
  return r;
}

FO_INLINE U widen(B x) {
  U r;
#if defined(__AVX512F__)
  r.part[0] =
      reinterpret_cast<U::Part>(_mm512_maskz_cvtepu8_epi32(ALL, reinterpret_cast<__m128i>(x.part[0])));
#elif defined(__AVX2__)
  __m128i bytes = reinterpret_cast<__m128i>(x.part[0]);
  r.part[0] = reinterpret_cast<U::Part>(_mm256_cvtepu8_epi32(bytes));
  r.part[1] = reinterpret_cast<U::Part>(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)));
#elif defined(__SSE2__)
  __m128i bytes = reinterpret_cast<__m128i>(x.part[0]), zero = _mm_setzero_si128();
  __m128i low = _mm_unpacklo_epi8(bytes, zero), high = _mm_unpackhi_epi8(bytes, zero);
  r.part[0] = reinterpret_cast<U::Part>(_mm_unpacklo_epi16(low, zero));
  r.part[1] = reinterpret_cast<U::Part>(_mm_unpackhi_epi16(low, zero));
  r.part[2] = reinterpret_cast<U::Part>(_mm_unpacklo_epi16(high, zero));
  r.part[3] = reinterpret_cast<U::Part>(_mm_unpackhi_epi16(high, zero));
#else
  FO_EACH_PART for (int lane = 0; lane < LANES / PARTS; ++lane) {
    r.part[i][lane] = x.part[0][i * LANES / PARTS + lane];
  }
#endif
  return r;
}
FO_INLINE U sign_extend(B x) {
#if defined(__AVX512F__)
  U r;
  r.part[0] =
      reinterpret_cast<U::Part>(_mm512_maskz_cvtepi8_epi32(ALL, reinterpret_cast<__m128i>(x.part[0])));
  return r;
#else
  return (widen(x) ^ U(0x80u)) - 0x80u;
#endif
}
FO_INLINE U sign_extend(H x) { return (widen(x) ^ U(0x8000u)) - 0x8000u; }

// Of numbers whose upper bits may be anything.
FO_INLINE B low_byte(U x) {
  B r;
#if defined(__AVX512F__)
  r.part[0] =
      reinterpret_cast<B::Part>(_mm512_maskz_cvtepi32_epi8(ALL, reinterpret_cast<__m512i>(x.part[0])));
#elif defined(__SSE2__)
  x = x & U(0xffu);
  __m128i quarter[4];
  memcpy(quarter, &x, sizeof x);
  __m128i low = _mm_packs_epi32(quarter[0], quarter[1]), high = _mm_packs_epi32(quarter[2], quarter[3]);
  r.part[0] = reinterpret_cast<B::Part>(_mm_packus_epi16(low, high));
#else
  FO_EACH_PART for (int lane = 0; lane < LANES / PARTS; ++lane) {
    r.part[0][i * LANES / PARTS + lane] = static_cast<uint8_t>(x.part[i][lane]);
  }
#endif
  return r;
}

// Half bytes: the lower half of a byte comes first.
FO_INLINE B load_halves(const void* from) {
  B r;
#if defined(__SSE2__)
  __m128i pairs = _mm_loadl_epi64(static_cast<const __m128i*>(from)), low = _mm_set1_epi8(15);
  __m128i upper = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
  r.part[0] = reinterpret_cast<B::Part>(_mm_unpacklo_epi8(_mm_and_si128(pairs, low), upper));
#else
  for (int lane = 0; lane < LANES; ++lane) {
    r.part[0][lane] = static_cast<const uint8_t*>(from)[lane / 2] >> lane % 2 * 4 & 15;
  }
#endif
  return r;
}
FO_INLINE void store_halves(void* to, B x) {
#if defined(__SSE2__)
  __m128i bytes = reinterpret_cast<__m128i>(x.part[0]);
  __m128i pairs = _mm_and_si128(_mm_or_si128(bytes, _mm_srli_epi16(bytes, 4)), _mm_set1_epi16(0xff));
  _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packus_epi16(pairs, pairs));
#else
  for (int pair = 0; pair < LANES / 2; ++pair) {
    static_cast<uint8_t*>(to)[pair] =
        static_cast<uint8_t>(x.part[0][2 * pair] | x.part[0][2 * pair + 1] << 4);
  }
#endif
}

FO_INLINE F look_up(const float* table, U index) {
  F r;
#if defined(__AVX512F__)
  __m512i at = reinterpret_cast<__m512i>(index.part[0]);
  r.part[0] = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), ALL, at, table, 4);
#elif defined(__AVX2__)
  FO_EACH_PART {
    __m256i at = reinterpret_cast<__m256i>(index.part[i]);
    r.part[i] = _mm256_mask_i32gather_ps(_mm256_setzero_ps(), table, at,
                                         _mm256_castsi256_ps(_mm256_set1_epi32(-1)), 4);
  }
#else
  FO_EACH_PART for (int lane = 0; lane < LANES / PARTS; ++lane) {
    r.part[i][lane] = table[index.part[i][lane]];
  }
#endif
  return r;
}
// By the four lowest bits of the index.
FO_INLINE F pick(const float (&table)[16], U index) {
#if defined(__AVX512F__)
  F r;
  __m512i at = reinterpret_cast<__m512i>(index.part[0]);
  r.part[0] = _mm512_maskz_permutexvar_ps(ALL, at, _mm512_maskz_loadu_ps(ALL, table));
  return r;
#else
  return look_up(table, index & U(15u));
#endif
}

// As a signed number.
FO_INLINE uint32_t largest(U x) {
#if defined(__AVX2__)
  __m256i halves[2];
  memcpy(halves, &x, sizeof x);
  __m256i half = _mm256_max_epi32(halves[0], halves[1]);
  __m128i lanes = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  lanes = _mm_max_epi32(lanes, _mm_shuffle_epi32(lanes, 0x4e));
  lanes = _mm_max_epi32(lanes, _mm_shuffle_epi32(lanes, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(lanes));
#else
  int32_t lanes[LANES];
  store(lanes, x);
  int32_t most = lanes[0];
  for (int32_t lane : lanes) most = lane > most ? lane : most;
  return static_cast<uint32_t>(most);
#endif
}

}  // namespace
