// The layouts of cute_kernels/hopper_launch.h and CuTe's of warpgroup mma as plain numbers, for
// tests/kernels/test_warpgroup_layouts.py. LIGHT_WIDTHS lists the mma's: WIDTH(tokens) ...
#include <cstdint>

#include "hopper_launch.h"

#include <cute/swizzle_layout.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

namespace {

template <class Element>
using Panel = cute::GMMA::Layout_K_SW128_Atom<Element>;

// Index of each (thread, value) of an operand, column-major; returns the values of a thread.
template <class Layout>
int write_fragment(int *out) {
  const auto layout = Layout{};
  const int num_values = cute::size<1>(layout);
  for (int thread = 0; thread < 128; ++thread) {
    for (int value = 0; value < num_values; ++value) *out++ = layout(thread, value);
  }
  return num_values;
}

// Layouts of CuTe's atoms MMA_64xTOKENSx16_*_RS.
template <int Tokens>
int write_operand(char operand, int *out) {
  return operand == 'A' ? write_fragment<cute::SM90::GMMA::ALayout_64x16>(out)
                        : write_fragment<cute::SM90::GMMA::CLayout_64xN<Tokens>>(out);
}

#define WIDTH(tokens) write_operand<tokens>,
constexpr int (*kWidths[])(char, int *) = {LIGHT_WIDTHS};

}  // namespace

extern "C" {

// Elements from the panel's start to (row, depth), as the tensor cores read a panel of many rows.
int panel_of_cute(int row, int depth) {
  const auto panel =
      cute::tile_to_shape(Panel<std::uint16_t>{}, cute::Shape<cute::Int<256>, cute::_64>{});
  return cute::as_position_independent_swizzle_layout(panel)(row, depth);
}

int panel_of_cute_in_bytes(int row, int depth) {
  const auto panel =
      cute::tile_to_shape(Panel<std::uint8_t>{}, cute::Shape<cute::Int<256>, cute::_128>{});
  return cute::as_position_independent_swizzle_layout(panel)(row, depth);
}

int panel_offset(int row, int chunk) { return light::panel_offset(row, chunk); }

int token_scale(int token) { return light::token_scale(token); }

int scale_list_bytes(int tokens) { return light::scale_list_bytes(tokens); }

int output_offset(int row_chunks, int token, int chunk) {
  switch (row_chunks) {
    case 4:
      return light::output_offset<4>(token, chunk);
    case 8:
      return light::output_offset<8>(token, chunk);
    case 16:
      return light::output_offset<16>(token, chunk);
    default:
      return -1;
  }
}

int mma_fragment(int width, char operand, int *out) { return kWidths[width](operand, out); }

}  // extern "C"
