// The split of every expert's pairs over its copies from the counts of all ranks, and what it means
// for each rank: one CTA, and the integers of lightmoe/kernels/route_reference.py.
//
//   read    tokens of each expert, and which ranks hold it
//   pool    experts of the same ranks, in the order of their turns (route_pools.cuh)
//   pour    one warp takes them in turns, sweep after sweep (route_pour.cuh)
//   share   what a pool gives to a rank becomes its experts'
//   add     tokens of each expert on each rank become the places where their groups begin
//   write   which pairs of each source go to which copy, and this rank's groups
//
// Where no expert has a choice, the three in the middle are left out.
#include "previous_kernel.cuh"
#include "route_pools.cuh"
#include "route_pour.cuh"

namespace light::route {

template <int kRanksPerLane>
class Router {
 public:
  __device__ Router(const light_route_split_args &args, char *memory)
      : args_(args), tables_(args, memory) {}

  __device__ void run() {
    clear();
    wait_for_previous_kernel();
    __syncthreads();
    read();
    __syncthreads();
    share_at_first();
    __syncthreads();
    if (*tables_.num_listed > 0) {
      split_pools();
      __syncthreads();
    }
    add_up();
    __syncthreads();
    write_groups();
    write_segments();
  }

 private:
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kAtOnce = 4;  // loads that are on their way together

  __device__ void clear() {
    for (int i = threadIdx.x; i < (args_.num_experts + 1) * tables_.stride; i += kThreads) {
      tables_.starts[i] = 0;
    }
    const int num_seats = (args_.num_experts + kSeatRowsBehind) * args_.num_ranks;
    for (int i = threadIdx.x; i < num_seats; i += kThreads) {
      tables_.seats[i] = args_.num_experts << kPlaceBits;
    }
    for (int i = threadIdx.x; i <= args_.num_experts; i += kThreads) {
      tables_.ranks_of[i] = 0;
      tables_.totals[i] = 0;
      tables_.most_copies[i] = 0;
    }
    if (threadIdx.x < args_.num_ranks) {
      tables_.rank_load[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) {
      tables_.pools[args_.num_experts] = {0, 0, 0, 0};
      *tables_.num_listed = 0;
    }
  }

  // The first copies are on their way while the tokens are counted.
  __device__ void read() {
    const int num_places = args_.num_experts * args_.num_copies;
    int ranks[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int place = threadIdx.x + i * kThreads;
      ranks[i] = place < num_places ? args_.copy_ranks[place] : -1;
    }
    count();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      add_copy(threadIdx.x + i * kThreads, ranks[i]);
    }
#pragma unroll 4
    for (int place = threadIdx.x + kAtOnce * kThreads; place < num_places; place += kThreads) {
      add_copy(place, args_.copy_ranks[place]);
    }
  }

  // A warp takes a source.
  __device__ void count() {
    for (int source = warp_index(); source < args_.num_ranks; source += kWarps) {
      for (int first = threadIdx.x % 32; first < args_.num_experts; first += 32 * kAtOnce) {
        int counts[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int expert = first + 32 * i;
          counts[i] = expert < args_.num_experts ? count_of(args_, source, expert) : 0;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (counts[i] > 0) {
            atomicAdd(&tables_.totals[first + 32 * i], counts[i]);
          }
        }
      }
    }
  }

  __device__ void add_copy(int place, int rank) {
    if (rank >= 0) {
      const int expert = static_cast<unsigned>(place) / args_.num_copies;
      atomicOr(reinterpret_cast<unsigned *>(tables_.ranks_of + expert) + rank / 32,
               1u << rank % 32);
    }
  }

  // All tokens to the home, or the same number to every copy, the first ones having the rest.
  // Experts that may choose get nothing yet.
  __device__ void share_at_first() {
    const int expert = threadIdx.x;
    const bool exists = expert < args_.num_experts;
    const RankSet ranks = exists ? tables_.ranks_of[expert] : 0;
    const int num_copies = __popcll(ranks);
    const bool may_choose = args_.route == kWaterfill || args_.route == kFewest;
    Pools(args_, tables_).list(expert, may_choose && num_copies > 1);
    if (!exists || (may_choose && num_copies > 1)) {
      return;
    }
    const int tokens = tables_.totals[expert];
    if (args_.route == kEven) {
      const int each = tokens / num_copies, rest = tokens - each * num_copies;
      for (int copy = 0; copy < num_copies; ++copy) {
        tables_.share(expert, copy_rank(args_, expert, copy)) = each + (copy < rest);
      }
    } else {
      const int home = num_copies == 1 ? lowest(ranks) : copy_rank(args_, expert, 0);
      tables_.share(expert, home) = tokens;
      atomicAdd(&tables_.rank_load[home], args_.route == kFewest ? tokens > 0 : tokens);
    }
  }

  __device__ void split_pools() {
    const Pools pools(args_, tables_);
    const int num_pools = pools.make();
    if (warp_index() == 0 && num_pools > 0) {
      if (args_.route == kFewest) {
        pour<true>(num_pools);
      } else {
        pour<false>(num_pools);
      }
    }
    __syncthreads();
    pools.template share_out<kRanksPerLane>(num_pools);
  }

  template <bool kFewestExperts>
  __device__ void pour(int num_pools) {
    Pouring<kRanksPerLane, kFewestExperts> pouring(args_, tables_);
    pouring.make_batches(num_pools);
    pouring.sweep();
  }

  // A warp takes a rank, a lane an expert.
  __device__ void add_up() {
    const int lane = threadIdx.x % 32;
    for (int rank = warp_index(); rank < args_.num_ranks; rank += kWarps) {
      int pairs = 0, tiles = 0, active = 0;
      for (int first = lane; first - lane < args_.num_experts; first += 32 * kAtOnce) {
        int shares[kAtOnce], ends[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int expert = first + 32 * i;
          shares[i] = expert < args_.num_experts ? tables_.share(expert, rank) : 0;
          ends[i] = inclusive_scan(shares[i]);
        }
        if (rank == args_.rank) {
          tiles = add_up_tiles(first, shares, tiles);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + 32 * i < args_.num_experts) {
            tables_.share(first + 32 * i, rank) = pairs + ends[i] - shares[i];
          }
          pairs += __shfl_sync(kAllLanes, ends[i], 31);
          active += __popc(__ballot_sync(kAllLanes, shares[i] > 0));
        }
      }
      if (lane == 0) {
        tables_.share(args_.num_experts, rank) = pairs;
        args_.rank_pairs[rank] = pairs;
        if (args_.active_experts != nullptr) {
          args_.active_experts[rank] = active;
        }
      }
    }
  }

  // Where the tiles of these experts begin, behind so many; returns where they end.
  __device__ int add_up_tiles(int first, const int (&shares)[kAtOnce], int tiles) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned last_token = shares[i] + args_.tokens_per_tile - 1;
      const int own = last_token / args_.tokens_per_tile, end = tiles + inclusive_scan(own);
      if (first + 32 * i < args_.num_experts) {
        tables_.tile_offsets[first + 32 * i] = end - own;
      }
      tiles = __shfl_sync(kAllLanes, end, 31);
    }
    if (threadIdx.x % 32 == 0 && first + 32 * kAtOnce >= args_.num_experts) {
      tables_.tile_offsets[args_.num_experts] = tiles;
    }
    return tiles;
  }

  __device__ void write_groups() {
    for (int expert = threadIdx.x; expert <= args_.num_experts; expert += kThreads) {
      args_.group_offsets[expert] = tables_.share(expert, args_.rank);
      args_.tile_offsets[expert] = tables_.tile_offsets[expert];
    }
    const int num_tiles = min(tables_.tile_offsets[args_.num_experts], args_.most_tiles);
    for (int tile = threadIdx.x; tile < num_tiles; tile += kThreads) {
      args_.tile_groups[tile] = expert_of(tile);
    }
  }

  // The first expert whose tiles end behind this one.
  __device__ int expert_of(int tile) const {
    int low = 0;
#pragma unroll
    for (int step = kMaxExperts / 2; step > 0; step /= 2) {
      const int end = low + step;
      if (end < args_.num_experts && tables_.tile_offsets[end] <= tile) {
        low = end;
      }
    }
    return low;
  }

  __device__ int share_of(int expert, int rank) const {
    return tables_.share(expert + 1, rank) - tables_.share(expert, rank);
  }

  // Pairs that stay where they are: those of a rank of which its own copy has room.
  __device__ int staying(int expert, int rank) const {
    return min(count_of(args_, rank, expert), share_of(expert, rank));
  }

  // A thread takes a copy. The pairs that do not stay stand in a row by source; so do the places
  // that are left, by copy; what goes from a source to a copy is where the two overlap. All first
  // copies come before all second ones, so that warps have many copies that exist, or none.
  __device__ void write_segments() {
    const int num_places = args_.num_experts * args_.num_copies;
    for (int place = threadIdx.x; place < num_places; place += kThreads) {
      const int copy = static_cast<unsigned>(place) / args_.num_experts;
      const int expert = place - copy * args_.num_experts;
      const int rank = copy_rank(args_, expert, copy);
      if (rank >= 0) {
        write_segments_of(expert, copy, rank);
      }
    }
  }

  __device__ void write_segments_of(int expert, int copy, int rank) {
    int room_before = 0;
    RankSet ranks = 1ull << rank;  // of the copies up to this one
    for (int other = 0; other < copy; ++other) {
      const int other_rank = copy_rank(args_, expert, other);
      room_before += share_of(expert, other_rank) - staying(expert, other_rank);
      ranks |= 1ull << other_rank;
    }
    const int stay = staying(expert, rank), room = share_of(expert, rank) - stay;
    const int start = tables_.share(expert, rank);
    const int num_places = args_.num_experts * args_.num_copies;
    int2 *segments =
        reinterpret_cast<int2 *>(args_.segments) + expert * args_.num_copies + copy;
    int leaving_before = 0;
    for (int first = 0; first < args_.num_ranks; first += kAtOnce) {
      int counts[kAtOnce], stays[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int source = min(first + i, args_.num_ranks - 1);
        counts[i] = count_of(args_, source, expert);
        stays[i] = min(counts[i], share_of(expert, source));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int source = first + i;
        const int leaving = counts[i] - stays[i];
        const int to_here = clamp(room_before + room - leaving_before, 0, leaving);
        const int came = clamp(leaving_before - room_before, 0, room);
        if (source < args_.num_ranks) {
          segments[source * num_places] = {(ranks >> source & 1 ? stays[i] : 0) + to_here,
                                           start + came + (rank < source ? stay : 0)};
        }
        leaving_before += leaving;
      }
    }
  }

  const light_route_split_args &args_;
  const Tables tables_;
};

template <int kRanksPerLane>
__device__ void split(const light_route_split_args &args) {
  extern __shared__ __align__(16) char memory[];
  Router<kRanksPerLane>(args, memory).run();
}

}  // namespace light::route

extern "C" __global__ void __launch_bounds__(light::route::kThreads, 1)
    route_split_w32(const __grid_constant__ light_route_split_args args) {
  light::route::split<1>(args);
}

extern "C" __global__ void __launch_bounds__(light::route::kThreads, 1)
    route_split_w64(const __grid_constant__ light_route_split_args args) {
  light::route::split<2>(args);
}
