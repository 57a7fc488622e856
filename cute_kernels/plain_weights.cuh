// The weights' side of a tile (the mma's A operand), 16-bit: from global memory into a swizzled
// stage, and from there into fragments. With SwiGLU a block of 16 rows is 8 gate rows and the 8 up
// rows beside them, so that both products of an output end in the same thread.
#pragma once

#include "matrix_tile.cuh"

namespace light {

template <class Tile>
class PlainWeights {
  using Store = TileStore<Tile::kDepth, Tile::kThreads>;
  static constexpr int kFeaturesPerBlock = Tile::kSwiglu ? 8 : 16;  // of 16 rows
  static constexpr int kStepFeatures = Store::kStepRows * kFeaturesPerBlock / 16;
  static_assert(Store::kStepRows % 16 == 0 && Tile::kWeightRows % Store::kStepRows == 0,
                "a step stores whole blocks");

 public:
  // Of 16 bytes, a thread and stage.
  static constexpr int kCopies = Store::num_steps(Tile::kWeightRows);

  __device__ __forceinline__ PlainWeights(const light_grouped_gemm_args &args, int warp_row)
      : weights_(static_cast<const char *>(args.weights)),
        slot_bytes_(args.slot_bytes),
        depth_(args.depth),
        num_features_(args.num_features) {
    const Position at = Store::at(threadIdx.x, 0);
    chunk_ = at.depth;
    const bool up = Tile::kSwiglu && at.row % 16 >= 8;
    feature_ = at.row / 16 * kFeaturesPerBlock + at.row % kFeaturesPerBlock;
    first_row_ = up ? num_features_ : 0;
    step_bytes_ = kStepFeatures * depth_ * 2;
    target_ = tile_offset<8, Tile::kDepth>({at.row % 8, at.depth}) * 2 +
              at.row / 8 * 8 * Tile::kDepth * 2;
    const Position piece = weight_piece(threadIdx.x % 32);
    source_ = (warp_row * Tile::kDepth + tile_offset<16, Tile::kDepth>(piece)) * 2;
  }

  // Rows behind the last feature are read as the last one: their sums are never stored.
  __device__ __forceinline__ void begin_tile(int slot, int weight_block) {
    const int feature = weight_block * (Tile::kWeightRows / 16 * kFeaturesPerBlock) + feature_;
    steps_left_ = max(num_features_ - 1 - feature, 0) / kStepFeatures;
    const long long row = min(feature, num_features_ - 1) + first_row_;
    row_ = weights_ + slot * slot_bytes_ + (row * depth_ + chunk_) * 2;
  }

  // The stage's copies start here: `depth` elements into the rows, `bytes` 16, or 0 behind the end.
  __device__ __forceinline__ void begin_copies(int depth, int bytes) {
    source_row_ = row_ + depth * 2;
    bytes_ = depth + chunk_ < depth_ ? bytes : 0;
  }

  __device__ __forceinline__ void copy(unsigned stage, int i) const {
    copy_async_16(target(stage, i), source(i), bytes_);
  }

  __device__ __forceinline__ void fetch(int i) {
    staged_[i] = load_global_16(source(i), bytes_ != 0);
  }

  __device__ __forceinline__ void store(unsigned stage, int i) const {
    store_shared_16(target(stage, i), staged_[i]);
  }

  // The fragment of 16 rows at a step of 16 of depth.
  __device__ __forceinline__ void fragment(unsigned stage, int step, int atom,
                                           unsigned (&a)[4]) const {
    const unsigned address = stage + (source_ ^ (step * 32)) + atom * 16 * Tile::kDepth * 2;
    load_matrices(address, a[0], a[1], a[2], a[3]);
  }

 private:
  __device__ __forceinline__ unsigned target(unsigned stage, int i) const {
    return stage + target_ + i * Store::kStepRows * Tile::kDepth * 2;
  }
  __device__ __forceinline__ const char *source(int i) const {
    return source_row_ + static_cast<long long>(min(i, steps_left_)) * step_bytes_;
  }

  const char *weights_;
  long long slot_bytes_;
  int depth_;
  int num_features_;
  int chunk_;
  int feature_;
  int first_row_;
  int steps_left_;
  int step_bytes_;
  unsigned target_;
  unsigned source_;
  const char *row_;
  const char *source_row_;
  int bytes_;
  uint4 staged_[kAsyncCopies ? 1 : kCopies];
};

}  // namespace light
