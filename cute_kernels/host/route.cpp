// light_route_split: the split of all ranks' pairs over the copies of their experts.
#include "launch.h"
#include "route_sizes.h"

namespace light {
namespace {

constexpr int kMostRoute = 3;

light_status check_route(const light_route_split_args *args) {
  if (args == nullptr) {
    return fail(LIGHT_BAD_ARGUMENT, "route_split: no arguments");
  }
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

light_status light_route_split(const light_route_split_args *args, light_stream stream) {
  LIGHT_TRY(light::check_route(args));
  const std::string name =
      std::string(args->num_levels > 0 ? "route_split_near" : "route_split") +
      (args->num_ranks <= light::route::kRanksOfOneLane ? "_w32" : "_w64");
  const light::route::Layout layout(args->num_experts, args->num_ranks);
  const light::Kernel *kernel = nullptr;
  LIGHT_TRY(light::find_kernel("route", name, light::route::kThreads, layout.bytes, &kernel));
  return light::launch(*kernel, {1}, *args, stream);
}
