// fp8_gemm: grouped_gemm from e4m3 rows and e4m3 weights, both with scales (W8A8). For Hopper alone.
#include "hopper_fp8.cuh"
#include "hopper_kernel.cuh"

namespace {
#if LIGHT_DTYPE == 0
using Element = light::Float16;
#else
using Element = light::BFloat16;
#endif
using Tile = light::HopperTile<Element, LIGHT_TILE_WEIGHT_ROWS, LIGHT_LIMIT, LIGHT_TILE_DEPTH,
                               LIGHT_WARPS_WEIGHT / 4, LIGHT_DEPTH_PARTS, LIGHT_CTAS_PER_SM,
                               LIGHT_NUM_BITS, LIGHT_SWIGLU, 8>;
}  // namespace

extern "C" __global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    LIGHT_KERNEL_NAME(const __grid_constant__ light::HopperLaunch<light_fp8_gemm_args> launch) {
  light::run_hopper_kernel<Tile, light::Fp8Operand<Tile>>(launch);
}
