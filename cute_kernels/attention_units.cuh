// Which rows and which positions a CTA of attention works on, found in the sequences' lengths.
#pragma once

#include "light_ops.h"
#include "paged_attention_sizes.h"

namespace light::attention {

constexpr unsigned kAllLanes = 0xffffffffu;

// Queries of one sequence that share a KV head. Row r is the query of token r / G and head r % G of
// the G heads: the order of the mma's rows.
struct Unit {
  int sequence;
  int kv_head;
  int first_token;  // of the sequence's queries among those of the step
  int num_rows;     // of the sequence
  int first_position;
  int length;
  int first_row;  // of the CTA
  int section;    // the first one
  int num_positions;  // from there on
};

__device__ __forceinline__ int num_sections(int num_positions) {
  return max(1, (num_positions + kSection - 1) / kSection);
}

__device__ __forceinline__ int num_queries(const light_paged_attention_args &args, int sequence) {
  return args.query_starts[sequence + 1] - args.query_starts[sequence];
}

// The place of `index` among the items of all sequences, `count` of each: by a whole warp.
template <class Count>
__device__ __forceinline__ bool find_sequence(int num_sequences, int index, Count count,
                                              int *sequence, int *item) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < num_sequences; first += 32) {
    const int own = first + lane < num_sequences ? count(first + lane) : 0;
    int up_to = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int below = __shfl_up_sync(kAllLanes, up_to, offset);
      up_to += lane >= offset ? below : 0;
    }
    const unsigned found = __ballot_sync(kAllLanes, index < up_to);
    if (found != 0) {
      const int source = __ffs(found) - 1;
      *sequence = first + source;
      *item = index - __shfl_sync(kAllLanes, up_to - own, source);
      return true;
    }
    index -= __shfl_sync(kAllLanes, up_to, 31);
  }
  return false;
}

__device__ __forceinline__ Unit unit_of(const light_paged_attention_args &args, int sequence,
                                        int kv_head) {
  const int queries = num_queries(args, sequence), length = args.lengths[sequence];
  const int num_rows = queries * (args.num_heads / args.num_kv_heads);
  const int first_token = args.query_starts[sequence];
  return {sequence, kv_head, first_token, num_rows, length - queries, length, 0, 0, 0};
}

// One section of a sequence with one query: section after section, the rows of one side by side.
__device__ __forceinline__ bool find_split_unit(const light_paged_attention_args &args, int index,
                                                Unit *unit) {
  const int group = args.num_heads / args.num_kv_heads;
  const int tiles_per_head = (group + kRows - 1) / kRows;
  const int tiles = args.num_kv_heads * tiles_per_head, tile = index % tiles;
  int sequence, section;
  const auto count = [&](int i) {
    return num_queries(args, i) == 1 ? num_sections(args.lengths[i]) : 0;
  };
  if (!find_sequence(args.num_sequences, index / tiles, count, &sequence, &section)) {
    return false;
  }
  *unit = unit_of(args, sequence, tile / tiles_per_head);
  unit->first_row = tile % tiles_per_head * kRows;
  unit->section = section;
  unit->num_positions = min(unit->length - section * kSection, kSection);
  return true;
}

// So many rows of a sequence and all that they see; the last rows, which see most, come first.
__device__ __forceinline__ bool find_whole_unit(const light_paged_attention_args &args, int index,
                                                int rows_per_unit, Unit *unit) {
  const int group = args.num_heads / args.num_kv_heads;
  const auto count = [&](int i) {
    const int queries = num_queries(args, i);
    const bool is_split = args.splits_single_queries && queries == 1;
    return is_split ? 0 : (queries * group + rows_per_unit - 1) / rows_per_unit;
  };
  int sequence, item;
  if (!find_sequence(args.num_sequences, index / args.num_kv_heads, count, &sequence, &item)) {
    return false;
  }
  *unit = unit_of(args, sequence, index % args.num_kv_heads);
  unit->first_row = (count(sequence) - 1 - item) * rows_per_unit;
  const int last_row = min(unit->first_row + rows_per_unit, unit->num_rows) - 1;
  unit->num_positions = unit->first_position + last_row / group + 1;
  return true;
}

// Tiles of keys that a unit goes through. Each section that is split off has some at least, the
// last perhaps of nothing: copies that run ahead so never reach over the unit that comes next.
template <class Shape>
__device__ __forceinline__ int num_tiles(const Unit &unit) {
  constexpr int kKeys = Shape::kSizes.tile_keys();
  constexpr int kFewest = Shape::kWhole ? 0 : 2;
  static_assert(Shape::kWhole || kFewest * (Shape::kSizes.values_are_keys() ? 1 : 2) >=
                                     Shape::kSlots - (Shape::kPaired ? 2 : 1),
                "copies ahead are of two units");
  return max((unit.num_positions + kKeys - 1) / kKeys, kFewest);
}

}  // namespace light::attention
