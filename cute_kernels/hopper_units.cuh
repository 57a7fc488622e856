// Which tiles a CTA computes: CTA c takes units c, c + grid, c + 2 grid ... A warp looks 32 of them
// up at a time, a unit to a lane, so that the chain of loads behind each is waited for once.
//
// With a ticket only the first is c: CTAs claim the others as they get to them, so one that started
// late, because another kernel held its multiprocessor, takes fewer. Those of a launch that helps
// have no first one: they claim what is left of the other's.
#pragma once

#include "hopper_tile.cuh"

namespace light {

// The products of quantised weights have no ticket, and their kernels no code for one.
__device__ __forceinline__ unsigned *unit_ticket(const light_grouped_gemm_args &args) {
  return args.unit_ticket;
}
__device__ __forceinline__ int other_ctas(const light_grouped_gemm_args &args) {
  return args.other_ctas;
}
__device__ __forceinline__ bool helps(const light_grouped_gemm_args &args) {
  return args.helps != 0;
}
template <class Args>
__device__ __forceinline__ unsigned *unit_ticket(const Args &) {
  return nullptr;
}
template <class Args>
__device__ __forceinline__ int other_ctas(const Args &) {
  return 0;
}
template <class Args>
__device__ __forceinline__ bool helps(const Args &) {
  return false;
}

template <class Tile, class Args>
class UnitLookup {
 public:
  // `tokens`: the most tokens of a tile.
  __device__ __forceinline__ UnitLookup(const Args &args, int tokens)
      : args_(args),
        groups_(args.groups),
        num_weight_blocks_((args.num_features + Tile::kFeatures - 1) / Tile::kFeatures),
        num_work_(num_weight_blocks_ *
                  (groups_.offsets ? groups_.tile_offsets[groups_.num_groups]
                                   : (groups_.num_pairs + tokens - 1) / tokens)) {}

  // Whether units behind the first are claimed: nobody needs to where each CTA has one at most.
  __device__ __forceinline__ bool claims() const {
    return unit_ticket(args_) != nullptr && num_work_ > num_first();
  }

  // A unit that is nobody else's, for one thread of the CTA, which claims until there is none. So a
  // product takes num_work claims: of num_work - num_first units, and one of each CTA behind them.
  // Of a launch that helps, each CTA makes one more. The last claim of all, whosever it is, finds
  // the most that there can be and leaves 0, as it was, for the next product.
  __device__ __forceinline__ HopperUnit claim() const {
    const unsigned most = num_work_ + num_helpers() - 1;
    return find(num_first() + static_cast<int>(atomicInc(unit_ticket(args_), most)));
  }

  // The CTA's own, for a whole warp, and for index 0, 1, 2 ... in order. A CTA that helps has none:
  // where there is nothing to claim all units are others' first ones.
  __device__ __forceinline__ HopperUnit unit(int index) {
    const int lane = threadIdx.x % 32;
    const int first = helps(args_) ? num_first() : blockIdx.x;
    if (index % 32 == 0) found_ = find(first + (index + lane) * gridDim.x);
    const int source = index % 32;
    return {__shfl_sync(~0u, found_.slot, source), __shfl_sync(~0u, found_.first_pair, source),
            __shfl_sync(~0u, found_.num_tokens, source),
            __shfl_sync(~0u, found_.weight_block, source)};
  }

 private:
  // Units that are a CTA's first, of the launch that is helped.
  __device__ __forceinline__ int num_first() const {
    return helps(args_) ? other_ctas(args_) : static_cast<int>(gridDim.x);
  }
  __device__ __forceinline__ int num_helpers() const {
    return helps(args_) ? static_cast<int>(gridDim.x) : other_ctas(args_);
  }

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

  const Args &args_;
  const light_pair_groups &groups_;
  int num_weight_blocks_;
  int num_work_;
  HopperUnit found_;
};

}  // namespace light
