// How functions are inlined: always, so that no copy made for one instruction set serves another; and where
// constants live.
#pragma once

#ifdef __CUDACC__
#define FO_INLINE __device__ __forceinline__
#define FO_ANYWHERE __host__ __device__ __forceinline__
#define FO_LAMBDA
#define FO_TABLE static __device__ const
#define FO_UNROLL _Pragma("unroll")
#else
#define FO_INLINE inline __attribute__((always_inline))
#define FO_ANYWHERE FO_INLINE
#define FO_LAMBDA __attribute__((always_inline))
#define FO_TABLE alignas(64) constexpr
#define FO_UNROLL _Pragma("GCC unroll 16")
#endif
