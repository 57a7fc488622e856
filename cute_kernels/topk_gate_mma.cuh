// The router product on the tensor cores: the order in which a logit's products are added up, and
// the product of few tokens, which is part of the gate's launch.
//
// A logit is the sum of two halves of the depth; a half the sum of its slices of 256 in ascending
// order, from 0; a slice one chain of mma from 0 over blocks of 32 of depth. Experts are an mma's
// rows and tokens its columns everywhere. Nothing of that depends on the number of tokens or on a
// token's place, so its logits have the same bits in any company.
#pragma once

#include "instructions.cuh"
#include "light_ops.h"
#include "topk_gate_lanes.cuh"
#include "topk_gate_sizes.h"

namespace light::gate {

// The mma that multiplies hidden rows by router rows; none: fp32 multiply-adds do it
// (topk_gate_router.cuh).
template <typename Hidden, typename Router>
struct RouterMma {
  static constexpr bool kExists = false;
};
template <>
struct RouterMma<__half, __half> : Float16 {
  static constexpr bool kExists = true;
};
#if __CUDA_ARCH__ >= 800
template <>
struct RouterMma<__nv_bfloat16, __nv_bfloat16> : BFloat16 {
  static constexpr bool kExists = true;
};
#endif

constexpr int kBlockDepth = 32, kBlocksPerSlice = kSliceDepth / kBlockDepth;

// A lane's part of a row's 32 of depth: eight neighbours, four for each of two mma. Which depth an
// mma takes for which of its own does not matter, as long as both operands and all roads agree.
template <int kHalf>
__device__ __forceinline__ unsigned first_of(const uint4 &part) {
  return kHalf == 0 ? part.x : part.z;
}
template <int kHalf>
__device__ __forceinline__ unsigned second_of(const uint4 &part) {
  return kHalf == 0 ? part.y : part.w;
}

// The experts of one of the two mma of 32 of depth.
using Operand = unsigned[4];

// One of the two mma of 32 of depth.
template <class Mma, int kHalf>
__device__ __forceinline__ void multiply_half(float (&sums)[4], const Operand &experts,
                                              const uint4 &tokens) {
  const unsigned b[2] = {first_of<kHalf>(tokens), second_of<kHalf>(tokens)};
  Mma::mma(sums, experts, b);
}

// A slice of 8 experts for 8 tokens, the experts where they are among the 16 of an mma: experts
// `row` for tokens 2 * column and the next.
template <class Mma, bool kUpper>
__device__ __forceinline__ float2 multiply_slice(const uint4 (&experts)[kBlocksPerSlice],
                                                 const uint4 (&tokens)[kBlocksPerSlice]) {
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kBlocksPerSlice; ++i) {
    const uint4 &part = experts[i];
    if constexpr (kUpper) {
      multiply_half<Mma, 0>(sums, {0, part.x, 0, part.y}, tokens[i]);
      multiply_half<Mma, 1>(sums, {0, part.z, 0, part.w}, tokens[i]);
    } else {
      multiply_half<Mma, 0>(sums, {part.x, 0, part.y, 0}, tokens[i]);
      multiply_half<Mma, 1>(sums, {part.z, 0, part.w, 0}, tokens[i]);
    }
  }
  return kUpper ? float2{sums[2], sums[3]} : float2{sums[0], sums[1]};
}

// At most kRouterTokens tokens: partials [T, slices, E]. A warp's item is a slice of 8 experts for
// blocks of 8 tokens; the other half of the mma's rows is zeros, so that twice as many warps pull
// on the router's weights. Neighbouring items are on different multiprocessors.
template <class Mma>
__device__ inline void write_slices(const light_topk_gate_args &args, float *partials) {
  const int num_experts = args.sort.num_experts, num_tokens = args.sort.num_tokens;
  const int width = args.width, num_slices = slices_of(width);
  const int num_units = (num_experts + kItemExperts - 1) / kItemExperts * num_slices;
  const int token_blocks = (num_tokens + kMmaTokens - 1) / kMmaTokens;
  const int num_ctas = static_cast<int>(gridDim.x);
  const int shares = max(1, min(token_blocks, kBusyWarps * num_ctas / num_units));
  const int blocks_per_share = (token_blocks + shares - 1) / shares;
  const int num_warps = num_ctas * static_cast<int>(blockDim.x / 32);
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4;
  bool waited = false;
  for (int item = threadIdx.x / 32 * gridDim.x + blockIdx.x; item < num_units * shares;
       item += num_warps) {
    const int slice = item % num_units % num_slices;
    const int expert = item % num_units / num_slices * kItemExperts + row;
    const bool upper = expert & kItemExperts;  // its place among the 16 of an mma
    const int depth = slice * kSliceDepth + 8 * column;
    const unsigned short *router =
        static_cast<const unsigned short *>(args.router_weight) + (long long)expert * width + depth;
    uint4 experts[kBlocksPerSlice];
#pragma unroll
    for (int i = 0; i < kBlocksPerSlice; ++i) {
      const bool exists = depth + i * kBlockDepth < width;
      experts[i] = load_global_16(router + i * kBlockDepth, exists && expert < num_experts);
    }
    if (!waited) {  // the router's weights are older than the kernel before this one
      wait_for_previous_kernel();
      waited = true;
    }
    const int first = item / num_units * blocks_per_share;
    const int last = min(first + blocks_per_share, token_blocks);
#pragma unroll 1
    for (int block = first; block < last; ++block) {
      const int token = block * kMmaTokens + row;
      const unsigned short *hidden =
          static_cast<const unsigned short *>(args.hidden) + (long long)token * width + depth;
      uint4 tokens[kBlocksPerSlice];
#pragma unroll
      for (int i = 0; i < kBlocksPerSlice; ++i) {
        const bool exists = depth + i * kBlockDepth < width && token < num_tokens;
        tokens[i] = load_global_16(hidden + i * kBlockDepth, exists);
      }
      const float2 sums = upper ? multiply_slice<Mma, true>(experts, tokens)
                                : multiply_slice<Mma, false>(experts, tokens);
      const int of_token = block * kMmaTokens + 2 * column;
      float *partial = partials + (of_token * num_slices + slice) * num_experts + expert;
      if (of_token < num_tokens && expert < num_experts) {
        partial[0] = sums.x;
      }
      if (of_token + 1 < num_tokens && expert < num_experts) {
        partial[num_slices * num_experts] = sums.y;
      }
    }
  }
  if (!waited) {
    wait_for_previous_kernel();
  }
}

}  // namespace light::gate
