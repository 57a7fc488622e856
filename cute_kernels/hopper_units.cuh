// Which tiles a CTA computes: CTA c takes units c, c + grid, c + 2 grid ... A warp looks 32 of them
// up at a time, a unit to a lane, so that the chain of loads behind each is waited for once.
#pragma once

#include "hopper_tile.cuh"

namespace light {

template <class Tile>
class UnitLookup {
 public:
  // `tokens`: the most tokens of a tile.
  __device__ __forceinline__ UnitLookup(const light_pair_groups &groups, int tokens,
                                        int num_features)
      : groups_(groups),
        num_weight_blocks_((num_features + Tile::kFeatures - 1) / Tile::kFeatures),
        num_tiles_(groups.offsets ? groups.tile_offsets[groups.num_groups]
                                  : (groups.num_pairs + tokens - 1) / tokens) {
    const int num_work = num_tiles_ * num_weight_blocks_, block = blockIdx.x;
    num_units_ = block < num_work ? (num_work - 1 - block) / static_cast<int>(gridDim.x) + 1 : 0;
  }

  __device__ __forceinline__ int num_units() const { return num_units_; }

  // For a whole warp, and for index 0, 1, 2 ... in order.
  __device__ __forceinline__ HopperUnit unit(int index) {
    const int lane = threadIdx.x % 32;
    if (index % 32 == 0) {
      found_ = index + lane < num_units_ ? find(blockIdx.x + (index + lane) * gridDim.x)
                                         : HopperUnit{0, 0, 0, 0};
    }
    const int source = index % 32;
    return {__shfl_sync(~0u, found_.slot, source), __shfl_sync(~0u, found_.first_pair, source),
            __shfl_sync(~0u, found_.num_tokens, source),
            __shfl_sync(~0u, found_.weight_block, source)};
  }

 private:
  __device__ __forceinline__ HopperUnit find(int work) const {
    int group = 0, first_tile = 0, first_pair = 0, end = groups_.num_pairs;
    int num_tiles = num_tiles_;
    if (groups_.offsets) {
      group = groups_.tile_groups[work / num_weight_blocks_];
      first_tile = groups_.tile_offsets[group];
      num_tiles = groups_.tile_offsets[group + 1] - first_tile;
      first_pair = groups_.offsets[group];
      end = groups_.offsets[group + 1];
    }
    const TileWork tile =
        tile_work(work - first_tile * num_weight_blocks_, num_tiles, num_weight_blocks_);
    // Tiles of a group share its pairs evenly: none pays for more columns than it has.
    const int share = round_up((end - first_pair + num_tiles - 1) / num_tiles, 8);
    first_pair += tile.token_tile * share;
    return {groups_.slots ? groups_.slots[group] : group, first_pair, min(end - first_pair, share),
            tile.weight_block};
  }

  const light_pair_groups &groups_;
  int num_weight_blocks_;
  int num_tiles_;
  int num_units_;
  HopperUnit found_;
};

}  // namespace light
