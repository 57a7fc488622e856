// What one instance of the matrix kernels is: tile, warps, types, all known at compile time.
#pragma once

#include "instructions.cuh"
#include "layouts.h"
#include "light_ops.h"
#include "tile_memory.h"

namespace light {

template <class ElementType, int WeightRows, int Tokens, int Depth, int Stages, int WarpsWeight,
          int WarpsTokens, int CtasPerSm, int NumBits, bool Swiglu, bool HalfAccumulate>
struct MatrixTile {
  using Element = ElementType;
  static constexpr int kWeightRows = WeightRows;
  static constexpr int kTokens = Tokens;
  static constexpr int kDepth = Depth;
  static constexpr int kStages = Stages;
  static constexpr int kWarpsWeight = WarpsWeight;
  static constexpr int kWarpsTokens = WarpsTokens;
  static constexpr int kCtasPerSm = CtasPerSm;
  static constexpr int kNumBits = NumBits;
  static constexpr bool kSwiglu = Swiglu;
  static constexpr bool kHalfAccumulate = HalfAccumulate;

  static constexpr int kThreads = 32 * WarpsWeight * WarpsTokens;
  static constexpr int kWarpWeightRows = WeightRows / WarpsWeight;
  static constexpr int kWarpTokens = Tokens / WarpsTokens;
  static constexpr int kWeightAtoms = kWarpWeightRows / 16;
  static constexpr int kTokenAtoms = kWarpTokens / 8;
  static constexpr int kTokenPairs = (kTokenAtoms + 1) / 2;  // one ldmatrix.x4 each
  static constexpr int kSteps = Depth / 16;  // of one mma depth each
  static constexpr StageBytes kStageBytes = stage_bytes(WeightRows, Tokens, Depth, NumBits);
  static constexpr int kTokensOffset = kStageBytes.weights + 2 * kStageBytes.scales;

  static_assert(kWarpWeightRows % 16 == 0 && kWarpTokens % 8 == 0, "a warp holds whole mma tiles");
  static_assert(kAsyncCopies || Stages == 2, "without cp.async the pipeline has two buffers");
  static_assert(NumBits == 16 || Depth == kBlockDepth, "packed weights come in blocks of 64");
};

}  // namespace light
