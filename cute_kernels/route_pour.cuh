// The sequential part of a route, by one warp: a lane stands for a rank and keeps its load in a
// register. Experts whose ranks are disjoint do not see each other, so those of a batch have their
// turn together; every expert comes after all earlier ones that share a rank with it, and the
// result is that of one turn after the other.
#pragma once

#include "route_tables.cuh"

namespace light::route {

// kRanksPerLane: 1, or 2 where there are more than 32 ranks. kFewest: an expert's tokens all go to
// the copy whose rank has the fewest experts; else they are poured level over its copies.
template <int kRanksPerLane, bool kFewest>
class Pouring {
 public:
  __device__ Pouring(const light_route_split_args &args, const Tables &tables)
      : args_(args), tables_(tables) {
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const bool exists = rank_of(slot) < args.num_ranks;
      shares_[slot] = tables.starts + (exists ? rank_of(slot) : 0);
      // The last row of seats is no expert's.
      const int nobody = (args.num_experts + kSeatRowsBehind - 1) * args.num_ranks;
      seats_[slot] = static_cast<SeatExpert<kRanksPerLane> *>(tables.seats) +
                     (exists ? rank_of(slot) : nobody);
      seat_step_[slot] = exists ? args.num_ranks : 0;
      reciprocals_[slot] = 0xffffffffu / (rank_of(slot) + 1);
    }
  }

  // Puts each expert of `order` into the first batch behind those of its ranks.
  __device__ void make_batches(int num_replicated) {
    if (num_replicated == 0) {
      return;
    }
    const int last = num_replicated - 1;
    int next[kRanksPerLane] = {};
    int expert = tables_.order[0], following = tables_.order[min(1, last)];
    unsigned long long ranks = tables_.ranks_of[expert];
    for (int i = 0; i < num_replicated; ++i) {
      const int after = tables_.order[min(i + 2, last)];  // what comes next is on its way
      const unsigned long long following_ranks = tables_.ranks_of[following];
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
          seats_[slot][batch * seat_step_[slot]] = expert;
        }
      }
      if (threadIdx.x == 0) {
        unsigned char &most_copies = tables_.most_copies[batch];
        most_copies = max(static_cast<int>(most_copies), __popcll(ranks));
      }
      num_batches_ = max(num_batches_, batch + 1);
      expert = following;
      following = after;
      ranks = following_ranks;
    }
    __syncwarp();
  }

  // Sweeps until nothing changes, at most `args.sweeps`, from the loads that the ranks have.
  // Where an expert's tokens stay together, the first sweep gives them their place.
  __device__ void sweep() {
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      load_[slot] = rank_of(slot) < args_.num_ranks ? tables_.rank_load[rank_of(slot)] : 0;
    }
    bool changed = num_batches_ > 0;
    const int most = kFewest ? max(args_.sweeps, 1) : args_.sweeps;
    for (int i = 0; i < most && changed; ++i) {
      changed = sweep_once();
    }
  }

 private:
  static constexpr int kFew = 4;  // copies that are poured over without a vote
  // Of a copy that does not exist: above every level, and four of them still are an int.
  static constexpr int kHighGround = 1 << (kTokenBits + 2);

  // What a rank needs to know of the expert whose turn it is there. Of none: no copies, no tokens.
  struct Seat {
    int *share;
    int tokens, given;
    unsigned long long copies;
    int here;  // kFewest: tokens of the rank's own
  };

  __device__ static int rank_of(int slot) { return threadIdx.x % 32 + 32 * slot; }

  __device__ int expert_in(int batch, int slot) const {
    return seats_[slot][batch * seat_step_[slot]];
  }

  __device__ Seat take_seat(int expert, int slot) const {
    int *share = shares_[slot] + expert * tables_.stride;
    Seat seat{share, tables_.totals[expert], *share, tables_.first_copies[expert], 0};
    if (kFewest && expert < args_.num_experts) {
      seat.here = count_of(args_, rank_of(slot), expert);
    }
    return seat;
  }

  // What the next batches need is on its way while this one is computed.
  __device__ bool sweep_once() {
    Seat next[kRanksPerLane];
    int following[kRanksPerLane];
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      next[slot] = take_seat(expert_in(0, slot), slot);
      following[slot] = expert_in(1, slot);
    }
    int most_copies = tables_.most_copies[0];
    bool changed = false;
    for (int batch = 0; batch < num_batches_; ++batch) {
      Seat seats[kRanksPerLane];
      int base[kRanksPerLane], poured[kRanksPerLane];
      const int copies = most_copies;
      most_copies = tables_.most_copies[batch + 1];
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        seats[slot] = next[slot];
        base[slot] = load_[slot] - weight_of(seats[slot].given);
        next[slot] = take_seat(following[slot], slot);
        following[slot] = expert_in(batch + 2, slot);
      }
      take_turns(seats, copies, base, poured);
#pragma unroll
      for (int slot = 0; slot < kRanksPerLane; ++slot) {
        load_[slot] = base[slot] + weight_of(poured[slot]);
        if (poured[slot] != seats[slot].given) {
          changed = true;
          *seats[slot].share = poured[slot];
        }
      }
    }
    return __any_sync(kAllLanes, changed);
  }

  // What a rank's share of an expert adds to its load.
  __device__ static int weight_of(int share) { return kFewest ? share > 0 : share; }

  __device__ void take_turns(const Seat (&seats)[kRanksPerLane], int most_copies,
                             const int (&base)[kRanksPerLane],
                             int (&poured)[kRanksPerLane]) const {
    if constexpr (kFewest) {
      choose(seats, base, poured);
    } else if (most_copies == 2) {
      pour_over_two(seats, base, poured);
    } else if (most_copies <= kFew) {
      pour_over_few(seats, base, poured);
    } else {
      pour_over_many(seats, base, poured);
    }
  }

  // The value of another rank. Lanes may ask for any; what they get for kNoCopy means nothing.
  __device__ static int value_of(const int (&values)[kRanksPerLane], unsigned rank) {
    int value = __shfl_sync(kAllLanes, values[0], rank);
    if constexpr (kRanksPerLane == 2) {
      const int upper = __shfl_sync(kAllLanes, values[1], rank);
      value = rank & 32 ? upper : value;
    }
    return value;
  }

  __device__ static unsigned copy_of(const Seat &seat, int i) {
    return static_cast<unsigned>(seat.copies >> 8 * i) & kNoCopy;
  }
  __device__ static bool has_copy(const Seat &seat, int i) { return copy_of(seat, i) != kNoCopy; }
  __device__ static bool is_here(unsigned rank, int slot) {
    return rank == static_cast<unsigned>(rank_of(slot));
  }

  // Two vessels: the difference of their grounds says all. An odd token goes to the lower one, or
  // to the first.
  __device__ void pour_over_two(const Seat (&seats)[kRanksPerLane],
                                const int (&base)[kRanksPerLane],
                                int (&poured)[kRanksPerLane]) const {
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const unsigned first = copy_of(seats[slot], 0), second = copy_of(seats[slot], 1);
      const bool is_first = is_here(first, slot);
      const int higher = value_of(base, is_first ? second : first) - base[slot];
      const int rounding = higher >= !is_first;
      const int half = (seats[slot].tokens + higher + rounding) >> 1;
      poured[slot] = min(max(half, 0), seats[slot].tokens);
    }
  }

  // The level is the least to which the water would rise in any of the sets of vessels; of as many
  // vessels, the lowest count. The rest of the division goes to the lowest ones, a token each.
  __device__ void pour_over_few(const Seat (&seats)[kRanksPerLane],
                                const int (&base)[kRanksPerLane],
                                int (&poured)[kRanksPerLane]) const {
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      const Seat &seat = seats[slot];
      int grounds[kFew], before = 0;
      bool seen = false;
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        const unsigned rank = copy_of(seat, i);
        const int ground = value_of(base, rank);
        grounds[i] = rank == kNoCopy ? kHighGround : ground;
        seen |= is_here(rank, slot);
        before += grounds[i] < base[slot] + !seen;
      }
      const auto [a, b, c, d] = grounds;
      const int low = min(a, b), high = max(a, b), other_low = min(c, d), other_high = max(c, d);
      const unsigned of_one = min(low, other_low) + seat.tokens;
      const unsigned of_two = min(low + other_low, min(a + b, c + d)) + seat.tokens;
      const unsigned of_four = a + b + c + d + seat.tokens;
      const unsigned of_three = of_four - max(high, other_high);
      const int level = min(min(of_one, of_two / 2), min(of_three / 3, of_four / 4));
      int rest = seat.tokens;
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        rest -= max(level - grounds[i], 0);
      }
      poured[slot] = min(max(level - base[slot], 0) + (before < rest), seat.tokens);
    }
  }

  // Calls visit(copy, its rank or kNoCopy) for the copies of the seat's expert in their order; all
  // further ones have the number kFirstCopies. All lanes go on as long as one of them has more.
  template <class Visit>
  __device__ void for_each_copy(const Seat &seat, int slot, Visit visit) const {
#pragma unroll
    for (int i = 0; i < kFirstCopies; ++i) {
      visit(i, copy_of(seat, i));
    }
    const int expert = (seat.share - shares_[slot]) / tables_.stride;
    const int *copy_ranks = args_.copy_ranks + expert * args_.num_copies;
    bool more = has_copy(seat, kFirstCopies - 1);
#pragma unroll 1
    for (int i = kFirstCopies; i < args_.num_copies && __any_sync(kAllLanes, more); ++i) {
      const unsigned rank = more ? static_cast<unsigned>(copy_ranks[i]) & kNoCopy : kNoCopy;
      more = rank != kNoCopy;
      visit(kFirstCopies, rank);
    }
  }

  // Any number of vessels: water reaches those to whose ground the lower ones take no more tokens
  // than there are; these stand level, but for the rest.
  __device__ void pour_over_many(const Seat (&seats)[kRanksPerLane],
                                 const int (&base)[kRanksPerLane],
                                 int (&poured)[kRanksPerLane]) const {
    int first_grounds[kRanksPerLane][kFirstCopies], before[kRanksPerLane];
    unsigned reached[kRanksPerLane];  // a bit for each lane
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      unsigned missing = 0;  // to fill the lower ones up to this ground
      bool seen = false;
      before[slot] = 0;
      for_each_copy(seats[slot], slot, [&](int i, unsigned rank) {
        int ground = value_of(base, rank);
        ground = rank == kNoCopy ? kHighGround : ground;
        if (i < kFirstCopies) {
          first_grounds[slot][i] = ground;
        }
        seen |= is_here(rank, slot);
        before[slot] += ground < base[slot] + !seen;
        missing += max(base[slot] - ground, 0);
      });
      reached[slot] =
          __ballot_sync(kAllLanes, missing <= static_cast<unsigned>(seats[slot].tokens));
    }
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      int filled = seats[slot].tokens, count = 0;
      for_each_copy(seats[slot], slot, [&](int i, unsigned rank) {
        const int ground = i < kFirstCopies ? first_grounds[slot][i] : value_of(base, rank);
        const unsigned lanes = kRanksPerLane == 2 && rank & 32 ? reached[kRanksPerLane - 1]
                                                               : reached[0];
        const bool is_reached = rank != kNoCopy && (lanes >> rank % 32 & 1);
        filled += is_reached ? ground : 0;
        count += is_reached;
      });
      const int level = divide(filled, max(count, 1));
      const int rest = filled - level * count;
      const bool is_reached = has_copy(seats[slot], 0) && (reached[slot] >> threadIdx.x % 32 & 1);
      poured[slot] = is_reached ? level + (before[slot] < rest) - base[slot] : 0;
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
  // to the first copy.
  __device__ void choose(const Seat (&seats)[kRanksPerLane], const int (&base)[kRanksPerLane],
                         int (&poured)[kRanksPerLane]) const {
    int here[kRanksPerLane];
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      here[slot] = seats[slot].here;
    }
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      bool is_best = true, seen = false;
      for_each_copy(seats[slot], slot, [&](int, unsigned rank) {
        const int experts = value_of(base, rank), tokens = value_of(here, rank);
        seen |= is_here(rank, slot);
        const bool is_better = experts < base[slot] || (experts == base[slot] &&
                                                        tokens > here[slot] - !seen);
        is_best &= rank == kNoCopy || !is_better;
      });
      poured[slot] = is_best ? seats[slot].tokens : 0;
    }
  }

  const light_route_split_args &args_;
  const Tables &tables_;
  int num_batches_ = 0;
  SeatExpert<kRanksPerLane> *seats_[kRanksPerLane];  // the lane's columns
  int *shares_[kRanksPerLane], seat_step_[kRanksPerLane];
  int load_[kRanksPerLane], reciprocals_[kRanksPerLane];
};

}  // namespace light::route
