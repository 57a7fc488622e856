// The sequential part of a route, by one warp: a lane stands for a rank and keeps its load in a
// register. Pools whose ranks are disjoint do not see each other, so those of a batch have their
// turn together; every pool comes after all earlier ones that share a rank with it, and the result
// is that of one turn after the other.
#pragma once

#include "route_tables.cuh"

namespace light::route {

template <int kRanksPerLane>
struct RanksOfLanes {
  using Type = unsigned;
};
template <>
struct RanksOfLanes<2> {
  using Type = RankSet;
};

// kRanksPerLane: 1, or 2 where there are more than 32 ranks. kFewest: a pool's tokens all go to the
// rank that has the fewest experts; else they are poured level over its ranks.
template <int kRanksPerLane, bool kFewest>
class Pouring {
 public:
  __device__ Pouring(const light_route_split_args &args, const Tables &tables)
      : args_(args), tables_(tables) {
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const bool exists = rank_of(slot) < args.num_ranks;
      shares_[slot] = tables.starts + (exists ? rank_of(slot) : 0);
      // The last row of seats is nobody's.
      const int nobody = (args.num_experts + kSeatRowsBehind - 1) * args.num_ranks;
      seats_[slot] = tables.seats + (exists ? rank_of(slot) : nobody);
      seat_step_[slot] = exists ? args.num_ranks : 0;
      reciprocals_[slot] = 0xffffffffu / (rank_of(slot) + 1);
    }
  }

  // Puts each pool into the first batch behind those of its ranks.
  __device__ void make_batches(int num_pools) {
    const int last = num_pools - 1;
    int next[kRanksPerLane] = {};
    int pool = tables_.order[0], following = tables_.order[min(1, last)];
    Ranks ranks = tables_.ranks_of[pool];
    for (int i = 0; i < num_pools; ++i) {
      const int after = tables_.order[min(i + 2, last)];  // what comes next is on its way
      const Ranks following_ranks = tables_.ranks_of[following];
      int batch = 0;
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        batch = max(batch, ranks >> rank_of(slot) & 1 ? next[slot] : 0);
      }
      batch = largest_of_lanes(batch);
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        if (ranks >> rank_of(slot) & 1) {
          next[slot] = batch + 1;
          const int place = size_of(ranks & ((Ranks{1} << rank_of(slot)) - 1));
          seats_[slot][batch * seat_step_[slot]] = pool << kPlaceBits | min(place, kFew);
        }
      }
      if (threadIdx.x == 0) {
        unsigned char &most_copies = tables_.most_copies[batch];
        most_copies = max(static_cast<int>(most_copies), size_of(ranks));
      }
      num_batches_ = max(num_batches_, batch + 1);
      pool = following;
      following = after;
      ranks = following_ranks;
    }
    __syncwarp();
  }

  // Sweeps until nothing changes, at most `args.sweeps`. The first one gives the tokens their
  // places.
  __device__ void sweep() {
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      load_[slot] = rank_of(slot) < args_.num_ranks ? tables_.rank_load[rank_of(slot)] : 0;
    }
    bool changed = true;
    for (int i = 0; i < max(args_.sweeps, 1) && changed; ++i) {
      changed = sweep_once();
    }
  }

 private:
  using Ranks = typename RanksOfLanes<kRanksPerLane>::Type;
  static constexpr int kFew = 3;  // ranks that are poured over without a vote

  // What a rank needs to know of the pool whose turn it is there.
  struct Turn {
    int number, place;  // the pool's, and the rank's in it
    int *share, given;
    int here;  // kFewest: tokens of the rank's own
    Pool pool;
    unsigned next, other;  // ranks, in the lowest bits

    __device__ void find_others() {
      next = pool.next >> 8 * place;
      other = pool.other >> 8 * place;
    }
  };

  __device__ static int rank_of(int slot) { return threadIdx.x % 32 + 32 * slot; }
  __device__ static int size_of(Ranks ranks) { return __popcll(ranks); }

  __device__ int seat_in(int batch, int slot) const {
    return seats_[slot][batch * seat_step_[slot]];
  }

  __device__ Turn turn_of(int seat, int slot) const {
    Turn turn;
    turn.number = seat >> kPlaceBits;
    turn.place = seat & ((1 << kPlaceBits) - 1);
    turn.share = shares_[slot] + turn.number * tables_.stride;
    turn.given = *turn.share;
    turn.pool = tables_.pools[turn.number];
    if (kFewest) {
      const bool exists = turn.number < args_.num_experts;
      turn.here = exists ? count_of(args_, rank_of(slot), turn.number) : 0;
    }
    return turn;
  }

  // What the next batches need is on its way while this one is computed.
  __device__ bool sweep_once() {
    Turn turns[kRanksPerLane];
    int following[kRanksPerLane];
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      turns[slot] = turn_of(seat_in(0, slot), slot);
      turns[slot].find_others();
      following[slot] = seat_in(1, slot);
    }
    int most_copies = tables_.most_copies[0];
    bool changed = false;
#pragma unroll 1
    for (int batch = 0; batch < num_batches_; ++batch) {
      int base[kRanksPerLane], next[kRanksPerLane], other[kRanksPerLane], poured[kRanksPerLane];
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        base[slot] = load_[slot] - weight_of(turns[slot].given);
      }
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane && !kFewest; ++slot) {
        next[slot] = value_of(base, turns[slot].next);
        other[slot] = value_of(base, turns[slot].other);
      }
      const int copies = most_copies;
      most_copies = tables_.most_copies[batch + 1];
      Turn following_turns[kRanksPerLane];
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        following_turns[slot] = turn_of(following[slot], slot);
        following[slot] = seat_in(batch + 2, slot);
      }
      if constexpr (kFewest) {
        choose(turns, copies, base, poured);
      } else if (copies <= kFew) {
        pour_over_few(turns, base, next, other, poured);
      } else {
        pour_over_many(turns, copies, base, poured);
      }
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        load_[slot] = base[slot] + weight_of(poured[slot]);
        if (poured[slot] != turns[slot].given) {
          changed = true;
          *turns[slot].share = poured[slot];
        }
        turns[slot] = following_turns[slot];
        turns[slot].find_others();
      }
    }
    return __any_sync(kAllLanes, changed);
  }

  // What a rank's share of a pool adds to its load.
  __device__ static int weight_of(int share) { return kFewest ? share > 0 : share; }

  // The value of another rank. Lanes may ask for any; what they get of none means nothing.
  __device__ static int value_of(const int (&values)[kRanksPerLane], unsigned rank) {
    int value = __shfl_sync(kAllLanes, values[0], rank);
    if constexpr (kRanksPerLane == 2) {
      const int upper = __shfl_sync(kAllLanes, values[1], rank);
      value = rank & 32 ? upper : value;
    }
    return value;
  }

  // The level is the least to which the water would rise in any of the sets of vessels, so what
  // this one gets is the least that it would get in a set with itself. Of n vessels that stand
  // together, the i-th gets (sum + n - 1 - i) / n, rounded down: together that is the sum.
  __device__ static void pour_over_few(const Turn (&turns)[kRanksPerLane],
                                       const int (&base)[kRanksPerLane],
                                       const int (&next)[kRanksPerLane],
                                       const int (&other)[kRanksPerLane],
                                       int (&poured)[kRanksPerLane]) {
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const Pool &pool = turns[slot].pool;
      const int place = turns[slot].place, ground = base[slot];
      // The second rank is before the third, its next, but not before the first.
      const int lower = min(next[slot], other[slot] - (place == 1));
      const int of_two = (pool.tokens + (place < 2) - ground + lower) >> 1;
      const int of_three = third_of(pool.of_three - place - 2 * ground + next[slot] + other[slot]);
      poured[slot] = max(min(min(of_two, of_three), pool.tokens), 0);
    }
  }

  // Rounded down, of what is below 2^31.
  __device__ static int third_of(int value) { return __mulhi(value, 0x55555556); }

  // Calls visit(rank, whether there is one) for the lowest ranks first, so many times.
  template <class Visit>
  __device__ static void for_each_rank(Ranks ranks, int most, Visit visit) {
#pragma unroll 4
    for (int i = 0; i < most; ++i) {
      visit(lowest(ranks), ranks != 0);
      ranks &= ranks - 1;
    }
  }

  // Any number of vessels: water reaches those to whose ground the lower ones take no more tokens
  // than there are; these stand level, but for the rest.
  __device__ void pour_over_many(const Turn (&turns)[kRanksPerLane], int most_copies,
                                 const int (&base)[kRanksPerLane],
                                 int (&poured)[kRanksPerLane]) const {
    Ranks ranks[kRanksPerLane], all_reached = 0;
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      ranks[slot] = tables_.ranks_of[turns[slot].number];
      unsigned missing = 0;  // to fill the lower ones up to this ground
      for_each_rank(ranks[slot], most_copies, [&](int rank, bool exists) {
        const int higher = base[slot] - value_of(base, rank);
        missing += exists ? max(higher, 0) : 0;
      });
      const bool is_reached = missing <= static_cast<unsigned>(turns[slot].pool.tokens);
      const unsigned votes = __ballot_sync(kAllLanes, is_reached);
      all_reached |= static_cast<Ranks>(static_cast<RankSet>(votes) << 32 * slot);
    }
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const Ranks reached = ranks[slot] & all_reached;
      int filled = turns[slot].pool.tokens;
      for_each_rank(reached, most_copies, [&](int rank, bool exists) {
        const int ground = value_of(base, rank);
        filled += exists ? ground : 0;
      });
      const int count = max(size_of(reached), 1), level = divide(filled, count);
      const Ranks before = reached & ((Ranks{1} << rank_of(slot)) - 1);
      const bool has_one_more = size_of(before) < filled - level * count;
      const bool is_reached = reached >> rank_of(slot) & 1;
      poured[slot] = is_reached ? level + has_one_more - base[slot] : 0;
    }
  }

  // By what each lane keeps: 2^32 divided by every number of ranks, rounded down. The product is at
  // most one too small.
  __device__ int divide(int dividend, int divisor) const {
    const unsigned reciprocal = value_of(reciprocals_, divisor - 1);
    const int quotient = __umulhi(dividend, reciprocal);
    return quotient + (dividend - quotient * divisor >= divisor);
  }

  // All tokens to the rank with the fewest experts; then to that with most tokens of its own, then
  // to the lowest.
  __device__ void choose(const Turn (&turns)[kRanksPerLane], int most_copies,
                         const int (&base)[kRanksPerLane], int (&poured)[kRanksPerLane]) const {
    int here[kRanksPerLane];
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      here[slot] = turns[slot].here;
    }
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      bool is_best = true;
      for_each_rank(tables_.ranks_of[turns[slot].number], most_copies, [&](int rank, bool exists) {
        const int experts = value_of(base, rank), tokens = value_of(here, rank);
        const bool has_more = tokens > here[slot] - (rank < rank_of(slot));
        const bool is_better = experts < base[slot] || (experts == base[slot] && has_more);
        is_best &= !exists || rank == rank_of(slot) || !is_better;
      });
      poured[slot] = is_best ? turns[slot].pool.tokens : 0;
    }
  }

  const light_route_split_args &args_;
  const Tables &tables_;
  int num_batches_ = 0;
  unsigned short *seats_[kRanksPerLane];  // the lane's columns
  int *shares_[kRanksPerLane], seat_step_[kRanksPerLane];
  int load_[kRanksPerLane], reciprocals_[kRanksPerLane];
};

}  // namespace light::route
