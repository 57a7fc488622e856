// Sizes that the gate's kernels and their launcher agree on.
#pragma once

#ifdef __CUDACC__
#define LIGHT_GATE_BOTH __host__ __device__
#else
#define LIGHT_GATE_BOTH
#endif

namespace light::gate {

constexpr int kMaxCtas = 256;     // of a launch that exchanges counts
constexpr int kPollingCtas = 24;  // more would slow each other down: they meet first
constexpr int kMaxExperts = 512;
constexpr int kMaxExpertsPerToken = 16;
constexpr int kMaxGroups = 32;
constexpr int kMaxCount = 0x7fff;  // pairs of one expert in one CTA, where several exchange counts
constexpr int kFewExperts = 8;     // up to here a warp holds four tokens at once
constexpr int kManyExperts = 256;  // from here on a CTA has at most 512 threads

// The router product (topk_gate_router.cuh): a unit is 8 experts x 1024 of depth for 4 warps.
constexpr int kUnitExperts = 8, kUnitDepth = 1024, kTeamWarps = kUnitDepth / 256;
constexpr int kRouterThreads = 512;
constexpr int kRouterTokens = 64;
constexpr int kSumsPerTeam = kRouterTokens * kTeamWarps * kUnitExperts;

LIGHT_GATE_BOTH constexpr int tokens_at_once(int num_experts) {
  return num_experts <= kFewExperts ? 4 : 1;
}

// The workspace begins with this; all zeros at first. A launch that exchanges counts marks them as
// present, so a few CTAs wait for nothing but the counts that they read. Rounds take turns with two
// tables: the marks of the round before are wiped while the other table is in use.
struct Exchange {
  unsigned router_counter, ticket_counter, sort_counter;
  unsigned round;
  unsigned marked[2];  // what is marked in each table: experts << 16 | CTAs
  unsigned reserved[58];
  unsigned short counts[2][kMaxCtas][kMaxExperts];
};

// Dynamic shared memory of the sort; `warps` rows of `num_experts` counts stand behind it.
struct SortMemory {
  int position[kMaxExperts];  // where this CTA's first pair of each expert goes
  int tile_offsets[kMaxExperts + 1];
  int warp_pairs[kMaxExperts / 32], warp_tiles[kMaxExperts / 32];
  int before[kMaxExperts], total[kMaxExperts];  // pairs in the CTAs before, in all
  unsigned round, to_wipe;
};

constexpr int sort_shared_bytes(int num_threads, int num_experts) {
  const int bytes = sizeof(SortMemory) + num_threads / 32 * num_experts * 2;
  return (bytes + 15) / 16 * 16;
}

constexpr int router_shared_bytes() {
  return kRouterThreads / 32 / kTeamWarps * kSumsPerTeam * static_cast<int>(sizeof(float));
}

constexpr long long workspace_bytes(int num_experts, int num_tokens, int width) {
  const long long num_splits = (width + kUnitDepth - 1) / kUnitDepth;
  return static_cast<long long>(sizeof(Exchange)) +
         num_tokens * num_splits * num_experts * static_cast<long long>(sizeof(float));
}

}  // namespace light::gate
