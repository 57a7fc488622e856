// light_quant_gemm: the product with int4 or int8 weights.
#include <algorithm>

#include "hopper.h"
#include "tile_memory.h"

namespace light {
namespace {

// Codes, scales and zeros of a stage, each one box: [16-row blocks, blocks or groups of the depth].
light_status launch_on_warpgroups(const MatrixLaunch &launch, const light_quant_gemm_args &args) {
  const light_tile &tile = launch.tile;
  const int block_bytes = kBlockRows * kBlockDepth * args.num_bits / 8;
  const int depth_blocks = (args.depth + kBlockDepth - 1) / kBlockDepth;
  const int num_blocks = (launch.weight_rows() + kBlockRows - 1) / kBlockRows;
  const int box_blocks = tile.weight_rows / kBlockRows;
  HopperLaunch<light_quant_gemm_args> prepared{};
  MappedArray codes{args.weights, MappedArray::Type::kWord, false};
  codes.add_axis(block_bytes / 4, 4, block_bytes / 4);
  codes.add_axis(depth_blocks, block_bytes, tile.depth / kBlockDepth);
  codes.add_axis(num_blocks, 1ll * depth_blocks * block_bytes, box_blocks);
  codes.add_slots(args.slot_bytes);
  LIGHT_TRY(encode_map(launch, codes, &prepared.weights));
  const int num_groups = (depth_blocks * kBlockDepth + args.group_size - 1) / args.group_size;
  const int stage_groups = std::max(tile.depth / args.group_size, 1);
  const auto encode_numbers = [&](const void *numbers, TensorMap *map) {
    MappedArray array{numbers, mapped_type(launch), false};
    array.add_axis(kBlockRows, 2, kBlockRows);
    array.add_axis(num_groups, kBlockRows * 2, stage_groups);
    array.add_axis(num_blocks, 1ll * num_groups * kBlockRows * 2, box_blocks);
    array.add_slots(args.slot_bytes);
    return encode_map(launch, array, map);
  };
  LIGHT_TRY(encode_numbers(args.scales, &prepared.scales));
  if (args.zeros != nullptr) {
    LIGHT_TRY(encode_numbers(args.zeros, &prepared.zeros));
  }
  const HopperStage stage = hopper_stage(tile.weight_rows, tile.tokens, tile.depth, args.num_bits,
                                         stage_groups, args.zeros != nullptr);
  return launch_hopper(launch, args, stage, &prepared);
}

}  // namespace
}  // namespace light

light_status light_quant_gemm(const light_quant_gemm_args *args, const light_tile *tile,
                              light_dtype dtype, int max_ctas, light_stream stream) {
  if (args == nullptr || tile == nullptr) {
    return light::fail(LIGHT_BAD_ARGUMENT, "quant_gemm: args or tile is null");
  }
  if (args->num_bits != 4 && args->num_bits != 8) {
    return light::fail(LIGHT_BAD_ARGUMENT, "quant_gemm: weights of %d bits; 4 or 8",
                       args->num_bits);
  }
  if (args->group_size != 32 && args->group_size != 64 && args->group_size != 128) {
    return light::fail(LIGHT_BAD_ARGUMENT, "quant_gemm: groups of %d; 32, 64 or 128",
                       args->group_size);
  }
  const light::MatrixLaunch launch("quant_gemm", *args, *tile, dtype, args->num_bits, 16,
                                   max_ctas, stream, light::DepthSplits::of(*args));
  LIGHT_TRY(light::check_matrix(launch));
  if (args->scales == nullptr) {
    return light::fail(LIGHT_BAD_ARGUMENT, "quant_gemm: no scales");
  }
  if (launch.groups.num_pairs == 0) {
    return LIGHT_OK;
  }
  return launch.on_warpgroups() ? light::launch_on_warpgroups(launch, *args)
                                : light::launch_matrix(launch, args);
}
