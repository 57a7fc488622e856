// Checks, names and launches an instance of the matrix kernels.
#include "matrix.h"

#include <algorithm>
#include <string>

#include "hopper_launch.h"
#include "launch.h"
#include "tile_memory.h"

namespace light {
namespace {

constexpr int kChunkBytes = 16;  // of rows and weights, copied at a time

// grouped_gemm_bf16_w128_t64_d64_s4_2x2_swiglu: cute_kernels/instances.py makes the same name.
std::string instance_name(const MatrixLaunch &launch) {
  const light_tile &tile = launch.tile;
  std::string name = launch.stem;
  name += launch.dtype == LIGHT_FLOAT16 ? "_f16" : "_bf16";
  if (launch.num_bits < launch.row_bits) {
    name += "_int" + std::to_string(launch.num_bits);
  }
  const auto add = [&name](const char *what, int number) { name += what + std::to_string(number); };
  add("_w", tile.weight_rows);
  if (launch.on_warpgroups()) {
    add("_n", tile.limit);
    add("_d", tile.depth);
    add("_", tile.warps_weight / 4);
    add("x", tile.depth_parts);
    name += "_wgmma";
  } else {
    add("_t", tile.tokens);
    add("_d", tile.depth);
    add("_s", tile.stages);
    add("_", tile.warps_weight);
    add("x", tile.warps_tokens);
    name += tile.half_accumulate ? "_acc16" : "";
  }
  return name + (launch.swiglu ? "_swiglu" : "_plain");
}

// The most tiles of the output there can be: a group of c pairs has ceil(c / tokens) tiles, so the
// last tile of each group that is not empty may be almost empty.
long long most_output_tiles(const light_tile &tile, long long num_pairs, long long num_groups,
                            long long weight_rows) {
  const long long num_occupied = std::min(num_groups, num_pairs);
  const long long num_tiles = (num_pairs + num_occupied * (tile.tokens - 1)) / tile.tokens;
  return num_tiles * ((weight_rows + tile.weight_rows - 1) / tile.weight_rows);
}

light_status check_tile(const MatrixLaunch &launch) {
  const light_tile &tile = launch.tile;
  const int smallest = std::min({tile.weight_rows, tile.tokens, tile.depth, tile.stages,
                                 tile.warps_weight, tile.warps_tokens, tile.depth_parts});
  if (smallest < 1 || tile.warps_weight * tile.warps_tokens > 32) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: no such tile as %s", launch.stem,
                instance_name(launch).c_str());
  }
  // Of other numbers the widest mma, and copies of contiguous rows, would pass the tile's end.
  const bool whole_boxes = tile.tokens == 8 || tile.tokens % 16 == 0;
  if (launch.on_warpgroups() &&
      (tile.tokens > tile.limit || !whole_boxes || tile.stages > kMostStages)) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: a tile of %d tokens (8, or 16, 32 .. %d), %d stages",
                launch.stem, tile.tokens, tile.limit, tile.stages);
  }
  if (tile.half_accumulate && launch.dtype != LIGHT_FLOAT16) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: fp16 accumulators take fp16 rows only", launch.stem);
  }
  return LIGHT_OK;
}

light_status check_groups(const MatrixLaunch &launch) {
  const light_pair_groups &groups = launch.groups;
  if (groups.num_pairs < 0 || (groups.offsets != nullptr && groups.num_groups < 1)) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: %d pairs in %d groups", launch.stem, groups.num_pairs,
                groups.num_groups);
  }
  if (groups.offsets != nullptr &&
      (groups.tile_offsets == nullptr || groups.tile_groups == nullptr)) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: groups without a table of tiles", launch.stem);
  }
  return LIGHT_OK;
}

light_status check_splits(const MatrixLaunch &launch) {
  const int num_stages = (launch.depth + launch.tile.depth - 1) / launch.tile.depth;
  // Parts are of whole stages, so the last ones may be empty: five stages make no four parts.
  const int splits = launch.splits.count;
  if (launch.on_warpgroups() && splits != 1) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: %d splits of the depth; on warpgroups it has one part",
                launch.stem, splits);
  }
  if (splits < 1 || (splits - 1) * ((num_stages + splits - 1) / splits) >= num_stages) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: %d splits of a depth of %d stages", launch.stem, splits,
                num_stages);
  }
  if (splits > 1 && (launch.splits.sums == nullptr || launch.splits.tickets == nullptr)) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: %d splits without split_sums or split_tickets",
                launch.stem, splits);
  }
  return LIGHT_OK;
}

}  // namespace

light_status check_matrix(const MatrixLaunch &launch) {
  if (launch.dtype != LIGHT_FLOAT16 && launch.dtype != LIGHT_BFLOAT16) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: dtype %d is neither fp16 nor bf16", launch.stem,
                launch.dtype);
  }
  LIGHT_TRY(check_tile(launch));
  LIGHT_TRY(check_groups(launch));
  if (launch.groups.num_pairs > 0 &&
      (launch.rows == nullptr || launch.weights == nullptr ||
       (launch.output == nullptr) == (launch.output_rows == nullptr))) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: rows or weights is null, or output and output_rows both"
                " are or neither is", launch.stem);
  }
  const int whole = kChunkBytes * 8 / launch.row_bits;
  if (launch.depth < whole || launch.depth % whole || launch.num_features < 8 ||
      launch.num_features % 8) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: depth %d and %d features must be multiples of %s",
                launch.stem, launch.depth, launch.num_features, whole == 8 ? "8" : "16 and of 8");
  }
  if (launch.output_float32 && (launch.swiglu || launch.output_rows != nullptr)) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: %s has no float32 output", launch.stem,
                launch.swiglu ? "swiglu" : "output_rows");
  }
  return check_splits(launch);
}

light_status launch_matrix(const MatrixLaunch &launch, const void *args) {
  return launch_instance(launch, tile_shared_bytes(launch.tile, launch.num_bits), args);
}

light_status launch_instance(const MatrixLaunch &launch, int shared_bytes, const void *args) {
  const light_tile &tile = launch.tile;
  const std::string name = instance_name(launch);
  // On warpgroups one more of them copies.
  const int warps = tile.warps_weight * tile.warps_tokens * tile.depth_parts +
                    (launch.on_warpgroups() ? 4 : 0);
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find_kernel(name, name, 32 * warps, shared_bytes, &kernel));
  const int num_groups = launch.groups.offsets == nullptr ? 1 : launch.groups.num_groups;
  const long long num_units =
      launch.splits.count *
      most_output_tiles(tile, launch.groups.num_pairs, num_groups, launch.weight_rows());
  long long num_ctas = std::min<long long>(kernel->resident_ctas(), num_units);
  if (launch.max_ctas > 0) {
    num_ctas = std::min<long long>(num_ctas, launch.max_ctas);
  }
  // Where multiprocessors are left to others, a product that waits ahead of its turn would hold them.
  LaunchOptions options;
  options.overlapped = launch.max_ctas <= 0;
  return launch_bytes(*kernel, {static_cast<unsigned int>(num_ctas)}, args, launch.stream,
                      options);
}

}  // namespace light

long long light_output_tiles(const light_tile *tile, int num_pairs, int num_groups,
                             int weight_rows) {
  return light::most_output_tiles(*tile, num_pairs, num_groups, weight_rows);
}

long long light_split_bytes(const light_tile *tile, long long num_output_tiles,
                            int depth_splits) {
  constexpr int kSumBytes = 4;
  return num_output_tiles * depth_splits * tile->weight_rows * tile->tokens * kSumBytes;
}
