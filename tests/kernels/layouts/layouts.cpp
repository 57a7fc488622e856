// The layouts of cute_kernels/layouts.h and CuTe's fragment layouts as plain numbers, for
// tests/kernels/test_layouts.py. LIGHT_TILES lists the tiles: TILE(rows, depth, threads) ...
#include "layouts.h"

#include <cute/atom/mma_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

#include "mma_sm75_half.h"

namespace {

struct Tile {
  void (*offsets)(int *);       // of each (row, depth)
  int (*stores)(int, int *);    // (row, depth) of each thread of a step; returns the steps
};

template <int Rows, int Depth>
void write_offsets(int *out) {
  for (int row = 0; row < Rows; ++row) {
    for (int depth = 0; depth < Depth; ++depth) {
      *out++ = light::tile_offset<Rows, Depth>({row, depth});
    }
  }
}

template <int Rows, int Depth, int Threads>
int write_stores(int step, int *out) {
  using Store = light::TileStore<Depth, Threads>;
  for (int thread = 0; thread < Threads; ++thread) {
    const light::Position at = Store::at(thread, step);
    *out++ = at.row;
    *out++ = at.depth;
  }
  return Store::num_steps(Rows);
}

#define TILE(rows, depth, threads) \
  {write_offsets<rows, depth>, write_stores<rows, depth, threads>},
constexpr Tile kTiles[] = {LIGHT_TILES};

constexpr light::Position (*kPieces[])(int) = {light::weight_piece, light::token_piece,
                                               light::narrow_token_piece};

template <class Layout>
int write_fragment(int *out) {
  const auto layout = Layout{};
  const int num_values = cute::size<1>(layout);
  for (int lane = 0; lane < 32; ++lane) {
    for (int value = 0; value < num_values; ++value) *out++ = layout(lane, value);
  }
  return num_values;
}

template <class Atom>
int write_operand(char operand, int *out) {
  using Traits = cute::MMA_Traits<Atom>;
  if (operand == 'A') return write_fragment<typename Traits::ALayout>(out);
  if (operand == 'B') return write_fragment<typename Traits::BLayout>(out);
  return write_fragment<typename Traits::CLayout>(out);
}

constexpr int (*kAtoms[])(char, int *) = {
    write_operand<cute::SM75_16x8x8_F32F16F16F32_TN>,
    write_operand<cute::SM75_16x8x8_F16F16F16F16_TN>,
    write_operand<cute::SM80_16x8x16_F32F16F16F32_TN>,
    write_operand<cute::SM80_16x8x16_F32BF16BF16F32_TN>,
};

}  // namespace

extern "C" {

void tile_offsets(int tile, int *out) { kTiles[tile].offsets(out); }

int tile_stores(int tile, int step, int *out) { return kTiles[tile].stores(step, out); }

void piece(int kind, int lane, int *out) {
  const light::Position at = kPieces[kind](lane);
  out[0] = at.row;
  out[1] = at.depth;
}

// Index of each (lane, value) in the operand, column-major; returns the values of a lane.
int mma_fragment(int atom, char operand, int *out) { return kAtoms[atom](operand, out); }

}  // extern "C"
