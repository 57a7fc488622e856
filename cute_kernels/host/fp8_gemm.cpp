// light_fp8_gemm: the product of e4m3 rows with e4m3 weights.
#include "hopper.h"

light_status light_fp8_gemm(const light_fp8_gemm_args *args, const light_tile *tile,
                            light_dtype dtype, int max_ctas, light_stream stream) {
  if (args == nullptr || tile == nullptr) {
    return light::fail(LIGHT_BAD_ARGUMENT, "fp8_gemm: args or tile is null");
  }
  if (tile->limit == 0 || tile->depth % light::kScaleSpan) {
    return light::fail(LIGHT_BAD_ARGUMENT,
                       "fp8_gemm: limit %d and depth %d of a tile; it needs one of warpgroups, and"
                       " a multiple of %d",
                       tile->limit, tile->depth, light::kScaleSpan);
  }
  const light::MatrixLaunch launch("fp8_gemm", *args, *tile, dtype, 8, 8, max_ctas, stream);
  LIGHT_TRY(light::check_matrix(launch));
  if (args->scales == nullptr || (args->row_scales == nullptr && launch.groups.num_pairs > 0)) {
    return light::fail(LIGHT_BAD_ARGUMENT, "fp8_gemm: no scales of weights or of rows");
  }
  if (launch.groups.num_pairs == 0) {
    return LIGHT_OK;
  }
  light::HopperLaunch<light_fp8_gemm_args> prepared{};
  LIGHT_TRY(light::encode_weights(launch, args->slot_bytes, &prepared.weights));
  const light::HopperStage stage =
      light::fp8_stage(tile->weight_rows, tile->tokens, tile->depth);
  return light::launch_hopper(launch, *args, stage, &prepared);
}
