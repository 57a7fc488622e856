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

constexpr int kTokensInFlight = 4;  // rows that a warp loads before it multiplies the first

// Eight neighbours, 16-bit or fp32.
template <typename Scalar>
union RowPart {
  uint4 vectors[sizeof(Scalar) / 2];
  Scalar scalars[8];

  __device__ void load(const Scalar *source, bool exists) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Scalar) / 2); ++i) {
      vectors[i] = exists ? __ldg(reinterpret_cast<const uint4 *>(source) + i) : uint4{};
    }
  }
};

// Lane l gets the sum over all lanes of sums[l % 8]: halves change owners, 4 + 2 + 1 + 2 shuffles.
__device__ inline float transpose_and_sum(float (&sums)[8], int lane) {
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

// One team's part: units of experts and depth for blocks of tokens.
template <typename Hidden, typename Router>
class RouterTeam {
 public:
  // sums: kSumsPerTeam for each team of the CTA.
  __device__ RouterTeam(const void *hidden, const void *router_weight, int num_experts, int width,
                        float *sums)
      : hidden_(static_cast<const Hidden *>(hidden)),
        router_weight_(static_cast<const Router *>(router_weight)),
        sums_(sums + threadIdx.x / 32 / kTeamWarps * kSumsPerTeam),
        num_experts_(num_experts),
        width_(width) {}

  __device__ static int num_teams() { return gridDim.x * (blockDim.x / 32 / kTeamWarps); }
  __device__ static int team() {  // neighbours are on different multiprocessors
    return threadIdx.x / 32 / kTeamWarps * gridDim.x + blockIdx.x;
  }

  __device__ int num_splits() const { return (width_ + kUnitDepth - 1) / kUnitDepth; }
  __device__ int num_blocks() const { return (num_experts_ + kUnitExperts - 1) / kUnitExperts; }

  __device__ void load_router(int block, int split) {
    const int lane = threadIdx.x % 32;
    expert_ = block * kUnitExperts;
    depth_ = split * kUnitDepth + threadIdx.x / 32 % kTeamWarps * 256 + lane * 8;
#pragma unroll
    for (int i = 0; i < kUnitExperts; ++i) {
      const bool exists = expert_ + i < num_experts_ && depth_ < width_;
      RowPart<Router> part;
      part.load(router_weight_ + (long long)(expert_ + i) * width_ + depth_, exists);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        router_[i][j] = to_float(part.scalars[j]);
      }
    }
  }

  // The unit's sums for tokens [begin, end), at most kRouterTokens: in shared memory, by quarter.
  __device__ void multiply(int begin, int end) {
    const int lane = threadIdx.x % 32, member = threadIdx.x / 32 % kTeamWarps;
    wait_for_team();  // for those who still read the sums before
    for (int first = begin; first < end; first += kTokensInFlight) {
      RowPart<Hidden> parts[kTokensInFlight];
#pragma unroll
      for (int i = 0; i < kTokensInFlight; ++i) {
        parts[i].load(hidden_ + (long long)(first + i) * width_ + depth_,
                      first + i < end && depth_ < width_);
      }
#pragma unroll
      for (int i = 0; i < kTokensInFlight; ++i) {
        if (first + i < end) {
          const float sum = multiply_token(parts[i], lane);
          if (lane < kUnitExperts) {
            sums_[((first + i - begin) * kTeamWarps + member) * kUnitExperts + lane] = sum;
          }
        }
      }
    }
    wait_for_team();
  }

  // visit(i, token of the block, expert, sum) for the sums that this thread has.
  template <class Visit>
  __device__ void for_own_sums(int num_tokens, Visit visit) const {
    const int thread = threadIdx.x % (32 * kTeamWarps);
    const int expert = thread % kUnitExperts;
    if (expert_ + expert >= num_experts_) {
      return;
    }
#pragma unroll
    for (int i = 0; i < kOwnSums; ++i) {
      const int token = thread / kUnitExperts + i * kTokensAtOnce;
      if (token < num_tokens) {
        const float *quarters = sums_ + token * kTeamWarps * kUnitExperts + expert;
        float sum = quarters[0];
#pragma unroll
        for (int member = 1; member < kTeamWarps; ++member) {
          sum += quarters[member * kUnitExperts];
        }
        visit(i, token, expert_ + expert, sum);
      }
    }
  }

  static constexpr int kTokensAtOnce = 32 * kTeamWarps / kUnitExperts;
  static constexpr int kOwnSums = kRouterTokens / kTokensAtOnce;

 private:
  // Lane e < 8 gets expert e's sum over the warp's depth.
  __device__ float multiply_token(const RowPart<Hidden> &part, int lane) const {
    float sums[kUnitExperts] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float element = to_float(part.scalars[j]);
#pragma unroll
      for (int i = 0; i < kUnitExperts; ++i) {
        sums[i] = fmaf(element, router_[i][j], sums[i]);
      }
    }
    return transpose_and_sum(sums, lane);
  }

  __device__ void wait_for_team() {
    const int barrier = 1 + threadIdx.x / 32 / kTeamWarps;  // 0 is the CTA's
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(32 * kTeamWarps) : "memory");
  }

  const Hidden *hidden_;
  const Router *router_weight_;
  float *sums_;
  int num_experts_, width_;
  int expert_, depth_;
  float router_[kUnitExperts][8];
};

// At most kRouterTokens tokens: partials [T, splits, E]. All units, dealt out to the teams of the
// grid: unit by unit, its tokens in blocks.
template <typename Hidden, typename Router>
__device__ inline void write_partials(RouterTeam<Hidden, Router> &team, float *partials,
                                      int num_tokens, int num_experts) {
  const int num_splits = team.num_splits(), num_units = team.num_blocks() * num_splits;
  const int blocks = max(1, min(num_tokens, team.num_teams() / num_units));
  const int tokens_per_block = (num_tokens + blocks - 1) / blocks;
  bool waited = false;
  for (int item = team.team(); item < num_units * blocks; item += team.num_teams()) {
    const int unit = item % num_units, split = unit % num_splits;
    team.load_router(unit / num_splits, split);
    if (!waited) {  // the router's weights are older than the kernel before this one
      wait_for_previous_kernel();
      waited = true;
    }
    const int begin = item / num_units * tokens_per_block;
    const int end = min(begin + tokens_per_block, num_tokens);
    team.multiply(begin, end);
    team.for_own_sums(end - begin, [&](int, int token, int expert, float sum) {
      partials[((begin + token) * num_splits + split) * num_experts + expert] = sum;
    });
  }
  if (!waited) {
    wait_for_previous_kernel();
  }
}

// Any number of tokens: logits [T, E], the splits added in order, as the gate adds the partials.
template <typename Hidden, typename Router>
__device__ inline void write_logits(RouterTeam<Hidden, Router> &team,
                                    const light_router_logits_args &args) {
  using Team = RouterTeam<Hidden, Router>;
  const int tokens_for_all = args.num_tokens * team.num_blocks() / team.num_teams() + 1;
  const int tokens_per_block = min(tokens_for_all, kRouterTokens);
  wait_for_previous_kernel();
  for (int item = team.team();; item += team.num_teams()) {
    const int begin = item / team.num_blocks() * tokens_per_block;
    const int end = min(begin + tokens_per_block, args.num_tokens);
    if (begin >= args.num_tokens) {
      break;
    }
    float totals[Team::kOwnSums];
    for (int split = 0; split < team.num_splits(); ++split) {
      team.load_router(item % team.num_blocks(), split);
      team.multiply(begin, end);
      team.for_own_sums(end - begin, [&](int i, int, int, float sum) {
        totals[i] = split == 0 ? sum : totals[i] + sum;
      });
    }
    team.for_own_sums(end - begin, [&](int i, int token, int expert, float) {
      args.logits[(long long)(begin + token) * args.num_experts + expert] = totals[i];
    });
  }
}

}  // namespace light::gate
