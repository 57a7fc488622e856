// How many bytes of shared memory a tile of the matrix kernels takes, and where its parts lie.
//
// Plain C++17 without includes but light_ops.h: the device code and the host library both use it.
#pragma once

#include "light_ops.h"
#include "tile_scheduler.h"

namespace light {

constexpr int kQueueTiles = 16;  // units of work that a CTA looks up at a time; two such halves
constexpr int kBlockRows = 16;   // rows of a block of packed weights
constexpr int kBlockDepth = 64;
constexpr int kSmallestGroup = 32;  // elements of depth that share a scale, at least

// One pipeline stage: weights [weight_rows, depth], scales, zeros (quantised only), tokens.
struct StageBytes {
  int weights;
  int scales;  // 16-bit scales; as many bytes of zeros follow
  int tokens;

  LIGHT_HOST_DEVICE constexpr int total() const { return weights + 2 * scales + tokens; }
};

// `num_bits` of a weight: 16, 8 or 4.
LIGHT_HOST_DEVICE constexpr StageBytes stage_bytes(int weight_rows, int tokens, int depth,
                                                   int num_bits) {
  return {weight_rows * depth * num_bits / 8,
          num_bits == 16 ? 0 : weight_rows * (depth / kSmallestGroup) * 2, tokens * depth * 2};
}

// The work queue: two halves of 16-byte entries, two sets of the tokens' row numbers.
LIGHT_HOST_DEVICE constexpr int queue_bytes(int tokens) {
  return 2 * kQueueTiles * 16 + 2 * tokens * 4;
}

LIGHT_HOST_DEVICE constexpr int tile_shared_bytes(const light_tile &tile, int num_bits) {
  return tile.stages *
             stage_bytes(tile.weight_rows, tile.tokens, tile.depth, num_bits).total() +
         queue_bytes(tile.tokens);
}

}  // namespace light
