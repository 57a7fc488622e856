// What a launch of Hopper's matrix kernels passes beside the stem's own arguments: tensor maps for
// the copy engine, and where the parts of a pipeline stage lie. Host and device both include it.
#pragma once

#include "light_ops.h"
#include "tile_scheduler.h"

namespace light {

constexpr int kPanelRowBytes = 128;  // of depth: one row of a swizzled panel
constexpr int kScaleSpan = 128;      // rows, and elements of depth, that share an e4m3 scale
constexpr int kMostStages = 12;
constexpr int kRingUnits = 16;        // two more than stages at least: see HopperMemory
constexpr int kStageAlignment = 1024;  // a swizzled panel repeats after 8 rows

struct alignas(64) TensorMap {  // CUtensorMap
  unsigned long long words[16];
};

// Offsets in a stage, in bytes. Weights begin it.
struct HopperStage {
  int tokens_offset;
  int scales_offset;
  int zeros_offset;
  int bytes;          // of a stage, a multiple of kStageAlignment
  int weights_bytes;  // that the copy engine writes: weights, scales and zeros
};

template <class Args>
struct HopperLaunch {
  TensorMap weights;
  TensorMap scales;
  TensorMap zeros;
  TensorMap rows;
  Args args;
  HopperStage stage;
  int tokens;  // of a tile, at most: 8, or a multiple of 16
  int num_stages;
};

constexpr int kHopperTailBytes = 2 * kMostStages * 8 + kRingUnits * 16;

LIGHT_HOST_DEVICE constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Elements of so many bits in a row of a panel.
LIGHT_HOST_DEVICE constexpr int panel_depth(int bits) { return kPanelRowBytes * 8 / bits; }

// Rows that one copy of contiguous token rows brings, for a tile of `tokens` at most. Few large
// copies: with 32 rows to a copy prefill ran a tenth slower on an H100, with 16 a quarter.
LIGHT_HOST_DEVICE constexpr int row_box(int tokens) {
  return tokens > 64 ? round_up(tokens / 2, 8) : tokens < 16 ? tokens : 16;
}

// Bytes from a panel's start to 16 bytes of a row, exchanged as the tensor cores expect them.
LIGHT_HOST_DEVICE constexpr int panel_offset(int row, int chunk) {
  return row * kPanelRowBytes + (chunk ^ row % 8) * 16;
}

// The same of the outputs of a tile, whose rows are so many chunks: 8 rows of one chunk touch all
// banks, and 8 neighbours of a row or of rows that follow each other do.
template <int RowChunks>
LIGHT_HOST_DEVICE constexpr int output_offset(int token, int chunk) {
  constexpr int kExchanged = RowChunks < 8 ? RowChunks : 8;
  return (token * RowChunks + (chunk ^ token / (8 / kExchanged) % kExchanged)) * 16;
}

// `stage_groups`: groups of the depth in a stage that have scales of their own, 0 without scales.
LIGHT_HOST_DEVICE constexpr HopperStage hopper_stage(int weight_rows, int tokens, int depth,
                                                     int num_bits, int stage_groups,
                                                     bool has_zeros) {
  const int weights = weight_rows * depth * num_bits / 8;
  const int scales = weight_rows * stage_groups * 2;
  const int zeros = has_zeros ? scales : 0;
  const int scales_offset = weights + tokens * depth * 2;
  const int zeros_offset = scales_offset + round_up(scales, 128);
  const int bytes = round_up(zeros_offset + round_up(zeros, 128), kStageAlignment);
  return {weights, scales_offset, zeros_offset, bytes, weights + scales + zeros};
}

// Scales of 128 of depth, in float32: of gate and of up rows, or of the tile's first 128 rows and
// the others; then of the tokens.
LIGHT_HOST_DEVICE constexpr int scale_list_bytes(int tokens) { return (2 + tokens) * 4; }
LIGHT_HOST_DEVICE constexpr int token_scale(int token) { return (2 + token) * 4; }

// Of weights and rows in e4m3, with two sets of scales, for turns: a stage's weights and rows are
// done with before its scales.
LIGHT_HOST_DEVICE constexpr HopperStage fp8_stage(int weight_rows, int tokens, int depth) {
  const int weights = weight_rows * depth;
  const int scales_offset = weights + tokens * depth;
  const int end = scales_offset + 2 * (depth / kScaleSpan) * scale_list_bytes(tokens);
  return {weights, scales_offset, end, round_up(end, kStageAlignment), weights};
}

}  // namespace light
