// Shared-memory tiles of 16-bit elements as CuTe layouts, and who touches what in them: the piece
// of a tile that each lane names to ldmatrix, and the 16 bytes that each thread stores.
//
// A tile is [rows, depth], depth contiguous (both operands of a .row.col mma). The swizzle
// exchanges the 16-byte chunks of a row so that 8 lanes that read 8 rows, or store one row after
// the other, touch 32 banks. tests/kernels/test_layouts.py proves it on the host, so this header
// compiles under NVRTC and under a plain C++17 compiler.
#pragma once

#include <cute/layout.hpp>
#include <cute/swizzle_layout.hpp>

namespace light {

constexpr int kChunk = 8;   // elements of 16 bits in 16 bytes: one lane's part of a copy
constexpr int kPiece = 16;  // ldmatrix.x4 fetches 16 x 16 elements

// Rows of 128 bytes meet all 32 banks each: all 8 chunks take turns (3 bits). Rows of 64 bytes meet
// half of them, so two rows share a turn and 4 chunks take turns (2 bits).
template <int Depth>
using TileSwizzle = cute::Swizzle<Depth == 64 ? 3 : 2, 3, 3>;

template <int Rows, int Depth>
using TileLayout = decltype(cute::composition(
    TileSwizzle<Depth>{}, cute::Layout<cute::Shape<cute::Int<Rows>, cute::Int<Depth>>,
                                       cute::Stride<cute::Int<Depth>, cute::_1>>{}));

struct Position {
  int row;
  int depth;
};

// Elements from the start of the tile to (row, depth).
template <int Rows, int Depth>
CUTE_HOST_DEVICE constexpr int tile_offset(Position at) {
  static_assert(Depth == 32 || Depth == 64, "a tile is 32 or 64 deep");
  static_assert(Rows % 8 == 0, "the swizzle repeats after 8 rows");
  return TileLayout<Rows, Depth>{}(at.row, at.depth);
}

// Where a lane of ldmatrix.x4 points within a 16 x 16 piece of weights (the mma's A operand):
// registers 0 to 3 are then a0 to a3 of one m16n8k16, or a0, a1 of two m16n8k8 one after the other.
CUTE_HOST_DEVICE constexpr Position weight_piece(int lane) {
  return {lane % 16, lane / 16 * kChunk};
}

// The same for 16 tokens x 16 of depth (the B operand): registers 0, 1 are b0, b1 of tokens 0 to 7,
// registers 2, 3 those of tokens 8 to 15.
CUTE_HOST_DEVICE constexpr Position token_piece(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * kChunk};
}

// The same for 8 tokens x 32 of depth: registers 2s, 2s + 1 are b0, b1 of the depth's half s.
CUTE_HOST_DEVICE constexpr Position narrow_token_piece(int lane) {
  return {lane % 8, lane / 8 * kChunk};
}

// The 16 bytes that a thread stores (or copies by cp.async) in one step, as the first of its 8
// elements. Step i is kStepRows further down, so a thread keeps its place in the swizzle where
// kStepRows is a multiple of 8.
template <int Depth, int NumThreads>
struct TileStore {
  static_assert(NumThreads % (Depth / kChunk) == 0, "a step stores whole rows");
  static constexpr int kStepRows = NumThreads / (Depth / kChunk);

  CUTE_HOST_DEVICE static constexpr Position at(int thread, int step) {
    return {thread / (Depth / kChunk) + step * kStepRows, thread % (Depth / kChunk) * kChunk};
  }

  // Steps that a tile of so many rows takes; only threads with at().row < rows store in the last.
  CUTE_HOST_DEVICE static constexpr int num_steps(int rows) {
    return (rows + kStepRows - 1) / kStepRows;
  }
};

}  // namespace light
