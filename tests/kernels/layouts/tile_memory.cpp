// cute_kernels/tile_memory.h and hopper_launch.h for tests/kernels/test_tiles.py.
#include "tile_memory.h"

#include "hopper_launch.h"

// Of a stage on warpgroups with the most scales and zeros there can be.
static int hopper_stage_bytes(const light_tile &tile, int num_bits) {
  const bool quantised = num_bits < 16;
  const int groups = quantised ? tile.depth / light::kSmallestGroup : 0;
  return light::hopper_stage(tile.weight_rows, tile.tokens, tile.depth, num_bits, groups,
                             quantised)
      .bytes;
}

extern "C" int shared_bytes(const light_tile *tile, int num_bits) {
  return tile->limit ? tile->stages * hopper_stage_bytes(*tile, num_bits) + light::kHopperTailBytes
                     : light::tile_shared_bytes(*tile, num_bits);
}

// Of a CTA on warpgroups with weights and rows in e4m3.
extern "C" int fp8_shared_bytes(const light_tile *tile) {
  return tile->stages * light::fp8_stage(tile->weight_rows, tile->tokens, tile->depth).bytes +
         light::kHopperTailBytes;
}

extern "C" int most_stages() { return light::kMostStages; }
