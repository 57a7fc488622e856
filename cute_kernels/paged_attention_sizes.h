// Sizes that the kernels of attention over pages and their launcher agree on.
#pragma once

#ifdef __CUDACC__
#define LIGHT_ATTENTION_BOTH __host__ __device__
#else
#define LIGHT_ATTENTION_BOTH
#endif

namespace light::attention {

// Positions whose softmax is one chain; the sums of sections are then folded in ascending order. It
// is the specification of a position's bits, as is the number of keys of a tile.
constexpr int kSection = 256;
constexpr int kRows = 16;  // of the mma: the query heads of one KV head that a warp holds
constexpr int kMergeWarps = 4;
constexpr int kMinBlock = 8, kMaxBlock = kSection;

// Widths that the kernels are compiled for: the next larger one takes all below it. With the last
// one keys are the values as well.
constexpr int kWidths[] = {32, 64, 128, 256, 576};
constexpr int kMaxApart = 256;

// Of one width on one architecture (75, 90).
struct Sizes {
  int width;
  int architecture;

  LIGHT_ATTENTION_BOTH constexpr bool is_async() const { return architecture >= 80; }
  LIGHT_ATTENTION_BOTH constexpr bool is_roomy() const {  // shared memory of 163 KB a CTA or more
    return architecture == 80 || architecture >= 90;
  }
  LIGHT_ATTENTION_BOTH constexpr bool values_are_keys() const { return width > kMaxApart; }
  LIGHT_ATTENTION_BOTH constexpr bool query_in_shared() const { return width > 128; }
  // Warps that share 16 rows: each has its part of the value columns, and of a tile's scores. One
  // is enough where a CTA has many rows; with 16 alone it would wait for every step of a tile.
  LIGHT_ATTENTION_BOTH constexpr int parts(bool whole) const {
    if (width <= 128) return whole || !shares_few_rows() ? 1 : 4;
    return width <= kMaxApart ? 2 : 4;
  }
  LIGHT_ATTENTION_BOTH constexpr bool shares_few_rows() const {
    return architecture >= 90 && width >= 64;
  }
  LIGHT_ATTENTION_BOTH constexpr int tile_keys() const {
    return width > kMaxApart ? (is_async() ? 32 : 16) : is_async() && width <= 128 ? 64 : 32;
  }
  // Whether warps meet once for a tile of keys and its values, not for each.
  LIGHT_ATTENTION_BOTH constexpr bool pairs_slots(bool whole) const {
    return whole && is_async() && !values_are_keys();
  }
  // Tiles of keys, or of values, in shared memory.
  LIGHT_ATTENTION_BOTH constexpr int slots(bool whole) const {
    if (pairs_slots(whole)) return is_roomy() ? 6 : 4;
    if (width <= 128 && parts(whole) > 1) return 4;  // three CTAs of 64 keys x 128 on an SM
    if (width <= 128 && is_async()) return 3;
    return is_roomy() && !values_are_keys() ? 4 : 2;
  }
  // Of 16 rows, of a CTA that walks all sections of a prompt's tile.
  LIGHT_ATTENTION_BOTH constexpr int row_tiles() const {
    if (width <= 128) return is_async() ? 8 : 4;
    return width <= kMaxApart ? (is_roomy() ? 4 : 2) : is_roomy() ? 3 : 1;
  }
  LIGHT_ATTENTION_BOTH constexpr int row_bytes() const { return 2 * width + 16; }  // no conflicts
  LIGHT_ATTENTION_BOTH constexpr int slot_bytes() const { return tile_keys() * row_bytes(); }
  LIGHT_ATTENTION_BOTH constexpr int query_bytes(int num_row_tiles) const {
    return query_in_shared() ? num_row_tiles * kRows * row_bytes() : 0;
  }
  LIGHT_ATTENTION_BOTH constexpr int scores_bytes(int num_row_tiles, bool whole) const {
    return parts(whole) > 1 ? num_row_tiles * kRows * tile_keys() * 4 : 0;
  }
  LIGHT_ATTENTION_BOTH constexpr int shared_bytes(int num_row_tiles, bool whole) const {
    return slots(whole) * slot_bytes() + query_bytes(num_row_tiles) +
           scores_bytes(num_row_tiles, whole);
  }
  LIGHT_ATTENTION_BOTH constexpr int threads(int num_row_tiles, bool whole) const {
    return 32 * parts(whole) * num_row_tiles;
  }
};

}  // namespace light::attention
