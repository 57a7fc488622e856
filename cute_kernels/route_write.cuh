// The last phase of a route: which pairs of each source go to which copy, and this rank's groups.
#pragma once

#include "route_near.cuh"

namespace light::route {

// What is known by now: tables.starts, and through it the share of each expert on each rank. Some
// warps write segments, the others groups.
template <int kRanksPerLane, template <int> class Near>
class Writer {
 public:
  __device__ Writer(const light_route_split_args &args, const Tables &tables)
      : args_(args), tables_(tables) {}

  __device__ void run() const {
    if (warp_index() < kWarps - kGroupWarps) {
      write_segments();
    } else {
      add_up_tiles();
      write_groups();
    }
  }

 private:
  static constexpr int kGroupWarps = 4;
  using OfRanks = int[kRanksPerLane];

  __device__ int share_of(int expert, int rank) const {
    return tables_.share(expert + 1, rank) - tables_.share(expert, rank);
  }

  // A group of lanes takes an expert, a lane is a source and a rank.
  __device__ void write_segments() const {
    const Group group(args_.num_ranks);
    Near<kRanksPerLane> near(args_);
    const int step = group.num_groups / kWarps * (kWarps - kGroupWarps);
    for (int first = 0; first < args_.num_experts; first += step) {
      const int expert = first + group.index;
      write_segments_of(min(expert, args_.num_experts - 1), expert < args_.num_experts, group,
                        near);
    }
  }

  // The pairs that do not stay stand in a row by source; so do the places that are left, by copy;
  // what goes from a source to a copy is where the two overlap. Pairs that stay where they are:
  // those of a rank of which its own copy has room, and those that find a place near it.
  __device__ void write_segments_of(int expert, bool exists, const Group &group,
                                    Near<kRanksPerLane> &near) const {
    int copies[kRanksPerLane], stays[kRanksPerLane], leaving[kRanksPerLane];
    int rooms[kRanksPerLane], starts[kRanksPerLane], leaving_before[kRanksPerLane];
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const int source = group.lane + 32 * slot, own = min(source, args_.num_ranks - 1);
      copies[slot] = source < args_.num_copies ? copy_rank(args_, expert, source) : -1;
      starts[slot] = tables_.share(expert, own);
      const int count = source == own ? count_of(args_, own, expert) : 0;
      stays[slot] = min(count, share_of(expert, own));
      leaving[slot] = count - stays[slot];
      rooms[slot] = share_of(expert, own) - stays[slot];
    }
    near.match(group, copies, leaving, rooms);
    group.sum_before(leaving, leaving_before);
    int room_before = 0, to_near[kRanksPerLane] = {};
    bool has_copy[kRanksPerLane] = {};  // so far
#pragma unroll 1
    for (int copy = 0; copy < args_.num_copies; ++copy) {
      const int rank = group.value_of(copies, copy);
      if (!__any_sync(kAllLanes, rank >= 0)) {
        break;
      }
      const int room = group.value_of(rooms, rank), start = group.value_of(starts, rank);
      const int staying = group.value_of(stays, rank);
      int sent[kRanksPerLane], came_from_near[kRanksPerLane];
      near.sent_to(group, rank, sent, came_from_near);
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        const int source = group.lane + 32 * slot;
        has_copy[slot] |= source == rank;
        to_near[slot] += sent[slot];
        const int to_here = clamp(room_before + room - leaving_before[slot], 0, leaving[slot]);
        const int came = clamp(leaving_before[slot] - room_before, 0, room);
        if (exists && rank >= 0 && source < args_.num_ranks) {
          const int row = source * args_.num_experts + expert;
          reinterpret_cast<int2 *>(args_.segments)[row * args_.num_copies + copy] = {
              (has_copy[slot] ? stays[slot] : 0) + to_near[slot] + to_here,
              start + came + came_from_near[slot] + (rank < source ? staying : 0)};
        }
      }
      room_before += rank >= 0 ? room : 0;
    }
  }

  // Each of these warps for itself.
  __device__ void add_up_tiles() const {
    int tiles = 0;
    const int lane = threadIdx.x % 32;
    for (int first = lane; first - lane < args_.num_experts; first += 32 * kAtOnce) {
      int own[kAtOnce], ends[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int expert = first + 32 * i;
        const unsigned share = expert < args_.num_experts ? share_of(expert, args_.rank) : 0;
        own[i] = (share + args_.tokens_per_tile - 1) / args_.tokens_per_tile;
        ends[i] = inclusive_scan(own[i]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + 32 * i < args_.num_experts) {
          tables_.tile_offsets[first + 32 * i] = tiles + ends[i] - own[i];
        }
        tiles += __shfl_sync(kAllLanes, ends[i], 31);
      }
    }
    tables_.tile_offsets[args_.num_experts] = tiles;
    __syncwarp();
  }

  __device__ void write_groups() const {
    constexpr int kStep = 32 * kGroupWarps;
    const int thread = threadIdx.x - (kThreads - kStep);
    for (int expert = thread; expert <= args_.num_experts; expert += kStep) {
      args_.group_offsets[expert] = tables_.share(expert, args_.rank);
      args_.tile_offsets[expert] = tables_.tile_offsets[expert];
    }
    const int num_tiles = min(tables_.tile_offsets[args_.num_experts], args_.most_tiles);
    for (int tile = thread; tile < num_tiles; tile += kStep) {
      args_.tile_groups[tile] = expert_of(tile);
    }
  }

  // The last expert whose tiles begin at this one or before.
  __device__ int expert_of(int tile) const {
    int low = 0;
#pragma unroll
    for (int step = kMaxExperts / 2; step > 0; step /= 2) {
      const int middle = low + step;
      if (middle < args_.num_experts && tables_.tile_offsets[middle] <= tile) {
        low = middle;
      }
    }
    return low;
  }

  const light_route_split_args &args_;
  const Tables &tables_;
};

}  // namespace light::route
