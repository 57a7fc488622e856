// What an instance of Hopper's matrix kernels knows at compile time. Tokens and stages of a tile
// are the launch's: one instance serves every number of tokens up to kLimit.
#pragma once

#include "hopper_instructions.cuh"
#include "tile_memory.h"

namespace light {

// `RowGroups` warpgroups share a tile's rows, or `DepthParts` of them its depth: these add their
// sums in order.
template <class ElementType, int WeightRows, int Limit, int Depth, int RowGroups, int DepthParts,
          int CtasPerSm, int NumBits, bool Swiglu, int RowBits = 16>
struct HopperTile {
  using Element = ElementType;  // of the output
  static constexpr int kWeightRows = WeightRows;
  static constexpr int kLimit = Limit;  // tokens whose sums a warpgroup's registers hold
  static constexpr int kDepth = Depth;
  static constexpr int kRowGroups = RowGroups;
  static constexpr int kDepthParts = DepthParts;
  static constexpr int kWarpgroups = RowGroups * DepthParts;  // and one that feeds them
  static constexpr int kCtasPerSm = CtasPerSm;
  static constexpr int kNumBits = NumBits;  // of a weight
  static constexpr int kRowBits = RowBits;  // of an element of a token's row
  static constexpr bool kSwiglu = Swiglu;

  static constexpr int kThreads = 128 * (1 + kWarpgroups);
  static constexpr int kBlocks = WeightRows / 64 / RowGroups;  // of 64 rows, of a warpgroup
  static constexpr int kPanelDepth = panel_depth(RowBits);
  static constexpr int kPanels = Depth / kPanelDepth;
  static constexpr int kSteps = 4 * kPanels;  // mma of a stage, each of 32 bytes of a row
  static constexpr int kWeightBytes = WeightRows * Depth * NumBits / 8;
  static constexpr int kFeatures = Swiglu ? WeightRows / 2 : WeightRows;
  static constexpr int kBlockFeatures = Swiglu ? 32 : 64;  // of 64 rows

  static_assert(WeightRows % (64 * RowGroups) == 0, "a warpgroup multiplies blocks of 64 rows");
  static_assert(Depth % kPanelDepth == 0, "a stage holds whole panels");
  static_assert(kWeightBytes % kStageAlignment == 0, "tokens begin at a swizzled panel's border");
};

// One tile of the output: what the producer looks up and the consumers read.
struct HopperUnit {
  int slot;
  int first_pair;
  int num_tokens;
  int weight_block;

  static __device__ __forceinline__ HopperUnit none() { return {0, 0, 0, -1}; }
  __device__ __forceinline__ bool exists() const { return weight_block >= 0; }
};

// The pipeline's place: which stage comes next, and the parity of its current round.
struct StageCursor {
  int index = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance(int num_stages) {
    if (++index == num_stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// Shared memory: the stages, then for each a barrier `full` and a barrier `empty`, then the ring of
// units. A CTA's units end with one that does not exist, which takes a stage with nothing in it.
//
// The entry of unit i is written behind the copies of unit i - 2, which waited for their stages to be
// empty: all consumers gave back those of unit i - 2 - kMostStages, so nobody reads the entry that
// unit i - kRingUnits had.
template <class Tile, class Args>
class HopperMemory {
  static_assert(kRingUnits >= kMostStages + 2, "nobody reads an entry that is written again");

 public:
  __device__ __forceinline__ HopperMemory(const HopperLaunch<Args> &launch, unsigned char *shared)
      : base_(shared_address(shared)),
        stage_bytes_(launch.stage.bytes),
        tail_(base_ + launch.stage.bytes * launch.num_stages),
        ring_(reinterpret_cast<int4 *>(shared + launch.stage.bytes * launch.num_stages +
                                       2 * kMostStages * 8)) {}

  __device__ __forceinline__ unsigned stage(int index) const {
    return base_ + index * stage_bytes_;
  }
  __device__ __forceinline__ unsigned full(int index) const { return tail_ + index * 8; }
  __device__ __forceinline__ unsigned empty(int index) const {
    return tail_ + (kMostStages + index) * 8;
  }
  __device__ __forceinline__ void put_unit(int index, const HopperUnit &unit) const {
    ring_[index % kRingUnits] =
        make_int4(unit.slot, unit.first_pair, unit.num_tokens, unit.weight_block);
  }
  __device__ __forceinline__ HopperUnit unit(int index) const {
    const int4 entry = ring_[index % kRingUnits];
    return {entry.x, entry.y, entry.z, entry.w};
  }

 private:
  unsigned base_;
  int stage_bytes_;
  unsigned tail_;
  int4 *ring_;
};

}  // namespace light
