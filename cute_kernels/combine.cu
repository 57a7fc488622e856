// The weighted sum of a token's pairs: one thread adds 8 columns in ascending k, in float32, with
// the roundings of the reference (a product, then a sum), so its bits are the reference's.
#include "light_ops.h"
#include "rows.cuh"

namespace light {

constexpr int kPairsInFlight = 8;  // independent 16-byte loads of a thread

template <typename Scalar>
__device__ inline void add_pairs(const light_combine_args &args, int token, int column,
                                 float (&sums)[8]) {
  const int num_vectors = args.width / 8, num_pairs = args.num_pairs_per_token;
  const int *pair_index = args.pair_index + (long long)token * num_pairs;
  const float *weights = args.weights + (long long)token * num_pairs;
  for (int first = 0; first < num_pairs; first += kPairsInFlight) {
    int pairs[kPairsInFlight];
    float factors[kPairsInFlight];
    Eight<Scalar> rows[kPairsInFlight];
#pragma unroll
    for (int i = 0; i < kPairsInFlight; ++i) {
      const bool exists = first + i < num_pairs;
      pairs[i] = exists ? pair_index[first + i] : -1;
      factors[i] = exists && args.weights != nullptr ? weights[first + i] : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kPairsInFlight; ++i) {
      if (pairs[i] >= 0) {
        rows[i] = load_eight<Scalar>(args.pairs, (long long)pairs[i] * num_vectors + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kPairsInFlight; ++i) {
      if (pairs[i] >= 0) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float product = __fmul_rn(factors[i], to_float(rows[i].scalars[j]));
          sums[j] = __fadd_rn(sums[j], product);
        }
      }
    }
  }
}

template <typename Scalar>
__device__ void combine(const light_combine_args &args) {
  wait_for_previous_kernel();
  const unsigned num_vectors = args.width / 8;
  const unsigned total = args.num_tokens * num_vectors;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < total;
       i += gridDim.x * blockDim.x) {
    const int token = i / num_vectors, column = i % num_vectors;
    float sums[8] = {};
    add_pairs<Scalar>(args, token, column, sums);
    if (args.addend != nullptr) {
      const Eight<Scalar> addend = load_eight<Scalar>(args.addend, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[j] = __fadd_rn(sums[j], to_float(addend.scalars[j]));
      }
    }
    Eight<Scalar> output;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      output.scalars[j] = from_float<Scalar>(sums[j]);
    }
    static_cast<uint4 *>(args.output)[i] = output.vector;
  }
}

}  // namespace light

extern "C" __global__ void __launch_bounds__(256)
    combine_f16(const __grid_constant__ light_combine_args args) {
  light::combine<__half>(args);
}

extern "C" __global__ void __launch_bounds__(256)
    combine_bf16(const __grid_constant__ light_combine_args args) {
  light::combine<__nv_bfloat16>(args);
}
