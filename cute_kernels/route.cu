// The split of every expert's pairs over its copies from the counts of all ranks, and what it means
// for each rank: one CTA, and the integers of lightmoe/kernels/route_reference.py.
//
//   count   tokens of each expert; all of them start at their homes
//   order   experts that may be split, in the order of their turns
//   pour    one warp takes them in turns, sweep after sweep (route_pour.cuh)
//   add     tokens of each expert on each rank become the places where their groups begin
//   write   which pairs of each source go to which copy, and this rank's groups
#include "previous_kernel.cuh"
#include "route_pour.cuh"

namespace light::route {

enum Route { kHome = 0, kEven = 1, kWaterfill = 2, kFewest = 3 };

__device__ inline int copy_rank(const light_route_split_args &args, int expert, int copy) {
  return args.copy_ranks[expert * args.num_copies + copy];
}

__device__ inline int clamp(int value, int low, int high) { return min(max(value, low), high); }

template <int kRanksPerLane>
class Router {
 public:
  __device__ Router(const light_route_split_args &args, char *memory)
      : args_(args), tables_(args, memory) {}

  __device__ void run() {
    clear();
    wait_for_previous_kernel();
    __syncthreads();
    count();
    read_copies();
    __syncthreads();
    share_at_first();
    __syncthreads();
    const int num_replicated = sort();
    if (threadIdx.x < 32) {
      if (args_.route == kWaterfill) {
        pour<false>(num_replicated);
      } else if (args_.route == kFewest) {
        pour<true>(num_replicated);
      }
    }
    __syncthreads();
    add_up();
    __syncthreads();
    write_groups();
    write_segments();
  }

 private:
  static constexpr int kWarps = kThreads / 32;

  __device__ void clear() {
    for (int i = threadIdx.x; i < (args_.num_experts + 1) * tables_.stride; i += kThreads) {
      tables_.starts[i] = 0;
    }
    const int num_seats = (args_.num_experts + kSeatRowsBehind) * args_.num_ranks;
    for (int i = threadIdx.x; i < num_seats; i += kThreads) {
      static_cast<SeatExpert<kRanksPerLane> *>(tables_.seats)[i] = args_.num_experts;
    }
    for (int i = threadIdx.x; i <= args_.num_experts; i += kThreads) {
      tables_.first_copies[i] = ~0ull;
      tables_.totals[i] = 0;
      tables_.most_copies[i] = 0;
    }
    for (int i = threadIdx.x; i < args_.num_experts; i += kThreads) {
      tables_.ranks_of[i] = 0;
    }
    if (threadIdx.x < args_.num_ranks) {
      tables_.rank_load[threadIdx.x] = 0;
    }
  }

  __device__ void count() {
    for (int source = threadIdx.x / 32; source < args_.num_ranks; source += kWarps) {
#pragma unroll 4
      for (int expert = threadIdx.x % 32; expert < args_.num_experts; expert += 32) {
        atomicAdd(&tables_.totals[expert], count_of(args_, source, expert));
      }
    }
  }

  __device__ void read_copies() {
    for (int place = threadIdx.x; place < args_.num_experts * args_.num_copies;
         place += kThreads) {
      const int rank = args_.copy_ranks[place], expert = place / args_.num_copies;
      if (rank >= 0) {
        tables_.add_copy(expert, place - expert * args_.num_copies, rank);
      }
    }
  }

  // All tokens to the home, or the same number to every copy, the first ones having the rest. Where
  // one copy gets all, nothing of an expert that may choose.
  __device__ void share_at_first() {
    for (int expert = threadIdx.x; expert < args_.num_experts; expert += kThreads) {
      const int tokens = tables_.totals[expert], num_copies = __popcll(tables_.ranks_of[expert]);
      tables_.keys[expert] = key_of(tokens, num_copies);
      if (args_.route == kEven) {
        const int each = tokens / num_copies, rest = tokens - each * num_copies;
        for (int copy = 0; copy < num_copies; ++copy) {
          tables_.share(expert, copy_rank(args_, expert, copy)) = each + (copy < rest);
        }
      } else if (args_.route != kFewest || tables_.keys[expert] == 0) {
        const int home = copy_rank(args_, expert, 0);
        tables_.share(expert, home) = tokens;
        atomicAdd(&tables_.rank_load[home], args_.route == kFewest ? tokens > 0 : tokens);
      }
    }
  }

  // Poured: most tokens first. Fewest: fewest copies first, then most tokens.
  __device__ unsigned key_of(int tokens, int num_copies) const {
    if (num_copies == 1 || tokens == 0 || args_.route == kHome || args_.route == kEven) {
      return 0;
    }
    return args_.route == kFewest ? (kMaxRanks - num_copies) << kTokenBits | tokens : tokens;
  }

  // An expert's place is the number of those before it; some lanes share the counting. Ties go to
  // the lower number. Returns how many experts there are in the order.
  __device__ int sort() {
    int num_lanes = 1;
    while (2 * num_lanes <= 32 && 2 * num_lanes * args_.num_experts <= kThreads) {
      num_lanes *= 2;
    }
    const int expert = threadIdx.x / num_lanes, lane = threadIdx.x % num_lanes;
    const unsigned key = expert < args_.num_experts ? tables_.keys[expert] : 0;
    int place = 0;
#pragma unroll 4
    for (int other = lane; other < args_.num_experts; other += num_lanes) {
      place += tables_.keys[other] >= key + (other >= expert);
    }
    for (int offset = 1; offset < num_lanes; offset *= 2) {
      place += __shfl_xor_sync(kAllLanes, place, offset);
    }
    const bool is_replicated = key > 0 && lane == 0;
    if (is_replicated) {
      tables_.order[place] = expert;
    }
    return __syncthreads_count(is_replicated);
  }

  template <bool kFewestExperts>
  __device__ void pour(int num_replicated) {
    Pouring<kRanksPerLane, kFewestExperts> pouring(args_, tables_);
    pouring.make_batches(num_replicated);
    pouring.sweep();
  }

  // A warp takes a rank, a lane neighbouring experts of it.
  __device__ void add_up() {
    const int lane = threadIdx.x % 32, experts_per_lane = (args_.num_experts + 31) / 32;
    const int begin = min(lane * experts_per_lane, args_.num_experts);
    const int end = min(begin + experts_per_lane, args_.num_experts);
    for (int rank = threadIdx.x / 32; rank < args_.num_ranks; rank += kWarps) {
      if (rank == args_.rank) {
        add_up_tiles(begin, end);
      }
      int pairs = 0, active = 0;
      for (int expert = begin; expert < end; ++expert) {
        pairs += tables_.share(expert, rank);
        active += tables_.share(expert, rank) > 0;
      }
      const int pairs_end = inclusive_scan(pairs), active_end = inclusive_scan(active);
      int start = pairs_end - pairs;
      for (int expert = begin; expert < end; ++expert) {
        const int share = tables_.share(expert, rank);
        tables_.share(expert, rank) = start;
        start += share;
      }
      if (lane == 31) {
        tables_.share(args_.num_experts, rank) = pairs_end;
        args_.rank_pairs[rank] = pairs_end;
        if (args_.active_experts != nullptr) {
          args_.active_experts[rank] = active_end;
        }
      }
    }
  }

  __device__ void add_up_tiles(int begin, int end) {
    int tiles = 0;
    for (int expert = begin; expert < end; ++expert) {
      tiles += num_tiles(expert);
    }
    const int tiles_end = inclusive_scan(tiles);
    int start = tiles_end - tiles;
    for (int expert = begin; expert < end; ++expert) {
      tables_.tile_offsets[expert] = start;
      start += num_tiles(expert);
    }
    if (threadIdx.x % 32 == 31) {
      tables_.tile_offsets[args_.num_experts] = tiles_end;
    }
    __syncwarp();
  }

  __device__ int num_tiles(int expert) const {
    return (tables_.share(expert, args_.rank) + args_.tokens_per_tile - 1) / args_.tokens_per_tile;
  }

  __device__ void write_groups() {
    for (int expert = threadIdx.x; expert <= args_.num_experts; expert += kThreads) {
      args_.group_offsets[expert] = tables_.share(expert, args_.rank);
      args_.tile_offsets[expert] = tables_.tile_offsets[expert];
    }
    const int num_tiles = min(tables_.tile_offsets[args_.num_experts], args_.most_tiles);
    for (int tile = threadIdx.x; tile < num_tiles; tile += kThreads) {
      int low = 0, high = args_.num_experts - 1;  // the first expert whose tiles end after this one
#pragma unroll 1
      while (low < high) {
        const int middle = (low + high) / 2;
        if (tables_.tile_offsets[middle + 1] > tile) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      args_.tile_groups[tile] = low;
    }
  }

  __device__ int share_of(int expert, int rank) const {
    return tables_.share(expert + 1, rank) - tables_.share(expert, rank);
  }

  // Pairs that stay where they are: those of a rank of which its own copy has room.
  __device__ int staying(int expert, int rank) const {
    return min(count_of(args_, rank, expert), share_of(expert, rank));
  }

  // A thread takes a copy. The pairs that do not stay stand in a row by source; so do the places
  // that are left, by copy; what goes from a source to a copy is where the two overlap.
  __device__ void write_segments() {
    const int num_places = args_.num_experts * args_.num_copies;
    for (int place = threadIdx.x; place < num_places; place += kThreads) {
      const int expert = place / args_.num_copies, copy = place - expert * args_.num_copies;
      const int rank = args_.copy_ranks[place];
      int2 *segments = reinterpret_cast<int2 *>(args_.segments) + place;
      if (rank < 0) {
        for (int source = 0; source < args_.num_ranks; ++source) {
          segments[source * num_places] = {count_of(args_, source, expert), 0};
        }
        continue;
      }
      int room_before = 0;
      unsigned long long ranks = 1ull << rank;  // of the copies up to this one
      for (int other = 0; other < copy; ++other) {
        const int other_rank = copy_rank(args_, expert, other);
        room_before += share_of(expert, other_rank) - staying(expert, other_rank);
        ranks |= 1ull << other_rank;
      }
      const int stay = staying(expert, rank), room = share_of(expert, rank) - stay;
      const int start = tables_.share(expert, rank);
      int leaving_before = 0;
#pragma unroll 4
      for (int source = 0; source < args_.num_ranks; ++source) {
        const int stay_there = staying(expert, source);
        const int leaving = count_of(args_, source, expert) - stay_there;
        const int to_here = clamp(room_before + room - leaving_before, 0, leaving);
        const int came = clamp(leaving_before - room_before, 0, room);
        segments[source * num_places] = {(ranks >> source & 1 ? stay_there : 0) + to_here,
                                         start + came + (rank < source ? stay : 0)};
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
