// The arithmetic of softmax(scores) x values of one row, in pieces: every road adds up the same
// pieces in the same order with these roundings, so they agree to the bit.
#pragma once

#include "attention_units.cuh"

namespace light::attention {

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float exp2_fast(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

// 2^(factor (value - largest)); exactly 1 where both are the same.
__device__ __forceinline__ float decay(float value, float largest, float factor) {
  return exp2_fast(__fmul_rn(__fsub_rn(value, largest), factor));
}

// Over the four lanes that hold a row.
__device__ __forceinline__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

__device__ __forceinline__ float row_sum(float value) {
  value = __fadd_rn(value, __shfl_xor_sync(kAllLanes, value, 1));
  return __fadd_rn(value, __shfl_xor_sync(kAllLanes, value, 2));
}

// The sums of a row so far: its largest score, and the sum of the exponentials less that score.
struct RowSums {
  float largest;
  float total;

  // Take those of the next section; the outputs become output * before + section output * after.
  __device__ __forceinline__ void fold(const RowSums &section, float factor, float *before,
                                       float *after) {
    const float both = fmaxf(largest, section.largest);
    *before = decay(largest, both, factor);
    *after = decay(section.largest, both, factor);
    largest = both;
    total = folded(total, *before, section.total, *after);
  }

  __device__ __forceinline__ static float folded(float value, float before, float section,
                                                 float after) {
    return __fmaf_rn(value, before, __fmul_rn(section, after));
  }

  // What outputs are multiplied with; a row that sees nothing is zeros.
  __device__ __forceinline__ float inverse() const {
    return total == 0.0f ? 0.0f : __frcp_rn(total);
  }
};

// Two rows' scores of a tile become weights: those of row 0 are elements 0 and 1 of each quad, of
// row 1 elements 2 and 3. `decays` is what the outputs so far are to be multiplied with.
template <int kQuads>
__device__ __forceinline__ void weigh(float (&scores)[kQuads][4], RowSums (&sums)[2], float factor,
                                      float (&decays)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = sums[row].largest;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      largest = fmaxf(largest, fmaxf(scores[j][2 * row], scores[j][2 * row + 1]));
    }
    largest = row_max(largest);
    const float base = largest == minus_infinity() ? 0.0f : largest;  // nothing is seen yet
    const float offset = -__fmul_rn(base, factor);
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
#pragma unroll
      for (int i = 2 * row; i < 2 * row + 2; ++i) {
        scores[j][i] = exp2_fast(__fmaf_rn(scores[j][i], factor, offset));
      }
      total = __fadd_rn(total, __fadd_rn(scores[j][2 * row], scores[j][2 * row + 1]));
    }
    decays[row] = decay(sums[row].largest, base, factor);
    sums[row].largest = largest;
    sums[row].total = __fmaf_rn(sums[row].total, decays[row], total);
  }
}

}  // namespace light::attention
