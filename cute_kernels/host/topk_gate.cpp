// light_topk_gate and light_sort_pairs: which kernel, how many CTAs, and what each of them takes.
#include <algorithm>
#include <cstdint>
#include <string>

#include "launch.h"
#include "topk_gate_sizes.h"

namespace light {
namespace {

constexpr const char *kProgram = "topk_gate";
constexpr int kMostThreads = 1024, kManyExpertsThreads = 512;
constexpr int kAloneWarps = 16, kAloneWork = 2048;  // warps x experts that one CTA does quickest
constexpr int kPollingWarps = 16 * gate::kPollingCtas;  // topk_gate_sort.cuh: no barrier

int ceil_div(long long value, int divisor) { return (value + divisor - 1) / divisor; }

// How the tokens are dealt out to CTAs and their warps, at_once at a time.
struct Deal {
  int num_ctas, num_warps, tokens_per_cta, tokens_per_warp;

  void apply(light_pair_sort *sort) const {
    sort->num_ctas = num_ctas;
    sort->tokens_per_cta = tokens_per_cta;
    sort->tokens_per_warp = tokens_per_warp;
  }
};

bool one_cta_does(int work_warps, int num_experts) {
  return work_warps <= kAloneWarps && work_warps * num_experts <= kAloneWork;
}

Deal share_out(int num_tokens, int at_once, int num_ctas, int num_warps) {
  const int tokens_per_cta = std::max(ceil_div(num_tokens, num_ctas), 1);
  const int tokens_per_warp = ceil_div(ceil_div(tokens_per_cta, num_warps), at_once) * at_once;
  return {std::max(ceil_div(num_tokens, tokens_per_cta), 1), num_warps, tokens_per_cta,
          tokens_per_warp};
}

// All CTAs have to be resident at once, so there is at most one for each multiprocessor.
Deal deal_out(int num_tokens, int num_experts, int at_once, int most_ctas) {
  const int work_warps = ceil_div(num_tokens, at_once);
  const int least_warps = std::max(ceil_div(num_experts, 32), 4);
  if (one_cta_does(work_warps, num_experts) || most_ctas == 1) {
    const int most_warps = num_experts > gate::kManyExperts ? 16 : 32;
    const int num_warps = std::clamp(work_warps, least_warps, most_warps);
    return share_out(num_tokens, at_once, 1, num_warps);
  }
  const int wanted = work_warps <= kPollingWarps
                         ? std::min(ceil_div(work_warps, 4), gate::kPollingCtas)
                         : ceil_div(work_warps, 16);
  const int num_ctas = std::min(wanted, most_ctas);
  const int warps_per_cta = ceil_div(work_warps, num_ctas);
  const bool is_long = warps_per_cta > 16 && num_experts <= gate::kManyExperts;
  const int num_warps = is_long ? 32 : std::clamp(warps_per_cta, std::max(least_warps, 8), 16);
  return share_out(num_tokens, at_once, num_ctas, num_warps);
}

int most_ctas(const Kernel &kernel, int max_ctas) {
  const int most = std::min(kernel.num_multiprocessors, gate::kMaxCtas);
  return max_ctas > 0 ? std::min(most, max_ctas) : most;
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
  if (sort.tokens_per_tile < 1 || (sort.tokens_per_tile & (sort.tokens_per_tile - 1)) != 0) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: tokens_per_tile %d is no power of two", stem,
                sort.tokens_per_tile);
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
  const int most_threads =
      sort.num_experts > gate::kManyExperts ? kManyExpertsThreads : kMostThreads;
  const auto shared = [&](int threads) {
    return gate::sort_shared_bytes(threads, sort.num_experts);
  };
  const auto name = [&](int threads) {
    return "topk_gate_logits_" + dtype_name(input) +
           (threads > kManyExpertsThreads ? "_t1024" : "_t512");
  };
  const Kernel *kernel = nullptr;
  LIGHT_TRY(
      find_kernel(kProgram, name(most_threads), most_threads, shared(most_threads), &kernel));
  const Deal deal = deal_out(sort.num_tokens, sort.num_experts,
                             gate::tokens_at_once(sort.num_experts), most_ctas(*kernel, max_ctas));
  LIGHT_TRY(check_counts(kProgram, deal, 1));
  deal.apply(&sort);
  const int threads = 32 * deal.num_warps;
  LIGHT_TRY(find_kernel(kProgram, name(threads), threads, shared(threads), &kernel));
  return launch(*kernel, {static_cast<unsigned int>(deal.num_ctas)}, args, stream);
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
  const int shared = std::max(gate::router_shared_bytes(),
                              gate::sort_shared_bytes(gate::kRouterThreads, sort.num_experts));
  const std::string name = "topk_gate_router_" + dtype_name(input) + "_" + dtype_name(router);
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find_kernel(kProgram, name, gate::kRouterThreads, shared, &kernel));
  const int most = most_ctas(*kernel, max_ctas);
  const int at_once = gate::tokens_at_once(sort.num_experts);
  const int num_warps = gate::kRouterThreads / 32;
  const bool is_alone = one_cta_does(ceil_div(sort.num_tokens, at_once), sort.num_experts);
  const int num_ctas = is_alone ? 1 : std::min(ceil_div(sort.num_tokens, num_warps / 2), most);
  share_out(sort.num_tokens, at_once, num_ctas, num_warps).apply(&sort);
  const int num_units = ceil_div(sort.num_experts, gate::kUnitExperts) *
                        ceil_div(args.width, gate::kUnitDepth);
  const int grid = std::clamp(num_units * sort.num_tokens, num_ctas, most);
  return launch(*kernel, {static_cast<unsigned int>(grid)}, args, stream);
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
  const std::string name = "router_logits_" + dtype_name(input) + "_" + dtype_name(router);
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find_kernel(kProgram, name, gate::kRouterThreads, gate::router_shared_bytes(),
                        &kernel));
  const int most = most_ctas(*kernel, max_ctas);
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
  const auto shared = [&](int threads) {
    return gate::sort_shared_bytes(threads, sort.num_experts);
  };
  const int most_threads =
      sort.num_experts > gate::kManyExperts ? kManyExpertsThreads : kMostThreads;
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find_kernel(kProgram, kName, most_threads, shared(most_threads), &kernel));
  const int at_once = std::max(32 / sort.num_experts_per_token, 1);
  const Deal deal =
      deal_out(sort.num_tokens, sort.num_experts, at_once, most_ctas(*kernel, max_ctas));
  LIGHT_TRY(check_counts(kName, deal, sort.num_experts_per_token));
  deal.apply(&sort);
  const int threads = 32 * deal.num_warps;
  LIGHT_TRY(find_kernel(kProgram, kName, threads, shared(threads), &kernel));
  return launch(*kernel, {static_cast<unsigned int>(deal.num_ctas)}, dealt, stream);
}
