// Sizes and the shared memory that the route's kernel and its launcher agree on.
#pragma once

#ifdef __CUDACC__
#define LIGHT_ROUTE_BOTH __host__ __device__
#else
#define LIGHT_ROUTE_BOTH
#endif

namespace light::route {

constexpr int kThreads = 512;
constexpr int kMaxRanks = 64, kMaxExperts = 512;
constexpr int kSeatRowsBehind = 2;  // rows of seats that are read behind those of as many batches
static_assert(kMaxExperts <= kThreads, "an expert is a thread's");

// Threads that read a column, of one rank, meet every bank once.
LIGHT_ROUTE_BOTH constexpr int row_stride(int num_ranks) { return num_ranks | 1; }

constexpr int kRanksOfOneLane = 32;

// Where the tables lie behind each other in dynamic shared memory, in bytes. There is one expert
// more than experts: nobody's, without tokens or copies.
struct Layout {
  int ranks_of, listed, pools, keys, rank_load, num_listed, totals, starts, order, next, seats,
      most_copies, bytes;

  LIGHT_ROUTE_BOTH constexpr Layout(int num_experts, int num_ranks)
      : ranks_of(0),
        listed(ranks_of + (num_experts + 2) / 2 * 16),
        pools(listed + 16 * num_experts),
        keys(pools + 16 * (num_experts + 1)),
        rank_load(keys + 8 * num_experts),
        num_listed(rank_load + 4 * num_ranks),
        totals(num_listed + 4),
        starts(totals + 4 * (num_experts + 1)),
        order(starts + 4 * (num_experts + 1) * row_stride(num_ranks)),
        next(order + 2 * num_experts),
        seats(next + 2 * num_experts),
        most_copies(seats + 2 * (num_experts + kSeatRowsBehind) * num_ranks),
        bytes((most_copies + num_experts + 1 + 15) / 16 * 16) {}
};

}  // namespace light::route
