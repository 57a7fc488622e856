// Stands in for the header of the same name, which comes with nvcc only: what a host compiler must
// read in place of CUDA's own words, so that CuTe's headers compile without a CUDA toolkit.
#pragma once

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(num_bytes) __attribute__((aligned(num_bytes)))
#define __builtin_align__(num_bytes) __align__(num_bytes)
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDART_CB
