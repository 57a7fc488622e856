// How the gate's tokens are dealt out to CTAs and their warps, and how the CTAs meet to exchange
// their counts: decided by sizes and architecture alone.
#pragma once

#include "light_ops.h"
#include "topk_gate_sizes.h"

namespace light::gate {

enum class Meeting {
  kNone,       // one CTA, or nothing to exchange
  kCluster,    // in the shared memory of one cluster
  kWorkspace,  // in global memory, where they wait for each other: all have to be resident
};

struct Deal {
  Meeting meeting;
  int num_ctas, num_warps, tokens_per_cta, tokens_per_warp;

  void apply(light_pair_sort *sort) const {
    sort->num_ctas = num_ctas;
    sort->tokens_per_cta = tokens_per_cta;
    sort->tokens_per_warp = tokens_per_warp;
  }
};

struct Device {
  int most_ctas;          // that are resident at once, one for each multiprocessor
  int most_cluster_ctas;  // 0: no clusters
};

int ceil_div(long long value, int divisor);

// Tokens whose experts a warp takes `tokens_at_once`; without a sort nothing is exchanged.
Deal deal_out(int num_tokens, int num_experts, int tokens_at_once, bool is_sorted, Device device);

// The same behind the router product: the last CTAs of 512 threads that are done with it.
Deal deal_out_router(int num_tokens, int num_experts, Device device);

// Which tile of the router product takes least time, where `most_tiles` are worked on at once.
RouterTile choose_router_tile(int num_tokens, int num_experts, int most_experts, int most_tiles);

}  // namespace light::gate
