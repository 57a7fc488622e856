// The split of every expert's pairs over its copies from the counts of all ranks, and what it means
// for each rank: a CTA for a chunk, and the integers of lightmoe/kernels/route_reference.py.
//
//   read    tokens of each expert, and which ranks hold it
//   pool    experts of the same ranks, in the order of their turns (route_pools.cuh)
//   pour    one warp takes them in turns, sweep after sweep (route_pour.cuh)
//   share   what a pool gives to a rank becomes its experts'
//   add     tokens of each expert on each rank become the places where their groups begin
//   write   which pairs of each source go to which copy, and this rank's groups (route_write.cuh)
//
// Where no expert has a choice, the three in the middle are left out.
#include "previous_kernel.cuh"
#include "route_pools.cuh"
#include "route_pour.cuh"
#include "route_write.cuh"

namespace light::route {

template <int kRanksPerLane, template <int> class Near>
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
    Writer<kRanksPerLane, Near>(args_, tables_).run();
  }

 private:
  __device__ void clear() {
    for (int i = threadIdx.x; i < (args_.num_experts + 1) * tables_.stride; i += kThreads) {
      tables_.starts[i] = 0;
    }
    if (threadIdx.x < args_.num_experts) {
      tables_.ranks_of[threadIdx.x] = 0;
      tables_.totals[threadIdx.x] = 0;
    }
    if (threadIdx.x < args_.num_ranks) {
      tables_.rank_load[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) {
      *tables_.num_listed = 0;
    }
  }

  // The first copies are on their way while the tokens are counted. A group of lanes takes an
  // expert.
  __device__ void read() {
    const Group group(args_.num_ranks);
    int ranks[kAtOnce][kRanksPerLane];
    load_copies(group, 0, ranks);
    count();
    add_copies(group, 0, ranks);
    const int step = kAtOnce * group.num_groups;
#pragma unroll 1
    for (int first = step; first < args_.num_experts; first += step) {
      load_copies(group, first, ranks);
      add_copies(group, first, ranks);
    }
  }

  __device__ void load_copies(const Group &group, int first,
                              int (&ranks)[kAtOnce][kRanksPerLane]) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int expert = first + group.index + i * group.num_groups;
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        const int copy = group.lane + 32 * slot;
        const bool exists = expert < args_.num_experts && copy < args_.num_copies;
        ranks[i][slot] = exists ? copy_rank(args_, expert, copy) : -1;
      }
    }
  }

  __device__ void add_copies(const Group &group, int first,
                             const int (&ranks)[kAtOnce][kRanksPerLane]) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int expert = first + group.index + i * group.num_groups;
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        const int rank = ranks[i][slot];
        if (rank >= 0) {
          unsigned *words = reinterpret_cast<unsigned *>(tables_.ranks_of + expert);
          atomicOr(words + rank / 32, 1u << rank % 32);
        }
      }
    }
  }

  // A warp takes a source.
  __device__ void count() const {
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

  // All tokens to the home, or the same number to every copy, the first ones having the rest.
  // Experts that may choose get nothing yet.
  __device__ void share_at_first() const {
    const int expert = threadIdx.x;
    const bool exists = expert < args_.num_experts;
    const RankSet ranks = exists ? tables_.ranks_of[expert] : 0;
    const int num_copies = __popcll(ranks);
    const bool chooses = num_copies > 1 && (args_.route == kWaterfill || args_.route == kFewest);
    Pools(args_, tables_).list(expert, chooses);
    if (!exists || chooses) {
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

  // While the first warp pours, the others look at what they will share out.
  __device__ void split_pools() const {
    const Pools pools(args_, tables_);
    const int num_pools = pools.make();
    if (num_pools == 0) {
      return;
    }
    const int warp = warp_index();
    if (args_.route == kFewest) {
      if (warp == 0) {
        Pouring<kRanksPerLane>(args_, tables_, num_pools).gather();
      }
      return;
    }
    clear_seats();
    __syncthreads();
    int own[kRanksPerLane];
    if (warp == 0) {
      Pouring<kRanksPerLane>(args_, tables_, num_pools).level();
    } else if (warp <= num_pools) {
      pools.count_own(tables_.order[warp - 1], own);
    }
    __syncthreads();
    for (int i = warp - 1; i < num_pools && warp > 0; i += kWarps - 1) {
      if (i >= kWarps - 1) {
        pools.count_own(tables_.order[i], own);
      }
      pools.share_out(tables_.order[i], own);
    }
  }

  __device__ void clear_seats() const {
    const int all = num_seats(args_.num_experts, args_.num_ranks);
    for (int i = threadIdx.x; i < all; i += kThreads) {
      tables_.seats[i] = {0, 0, 0, 0};
      tables_.given[i] = 0;
    }
  }

  // A warp takes a rank, a lane an expert.
  __device__ void add_up() const {
    const int lane = threadIdx.x % 32;
    for (int rank = warp_index(); rank < args_.num_ranks; rank += kWarps) {
      int pairs = 0, active = 0;
      for (int first = lane; first - lane < args_.num_experts; first += 32 * kAtOnce) {
        int shares[kAtOnce], ends[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int expert = first + 32 * i;
          shares[i] = expert < args_.num_experts ? tables_.share(expert, rank) : 0;
          ends[i] = inclusive_scan(shares[i]);
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

  const light_route_split_args &args_;
  const Tables tables_;
};

template <int kRanksPerLane, template <int> class Near>
__device__ void split(const light_route_split_args &args) {
  extern __shared__ __align__(16) char memory[];
  Router<kRanksPerLane, Near>(args, memory).run();
}

}  // namespace light::route

extern "C" __global__ void __launch_bounds__(light::route::kThreads, 1)
    route_split_w32(const __grid_constant__ light_route_split_chunks chunks) {
  light::route::split<1, light::route::Nobody>(chunks.chunk[blockIdx.x]);
}

extern "C" __global__ void __launch_bounds__(light::route::kThreads, 1)
    route_split_w64(const __grid_constant__ light_route_split_chunks chunks) {
  light::route::split<2, light::route::Nobody>(chunks.chunk[blockIdx.x]);
}

extern "C" __global__ void __launch_bounds__(light::route::kThreads, 1)
    route_split_near_w32(const __grid_constant__ light_route_split_chunks chunks) {
  light::route::split<1, light::route::Neighbours>(chunks.chunk[blockIdx.x]);
}

extern "C" __global__ void __launch_bounds__(light::route::kThreads, 1)
    route_split_near_w64(const __grid_constant__ light_route_split_chunks chunks) {
  light::route::split<2, light::route::Neighbours>(chunks.chunk[blockIdx.x]);
}
