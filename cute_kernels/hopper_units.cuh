// Which tiles a CTA computes: CTA c takes units c, c + grid, c + 2 grid ... A warp looks 32 of them
// up at a time, a unit to a lane, so that the chain of loads behind each is waited for once.
//
// With a ticket only the first is c: CTAs claim the others as they get to them, so one that started
// late, because another kernel held its multiprocessor, takes fewer.
#pragma once

#include "hopper_tile.cuh"

namespace light {

// The products of quantised weights have no ticket, and their kernels no code for one.
__device__ __forceinline__ unsigned *unit_ticket(const light_grouped_gemm_args &args) {
  return args.unit_ticket;
}
template <class Args>
__device__ __forceinline__ unsigned *unit_ticket(const Args &) {
  return nullptr;
}

template <class Tile>
class UnitLookup {
 public:
  // `tokens`: the most tokens of a tile.
  __device__ __forceinline__ UnitLookup(const light_pair_groups &groups, int tokens,
                                        int num_features, unsigned *ticket)
      : groups_(groups),
        ticket_(ticket),
        num_weight_blocks_((num_features + Tile::kFeatures - 1) / Tile::kFeatures),
        num_work_(num_weight_blocks_ *
                  (groups.offsets ? groups.tile_offsets[groups.num_groups]
                                  : (groups.num_pairs + tokens - 1) / tokens)) {}

  // Whether units behind the first are claimed: nobody needs to where each CTA has one at most.
  __device__ __forceinline__ bool claims() const {
    return ticket_ != nullptr && num_work_ > static_cast<int>(gridDim.x);
  }

  // A unit that is nobody else's, for one thread of the CTA, which claims until there is none. So a
  // launch makes num_work claims: of num_work - grid units, and one of each CTA behind them. The
  // last of all finds num_work - 1 and leaves 0, as it was, for the next launch.
  __device__ __forceinline__ HopperUnit claim() const {
    return find(static_cast<int>(gridDim.x + atomicInc(ticket_, num_work_ - 1)));
  }

  // The CTA's own, for a whole warp, and for index 0, 1, 2 ... in order.
  __device__ __forceinline__ HopperUnit unit(int index) {
    const int lane = threadIdx.x % 32;
    if (index % 32 == 0) found_ = find(blockIdx.x + (index + lane) * gridDim.x);
    const int source = index % 32;
    return {__shfl_sync(~0u, found_.slot, source), __shfl_sync(~0u, found_.first_pair, source),
            __shfl_sync(~0u, found_.num_tokens, source),
            __shfl_sync(~0u, found_.weight_block, source)};
  }

 private:
  __device__ __forceinline__ HopperUnit find(int work) const {
    if (work >= num_work_) return HopperUnit::none();
    int group = 0, first_tile = 0, first_pair = 0, end = groups_.num_pairs;
    int num_tiles = num_work_ / num_weight_blocks_;
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
  unsigned *ticket_;
  int num_weight_blocks_;
  int num_work_;
  HopperUnit found_;
};

}  // namespace light
