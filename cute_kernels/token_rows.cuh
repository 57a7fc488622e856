// The tokens' side of a tile (the mma's B operand): gathered rows of 16-bit elements, from global
// memory into a swizzled stage, and from there into fragments.
#pragma once

#include "matrix_tile.cuh"

namespace light {

template <class Tile>
class TokenRows {
  using Store = TileStore<Tile::kDepth, Tile::kThreads>;
  static constexpr int kNoRow = -1;

 public:
  static constexpr int kCopies = Store::num_steps(Tile::kTokens);  // of 16 bytes a thread and stage

  __device__ __forceinline__ TokenRows(const void *rows, int depth, int warp_token)
      : rows_(static_cast<const char *>(rows)), depth_(depth), row_bytes_(depth * 2) {
    const Position at = Store::at(threadIdx.x, 0);
    first_ = at.row;
    chunk_ = at.depth;
    target_ = tile_offset<kLayoutRows, Tile::kDepth>({at.row % 8, at.depth}) * 2 +
              at.row / 8 * 8 * Tile::kDepth * 2;
    const int lane = threadIdx.x % 32;
    const Position piece = Tile::kTokenAtoms == 1 ? narrow_token_piece(lane) : token_piece(lane);
    // Beyond two chunks the depth is reached by exclusive or, in fragments().
    source_ = warp_token * Tile::kDepth * 2 +
              tile_offset<16, Tile::kDepth>({piece.row, piece.depth % 16}) * 2;
  }

  // Take the rows of the next tile from the queue: row numbers, kNoRow behind the last one.
  __device__ __forceinline__ void begin_tile(const int *tile_rows) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = first_ + i * Store::kStepRows;
      row_[i] = row < Tile::kTokens ? tile_rows[row] : kNoRow;
    }
  }

  // The stage's copies start here: `depth` elements into the rows, `bytes` 16, or 0 behind the end.
  __device__ __forceinline__ void begin_copies(int depth, int bytes) {
    source_row_ = rows_ + (depth + chunk_) * 2;
    bytes_ = depth + chunk_ < depth_ ? bytes : 0;
  }

  __device__ __forceinline__ void copy(unsigned stage, int i) const {
    if (Tile::kTokens % Store::kStepRows == 0 || first_ + i * Store::kStepRows < Tile::kTokens) {
      copy_async_16(target(stage, i), source(i), row_[i] == kNoRow ? 0 : bytes_);
    }
  }

  __device__ __forceinline__ void fetch(int i) {
    staged_[i] = load_global_16(source(i), row_[i] != kNoRow && bytes_ != 0);
  }

  __device__ __forceinline__ void store(unsigned stage, int i) const {
    if (Tile::kTokens % Store::kStepRows == 0 || first_ + i * Store::kStepRows < Tile::kTokens) {
      store_shared_16(target(stage, i), staged_[i]);
    }
  }

  // Fragments of 16 tokens (of all 8, where a warp has no more) at a step of 16 of depth.
  __device__ __forceinline__ void fragments(unsigned stage, int step, int pair,
                                            unsigned (&b)[2][2]) const {
    // A step is two chunks: its bits lie above the one that the lane chose.
    const unsigned address = stage + Tile::kTokensOffset + (source_ ^ (step * 32));
    if constexpr (Tile::kTokenAtoms == 1) {
      load_matrices(address, b[0][0], b[0][1]);
    } else {
      static_assert(Tile::kTokenAtoms % 2 == 0, "ldmatrix.x4 fetches 16 tokens");
      load_matrices(address + pair * 16 * Tile::kDepth * 2, b[0][0], b[0][1], b[1][0], b[1][1]);
    }
  }

 private:
  static constexpr int kLayoutRows = 8;

  __device__ __forceinline__ unsigned target(unsigned stage, int i) const {
    return stage + Tile::kTokensOffset + target_ + i * Store::kStepRows * Tile::kDepth * 2;
  }
  __device__ __forceinline__ const char *source(int i) const {
    return source_row_ + static_cast<long long>(row_[i]) * row_bytes_;
  }

  const char *rows_;
  int depth_;
  int row_bytes_;
  int first_;
  int chunk_;
  unsigned target_;
  unsigned source_;
  const char *source_row_;
  int bytes_;
  int row_[kCopies];
  uint4 staged_[kAsyncCopies ? 1 : kCopies];
};

}  // namespace light
