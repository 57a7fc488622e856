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
constexpr int kFirstCopies = 8;     // of an expert, which are packed into a word
constexpr int kSeatRowsBehind = 2;  // rows of seats that are read behind those of as many batches

// Threads that read a column, of one rank, meet every bank once.
LIGHT_ROUTE_BOTH constexpr int row_stride(int num_ranks) { return num_ranks | 1; }

// A number of an expert is quicker to load as a word; with the most ranks that takes too much room.
constexpr int kRanksOfOneLane = 32;
LIGHT_ROUTE_BOTH constexpr int seat_bytes(int num_ranks) {
  return num_ranks <= kRanksOfOneLane ? 4 : 2;
}

// Where the tables lie behind each other in dynamic shared memory, in bytes. There is one expert
// more than experts: nobody's, without tokens or copies.
struct Layout {
  int ranks_of, first_copies, rank_load, totals, keys, starts, order, seats, most_copies, bytes;

  LIGHT_ROUTE_BOTH constexpr Layout(int num_experts, int num_ranks)
      : ranks_of(0),
        first_copies(ranks_of + 8 * num_experts),
        rank_load(first_copies + 8 * (num_experts + 1)),
        totals(rank_load + 4 * num_ranks),
        keys(totals + 4 * (num_experts + 1)),
        starts(keys + 4 * (num_experts + 1)),
        order(starts + 4 * (num_experts + 1) * row_stride(num_ranks)),
        seats(order + (num_experts + 1) / 2 * 4),
        most_copies(seats + seat_bytes(num_ranks) * (num_experts + kSeatRowsBehind) * num_ranks),
        bytes((most_copies + num_experts + 1 + 15) / 16 * 16) {}
};

}  // namespace light::route
