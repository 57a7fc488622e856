// What the gate, combine and permute share: numbers of any dtype, and 16-byte vectors of 16-bit ones.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "previous_kernel.cuh"

namespace light {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename Scalar>
__device__ inline Scalar from_float(float value);
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename Scalar>
union Eight {
  uint4 vector;
  Scalar scalars[8];
};

template <typename Scalar>
__device__ inline Eight<Scalar> load_eight(const void *base, long long vector_index) {
  Eight<Scalar> eight;
  eight.vector = static_cast<const uint4 *>(base)[vector_index];
  return eight;
}

}  // namespace light
