// Who meets nearby: of the pairs that leave their rank and the places left for them, those that are
// near each other in the topology.
#pragma once

#include "route_tables.cuh"

namespace light::route {

// Where all ranks are as near to each other: nobody is nearer.
template <int kRanksPerLane>
struct Nobody {
  using OfRanks = int[kRanksPerLane];

  __device__ explicit Nobody(const light_route_split_args &) {}
  __device__ void match(const Group &, const OfRanks &, OfRanks &, OfRanks &) const {}
  __device__ void sent_to(const Group &, int, OfRanks &sent, OfRanks &before) const {
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      sent[slot] = before[slot] = 0;
    }
  }
};

// What the levels make of one expert, for each lane as a source and as a rank: the pairs of its
// group stand in a row by source, the places that are left in one by copy, and a part of each is
// the lane's. What goes from a source to a copy is where the two overlap.
template <int kRanksPerLane>
class Neighbours {
 public:
  using OfRanks = int[kRanksPerLane];

  __device__ explicit Neighbours(const light_route_split_args &args) : args_(args) {
#pragma unroll
    for (int level = 0; level < kMostLevels; ++level) {
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        near_[level][slot] = 0;
      }
      if (level < args_.num_levels) {
        find_near(args_.nearness + level * args_.num_ranks, near_[level]);
      }
    }
  }

  // Takes what meets from both; nobody has to meet where a warp's experts have one copy.
  __device__ void match(const Group &group, const OfRanks &copies, OfRanks &leaving,
                        OfRanks &rooms) {
    has_choice_ = __any_sync(kAllLanes, group.lane == 1 && copies[0] >= 0);
    if (!has_choice_) {
      return;
    }
#pragma unroll
    for (int level = 0; level < kMostLevels; ++level) {
      if (level < args_.num_levels) {
        match_at(level, group, copies, leaving, rooms);
      }
    }
  }

  // How many of each source's pairs go to the rank, and how many of sources before it. All lanes
  // of a group ask for one rank.
  __device__ void sent_to(const Group &group, int rank, OfRanks &sent, OfRanks &before) const {
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      sent[slot] = before[slot] = 0;
    }
    if (!has_choice_) {
      return;
    }
#pragma unroll
    for (int level = 0; level < kMostLevels; ++level) {
      if (level < args_.num_levels) {
        const int begin = group.value_of(first_place_[level], rank);
        const int end = group.value_of(end_place_[level], rank);
#pragma unroll
        for (int slot = 0; slot < kRanksPerLane; ++slot) {
          const int both = min(end, end_pair_[level][slot]) - max(begin, first_pair_[level][slot]);
          sent[slot] += is_near(level, slot, rank) ? max(both, 0) : 0;
        }
      }
    }
    group.sum_before(sent, before);
  }

 private:
  // The ranks of a lane's group.
  __device__ void find_near(const int *numbers, RankSet (&near)[kRanksPerLane]) const {
    OfRanks own;
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      own[slot] = numbers[min(Group(args_.num_ranks).lane + 32 * slot, args_.num_ranks - 1)];
    }
#pragma unroll 4
    for (int rank = 0; rank < args_.num_ranks; ++rank) {
      const int number = numbers[rank];
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        near[slot] |= static_cast<RankSet>(number == own[slot]) << rank;
      }
    }
  }

  // -1 is near nobody.
  __device__ bool is_near(int level, int slot, int rank) const {
    return rank >= 0 && is_in(near_[level][slot], rank);
  }

  __device__ void match_at(int level, const Group &group, const OfRanks &copies, OfRanks &leaving,
                           OfRanks &rooms) {
    OfRanks pairs = {}, places = {};  // of the lane's group
    OfRanks &first_pair = first_pair_[level], &first_place = first_place_[level];
#pragma unroll 4
    for (int rank = 0; rank < args_.num_ranks; ++rank) {
      const int there = group.value_of(leaving, rank);
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        first_pair[slot] = rank == group.lane + 32 * slot ? pairs[slot] : first_pair[slot];
        pairs[slot] += is_near(level, slot, rank) ? there : 0;
      }
    }
#pragma unroll 1
    for (int copy = 0; copy < args_.num_copies; ++copy) {
      const int rank = group.value_of(copies, copy);
      if (!__any_sync(kAllLanes, rank >= 0)) {
        break;
      }
      const int there = group.value_of(rooms, rank);
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        first_place[slot] = rank == group.lane + 32 * slot ? places[slot] : first_place[slot];
        places[slot] += is_near(level, slot, rank) ? there : 0;
      }
    }
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const int meeting = min(pairs[slot], places[slot]);
      const int sent = clamp(meeting - first_pair[slot], 0, leaving[slot]);
      const int taken = clamp(meeting - first_place[slot], 0, rooms[slot]);
      end_pair_[level][slot] = first_pair[slot] + sent;
      end_place_[level][slot] = first_place[slot] + taken;
      leaving[slot] -= sent;
      rooms[slot] -= taken;
    }
  }

  const light_route_split_args &args_;
  bool has_choice_ = false;
  RankSet near_[kMostLevels][kRanksPerLane];
  OfRanks first_pair_[kMostLevels] = {}, end_pair_[kMostLevels] = {};
  OfRanks first_place_[kMostLevels] = {}, end_place_[kMostLevels] = {};
};

}  // namespace light::route
