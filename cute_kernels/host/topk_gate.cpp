// light_topk_gate and light_sort_pairs: which kernel, how many CTAs, and what each of them takes.
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>

#include "launch.h"
#include "topk_gate_deal.h"
#include "topk_gate_sizes.h"

namespace light {
namespace {

constexpr const char *kProgram = "topk_gate";

constexpr int kClustersFrom = 90, kBfloatMmaFrom = 80;

using gate::ceil_div;
using gate::Deal;
using gate::Meeting;

constexpr Deal kSmallestDeal{Meeting::kNone, 1, 1, 1, 1};  // to find what tells about the device

// A launch whose CTAs wait for each other has at most one for each multiprocessor.
gate::Device device_of(const Kernel &kernel, int max_ctas) {
  const int most = std::min(kernel.num_multiprocessors, gate::kMaxCtas);
  return {max_ctas > 0 ? std::min(most, max_ctas) : most,
          kernel.architecture >= kClustersFrom ? gate::kMaxClusterCtas : 0};
}

// CTAs that wait for each other in global memory have to be resident together.
LaunchOptions options_of(const Deal &deal) {
  LaunchOptions options;
  options.cooperative = deal.meeting == Meeting::kWorkspace;
  options.cluster = deal.meeting == Meeting::kCluster ? deal.num_ctas : 0;
  return options;
}

int shared_bytes(const Deal &deal, int num_experts) {
  const int cluster_ctas = deal.meeting == Meeting::kCluster ? deal.num_ctas : 0;
  return gate::sort_shared_bytes(32 * deal.num_warps, num_experts, cluster_ctas);
}

// Deals out with clusters as large as the device takes, and finds the kernel of that deal.
template <class DealOut, class Find>
light_status deal_and_find(int max_ctas, DealOut deal_out, Find find, Deal *deal,
                           const Kernel **kernel) {
  LIGHT_TRY(find(kSmallestDeal, kernel));
  gate::Device device = device_of(**kernel, max_ctas);
  *deal = deal_out(device);
  LIGHT_TRY(find(*deal, kernel));
  if (deal->meeting == Meeting::kCluster && deal->num_ctas > gate::kPortableClusterCtas) {
    bool fits = false;
    LIGHT_TRY(large_cluster_fits(**kernel, deal->num_ctas, &fits));
    if (!fits) {
      device.most_cluster_ctas = gate::kPortableClusterCtas;
      *deal = deal_out(device);
      LIGHT_TRY(find(*deal, kernel));
    }
  }
  return LIGHT_OK;
}

light_status check_counts(const char *stem, const Deal &deal, int pairs_per_token) {
  const long long most = deal.num_ctas == 1 ? 2 * gate::kMaxCount : gate::kMaxCount;
  if (static_cast<long long>(deal.tokens_per_cta) * pairs_per_token > most) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: %d tokens for each of %d CTAs are too many: allow more",
                stem, deal.tokens_per_cta, deal.num_ctas);
  }
  return LIGHT_OK;
}

light_status check_sort(const char *stem, const light_pair_sort &sort) {
  if (sort.num_tokens < 0 || sort.num_experts < 1 || sort.num_experts > gate::kMaxExperts ||
      sort.num_experts_per_token < 1 ||
      sort.num_experts_per_token > gate::kMaxExpertsPerToken) {
    return fail(LIGHT_BAD_ARGUMENT,
                "%s: %d tokens, %d experts, %d of them per token; at most %d experts, %d per token",
                stem, sort.num_tokens, sort.num_experts, sort.num_experts_per_token,
                gate::kMaxExperts, gate::kMaxExpertsPerToken);
  }
  if (sort.offsets == nullptr) {
    return LIGHT_OK;
  }
  const bool has_pairs = sort.num_tokens > 0;
  if (sort.tile_offsets == nullptr || sort.workspace == nullptr ||
      (has_pairs && (sort.pair_row == nullptr || sort.pair_index == nullptr ||
                     sort.tile_groups == nullptr))) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: an output of the sort or the workspace is null", stem);
  }
  if (!gate::is_tile(sort.tokens_per_tile)) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: tokens_per_tile %d is no multiple of %d up to %d", stem,
                sort.tokens_per_tile, gate::kTileTokens, gate::kMaxTileTokens);
  }
  return LIGHT_OK;
}

light_status check_workspace(const char *stem, const light_pair_sort &sort, long long needed) {
  if (sort.workspace == nullptr || sort.workspace_bytes < needed ||
      reinterpret_cast<std::uintptr_t>(sort.workspace) % 16 != 0) {
    return fail(LIGHT_BAD_ARGUMENT,
                "%s: the workspace needs %lld bytes from a multiple of 16; it has %lld", stem,
                needed, sort.workspace_bytes);
  }
  return LIGHT_OK;
}

light_status check_gate(const light_topk_gate_args &args, light_dtype input) {
  const light_pair_sort &sort = args.sort;
  LIGHT_TRY(check_sort(kProgram, sort));
  if (sort.num_experts_per_token > sort.num_experts || args.num_groups < 1 ||
      args.num_groups > gate::kMaxGroups || sort.num_experts % args.num_groups != 0 ||
      args.num_groups_per_token < 1 || args.num_groups_per_token > args.num_groups ||
      sort.num_experts / args.num_groups * args.num_groups_per_token <
          sort.num_experts_per_token) {
    return fail(LIGHT_BAD_ARGUMENT, "topk_gate: no %d of %d experts in %d of %d groups",
                sort.num_experts_per_token, sort.num_experts, args.num_groups_per_token,
                args.num_groups);
  }
  if (args.sigmoid && args.num_groups_per_token < args.num_groups &&
      sort.num_experts / args.num_groups < 2) {
    return fail(LIGHT_BAD_ARGUMENT, "topk_gate: sigmoid groups need two experts each");
  }
  const bool from_hidden = args.logits == nullptr;
  if (sort.num_tokens > 0 && (args.experts == nullptr || args.weights == nullptr ||
                              (from_hidden && (args.hidden == nullptr ||
                                               args.router_weight == nullptr)))) {
    return fail(LIGHT_BAD_ARGUMENT, "topk_gate: an input or output is null");
  }
  if (from_hidden && sort.num_tokens > 0 &&
      (sort.num_tokens > gate::kRouterTokens || args.width < 8 || args.width % 8 != 0 ||
       input == LIGHT_FLOAT32)) {
    return fail(LIGHT_BAD_ARGUMENT,
                "topk_gate: %d hidden rows of width %d and dtype %d; at most %d of 16 bits and a "
                "multiple of 8",
                sort.num_tokens, args.width, input, gate::kRouterTokens);
  }
  return LIGHT_OK;
}

std::string dtype_name(light_dtype dtype) {
  return dtype == LIGHT_FLOAT32 ? "f32" : dtype == LIGHT_FLOAT16 ? "f16" : "bf16";
}

light_status gate_from_logits(light_topk_gate_args args, light_dtype input, int max_ctas,
                              light_stream stream) {
  light_pair_sort &sort = args.sort;
  const int num_experts = sort.num_experts;
  const int size = *std::lower_bound(std::begin(gate::kExpertSizes), std::end(gate::kExpertSizes),
                                     num_experts);
  const std::string name =
      "topk_gate_logits_" + dtype_name(input) + "_e" + std::to_string(size);
  const auto find = [&](const Deal &deal, const Kernel **kernel) {
    return find_kernel(kProgram, name, 32 * deal.num_warps, shared_bytes(deal, num_experts),
                       kernel);
  };
  const Kernel *kernel = nullptr;
  Deal deal = kSmallestDeal;
  const auto deal_out = [&](gate::Device device) {
    return gate::deal_out(sort.num_tokens, num_experts, gate::tokens_at_once(num_experts),
                          sort.offsets != nullptr, device);
  };
  LIGHT_TRY(deal_and_find(max_ctas, deal_out, find, &deal, &kernel));
  LIGHT_TRY(check_counts(kProgram, deal, 1));
  deal.apply(&sort);
  return launch(*kernel, {static_cast<unsigned int>(deal.num_ctas)}, args, stream,
                options_of(deal));
}

// What topk_gate.cu decides by the architecture that it is compiled for.
bool multiplies_by_mma(int architecture, light_dtype input, light_dtype router) {
  return input == router && (input == LIGHT_FLOAT16 || architecture >= kBfloatMmaFrom);
}

int router_ctas_by_mma(const light_topk_gate_args &args) {
  const int items = ceil_div(args.sort.num_experts, gate::kItemExperts) *
                    gate::slices_of(args.width) * ceil_div(args.sort.num_tokens, gate::kMmaTokens);
  return ceil_div(items, gate::kWarpsWithItems);
}

int router_ctas(const light_topk_gate_args &args) {
  return ceil_div(args.sort.num_experts, gate::kUnitExperts) *
         ceil_div(args.width, gate::kUnitDepth) * args.sort.num_tokens;
}

light_status gate_from_hidden(light_topk_gate_args args, light_dtype input, light_dtype router,
                              int max_ctas, light_stream stream) {
  light_pair_sort &sort = args.sort;
  LIGHT_TRY(check_workspace(kProgram, sort,
                            gate::workspace_bytes(sort.num_experts, sort.num_tokens, args.width)));
  if (router != input && router != LIGHT_FLOAT32) {
    return fail(LIGHT_BAD_ARGUMENT, "topk_gate: hidden of dtype %d, router of dtype %d", input,
                router);
  }
  const std::string name = "topk_gate_router_" + dtype_name(input) + "_" + dtype_name(router);
  const auto find = [&](int sort_bytes, const Kernel **kernel) {
    return find_kernel(kProgram, name, gate::kRouterThreads,
                       std::max(gate::router_shared_bytes(), sort_bytes), kernel);
  };
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find(0, &kernel));
  const gate::Device device = device_of(*kernel, max_ctas);
  const Deal deal = gate::deal_out_router(sort.num_tokens, sort.num_experts, device);
  deal.apply(&sort);
  LIGHT_TRY(find(shared_bytes(deal, sort.num_experts), &kernel));
  const bool by_mma = multiplies_by_mma(kernel->architecture, input, router);
  const int wanted = by_mma ? router_ctas_by_mma(args) : router_ctas(args);
  const int grid = std::clamp(wanted, deal.num_ctas, device.most_ctas);
  return launch(*kernel, {static_cast<unsigned int>(grid)}, args, stream);
}

// On Hopper a tile is a cluster's, a half of the depth for each of its two CTAs.
light_status router_tiles(const light_router_logits_args &args, light_dtype input,
                          const Kernel &any, int max_ctas, light_stream stream) {
  const int ctas_per_tile = any.architecture >= kClustersFrom ? 2 : 1;
  const int most = std::max(device_of(any, max_ctas).most_ctas / ctas_per_tile, 1);
  const gate::RouterTile tile = gate::choose_router_tile(
      args.num_tokens, args.num_experts,
      ctas_per_tile == 2 ? gate::kMaxExperts : gate::kMostUnpairedExperts, most);
  const std::string name = "router_logits_" + dtype_name(input) + "_e" +
                           std::to_string(tile.experts) + "_t" + std::to_string(tile.tokens);
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find_kernel(kProgram, name, gate::kTileThreads,
                        gate::tile_shared_bytes(tile, any.architecture), &kernel));
  const int num_tiles =
      ceil_div(args.num_experts, tile.experts) * ceil_div(args.num_tokens, tile.tokens);
  LaunchOptions options;
  options.cluster = ctas_per_tile == 2 ? 2 : 0;
  return launch(*kernel, {static_cast<unsigned int>(std::min(num_tiles, most) * ctas_per_tile)},
                args, stream, options);
}

}  // namespace
}  // namespace light

long long light_topk_gate_workspace_bytes(int num_experts, int num_tokens, int width) {
  return light::gate::workspace_bytes(num_experts, num_tokens, width);
}

light_status light_topk_gate(const light_topk_gate_args *args, light_dtype input,
                             light_dtype router, int max_ctas, light_stream stream) {
  using namespace light;
  if (args == nullptr) {
    return fail(LIGHT_BAD_ARGUMENT, "topk_gate: args is null");
  }
  LIGHT_TRY(check_gate(*args, input));
  if (args->sort.offsets != nullptr) {
    LIGHT_TRY(check_workspace(kProgram, args->sort, gate::workspace_bytes(0, 0, 0)));
  }
  if (args->logits != nullptr || args->sort.num_tokens == 0) {
    return gate_from_logits(*args, input, max_ctas, stream);
  }
  return gate_from_hidden(*args, input, router, max_ctas, stream);
}

light_status light_router_logits(const light_router_logits_args *args, light_dtype input,
                                 light_dtype router, int max_ctas, light_stream stream) {
  using namespace light;
  if (args == nullptr || args->num_tokens < 0 || args->num_experts < 1 || args->width < 8 ||
      args->width % 8 != 0 || input == LIGHT_FLOAT32 ||
      (router != input && router != LIGHT_FLOAT32)) {
    return fail(LIGHT_BAD_ARGUMENT,
                "router_logits: needs 16-bit rows, a router of their dtype or fp32, and a width "
                "that is a multiple of 8");
  }
  if (args->num_tokens == 0) {
    return LIGHT_OK;
  }
  if (args->hidden == nullptr || args->router_weight == nullptr || args->logits == nullptr) {
    return fail(LIGHT_BAD_ARGUMENT, "router_logits: hidden, router_weight or logits is null");
  }
  // A kernel that every architecture has tells which one it is.
  const Kernel *kernel = nullptr;
  const auto find = [&](light_dtype router_dtype) {
    const std::string name =
        "router_logits_" + dtype_name(input) + "_" + dtype_name(router_dtype);
    return find_kernel(kProgram, name, gate::kRouterThreads, gate::router_shared_bytes(), &kernel);
  };
  LIGHT_TRY(find(LIGHT_FLOAT32));
  if (multiplies_by_mma(kernel->architecture, input, router)) {
    return router_tiles(*args, input, *kernel, max_ctas, stream);
  }
  LIGHT_TRY(find(router));
  const int most = device_of(*kernel, max_ctas).most_ctas;
  const int num_items = ceil_div(args->num_experts, gate::kUnitExperts) *
                        std::min(args->num_tokens, most * gate::kRouterTokens);
  const int teams_per_cta = gate::kRouterThreads / 32 / gate::kTeamWarps;
  const int grid = std::min(ceil_div(num_items, teams_per_cta), most);
  return launch(*kernel, {static_cast<unsigned int>(grid)}, *args, stream);
}

light_status light_sort_pairs(const light_sort_pairs_args *args, int max_ctas,
                              light_stream stream) {
  using namespace light;
  constexpr const char *kName = "sort_pairs";
  if (args == nullptr || args->sort.offsets == nullptr ||
      (args->sort.num_tokens > 0 && args->experts == nullptr) ||
      (args->sort.pair_weight != nullptr && args->weights == nullptr)) {
    return fail(LIGHT_BAD_ARGUMENT, "sort_pairs: args or an input or output is null");
  }
  light_sort_pairs_args dealt = *args;
  light_pair_sort &sort = dealt.sort;
  LIGHT_TRY(check_sort(kName, sort));
  LIGHT_TRY(check_workspace(kName, sort, gate::workspace_bytes(0, 0, 0)));
  const auto find = [&](const Deal &deal, const Kernel **kernel) {
    return find_kernel(kProgram, kName, 32 * deal.num_warps, shared_bytes(deal, sort.num_experts),
                       kernel);
  };
  const Kernel *kernel = nullptr;
  Deal deal = kSmallestDeal;
  const auto deal_out = [&](gate::Device device) {
    const int at_once = std::max(32 / sort.num_experts_per_token, 1);
    return gate::deal_out(sort.num_tokens, sort.num_experts, at_once, true, device);
  };
  LIGHT_TRY(deal_and_find(max_ctas, deal_out, find, &deal, &kernel));
  LIGHT_TRY(check_counts(kName, deal, sort.num_experts_per_token));
  deal.apply(&sort);
  return launch(*kernel, {static_cast<unsigned int>(deal.num_ctas)}, dealt, stream,
                options_of(deal));
}
