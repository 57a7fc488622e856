// The router product for a few tokens, cut into units of 8 experts x 1024 of depth so that many SMs
// pull on the router's weights at once. A unit is for a team of 4 warps with a quarter of the depth
// each: a lane holds 8 elements of depth of 8 experts, its 8 sums per token meet in a butterfly,
// the quarters in shared memory. Cuts and order depend on neither the number of tokens nor the
// grid, so a token's logits have the same bits in any company.
#pragma once

#include "light_ops.h"
#include "topk_gate_lanes.cuh"
#include "topk_gate_sizes.h"

namespace light::gate {

template <typename Scalar>
__device__ inline void load_eight(const Scalar *source, bool exists, float (&values)[8]) {
  constexpr int kVectors = sizeof(Scalar) / 2;
  union {
    uint4 vectors[kVectors];
    Scalar scalars[8];
  } raw;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    raw.vectors[i] = exists ? __ldg(reinterpret_cast<const uint4 *>(source) + i) : uint4{};
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = to_float(raw.scalars[i]);
  }
}

// Lane l gets the sum over all lanes of sums[l % 8]: halves change owners, 4 + 2 + 1 + 2 shuffles.
__device__ inline float transposed_sum(float (&sums)[8], int lane) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? sums[i] : sums[i + half];
      const float kept = upper ? sums[i + half] : sums[i];
      sums[i] = kept + __shfl_xor_sync(kAllLanes, given, half);
    }
  }
  float sum = sums[0];
  sum += __shfl_xor_sync(kAllLanes, sum, 8);
  return sum + __shfl_xor_sync(kAllLanes, sum, 16);
}

template <typename Hidden, typename Router>
class RouterProduct {
 public:
  // partials [T, depth / 1024, E]; sums: kSumsPerTeam for each team of the CTA.
  __device__ RouterProduct(const light_topk_gate_args &args, float *partials, float *sums)
      : args_(args),
        partials_(partials),
        sums_(sums + threadIdx.x / 32 / kTeamWarps * kSumsPerTeam),
        num_splits_((args.width + kUnitDepth - 1) / kUnitDepth),
        num_units_((args.sort.num_experts + kUnitExperts - 1) / kUnitExperts * num_splits_) {}

  __device__ int num_splits() const { return num_splits_; }

  // All tokens' units, dealt out to the teams of the grid: unit by unit, its tokens in blocks.
  __device__ void run() {
    const int num_teams = gridDim.x * (blockDim.x / 32 / kTeamWarps);
    const int team = threadIdx.x / 32 / kTeamWarps * gridDim.x + blockIdx.x;
    const int num_tokens = args_.sort.num_tokens;
    const int blocks = max(1, min(num_tokens, num_teams / num_units_));
    const int tokens_per_block = (num_tokens + blocks - 1) / blocks;
    bool waited = false;
    for (int item = team; item < num_units_ * blocks; item += num_teams) {
      load_router(item % num_units_);
      if (!waited) {  // the router's weights are older than the kernel before this one
        wait_for_previous_kernel();
        waited = true;
      }
      const int first = item / num_units_ * tokens_per_block;
      multiply(first, min(first + tokens_per_block, num_tokens));
    }
    if (!waited) {
      wait_for_previous_kernel();
    }
  }

 private:
  __device__ void load_router(int unit) {
    const int lane = threadIdx.x % 32;
    split_ = unit % num_splits_;
    expert_ = unit / num_splits_ * kUnitExperts;
    depth_ = split_ * kUnitDepth + threadIdx.x / 32 % kTeamWarps * 256 + lane * 8;
    const Router *weights = static_cast<const Router *>(args_.router_weight);
#pragma unroll
    for (int i = 0; i < kUnitExperts; ++i) {
      const bool exists = expert_ + i < args_.sort.num_experts && depth_ < args_.width;
      load_eight(weights + (long long)(expert_ + i) * args_.width + depth_, exists, router_[i]);
    }
  }

  __device__ void multiply(int begin, int end) {
    const int lane = threadIdx.x % 32, member = threadIdx.x / 32 % kTeamWarps;
    const Hidden *hidden = static_cast<const Hidden *>(args_.hidden) + depth_;
#pragma unroll 2
    for (int token = begin; token < end; ++token) {
      float row[8];
      load_eight(hidden + (long long)token * args_.width, depth_ < args_.width, row);
      float sums[8];
#pragma unroll
      for (int i = 0; i < kUnitExperts; ++i) {
        sums[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          sums[i] = fmaf(row[j], router_[i][j], sums[i]);
        }
      }
      const float sum = transposed_sum(sums, lane);
      if (lane < kUnitExperts) {
        sums_[((token - begin) * kTeamWarps + member) * kUnitExperts + lane] = sum;
      }
    }
    wait_for_team();
    write_partials(begin, end);
    wait_for_team();
  }

  __device__ void write_partials(int begin, int end) {
    const int thread = threadIdx.x % (32 * kTeamWarps);
    for (int i = thread; i < (end - begin) * kUnitExperts; i += 32 * kTeamWarps) {
      const int token = i / kUnitExperts, expert = i % kUnitExperts;
      const float *quarters = sums_ + token * kTeamWarps * kUnitExperts + expert;
      float sum = quarters[0];
#pragma unroll
      for (int member = 1; member < kTeamWarps; ++member) {
        sum += quarters[member * kUnitExperts];
      }
      if (expert_ + expert < args_.sort.num_experts) {
        const int row = (begin + token) * num_splits_ + split_;
        partials_[row * args_.sort.num_experts + expert_ + expert] = sum;
      }
    }
  }

  __device__ void wait_for_team() {
    const int barrier = 1 + threadIdx.x / 32 / kTeamWarps;  // 0 is the CTA's
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(32 * kTeamWarps) : "memory");
  }

  const light_topk_gate_args &args_;
  float *partials_, *sums_;
  int num_splits_, num_units_;
  int split_, expert_, depth_;
  float router_[kUnitExperts][8];
};

}  // namespace light::gate
