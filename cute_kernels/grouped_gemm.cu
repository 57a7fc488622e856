// grouped_gemm: rows grouped by slot times each slot's 16-bit weight matrix, with the gather of the
// token rows, SwiGLU and the routing weight fused. A compilation makes one instance:
// instances.py lists them.
#if LIGHT_LIMIT
#include "hopper_kernel.cuh"
#else
#include "matrix_kernel.cuh"
#include "plain_weights.cuh"
#endif

namespace {
#if LIGHT_DTYPE == 0
using Element = light::Float16;
#else
using Element = light::BFloat16;
#endif
#if LIGHT_LIMIT
using Tile = light::HopperTile<Element, LIGHT_TILE_WEIGHT_ROWS, LIGHT_LIMIT, LIGHT_TILE_DEPTH,
                               LIGHT_WARPS_WEIGHT / 4, LIGHT_DEPTH_PARTS, LIGHT_CTAS_PER_SM,
                               16, LIGHT_SWIGLU>;
#else
using Tile =
    light::MatrixTile<Element, LIGHT_TILE_WEIGHT_ROWS, LIGHT_TILE_TOKENS, LIGHT_TILE_DEPTH,
                      LIGHT_TILE_STAGES, LIGHT_WARPS_WEIGHT, LIGHT_WARPS_TOKENS,
                      LIGHT_CTAS_PER_SM, 16, LIGHT_SWIGLU, LIGHT_HALF_ACCUMULATE>;
#endif
}  // namespace

#if LIGHT_LIMIT
extern "C" __global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    LIGHT_KERNEL_NAME(const __grid_constant__ light::HopperLaunch<light_grouped_gemm_args> launch) {
  light::run_hopper_kernel<Tile, light::PlainOperand<Tile>>(launch);
}
#else
extern "C" __global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    LIGHT_KERNEL_NAME(const __grid_constant__ light_grouped_gemm_args args) {
  light::run_matrix_kernel<Tile, light::PlainWeights<Tile>>(args);
}
#endif
