// What the phases of a route share: its tables in shared memory, and a warp's elementary steps.
#pragma once

#include "light_ops.h"
#include "route_sizes.h"

namespace light::route {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr unsigned kNoCopy = 0xff;  // in place of a rank
constexpr int kTokenBits = 26;      // of all pairs of all ranks

template <int kRanksPerLane>
struct SeatNumber {
  using Type = int;
};
template <>
struct SeatNumber<2> {
  using Type = unsigned short;
};
template <int kRanksPerLane>
using SeatExpert = typename SeatNumber<kRanksPerLane>::Type;

struct Tables {
  unsigned long long *ranks_of;      // [E] a bit for each rank that holds a copy
  unsigned long long *first_copies;  // [E + 1] of the first eight copies, a byte each, home lowest
  int *rank_load;         // [W] before the first turn: tokens, or experts where those count
  int *totals;            // [E + 1] tokens of all ranks
  unsigned *keys;         // [E] the larger, the earlier in `order`; 0: not in it
  int *tile_offsets;      // [E + 1] in the place of the keys, once those were used
  int *starts;            // [E + 1, stride] tokens of each expert on each rank; at last those of
                          // the experts before it
  unsigned short *order;  // [E] experts that may be split, in the order of their turns
  void *seats;            // [batches, W] the expert whose turn a batch is on a rank; nobody's is E
  unsigned char *most_copies;  // [batches] copies of the expert that has most
  int stride;

  __device__ Tables(const light_route_split_args &args, char *memory)
      : Tables(Layout(args.num_experts, args.num_ranks), memory, args.num_ranks) {}

  __device__ int &share(int expert, int rank) const { return starts[expert * stride + rank]; }

  __device__ void add_copy(int expert, int copy, int rank) const {
    atomicOr(reinterpret_cast<unsigned *>(ranks_of + expert) + rank / 32, 1u << rank % 32);
    if (copy < kFirstCopies) {
      reinterpret_cast<unsigned char *>(first_copies + expert)[copy] = rank;
    }
  }

 private:
  __device__ Tables(const Layout &layout, char *memory, int num_ranks)
      : ranks_of(reinterpret_cast<unsigned long long *>(memory + layout.ranks_of)),
        first_copies(reinterpret_cast<unsigned long long *>(memory + layout.first_copies)),
        rank_load(reinterpret_cast<int *>(memory + layout.rank_load)),
        totals(reinterpret_cast<int *>(memory + layout.totals)),
        keys(reinterpret_cast<unsigned *>(memory + layout.keys)),
        tile_offsets(reinterpret_cast<int *>(memory + layout.keys)),
        starts(reinterpret_cast<int *>(memory + layout.starts)),
        order(reinterpret_cast<unsigned short *>(memory + layout.order)),
        seats(memory + layout.seats),
        most_copies(reinterpret_cast<unsigned char *>(memory + layout.most_copies)),
        stride(row_stride(num_ranks)) {}
};

__device__ inline int count_of(const light_route_split_args &args, int source, int expert) {
  const int *offsets = args.source_offsets + source * args.source_stride + expert;
  return offsets[1] - offsets[0];
}

__device__ inline int largest_of_lanes(int value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAllLanes, value);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
#endif
}

__device__ inline int inclusive_scan(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, offset);
    value += lane >= offset ? before : 0;
  }
  return value;
}

}  // namespace light::route
