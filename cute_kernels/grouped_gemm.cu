// grouped_gemm: rows grouped by slot times each slot's 16-bit weight matrix, with the gather of the
// token rows, SwiGLU and the routing weight fused. A compilation makes one instance:
// instances.py lists them.
#include "matrix_kernel.cuh"
#include "plain_weights.cuh"

namespace {
#if LIGHT_DTYPE == 0
using Element = light::Float16;
#else
using Element = light::BFloat16;
#endif
using Tile =
    light::MatrixTile<Element, LIGHT_TILE_WEIGHT_ROWS, LIGHT_TILE_TOKENS, LIGHT_TILE_DEPTH,
                      LIGHT_TILE_STAGES, LIGHT_WARPS_WEIGHT, LIGHT_WARPS_TOKENS,
                      LIGHT_CTAS_PER_SM, 16, LIGHT_SWIGLU, LIGHT_HALF_ACCUMULATE>;
}  // namespace

extern "C" __global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    LIGHT_KERNEL_NAME(const __grid_constant__ light_grouped_gemm_args args) {
  light::run_matrix_kernel<Tile, light::PlainWeights<Tile>>(args);
}
