// Pools: which experts are poured as one, in which order, and at last which of a pool's tokens are
// whose.
#pragma once

#include "route_tables.cuh"

namespace light::route {

class Pools {
 public:
  __device__ Pools(const light_route_split_args &args, const Tables &tables)
      : args_(args), tables_(tables) {}

  // For whole warps; after it threads have to wait for each other.
  __device__ void list(int expert, bool has_choice) const {
    const int lane = threadIdx.x % 32;
    const unsigned votes = __ballot_sync(kAllLanes, has_choice);
    int begin = 0;
    if (lane == 0 && votes != 0) {
      begin = atomicAdd(tables_.num_listed, __popc(votes));
    }
    begin = __shfl_sync(kAllLanes, begin, 0);
    if (has_choice) {
      tables_.listed[begin + __popc(votes & ((1u << lane) - 1))] = {
          tables_.ranks_of[expert], tables_.totals[expert], expert};
    }
  }

  // Puts the pools of what is listed in order; returns how many there are. For all threads.
  __device__ int make() const {
    const Team team(*tables_.num_listed);
    join(team);
    __syncthreads();
    return sort(team);
  }

  // Tokens of the pool's experts that each rank has itself.
  template <int kRanksPerLane>
  __device__ void count_own(int pool, int (&own)[kRanksPerLane]) const {
    const RankSet ranks = tables_.ranks_of[pool];
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      own[slot] = 0;
    }
    for (int expert = pool; expert != kNoExpert; expert = tables_.next[expert]) {
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        own[slot] += own_of(ranks, slot, expert);
      }
    }
  }

  // The shares of a pool's experts, of the shares of the pool: a rank's own tokens stay, as far as
  // its share reaches; the others fill what is left, in the order of experts and ranks.
  template <int kRanksPerLane>
  __device__ void share_out(int pool, const int (&own)[kRanksPerLane]) const {
    if (tables_.next[pool] == kNoExpert) {
      return;
    }
    const RankSet ranks = tables_.ranks_of[pool];
    int share[kRanksPerLane], room[kRanksPerLane], room_before[kRanksPerLane], rooms;
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      share[slot] = is_in(ranks, rank_of(slot)) ? tables_.share(pool, rank_of(slot)) : 0;
      room[slot] = max(share[slot] - own[slot], 0);  // for what does not stay
    }
    sum_before(room, room_before, rooms);
    int own_before[kRanksPerLane] = {}, others_before = 0;
    for (int expert = pool; expert != kNoExpert; expert = tables_.next[expert]) {
      int stays[kRanksPerLane], staying = 0;
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        const int own_here = own_of(ranks, slot, expert);
        stays[slot] = clamp(share[slot] - own_before[slot], 0, own_here);
        own_before[slot] += own_here;
        staying += stays[slot];
      }
      const int others_end = others_before + tables_.totals[expert] - sum_of_lanes(staying);
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        const int end = min(room_before[slot] + room[slot], others_end);
        const int moved = max(end - max(room_before[slot], others_before), 0);
        if (is_in(ranks, rank_of(slot))) {
          tables_.share(expert, rank_of(slot)) = stays[slot] + moved;
        }
      }
      others_before = others_end;
    }
  }

 private:
  // Neighbouring lanes that share the work of one that is listed: as many as there are.
  struct Team {
    int num_listed, num_lanes, index, lane;

    __device__ explicit Team(int num_listed) : num_listed(num_listed) {
      const int log_lanes = min(5, __clz(num_listed - 1) - __clz(kThreads - 1));
      num_lanes = 1 << log_lanes;
      index = threadIdx.x >> log_lanes;
      lane = threadIdx.x & (num_lanes - 1);
    }
    __device__ bool has_one() const { return index < num_listed; }
    __device__ bool writes() const { return has_one() && lane == 0; }
  };

  // Finds the others of the same pool.
  __device__ void join(const Team &team) const {
    const bool stays_together = args_.route == kFewest;
    const Listed mine = team.has_one() ? tables_.listed[team.index] : Listed{0, 0, kNoExpert};
    int tokens = 0, first = kNoExpert, next = kNoExpert;
#pragma unroll 4
    for (int i = team.lane; i < team.num_listed; i += team.num_lanes) {
      const Listed other = tables_.listed[i];
      const bool is_alike = stays_together ? i == team.index : other.ranks == mine.ranks;
      tokens += is_alike ? other.tokens : 0;
      first = min(first, is_alike ? other.expert : kNoExpert);
      next = min(next, is_alike && other.expert > mine.expert ? other.expert : kNoExpert);
    }
    for (int offset = 1; offset < team.num_lanes; offset *= 2) {
      tokens += __shfl_xor_sync(kAllLanes, tokens, offset);
      first = min(first, __shfl_xor_sync(kAllLanes, first, offset));
      next = min(next, __shfl_xor_sync(kAllLanes, next, offset));
    }
    if (team.writes()) {
      const bool is_pool = first == mine.expert && tokens > 0;
      tables_.next[mine.expert] = next;
      tables_.pooled[mine.expert] = tokens;
      tables_.keys[team.index] = is_pool ? key_of(mine.ranks, tokens, mine.expert) : 0;
    }
  }

  // The fewest ranks first, then the most tokens, then the lowest expert.
  __device__ static unsigned long long key_of(RankSet ranks, int tokens, int expert) {
    const unsigned long long rarity = kMaxRanks - __popcll(ranks) + 1;
    return rarity << (kTokenBits + kExpertBits) |
           static_cast<unsigned long long>(tokens) << kExpertBits | (kMaxExperts - 1 - expert);
  }

  // A pool's place is the number of those before it.
  __device__ int sort(const Team &team) const {
    const unsigned long long key = team.has_one() ? tables_.keys[team.index] : 0;
    int place = 0;
#pragma unroll 4
    for (int i = team.lane; i < team.num_listed; i += team.num_lanes) {
      place += tables_.keys[i] > key;
    }
    for (int offset = 1; offset < team.num_lanes; offset *= 2) {
      place += __shfl_xor_sync(kAllLanes, place, offset);
    }
    const bool is_pool = team.writes() && key != 0;
    if (is_pool) {
      tables_.order[place] = tables_.listed[team.index].expert;
    }
    return __syncthreads_count(is_pool);
  }

  // Tokens of an expert that the lane's rank has itself.
  __device__ int own_of(RankSet ranks, int slot, int expert) const {
    return is_in(ranks, rank_of(slot)) ? count_of(args_, rank_of(slot), expert) : 0;
  }

  const light_route_split_args &args_;
  const Tables &tables_;
};

}  // namespace light::route
