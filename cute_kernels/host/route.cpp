// light_route_split: the split of all ranks' pairs over the copies of their experts.
#include "launch.h"
#include "route_sizes.h"

namespace light {
namespace {

constexpr int kMostRoute = 3;

light_status check_route(const light_route_split_args *args) {
  const int num_ranks = args->num_ranks, num_experts = args->num_experts;
  if (num_ranks < 1 || num_ranks > route::kMaxRanks || num_experts < 1 ||
      num_experts > route::kMaxExperts || args->num_copies < 1 || args->num_copies > num_ranks) {
    return fail(LIGHT_BAD_ARGUMENT,
                "route_split: %d experts of %d copies on %d ranks, at most %d on %d", num_experts,
                args->num_copies, num_ranks, route::kMaxExperts, route::kMaxRanks);
  }
  if (args->rank < 0 || args->rank >= num_ranks || args->source_stride <= num_experts) {
    return fail(LIGHT_BAD_ARGUMENT, "route_split: rank %d of %d, rows of %d offsets of %d experts",
                args->rank, num_ranks, args->source_stride, num_experts);
  }
  if (args->route < 0 || args->route > kMostRoute || args->sweeps < 0 ||
      args->tokens_per_tile < 1 || args->most_tiles < 0) {
    return fail(LIGHT_BAD_ARGUMENT,
                "route_split: route %d, %d sweeps, %d tokens in each of %d tiles", args->route,
                args->sweeps, args->tokens_per_tile, args->most_tiles);
  }
  if (args->num_levels < 0 || args->num_levels > route::kMostLevels ||
      (args->num_levels > 0 && args->nearness == nullptr)) {
    return fail(LIGHT_BAD_ARGUMENT, "route_split: %d levels of nearness, at most %d, %s",
                args->num_levels, route::kMostLevels,
                args->nearness == nullptr ? "none given" : "given");
  }
  if (args->source_offsets == nullptr || args->copy_ranks == nullptr ||
      args->segments == nullptr || args->group_offsets == nullptr ||
      args->tile_offsets == nullptr || args->tile_groups == nullptr ||
      args->rank_pairs == nullptr) {
    return fail(LIGHT_BAD_ARGUMENT, "route_split: an input or output is null");
  }
  return LIGHT_OK;
}

}  // namespace
}  // namespace light

light_status light_route_split(const light_route_split_chunks *args, int count,
                               light_stream stream) {
  if (args == nullptr || count < 1 || count > LIGHT_MAX_CHUNKS) {
    return light::fail(LIGHT_BAD_ARGUMENT, "route_split: %d chunks, 1 to %d may be given", count,
                       LIGHT_MAX_CHUNKS);
  }
  const light_route_split_args &first = args->chunk[0];
  for (int i = 0; i < count; ++i) {
    const light_route_split_args &chunk = args->chunk[i];
    LIGHT_TRY(light::check_route(&chunk));
    if (chunk.num_experts != first.num_experts || chunk.num_ranks != first.num_ranks ||
        chunk.num_levels != first.num_levels) {
      return light::fail(LIGHT_BAD_ARGUMENT,
                         "route_split: chunk %d has %d experts, %d ranks and %d levels, the first"
                         " %d, %d and %d",
                         i, chunk.num_experts, chunk.num_ranks, chunk.num_levels,
                         first.num_experts, first.num_ranks, first.num_levels);
    }
  }
  const std::string name =
      std::string(first.num_levels > 0 ? "route_split_near" : "route_split") +
      (first.num_ranks <= light::route::kRanksOfOneLane ? "_w32" : "_w64");
  const light::route::Layout layout(first.num_experts, first.num_ranks);
  const light::Kernel *kernel = nullptr;
  LIGHT_TRY(light::find_kernel("route", name, light::route::kThreads, layout.bytes, &kernel));
  return light::launch(*kernel, {static_cast<unsigned int>(count)}, *args, stream);
}
