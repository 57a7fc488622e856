// light_grouped_gemm: the product with 16-bit weights.
#include "hopper.h"

namespace light {
namespace {

light_status launch_on_warpgroups(const MatrixLaunch &launch, const light_grouped_gemm_args &args) {
  const light_tile &tile = launch.tile;
  HopperLaunch<light_grouped_gemm_args> prepared{};
  LIGHT_TRY(encode_weights(launch, args.slot_bytes, &prepared.weights));
  const HopperStage stage =
      hopper_stage(tile.weight_rows, tile.tokens, tile.depth, launch.num_bits, 0, false);
  return launch_hopper(launch, args, stage, &prepared);
}

}  // namespace
}  // namespace light

light_status light_grouped_gemm(const light_grouped_gemm_args *args, const light_tile *tile,
                                light_dtype dtype, int max_ctas, light_stream stream) {
  if (args == nullptr || tile == nullptr) {
    return light::fail(LIGHT_BAD_ARGUMENT, "grouped_gemm: args or tile is null");
  }
  const light::MatrixLaunch launch("grouped_gemm", *args, *tile, dtype, 16, 16, max_ctas, stream,
                                   light::DepthSplits::of(*args));
  LIGHT_TRY(light::check_matrix(launch));
  if (launch.groups.num_pairs == 0) {
    return LIGHT_OK;
  }
  return launch.on_warpgroups() ? light::launch_on_warpgroups(launch, *args)
                                : light::launch_matrix(launch, args);
}
