// Sizes that the gate's kernels and their launcher agree on.
#pragma once

#ifdef __CUDACC__
#define LIGHT_GATE_BOTH __host__ __device__
#else
#define LIGHT_GATE_BOTH
#endif

namespace light::gate {

constexpr int kMaxCtas = 256;     // of a launch that exchanges counts through the workspace
constexpr int kPollingCtas = 24;  // more would slow each other down: they meet first
constexpr int kMaxClusterCtas = 16, kPortableClusterCtas = 8;
constexpr int kMaxExperts = 512;
constexpr int kMaxExpertsPerToken = 16;
constexpr int kMaxGroups = 32;
constexpr int kMaxCount = 0x7fff;  // pairs of one expert in one CTA, where several exchange counts
constexpr int kFewExperts = 8;     // up to here a warp holds four tokens at once
constexpr int kManyExperts = 256;  // with more a CTA has at most 512 threads
constexpr int kMaxWarps = 32;

LIGHT_GATE_BOTH constexpr int most_threads(int num_experts) {
  return num_experts > kManyExperts ? 16 * kMaxWarps : 32 * kMaxWarps;
}

// Tiles of the sort: multiples of the first, up to the second.
constexpr int kTileTokens = 8, kMaxTileTokens = 256;

// The router product on the tensor cores (topk_gate_mma.cuh): a logit's products are added up in
// slices of the depth, the slices in two halves.
constexpr int kSliceDepth = 256;
LIGHT_GATE_BOTH constexpr int slices_of(int width) {
  return (width + kSliceDepth - 1) / kSliceDepth;
}
LIGHT_GATE_BOTH constexpr int first_slices_of(int num_slices) { return (num_slices + 1) / 2; }

constexpr int kMmaExperts = 16, kMmaTokens = 8;
constexpr int kItemExperts = 8;     // of a warp, for few tokens
constexpr int kWarpsWithItems = 4;  // of a CTA, as long as there are multiprocessors
constexpr int kBusyWarps = 16;      // of a CTA: with more, too many read the same weights

// Of many tokens (topk_gate_tiles.cuh).
struct RouterTile {
  int experts, tokens;
};
constexpr int kTileThreads = 256;
constexpr int kStageDepth = 64;
constexpr int kTileStages = 4, kTileStagesTuring = 2;
constexpr RouterTile kRouterTiles[] = {{16, 64},  {16, 128}, {32, 64},  {32, 128},
                                       {64, 64},  {64, 128}, {128, 128}};
constexpr int kMostUnpairedExperts = 64;  // of a tile whose two halves are the same CTA's

constexpr int tile_shared_bytes(RouterTile tile, int architecture) {
  const int stages = architecture >= 80 ? kTileStages : kTileStagesTuring;
  const int exchange = architecture >= 90 ? tile.experts * tile.tokens * 2 : 0;
  return stages * (tile.experts + tile.tokens) * kStageDepth * 2 + exchange;
}

// The router product by fp32 multiply-adds (topk_gate_router.cuh): a unit is 8 experts x 1024 of
// depth for 4 warps.
constexpr int kUnitExperts = 8, kUnitDepth = 1024, kTeamWarps = kUnitDepth / 256;
constexpr int kRouterThreads = 512;
constexpr int kRouterTokens = 64;
constexpr int kSumsPerTeam = kRouterTokens * kTeamWarps * kUnitExperts;

// Numbers of experts that the gate is compiled for: the next larger one takes all below it.
constexpr int kExpertSizes[] = {8, 32, 64, 128, 256, 512};

LIGHT_GATE_BOTH constexpr int tokens_at_once(int num_experts) {
  return num_experts <= kFewExperts ? 4 : 1;
}

LIGHT_GATE_BOTH constexpr bool is_tile(int tokens_per_tile) {
  return tokens_per_tile >= kTileTokens && tokens_per_tile <= kMaxTileTokens &&
         tokens_per_tile % kTileTokens == 0;
}

// What num_tiles() multiplies with in place of a division: 2^31 / (tokens_per_tile / 8), rounded
// up. The product is exact for fewer than 2^26 eights.
LIGHT_GATE_BOTH constexpr unsigned tile_reciprocal(int tokens_per_tile) {
  return 0x7fffffffu / (tokens_per_tile / kTileTokens) + 1;
}

LIGHT_GATE_BOTH constexpr int num_tiles(int pairs, int tokens_per_tile, unsigned reciprocal) {
  const unsigned eights = (pairs + tokens_per_tile - 1) / static_cast<unsigned>(kTileTokens);
  return static_cast<int>(static_cast<unsigned long long>(eights) * reciprocal >> 31);
}

// Neighbouring experts whose counts of 16 bits a thread adds up: a row of counts has whole columns.
constexpr int kColumnExperts = 4;
LIGHT_GATE_BOTH constexpr int num_columns(int num_experts) {
  return (num_experts + kColumnExperts - 1) / kColumnExperts;
}
constexpr int kMaxColumns = num_columns(kMaxExperts);

// Warps that have the columns, a thread each.
LIGHT_GATE_BOTH constexpr int exchanging_warps(int num_experts) {
  return (num_columns(num_experts) + 31) / 32;
}

// The workspace begins with this; all zeros at first. A launch that exchanges counts marks them as
// present, so a few CTAs wait for nothing but the counts that they read. Rounds take turns with two
// tables: the marks of the round before are wiped while the other table is in use.
struct Exchange {
  unsigned router_counter, sort_counter;
  unsigned round;
  unsigned marked[2];  // what is marked in each table: experts << 16 | CTAs
  unsigned reserved[59];
  unsigned short counts[2][kMaxCtas][kMaxExperts];
};

struct alignas(8) Chosen {
  unsigned key;  // by which it was chosen
  int expert;
};

// Dynamic shared memory of the sort. Rows of counts stand behind it: one for each warp, then one
// for each CTA of a cluster.
struct alignas(16) SortMemory {
  int position[kMaxExperts];  // where this CTA's first pair of each expert goes
  int tile_ends[kMaxExperts];
  int before[kMaxExperts], total[kMaxExperts];  // pairs in the CTAs before, in all
  Chosen chosen[kMaxWarps][32];                 // by the tokens that a warp holds
  int warp_pairs[kMaxColumns / 32], warp_tiles[kMaxColumns / 32];
  unsigned long long arrivals;  // of the cluster's counts
  unsigned round, to_wipe;
};

constexpr int sort_shared_bytes(int num_threads, int num_experts, int cluster_ctas = 0) {
  const int row_bytes = num_columns(num_experts) * kColumnExperts * 2;
  const int bytes =
      static_cast<int>(sizeof(SortMemory)) + (num_threads / 32 + cluster_ctas) * row_bytes;
  return (bytes + 15) / 16 * 16;
}

constexpr int router_shared_bytes() {
  return kRouterThreads / 32 / kTeamWarps * kSumsPerTeam * static_cast<int>(sizeof(float));
}

constexpr long long workspace_bytes(int num_experts, int num_tokens, int width) {
  return static_cast<long long>(sizeof(Exchange)) +
         static_cast<long long>(num_tokens) * slices_of(width) * num_experts *
             static_cast<long long>(sizeof(float));
}

}  // namespace light::gate
