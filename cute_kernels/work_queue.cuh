// Which tiles a CTA computes. A grid smaller than the work is persistent: CTA c takes units c,
// c + grid, c + 2 grid ... The look-ups (counts, slots, row numbers: all in device memory) run
// ahead of the copies, so that the pipeline does not drain between two tiles.
#pragma once

#include "matrix_tile.cuh"

namespace light {

template <class Tile>
class WorkQueue {
 public:
  struct Unit {
    int slot;
    int first_pair;
    int num_tokens;
    int weight_block;
    int split;  // which part of the depth
  };

  __device__ __forceinline__ WorkQueue(unsigned char *memory, const light_pair_groups &groups,
                                       const int *pair_row, int weight_rows, int depth_splits)
      : units_(reinterpret_cast<int4 *>(memory)),
        rows_(reinterpret_cast<int *>(memory + 2 * kQueueTiles * 16)),
        groups_(groups),
        pair_row_(pair_row),
        num_weight_blocks_((weight_rows + Tile::kWeightRows - 1) / Tile::kWeightRows),
        depth_splits_(depth_splits) {
    const int num_tiles = groups.offsets ? groups.tile_offsets[groups.num_groups]
                                         : (groups.num_pairs + Tile::kTokens - 1) / Tile::kTokens;
    num_outputs_ = num_tiles * num_weight_blocks_;
    num_work_ = num_outputs_ * depth_splits_;
  }

  __device__ __forceinline__ int num_units() const {
    const int block = blockIdx.x;
    return block < num_work_ ? (num_work_ - 1 - block) / static_cast<int>(gridDim.x) + 1 : 0;
  }

  // Look up units from `first` on, as many as half the queue holds. Readers wait at a barrier.
  __device__ __forceinline__ void look_up(int first) {
    const int work = blockIdx.x + (first + threadIdx.x) * gridDim.x;
    if (threadIdx.x < kQueueTiles && work < num_work_) {
      units_[(first + threadIdx.x) % (2 * kQueueTiles)] = find(work);
    }
  }

  __device__ __forceinline__ Unit unit(int index) const {
    const int4 entry = units_[index % (2 * kQueueTiles)];
    return {entry.x, entry.y, entry.z & 0xffff, entry.w, entry.z >> 16};
  }

  // The output tile of a unit, among all output tiles of the launch.
  __device__ __forceinline__ int output(int index) const {
    return (blockIdx.x + index * gridDim.x) / depth_splits_;
  }

  __device__ __forceinline__ const int *rows(int index) const {
    return rows_ + index % 2 * Tile::kTokens;
  }

  // The row of a token of a unit, or -1: for threads below kTokens.
  __device__ __forceinline__ int row_of(const Unit &unit) const {
    const int token = threadIdx.x;
    if (token >= unit.num_tokens) return -1;
    return pair_row_ ? pair_row_[unit.first_pair + token] : unit.first_pair + token;
  }

  __device__ __forceinline__ void put_row(int index, int row) {
    if (threadIdx.x < Tile::kTokens) rows_[index % 2 * Tile::kTokens + threadIdx.x] = row;
  }

  // put_row(index, row_of(unit)) that does not wait for memory: part of the next group of copies.
  __device__ __forceinline__ void put_row_async(int index, const Unit &unit) {
    const int token = threadIdx.x;
    if (token >= Tile::kTokens) return;
    if (pair_row_ && token < unit.num_tokens) {
      copy_async_4(shared_address(&rows_[index % 2 * Tile::kTokens + token]),
                   pair_row_ + unit.first_pair + token);
    } else {
      put_row(index, token < unit.num_tokens ? unit.first_pair + token : -1);
    }
  }

 private:
  __device__ __forceinline__ int4 find(int unit) const {
    const int work = unit / depth_splits_;
    int group = 0, first_tile = 0, first_pair = 0, end = groups_.num_pairs;
    int num_tiles = num_outputs_ / num_weight_blocks_;
    if (groups_.offsets) {
      group = groups_.tile_groups[work / num_weight_blocks_];
      first_tile = groups_.tile_offsets[group];
      num_tiles = groups_.tile_offsets[group + 1] - first_tile;
      first_pair = groups_.offsets[group];
      end = groups_.offsets[group + 1];
    }
    const TileWork tile =
        tile_work(work - first_tile * num_weight_blocks_, num_tiles, num_weight_blocks_);
    first_pair += tile.token_tile * Tile::kTokens;
    return {groups_.slots ? groups_.slots[group] : group, first_pair,
            min(end - first_pair, Tile::kTokens) | unit % depth_splits_ << 16, tile.weight_block};
  }

  int4 *units_;
  int *rows_;
  const light_pair_groups &groups_;
  const int *pair_row_;
  int num_weight_blocks_;
  int depth_splits_;
  int num_outputs_;
  int num_work_;
};

}  // namespace light
