// From a warpgroup's sums to the output: SwiGLU, routing weight, rounding, and a transposition
// through the warpgroup's own weights of the last stage, which nobody needs any more.
#pragma once

#include "epilogue.cuh"
#include "hopper_tile.cuh"

namespace light {

template <class Tile>
class HopperEpilogue {
  using Element = typename Tile::Element;
  static constexpr int kRowBytes = Tile::kBlocks * Tile::kBlockFeatures * 2;
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kRegionBytes = Tile::kWeightBytes / Tile::kRowGroups;
  static constexpr int kFit = kRegionBytes / 2 / kRowBytes / 8 * 8;  // of two halves in turns
  static constexpr int kTurnTokens = kFit < Tile::kLimit ? kFit : Tile::kLimit;
  static constexpr int kTurns = (Tile::kLimit + kTurnTokens - 1) / kTurnTokens;
  static constexpr int kSums = Tile::kLimit / 2;
  static constexpr int kStepTokens = 128 / kRowChunks;
  static constexpr int kSteps = (kTurnTokens + kStepTokens - 1) / kStepTokens;
  static constexpr int kWarpTokens = 32 / kRowChunks;  // of a step
  static_assert(kSteps * kWarpTokens <= 32, "a lane finds where a row of its warp's goes");
  static_assert(kTurnTokens > 0, "eight tokens at least fit into the warpgroup's weights");

 public:
  using Sums = float (&)[Tile::kBlocks][kSums];

  __device__ __forceinline__ HopperEpilogue(const OutputArgs &args, int row_group, int barrier)
      : args_(args), row_group_(row_group), barrier_(barrier), thread_(threadIdx.x % 128) {}

  // `stage`: its weights are free once all warps of the warpgroup are here.
  __device__ __forceinline__ void operator()(const HopperUnit &unit, unsigned stage,
                                             Sums sums) const {
    if (args_.pair_weight != nullptr) weigh(unit, sums);
    if (!Tile::kSwiglu && args_.float32) {
      store_float32(unit, sums);
      return;
    }
    const unsigned region = stage + row_group_ * kRegionBytes;
    unsigned long long row = find_row(unit, 0);
    sync_warpgroup(barrier_);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (turn * kTurnTokens >= unit.num_tokens) break;
      // Whoever is behind still reads the other half.
      const unsigned half = region + turn % 2 * (kTurnTokens * kRowBytes);
      const unsigned long long next_row = find_row(unit, turn + 1);
      put(half, turn, unit, sums);
      sync_warpgroup(barrier_);
      store(half, turn, unit, row);
      row = next_row;
    }
  }

 private:
  // Where a row goes that this warp stores in a turn, one a lane: to ask memory row by row as they
  // are stored took longer than to send them to other ranks.
  __device__ __forceinline__ unsigned long long find_row(const HopperUnit &unit, int turn) const {
    const int lane = thread_ % 32, warp = thread_ / 32;
    const int token = turn * kTurnTokens + lane / kWarpTokens * kStepTokens + warp * kWarpTokens +
                      lane % kWarpTokens;
    const bool stores = lane < kSteps * kWarpTokens && token < unit.num_tokens;
    return stores ? output_address(args_, unit.first_pair + token) : 0;
  }

  __device__ __forceinline__ void weigh(const HopperUnit &unit, Sums sums) const {
#pragma unroll
    for (int j = 0; j < Tile::kLimit / 8; ++j) {
      if (j * 8 >= unit.num_tokens) break;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int token = j * 8 + thread_ % 4 * 2 + side;
        const float weight =
            token < unit.num_tokens ? args_.pair_weight[unit.first_pair + token] : 0.0f;
#pragma unroll
        for (int block = 0; block < Tile::kBlocks; ++block) {
          // After SwiGLU the product is gate * up: weigh one of them only.
          if (!Tile::kSwiglu) sums[block][4 * j + side] *= weight;
          sums[block][4 * j + 2 + side] *= weight;
        }
      }
    }
  }

  static __device__ __forceinline__ unsigned at(unsigned region, int token, int chunk) {
    return region + output_offset<kRowChunks>(token, chunk);
  }

  __device__ __forceinline__ void put(unsigned region, int turn, const HopperUnit &unit,
                                      Sums sums) const {
    const int warp = thread_ / 32, lane = thread_ % 32;
#pragma unroll
    for (int i = 0; i < kTurnTokens / 8; ++i) {
      const int j = turn * (kTurnTokens / 8) + i;
      if (j >= Tile::kLimit / 8 || j * 8 >= unit.num_tokens) break;
#pragma unroll
      for (int block = 0; block < Tile::kBlocks; ++block) {
        const float *s = &sums[block][4 * j];
        if constexpr (Tile::kSwiglu) {
          store_matrix_transposed(at(region, i * 8 + lane % 8, block * 4 + warp),
                                  Element::pack(silu(s[0]) * s[2], silu(s[1]) * s[3]));
        } else {
          store_matrices_transposed(
              at(region, i * 8 + lane % 8, block * 8 + warp * 2 + lane / 8 % 2),
              Element::pack(s[0], s[1]), Element::pack(s[2], s[3]));
        }
      }
    }
  }

  __device__ __forceinline__ void store(unsigned region, int turn, const HopperUnit &unit,
                                        unsigned long long lane_row) const {
    constexpr int kAtOnce = kSteps < 2 ? kSteps : 2;
    const int chunk = thread_ % kRowChunks, first = thread_ / kRowChunks;
    const int feature = unit.weight_block * Tile::kFeatures +
                        row_group_ * (Tile::kBlocks * Tile::kBlockFeatures) + chunk * kChunk;
    const int left = min(unit.num_tokens - turn * kTurnTokens, kTurnTokens);
#pragma unroll
    for (int step = 0; step < kSteps; step += kAtOnce) {
      uint4 values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        values[i] = load_shared_16(at(region, first + (step + i) * kStepTokens, chunk));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const unsigned long long row = __shfl_sync(
            ~0u, lane_row, (step + i) * kWarpTokens + thread_ % 32 / kRowChunks);
        if (first + (step + i) * kStepTokens < left && feature < args_.num_features) {
          *reinterpret_cast<uint4 *>(row + feature * 2) = values[i];
        }
      }
    }
  }

  __device__ __forceinline__ void store_float32(const HopperUnit &unit, Sums sums) const {
    const int warp = thread_ / 32, lane = thread_ % 32;
    const int first_feature = unit.weight_block * Tile::kFeatures + warp * 16 + lane / 4 +
                              row_group_ * (Tile::kBlocks * Tile::kBlockFeatures);
#pragma unroll
    for (int j = 0; j < Tile::kLimit / 8; ++j) {
      if (j * 8 >= unit.num_tokens) break;
#pragma unroll
      for (int i = 0; i < 4 * Tile::kBlocks; ++i) {
        const int feature = first_feature + i / 4 * 64 + i % 4 / 2 * 8;
        const int token = j * 8 + lane % 4 * 2 + i % 2;
        if (token < unit.num_tokens && feature < args_.num_features) {
          static_cast<float *>(args_.output)[static_cast<long long>(unit.first_pair + token) *
                                                 args_.num_features +
                                             feature] = sums[i / 4][4 * j + i % 4];
        }
      }
    }
  }

  OutputArgs args_;
  int row_group_;
  int barrier_;  // of the warpgroup
  int thread_;
};

}  // namespace light
