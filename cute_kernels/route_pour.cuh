// The sequential part of a route, by one warp: a lane stands for a rank and keeps its load in a
// register. Most pools have two ranks or three, and those whose ranks are disjoint do not see each
// other: they form batches that have their turn together, each pool behind all earlier ones that
// share a rank with it. The others come one after the other. The result is that of one turn after
// the other in the order of all pools.
#pragma once

#include "route_tables.cuh"

namespace light::route {

// kRanksPerLane: 1, or 2 where there are more than 32 ranks.
template <int kRanksPerLane>
class Pouring {
 public:
  __device__ Pouring(const light_route_split_args &args, const Tables &tables, int num_pools)
      : args_(args), tables_(tables), num_pools_(num_pools) {
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const bool exists = rank_of(slot) < args.num_ranks;
      // The last row of seats is nobody's.
      const int nobody = most_batches(args.num_experts, args.num_ranks) * args.num_ranks;
      first_seat_[slot] = exists ? rank_of(slot) : nobody;
      seat_step_[slot] = exists ? args.num_ranks : 0;
      load_[slot] = exists ? tables.rank_load[rank_of(slot)] : 0;
      reciprocals_[slot] = 0xffffffffu / (rank_of(slot) + 1);
    }
  }

  // Pours every pool level over its ranks. Seats have to be cleared.
  __device__ void level() {
    make_batches();
    sweep([this](int pool, RankSet ranks, const int (&base)[kRanksPerLane],
                 int (&poured)[kRanksPerLane]) { pour(pool, ranks, base, poured); },
          [](int share) { return share; });
    give();
  }

  // Puts all tokens of a pool to the rank that has the fewest of them.
  __device__ void gather() {
    sweep([this](int pool, RankSet ranks, const int (&base)[kRanksPerLane],
                 int (&poured)[kRanksPerLane]) { choose(pool, ranks, base, poured); },
          [](int share) { return share > 0; });
  }

 private:
  static constexpr int kFew = 3;
  // More than three loads, and still three of these are an int.
  static constexpr int kOutOfReach = 1 << (kTokenBits + 3);
  static constexpr int kRankBits = 8, kPoolShift = 2 * kRankBits;
  static constexpr unsigned kSecond = 1u << 31;

  // Each pool joins the first batch behind those of its ranks, up to the first one that has too
  // many ranks or finds no batch.
  __device__ void make_batches() {
    const int last = num_pools_ - 1;
    int next[kRanksPerLane] = {};
    int pool = tables_.order[0], following = tables_.order[min(1, last)];
    RankSet ranks = tables_.ranks_of[pool];
    int tokens = tables_.pooled[pool];
    while (num_batched_ < num_pools_ && __popcll(ranks) <= kFew) {
      // What comes next is on its way.
      const int after = tables_.order[min(num_batched_ + 2, last)];
      const RankSet following_ranks = tables_.ranks_of[following];
      const int following_tokens = tables_.pooled[following];
      int batch = 0;
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        batch = max(batch, is_in(ranks, rank_of(slot)) ? next[slot] : 0);
      }
      batch = largest_of_lanes(batch);
      if (batch >= most_batches(args_.num_experts, args_.num_ranks)) {
        break;
      }
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        if (is_in(ranks, rank_of(slot))) {
          next[slot] = batch + 1;
          tables_.seats[seat_in(batch, slot)] = seat_of(pool, ranks, tokens, slot);
        }
      }
      num_batches_ = max(num_batches_, batch + 1);
      ++num_batched_;
      pool = following;
      following = after;
      ranks = following_ranks;
      tokens = following_tokens;
    }
    __syncwarp();
  }

  __device__ int seat_in(int batch, int slot) const {
    return first_seat_[slot] + batch * seat_step_[slot];
  }

  // The level is the least to which the water would rise in any of the sets of vessels, so what a
  // rank gets is the least that it would get in a set with itself. Of n vessels that stand together
  // the i-th gets (sum + n - 1 - i) / n, rounded down: together that is the sum.
  __device__ static Seat seat_of(int pool, RankSet ranks, int tokens, int slot) {
    const RankSet own = RankSet{1} << rank_of(slot), others = ranks & ~own;
    const int place = __popcll(ranks & (own - 1)), low = lowest(others);
    const RankSet high_one = without_lowest(others);
    const int high = high_one == 0 ? low : lowest(high_one);
    // Of three, the second one is before the high one, but not before the low one.
    const int next = place == 1 ? high : low, other = place == 1 ? low : high;
    return {tokens, tokens + (place < 2), high_one == 0 ? kOutOfReach : tokens + 2 - place,
            next | other << kRankBits | pool << kPoolShift | (place == 1 ? kSecond : 0)};
  }

  // Sweeps until nothing changes, at most `args.sweeps`. The first one gives the tokens their
  // places.
  template <class Turn, class Weight>
  __device__ void sweep(Turn turn, Weight weight_of) {
    bool changed = true;
    for (int i = 0; i < max(args_.sweeps, 1) && changed; ++i) {
      changed = false;
#pragma unroll 1
      for (int batch = 0; batch < num_batches_; batch += kBatchesAtOnce) {
        changed |= take_batches(batch);
      }
      changed |= take_pools(turn, weight_of);
      changed = __any_sync(kAllLanes, changed);
    }
  }

  __device__ bool take_batches(int first) {
    Seat seats[kBatchesAtOnce][kRanksPerLane];
    int given[kBatchesAtOnce][kRanksPerLane];
#pragma unroll
    for (int i = 0; i < kBatchesAtOnce; ++i) {
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        seats[i][slot] = tables_.seats[seat_in(first + i, slot)];
        given[i][slot] = tables_.given[seat_in(first + i, slot)];
      }
    }
    bool changed = false;
#pragma unroll
    for (int i = 0; i < kBatchesAtOnce; ++i) {
      int base[kRanksPerLane];
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        base[slot] = load_[slot] - given[i][slot];
      }
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        const Seat &seat = seats[i][slot];
        const int next = value_of(base, seat.others);
        const int other = value_of(base, seat.others >> kRankBits);
        const int lower = min(next, other - static_cast<int>(seat.others / kSecond));
        const int of_two = (seat.of_two - base[slot] + lower) >> 1;
        const int of_three = third_of(seat.of_three - 2 * base[slot] + next + other);
        const int poured = max(min(min(of_two, of_three), seat.tokens), 0);
        load_[slot] = base[slot] + poured;
        tables_.given[seat_in(first + i, slot)] = poured;
        changed |= poured != given[i][slot];
      }
    }
    return changed;
  }

  // Rounded down, of what is below 2^31.
  __device__ static int third_of(int value) { return __mulhi(value, 0x55555556); }

  // Those that are in no batch.
  template <class Turn, class Weight>
  __device__ bool take_pools(Turn turn, Weight weight_of) {
    bool changed = false;
#pragma unroll 1
    for (int i = num_batched_; i < num_pools_; ++i) {
      const int pool = tables_.order[i];
      const RankSet ranks = tables_.ranks_of[pool];
      int given[kRanksPerLane], base[kRanksPerLane], poured[kRanksPerLane];
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        given[slot] = is_in(ranks, rank_of(slot)) ? tables_.share(pool, rank_of(slot)) : 0;
        base[slot] = load_[slot] - weight_of(given[slot]);
      }
      turn(pool, ranks, base, poured);
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        load_[slot] = base[slot] + weight_of(poured[slot]);
        if (poured[slot] != given[slot]) {
          tables_.share(pool, rank_of(slot)) = poured[slot];
          changed = true;
        }
      }
    }
    return changed;
  }

  // Any number of vessels: as if the water reached all of them, then without those that are higher
  // than it would stand, until there are none. The first ones have what is left over.
  __device__ void pour(int pool, RankSet ranks, const int (&base)[kRanksPerLane],
                       int (&poured)[kRanksPerLane]) const {
    const int tokens = tables_.pooled[pool];
    RankSet reached = 0, left = ranks;
    int level = 0, rest = 0;
    while (left != reached) {
      reached = left;
      int ground = 0;
      bool is_below[kRanksPerLane];
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        ground += is_in(reached, rank_of(slot)) ? base[slot] : 0;
      }
      const int filled = tokens + sum_of_lanes(ground), count = __popcll(reached);
      level = divide(filled, count);
      rest = filled - level * count;
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        is_below[slot] = base[slot] <= level;
      }
      left = reached & ranks_where(is_below);
    }
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const RankSet own = RankSet{1} << rank_of(slot);
      const bool has_one_more = __popcll(reached & (own - 1)) < rest;
      poured[slot] = reached & own ? level + has_one_more - base[slot] : 0;
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
  __device__ void choose(int pool, RankSet ranks, const int (&base)[kRanksPerLane],
                         int (&poured)[kRanksPerLane]) const {
    int here[kRanksPerLane], spare = -kMaxExperts, most = -1;
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const bool has_copy = is_in(ranks, rank_of(slot));
      here[slot] = has_copy ? count_of(args_, rank_of(slot), pool) : -1;
      spare = max(spare, has_copy ? -base[slot] : spare);
    }
    spare = largest_of_lanes(spare);
    bool is_best[kRanksPerLane];
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      is_best[slot] = here[slot] >= 0 && base[slot] == -spare;
      most = max(most, is_best[slot] ? here[slot] : -1);
    }
    most = largest_of_lanes(most);
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      is_best[slot] = is_best[slot] && here[slot] == most;
    }
    const int best = lowest(ranks_where(is_best));
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      poured[slot] = rank_of(slot) == best ? tables_.pooled[pool] : 0;
    }
  }

  // What batches gave becomes the pools' shares.
  __device__ void give() const {
    for (int batch = 0; batch < num_batches_; ++batch) {
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        const Seat seat = tables_.seats[seat_in(batch, slot)];
        if (seat.tokens > 0) {
          const int pool = (seat.others & ~kSecond) >> kPoolShift;
          tables_.share(pool, rank_of(slot)) = tables_.given[seat_in(batch, slot)];
        }
      }
    }
  }

  const light_route_split_args &args_;
  const Tables &tables_;
  const int num_pools_;
  int num_batched_ = 0, num_batches_ = 0;  // pools that are in a batch; batches
  int first_seat_[kRanksPerLane], seat_step_[kRanksPerLane];  // of the lane's columns
  int load_[kRanksPerLane], reciprocals_[kRanksPerLane];
};

}  // namespace light::route
