// light_grouped_gemm: the product with 16-bit weights.
#include "hopper.h"

namespace light {
namespace {

// Two launches that share a product count each other's CTAs, so both have a bound.
light_status check_share(const MatrixLaunch &launch, const light_grouped_gemm_args &args) {
  if (args.other_ctas == 0 && !args.helps) {
    return LIGHT_OK;
  }
  if (args.other_ctas < 1 || launch.max_ctas < 1 || args.unit_ticket == nullptr ||
      !launch.on_warpgroups()) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: launches of %d and %d CTAs%s share a product, which takes"
                " a tile of warpgroups, a unit_ticket and a bound of each", launch.stem,
                launch.max_ctas, args.other_ctas, args.unit_ticket ? "" : " without a ticket");
  }
  return LIGHT_OK;
}

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
  LIGHT_TRY(light::check_share(launch, *args));
  if (launch.groups.num_pairs == 0) {
    return LIGHT_OK;
  }
  return launch.on_warpgroups() ? light::launch_on_warpgroups(launch, *args)
                                : light::launch_matrix(launch, args);
}
