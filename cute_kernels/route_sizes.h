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
constexpr int kMostLevels = 3;  // of a topology, whose groups ranks look for copies in
static_assert(kMaxExperts <= kThreads, "an expert is a thread's");

// Threads that read a column, of one rank, meet every bank once.
LIGHT_ROUTE_BOTH constexpr int row_stride(int num_ranks) { return num_ranks | 1; }

constexpr int kRanksOfOneLane = 32;

// Pools that have their turns together are a batch; batches are loaded some at a time.
constexpr int kBatchesAtOnce = 4, kBytesOfSeat = 20, kBytesOfSeats = 24 << 10;
LIGHT_ROUTE_BOTH constexpr int most_batches(int num_experts, int num_ranks) {
  const int room = kBytesOfSeats / (kBytesOfSeat * num_ranks);
  const int wanted = num_experts + kBatchesAtOnce - 1;
  return (room < wanted ? room : wanted) / kBatchesAtOnce * kBatchesAtOnce;
}

// Seats of all batches, and a row behind them that is nobody's.
LIGHT_ROUTE_BOTH constexpr int num_seats(int num_experts, int num_ranks) {
  return (most_batches(num_experts, num_ranks) + 1) * num_ranks;
}

// Where the tables lie behind each other in dynamic shared memory, in bytes. What is listed is gone
// when seats are taken.
struct Layout {
  int listed, seats, given, ranks_of, keys, rank_load, num_listed, totals, pooled, starts, order,
      next, bytes;

  LIGHT_ROUTE_BOTH constexpr Layout(int num_experts, int num_ranks)
      : listed(0),
        seats(0),
        given(seats + 16 * num_seats(num_experts, num_ranks)),
        ranks_of(larger(listed + 16 * num_experts,
                        given + (num_seats(num_experts, num_ranks) + 1) / 2 * 8)),
        keys(ranks_of + 8 * num_experts),
        rank_load(keys + 8 * num_experts),
        num_listed(rank_load + 4 * num_ranks),
        totals(num_listed + 4),
        pooled(totals + 4 * num_experts),
        starts(pooled + 4 * num_experts),
        order(starts + 4 * (num_experts + 1) * row_stride(num_ranks)),
        next(order + 2 * num_experts),
        bytes((next + 2 * num_experts + 15) / 16 * 16) {}

 private:
  LIGHT_ROUTE_BOTH static constexpr int larger(int one, int other) {
    return one > other ? one : other;
  }
};

}  // namespace light::route
