// A residual add and the RMS norm of the sum in one launch: a CTA takes a row. The sum is rounded as
// an addition of 16-bit tensors, the norm is taken of what was rounded, in float32, and rounded once.
#include "light_ops.h"
#include "rows.cuh"

namespace light::norm {

constexpr int kMostWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum of every lane's value, the same bits in all of them.
__device__ inline float sum_of_warp(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

// The sum of every thread's value, the same bits in all of them. Once a kernel.
__device__ inline float sum_of_cta(float value) {
  __shared__ float sums[kMostWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  value = sum_of_warp(value);
  if (lane == 0) {
    sums[warp] = value;
  }
  __syncthreads();
  return sum_of_warp(lane < num_warps ? sums[lane] : 0.0f);
}

template <typename Scalar>
__device__ inline Eight<Scalar> add(const Eight<Scalar> &hidden, const Eight<Scalar> &addend,
                                    float &squares) {
  Eight<Scalar> sum;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    sum.scalars[j] = from_float<Scalar>(
        __fadd_rn(to_float(hidden.scalars[j]), to_float(addend.scalars[j])));
    const float rounded = to_float(sum.scalars[j]);
    squares = __fmaf_rn(rounded, rounded, squares);
  }
  return sum;
}

template <typename Scalar>
__device__ inline Eight<Scalar> scale(const Eight<Scalar> &sum, const Eight<Scalar> &weight,
                                      float inverse) {
  Eight<Scalar> normed;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    normed.scalars[j] = from_float<Scalar>(__fmul_rn(
        to_float(weight.scalars[j]), __fmul_rn(inverse, to_float(sum.scalars[j]))));
  }
  return normed;
}

template <typename Scalar>
__device__ void add_norm(const light_add_norm_args &args) {
  pass_on_and_wait();
  const int num_vectors = args.width / 8;
  const long long row = static_cast<long long>(blockIdx.x) * num_vectors;
  uint4 *sums = static_cast<uint4 *>(args.sum), *normed = static_cast<uint4 *>(args.normed);
  // Of a row with a vector a thread these stay in registers; of a wider one they are read again.
  Eight<Scalar> sum, weight;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < num_vectors; i += blockDim.x) {
    weight = load_eight<Scalar>(args.weight, i);
    sum = add(load_eight<Scalar>(args.hidden, row + i), load_eight<Scalar>(args.addend, row + i),
              squares);
    sums[row + i] = sum.vector;
  }
  const float mean = __fdiv_rn(sum_of_cta(squares), static_cast<float>(args.width));
  const float inverse = rsqrtf(__fadd_rn(mean, args.epsilon));
  for (int i = threadIdx.x; i < num_vectors; i += blockDim.x) {
    if (num_vectors > blockDim.x) {
      weight = load_eight<Scalar>(args.weight, i);
      sum.vector = sums[row + i];
    }
    normed[row + i] = scale(sum, weight, inverse).vector;
  }
}

}  // namespace light::norm

extern "C" __global__ void __launch_bounds__(1024)
    add_norm_f16(const __grid_constant__ light_add_norm_args args) {
  light::norm::add_norm<__half>(args);
}

extern "C" __global__ void __launch_bounds__(1024)
    add_norm_bf16(const __grid_constant__ light_add_norm_args args) {
  light::norm::add_norm<__nv_bfloat16>(args);
}
