// The fold of the sections that were computed apart: a warp for each query head.
#pragma once

#include "attention_softmax.cuh"
#include "rows.cuh"

namespace light::attention {

template <class Scalar, int kWidth>
class Merge {
  static constexpr int kVectors = (kWidth + 127) / 128;  // of 4 columns, of a lane
  static constexpr int kInFlight = kVectors > 2 ? 4 : 8;  // sections

 public:
  // `item`: the query head, sequence after sequence.
  __device__ __forceinline__ Merge(const light_paged_attention_args &args, int item)
      : args_(args),
        first_(static_cast<long long>(item) * args.max_sections),
        column_(threadIdx.x % 32 * 4),
        factor_(args.scale * 1.4426950408889634f) {}

  __device__ __forceinline__ void fold_all(int count) {
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kInFlight) {
      Section sections[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (begin + i < count) load(begin + i, sections[i]);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (begin + i < count) fold(sections[i], begin + i == 0);
      }
    }
  }

  __device__ __forceinline__ void store(Scalar *target) const {
    const float inverse = sums_.inverse();
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (column_ + 128 * j >= args_.width) continue;
      union {
        uint2 vector;
        Scalar scalars[4];
      } quad;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        quad.scalars[k] = from_float<Scalar>(__fmul_rn(outputs_[j][k], inverse));
      }
      *reinterpret_cast<uint2 *>(target + column_ + 128 * j) = quad.vector;
    }
  }

 private:
  struct Section {
    float2 sums;
    float4 outputs[kVectors];
  };

  __device__ __forceinline__ void load(int section, Section &loaded) const {
    const long long place = first_ + section;
    const float *outputs = args_.partials + place * args_.width;
    loaded.sums = reinterpret_cast<const float2 *>(args_.partial_sums)[place];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (column_ + 128 * j < args_.width) {
        loaded.outputs[j] = *reinterpret_cast<const float4 *>(outputs + column_ + 128 * j);
      }
    }
  }

  __device__ __forceinline__ void fold(const Section &section, bool is_first) {
    const RowSums sums{section.sums.x, section.sums.y};
    float before = 0.0f, after = 0.0f;
    if (is_first) {
      sums_ = sums;
    } else {
      sums_.fold(sums, factor_, &before, &after);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const float4 quad = section.outputs[j];
      const float values[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        outputs_[j][k] =
            is_first ? values[k] : RowSums::folded(outputs_[j][k], before, values[k], after);
      }
    }
  }

  const light_paged_attention_args &args_;
  long long first_;
  int column_;
  float factor_;
  RowSums sums_;
  float outputs_[kVectors][4];
};

}  // namespace light::attention
