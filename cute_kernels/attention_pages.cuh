// Tiles of keys and values on their way from the pages of one sequence into shared memory.
#pragma once

#include "attention_units.cuh"
#include "instructions.cuh"

namespace light::attention {

// Tiles go through a ring of slots: keys, values, keys, values, ..; or keys alone. With cp.async
// copies are under way while a tile is in use; without, one waits in registers meanwhile.
//
// They come section after section. Where sections are of different units, the ring goes on from one
// to the next, so it never drains.
template <class Shape>
class Pages {
  static constexpr Sizes kSizes = Shape::kSizes;
  static constexpr int kAhead = Shape::kSlots - (Shape::kPaired ? 2 : 1);  // copies
  static constexpr int kChunks = kSizes.width / 8;  // of 16 bytes, of a row
  // Side by side in a row: so many that all threads have as much to copy.
  static constexpr int kLanes =
      kSizes.width <= kMaxApart ? kChunks : Shape::kRowTiles % 3 == 0 ? 24 : 8;
  static constexpr int kColumns = kChunks / kLanes;
  static constexpr int kRowsAtOnce = Shape::kThreads / kLanes;
  static constexpr int kPasses = kSizes.tile_keys() / kRowsAtOnce;
  static constexpr int kUnrolled = kAsyncCopies && kPasses > 8 ? 8 : kPasses;
  static_assert(kColumns * kLanes == kChunks && kPasses * kRowsAtOnce == kSizes.tile_keys(),
                "all threads copy as much");
  static constexpr int kTilesPerSection = kSection / kSizes.tile_keys();

 public:
  __device__ __forceinline__ Pages(const light_paged_attention_args &args, unsigned slots)
      : args_(args), slots_(slots), shift_(__ffs(args.block_size) - 1) {}

  // The first unit.
  __device__ __forceinline__ void look_up(const Unit &unit) {
    current_.num_tiles = tile_ = slot_ = 0;
    of_values_ = false;
    follow(unit);
  }

  // Ask for the first tiles of the unit that was looked up.
  __device__ __forceinline__ void begin() {
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) {
      copy_next();
      end_copy();
    }
  }

  // Its first section comes after the one that is being copied.
  __device__ __forceinline__ void follow(const Unit &unit) {
    table_ = args_.block_tables + static_cast<long long>(unit.sequence) * args_.table_stride;
    section_ = unit.section;
    length_ = unit.length;
    tiles_left_ = num_tiles<Shape>(unit);
    head_bytes_ = unit.kv_head * args_.width * 2;
    prepare();
  }

  __device__ __forceinline__ void follow_none() { next_.num_tiles = 0; }

  // Ask for the tile after the last one asked for.
  __device__ __forceinline__ void copy_next() {
    if (tile_ == current_.num_tiles) {
      current_ = next_;
      tile_ = 0;
      prepare();
    }
    copies_ = tile_ < current_.num_tiles;
    if (copies_) {
      copy_tile(static_cast<const unsigned char *>(of_values_ ? args_.values : args_.keys));
    }
    if constexpr (kAsyncCopies) {
      commit_copies();  // empty groups behind the end keep the count of pending ones right
      advance();
    }
  }

  // Without cp.async: what copy_next asked for is here, and the tile in its slot is done with.
  __device__ __forceinline__ void end_copy() {
    if constexpr (!kAsyncCopies) {
      if (copies_) {
        const unsigned target = this->target();
#pragma unroll
        for (int i = 0; i < kPasses * kColumns; ++i) {
          store_shared_16(target + offset(i / kColumns, i % kColumns), staged_[i]);
        }
      }
      advance();
    }
  }

  // The oldest tile, or pair, is in its slot once all threads have passed the barrier behind this.
  __device__ __forceinline__ void wait() const {
    if constexpr (kAsyncCopies) wait_copies<kAhead - (Shape::kPaired ? 2 : 1)>();
  }

 private:
  __device__ __forceinline__ unsigned target() const {
    return slots_ + slot_ * kSizes.slot_bytes() + threadIdx.x / kLanes * kSizes.row_bytes() +
           threadIdx.x % kLanes * 16;
  }

  __device__ __forceinline__ static constexpr int offset(int pass, int column) {
    return pass * kRowsAtOnce * kSizes.row_bytes() + column * kLanes * 16;
  }

  struct Section {
    int num_tiles;
    int head_bytes;
    int num_positions;  // to the end of the sequence
    int blocks;         // of lane l: the section's block l
  };

  // Look the next section up, ahead of its copies.
  __device__ __forceinline__ void prepare() {
    const int lane = threadIdx.x % 32, block = (section_ * kSection >> shift_) + lane;
    const bool exists = lane < kSection >> shift_ && block << shift_ < length_ && tiles_left_ > 0;
    next_ = {min(tiles_left_, kTilesPerSection), head_bytes_, length_ - section_ * kSection,
             exists ? table_[block] : 0};
    tiles_left_ = max(tiles_left_ - kTilesPerSection, 0);
    ++section_;
  }

  __device__ __forceinline__ void copy_tile(const unsigned char *pages) {
    const int first = tile_ * kSizes.tile_keys(), left = current_.num_positions - first;
    const int row = threadIdx.x / kLanes, chunk = threadIdx.x % kLanes;
    const unsigned target = this->target();
#pragma unroll kUnrolled
    for (int pass = 0; pass < kPasses; ++pass) {
      const int place = first + row + pass * kRowsAtOnce;
      const int block = __shfl_sync(kAllLanes, current_.blocks, place >> shift_);
      const int position = (block << shift_) + (place & (args_.block_size - 1));
      // What a page holds beyond the last position may be another request's, or NaN.
      const bool exists = row + pass * kRowsAtOnce < left;
      const long long row_bytes = static_cast<long long>(position) * args_.position_bytes;
      const unsigned char *source = pages + (exists ? row_bytes + current_.head_bytes : 0);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int column = chunk + i * kLanes;
        const bool copies = exists && 8 * column < args_.width;
        const unsigned char *from = source + (copies ? 16 * column : 0);
        if constexpr (kAsyncCopies) {
          copy_async_16(target + offset(pass, i), from, copies ? 16 : 0);
        } else {
          staged_[pass * kColumns + i] = load_global_16(from, copies);
        }
      }
    }
  }

  __device__ __forceinline__ void advance() {
    slot_ = slot_ + 1 == Shape::kSlots ? 0 : slot_ + 1;
    tile_ += kSizes.values_are_keys() || of_values_;
    of_values_ = !kSizes.values_are_keys() && !of_values_;
  }

  const light_paged_attention_args &args_;
  unsigned slots_;
  int shift_;
  const int *table_;  // of the section after next_
  int head_bytes_;
  int length_;
  int section_;
  int tiles_left_;
  Section current_;
  Section next_;
  int tile_;
  int slot_;
  bool of_values_;
  bool copies_;
  uint4 staged_[kAsyncCopies ? 1 : kPasses * kColumns];
};

}  // namespace light::attention
