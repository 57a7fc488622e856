// The borders between the roads were measured on an H100 (benchmarks/kernels/topk_gate.py).
#include "topk_gate_deal.h"

#include <algorithm>

namespace light::gate {
namespace {

constexpr int kAloneWarps = 16, kAloneWork = 2048;  // warps x experts that one CTA does quickest
constexpr int kPollingWarps = 16 * kPollingCtas;  // topk_gate_sort.cuh: no barrier
constexpr int kClusterCtaWarps = 16;  // with more on a multiprocessor the workspace is quicker

bool one_cta_does(int work_warps, int num_experts) {
  return work_warps <= kAloneWarps && work_warps * num_experts <= kAloneWork;
}

// CTAs of the cluster that does it; 0 if none does.
int cluster_ctas(int work_warps, Device device) {
  const int most = std::min(device.most_ctas, device.most_cluster_ctas);
  for (const int num_ctas : {kPortableClusterCtas, kMaxClusterCtas}) {
    if (num_ctas <= most && work_warps <= num_ctas * kClusterCtaWarps) {
      return num_ctas;
    }
  }
  return 0;
}

int most_warps(int num_experts) { return most_threads(num_experts) / 32; }

Deal share_out(Meeting meeting, int num_tokens, int at_once, int num_ctas, int num_warps) {
  const int tokens_per_cta = std::max(ceil_div(num_tokens, num_ctas), 1);
  const int tokens_per_warp = ceil_div(ceil_div(tokens_per_cta, num_warps), at_once) * at_once;
  if (meeting != Meeting::kCluster) {  // whose size is fixed: some of its CTAs may have no tokens
    num_ctas = std::max(ceil_div(num_tokens, tokens_per_cta), 1);
  }
  return {num_ctas == 1 ? Meeting::kNone : meeting, num_ctas, num_warps, tokens_per_cta,
          tokens_per_warp};
}

}  // namespace

int ceil_div(long long value, int divisor) {
  return static_cast<int>((value + divisor - 1) / divisor);
}

Deal deal_out(int num_tokens, int num_experts, int tokens_at_once, bool is_sorted,
              Device device) {
  const int work_warps = ceil_div(num_tokens, tokens_at_once);
  const int exchanging = exchanging_warps(num_experts);  // have no tokens if there is room
  const int least_warps = std::max(ceil_div(num_experts, 32), 4);
  const auto share = [&](Meeting meeting, int num_ctas, int num_warps) {
    return share_out(is_sorted ? meeting : Meeting::kNone, num_tokens, tokens_at_once, num_ctas,
                     num_warps);
  };
  if (one_cta_does(work_warps, num_experts) || device.most_ctas == 1) {
    return share(Meeting::kNone, 1,
                 std::clamp(work_warps + exchanging, least_warps, most_warps(num_experts)));
  }
  if (const int num_ctas = cluster_ctas(work_warps, device); is_sorted && num_ctas > 0) {
    const int warps = ceil_div(work_warps, num_ctas) + exchanging;
    return share(Meeting::kCluster, num_ctas, std::clamp(warps, 4, most_warps(num_experts)));
  }
  const int wanted = work_warps <= kPollingWarps
                         ? std::min(ceil_div(work_warps, 4), kPollingCtas)
                         : ceil_div(work_warps, 16);
  const int num_ctas = std::min(wanted, device.most_ctas);
  const int warps_per_cta = ceil_div(work_warps, num_ctas);
  const bool is_long = warps_per_cta > 16 && num_experts <= kManyExperts;
  const int most = num_experts > kManyExperts ? 16 : 16 + exchanging;
  const int num_warps =
      is_long ? 32 : std::clamp(warps_per_cta + exchanging, std::max(least_warps, 8), most);
  return share(Meeting::kWorkspace, num_ctas, num_warps);
}

Deal deal_out_router(int num_tokens, int num_experts, Device device) {
  const int num_warps = kRouterThreads / 32, at_once = tokens_at_once(num_experts);
  const int work_warps = ceil_div(num_tokens, at_once);
  if (one_cta_does(work_warps, num_experts) || device.most_ctas == 1) {
    return share_out(Meeting::kNone, num_tokens, at_once, 1, num_warps);
  }
  const int num_ctas = std::min(ceil_div(num_tokens, num_warps / 2), device.most_ctas);
  return share_out(Meeting::kWorkspace, num_tokens, at_once, num_ctas, num_warps);
}

// A tile's time is that of its rows on their way to a multiprocessor; half of all multiprocessors
// at full speed take what the L2 cache can give.
RouterTile choose_router_tile(int num_tokens, int num_experts, int most_experts, int most_tiles) {
  RouterTile best = kRouterTiles[0];
  long long least = -1;
  for (const RouterTile tile : kRouterTiles) {
    const long long num_tiles = static_cast<long long>(ceil_div(num_tokens, tile.tokens)) *
                                ceil_div(num_experts, tile.experts);
    const long long rounds = (num_tiles + most_tiles - 1) / most_tiles;
    const long long time =
        (tile.experts + tile.tokens) * std::max(rounds * most_tiles, 2 * num_tiles);
    if (tile.experts <= most_experts && (least < 0 || time < least)) {
      best = tile;
      least = time;
    }
  }
  return best;
}

}  // namespace light::gate
