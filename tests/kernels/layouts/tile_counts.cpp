// cute_kernels/topk_gate_sizes.h for tests/kernels/test_sort_pairs.py.
#include "topk_gate_sizes.h"

// The first number of pairs in steps of `step` whose tiles are not those of a division; -1: none.
extern "C" int first_wrong(int tokens_per_tile, int most_pairs, int step) {
  const unsigned reciprocal = light::gate::tile_reciprocal(tokens_per_tile);
  for (int pairs = 0; pairs <= most_pairs; pairs += step) {
    const int wanted = pairs / tokens_per_tile + (pairs % tokens_per_tile > 0);
    if (light::gate::num_tiles(pairs, tokens_per_tile, reciprocal) != wanted) {
      return pairs;
    }
  }
  return -1;
}

extern "C" bool is_tile(int tokens_per_tile) { return light::gate::is_tile(tokens_per_tile); }
