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

  // The shares of the pools' experts, of the shares of the pools: a rank's own tokens stay, as far
  // as its share reaches; the others fill what is left, in the order of experts and ranks. A warp
  // takes a pool, a lane a rank.
  template <int kRanksPerLane>
  __device__ void share_out(int num_pools) const {
    for (int i = warp_index(); i < num_pools; i += kThreads / 32) {
      const int pool = tables_.order[i];
      if (tables_.next[pool] != kNoExpert) {
        share_out_pool<kRanksPerLane>(pool);
      }
    }
  }

 private:
  // Neighbouring lanes that share the work of one that is listed: as many as there are.
  struct Team {
    int num_listed, log_lanes = 0, index, lane;

    __device__ explicit Team(int num_listed) : num_listed(num_listed) {
      while (log_lanes < 5 && num_listed << (log_lanes + 1) <= kThreads) {
        ++log_lanes;
      }
      index = threadIdx.x >> log_lanes;
      lane = threadIdx.x & ((1 << log_lanes) - 1);
    }
    __device__ int num_lanes() const { return 1 << log_lanes; }
    __device__ bool has_one() const { return index < num_listed; }
    __device__ bool writes() const { return has_one() && lane == 0; }
  };

  // Finds the others of the same pool.
  __device__ void join(const Team &team) const {
    const bool stays_together = args_.route == kFewest;
    const Listed mine = team.has_one() ? tables_.listed[team.index] : Listed{0, 0, kNoExpert};
    int tokens = 0, first = kNoExpert, next = kNoExpert;
#pragma unroll 4
    for (int i = team.lane; i < team.num_listed; i += team.num_lanes()) {
      const Listed other = tables_.listed[i];
      const bool is_alike = stays_together ? i == team.index : other.ranks == mine.ranks;
      tokens += is_alike ? other.tokens : 0;
      first = min(first, is_alike ? other.expert : kNoExpert);
      next = min(next, is_alike && other.expert > mine.expert ? other.expert : kNoExpert);
    }
    for (int offset = 1; offset < team.num_lanes(); offset *= 2) {
      tokens += __shfl_xor_sync(kAllLanes, tokens, offset);
      first = min(first, __shfl_xor_sync(kAllLanes, first, offset));
      next = min(next, __shfl_xor_sync(kAllLanes, next, offset));
    }
    if (team.writes()) {
      const bool is_pool = first == mine.expert && tokens > 0;
      tables_.next[mine.expert] = next;
      tables_.pools[mine.expert] = pool_of(mine.ranks, tokens);
      tables_.keys[team.index] = is_pool ? key_of(mine.ranks, tokens, mine.expert) : 0;
    }
  }

  __device__ static Pool pool_of(RankSet ranks, int tokens) {
    const RankSet after_first = ranks & (ranks - 1), after_second = after_first & (after_first - 1);
    const unsigned first = lowest(ranks), second = lowest(after_first);
    if (after_second == 0) {
      const unsigned others = second | first << 8;
      return {tokens, others, others, kOutOfReach};
    }
    const unsigned third = lowest(after_second);
    return {tokens, second | third << 8 | first << 16, third | first << 8 | second << 16,
            tokens + 2};
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
    for (int i = team.lane; i < team.num_listed; i += team.num_lanes()) {
      place += tables_.keys[i] > key;
    }
    for (int offset = 1; offset < team.num_lanes(); offset *= 2) {
      place += __shfl_xor_sync(kAllLanes, place, offset);
    }
    const bool is_pool = team.writes() && key != 0;
    if (is_pool) {
      tables_.order[place] = tables_.listed[team.index].expert;
    }
    return __syncthreads_count(is_pool);
  }

  __device__ static int rank_of(int slot) { return threadIdx.x % 32 + 32 * slot; }

  template <int kRanksPerLane>
  __device__ void share_out_pool(int pool) const {
    const RankSet ranks = tables_.ranks_of[pool];
    int share[kRanksPerLane], room[kRanksPerLane], room_end[kRanksPerLane];
    count_own<kRanksPerLane>(pool, room);
    int rooms = 0;
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const bool is_mine = ranks >> rank_of(slot) & 1;
      share[slot] = is_mine ? tables_.share(pool, rank_of(slot)) : 0;
      room[slot] = max(share[slot] - room[slot], 0);  // for what does not stay
      room_end[slot] = rooms + inclusive_scan(room[slot]);
      rooms = __shfl_sync(kAllLanes, room_end[slot], 31);
    }
    int own_before[kRanksPerLane] = {}, others_before = 0;
    for (int expert = pool; expert != kNoExpert; expert = tables_.next[expert]) {
      int stays[kRanksPerLane], staying = 0;
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        const int own = own_of(ranks, slot, expert);
        stays[slot] = clamp(share[slot] - own_before[slot], 0, own);
        own_before[slot] += own;
        staying += stays[slot];
      }
      const int others_end = others_before + tables_.totals[expert] - sum_of_lanes(staying);
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        const int begin = max(room_end[slot] - room[slot], others_before);
        const int moved = max(min(room_end[slot], others_end) - begin, 0);
        if (ranks >> rank_of(slot) & 1) {
          tables_.share(expert, rank_of(slot)) = stays[slot] + moved;
        }
      }
      others_before = others_end;
    }
  }

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

  // Tokens of an expert that the lane's rank has itself.
  __device__ int own_of(RankSet ranks, int slot, int expert) const {
    return ranks >> rank_of(slot) & 1 ? count_of(args_, rank_of(slot), expert) : 0;
  }

  const light_route_split_args &args_;
  const Tables &tables_;
};

}  // namespace light::route
