// Which part of the output a unit of work of the matrix kernels computes.
//
// Plain C++17 without includes: NVRTC compiles it for the device, g++ for the CPU tests.
#pragma once

#ifdef __CUDACC__
#define LIGHT_HOST_DEVICE __host__ __device__
#else
#define LIGHT_HOST_DEVICE
#endif

namespace light {

// Token tiles of a group that run beside each other for each block of weights: within such a band a
// block of weights is read from memory once and by the others from L2, and the band's tokens stay.
constexpr int kBandTiles = 16;

struct TileWork {
  int token_tile;    // within the group: its pairs from offsets[group] + token_tile * tokens
  int weight_block;  // rows from weight_block * weight_rows of the group's weight
};

// Unit `in_group` of a group of `num_tiles` token tiles, for in_group < num_tiles *
// num_weight_blocks: bands of kBandTiles token tiles; in a band weight blocks in order; for each of
// them the band's tiles. The units of all groups follow each other, so unit `work` of all belongs
// to group g = tile_groups[work / num_weight_blocks] and is its unit
// work - tile_offsets[g] * num_weight_blocks.
LIGHT_HOST_DEVICE constexpr TileWork tile_work(int in_group, int num_tiles,
                                               int num_weight_blocks) {
  const int band = in_group / (kBandTiles * num_weight_blocks);
  const int tiles_left = num_tiles - band * kBandTiles;
  const int tiles_in_band = tiles_left < kBandTiles ? tiles_left : kBandTiles;
  const int in_band = in_group - band * kBandTiles * num_weight_blocks;
  return {band * kBandTiles + in_band % tiles_in_band, in_band / tiles_in_band};
}

}  // namespace light
