// How functions are inlined: always, so that no copy made for one instruction set serves another.
#pragma once

#ifdef __CUDACC__
#define FO_INLINE __device__ __forceinline__
#define FO_ANYWHERE __host__ __device__ __forceinline__
#define FO_LAMBDA
#else
#define FO_INLINE inline __attribute__((always_inline))
#define FO_ANYWHERE FO_INLINE
#define FO_LAMBDA __attribute__((always_inline))
#endif
