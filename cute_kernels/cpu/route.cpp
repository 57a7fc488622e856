// The route of CPU ranks: which copy of its expert every pair goes to, with the integers of
// lightmoe/kernels/route_reference.py. A library of its own with one C function: it needs neither
// CUDA nor Python, only a C++17 compiler.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <tuple>
#include <vector>

namespace {

using Tokens = std::int64_t;

enum Route { kHome = 0, kEven = 1, kWaterfill = 2, kFewest = 3 };

struct Expert {
  const std::int32_t *ranks;  // of its copies, home first
  int num_copies;
  Tokens tokens;  // of all ranks
  Tokens *share;  // [num_copies] tokens that each copy gets
};

// Experts of the same ranks.
struct Pool {
  const int *ranks;  // ascending
  int num_ranks;
  int first_expert;
  Tokens tokens;
  std::vector<Tokens> share;  // [num_ranks] tokens that each rank gets
};

class Router {
 public:
  Router(const Tokens *counts, const std::int32_t *copy_ranks, const std::int32_t *nearness,
         int num_ranks, int num_experts, int num_copies, int num_levels, Tokens *assigned)
      : counts_(counts),
        nearness_(nearness),
        assigned_(assigned),
        num_ranks_(num_ranks),
        num_experts_(num_experts),
        num_copies_(num_copies),
        num_levels_(num_levels),
        everyone_(num_ranks),
        shares_(static_cast<std::size_t>(num_experts) * num_copies),
        load_(num_ranks),
        base_(num_copies),
        poured_(num_copies),
        sorted_(num_copies),
        left_(num_ranks) {
    experts_.reserve(num_experts);
    for (int expert = 0; expert < num_experts; ++expert) {
      const std::int32_t *ranks = copy_ranks + static_cast<std::size_t>(expert) * num_copies;
      const int copies = static_cast<int>(std::find(ranks, ranks + num_copies, -1) - ranks);
      experts_.push_back({ranks, copies, 0, shares_.data() + std::size_t(expert) * num_copies});
    }
    for (int source = 0; source < num_ranks; ++source) {
      for (int expert = 0; expert < num_experts; ++expert) {
        experts_[expert].tokens += count(source, expert);
      }
    }
  }

  void run(Route route, int sweeps) {
    switch (route) {
      case kHome:
        share_to_homes();
        break;
      case kEven:
        share_evenly();
        break;
      case kWaterfill:
        pour(sweeps);
        break;
      case kFewest:
        gather(sweeps);
        break;
    }
    assign();
  }

 private:
  Tokens count(int source, int expert) const {
    return counts_[static_cast<std::size_t>(source) * num_experts_ + expert];
  }

  Tokens &assigned(int source, int expert, int copy) {
    return assigned_[(static_cast<std::size_t>(source) * num_experts_ + expert) * num_copies_ +
                     copy];
  }

  void share_to_homes() {
    for (Expert &expert : experts_) {
      expert.share[0] = expert.tokens;
      load_[expert.ranks[0]] += expert.tokens;
    }
  }

  void share_evenly() {
    for (Expert &expert : experts_) {
      const Tokens each = expert.tokens / expert.num_copies;
      const Tokens rest = expert.tokens % expert.num_copies;
      for (int copy = 0; copy < expert.num_copies; ++copy) {
        expert.share[copy] = each + (copy < rest);
      }
    }
  }

  void pour(int sweeps) {
    for (const Expert &expert : experts_) {
      load_[expert.ranks[0]] += expert.num_copies == 1 ? expert.tokens : 0;
    }
    make_pools();
    bool changed = true;
    for (int sweep = 0; sweep < std::max(sweeps, 1) && changed; ++sweep) {
      changed = false;
      for (Pool &pool : pools_) {
        changed |= pour_out(pool);
      }
    }
    for (Expert &expert : experts_) {
      expert.share[0] = expert.num_copies == 1 ? expert.tokens : 0;
    }
    for (const Pool &pool : pools_) {
      share_out(pool);
    }
  }

  // Those with tokens, in the order of their turns.
  void make_pools() {
    next_expert_.assign(num_experts_, -1);
    int before = -1;
    for (const int number : replicated()) {
      if (before >= 0 && compare(before, number) == 0) {
        next_expert_[before] = number;
        pools_.back().tokens += experts_[number].tokens;
      } else {
        const int num_ranks = experts_[number].num_copies;
        pools_.push_back({ranks_of(number), num_ranks, number, experts_[number].tokens,
                          std::vector<Tokens>(num_ranks)});
      }
      before = number;
    }
    pools_.erase(std::remove_if(pools_.begin(), pools_.end(),
                                [](const Pool &pool) { return pool.tokens == 0; }),
                 pools_.end());
    std::sort(pools_.begin(), pools_.end(), [](const Pool &first, const Pool &second) {
      return std::make_tuple(first.num_ranks, -first.tokens, first.first_expert) <
             std::make_tuple(second.num_ranks, -second.tokens, second.first_expert);
    });
  }

  // Experts that have a choice, those of the same ranks beside each other in their order.
  std::vector<int> replicated() {
    sorted_ranks_.resize(shares_.size());
    std::vector<int> found;
    for (int number = 0; number < num_experts_; ++number) {
      const Expert &expert = experts_[number];
      if (expert.num_copies > 1) {
        int *ranks = sorted_ranks_.data() + std::size_t(number) * num_copies_;
        std::copy_n(expert.ranks, expert.num_copies, ranks);
        std::sort(ranks, ranks + expert.num_copies);
        found.push_back(number);
      }
    }
    std::stable_sort(found.begin(), found.end(),
                     [&](int first, int second) { return compare(first, second) < 0; });
    return found;
  }

  const int *ranks_of(int expert) const {
    return sorted_ranks_.data() + std::size_t(expert) * num_copies_;
  }

  // Any order in which the experts of a pool are neighbours: negative, 0 in one pool, positive.
  int compare(int first, int second) const {
    const int copies = experts_[first].num_copies, other_copies = experts_[second].num_copies;
    if (copies != other_copies) {
      return copies - other_copies;
    }
    const int *ranks = ranks_of(first), *other = ranks_of(second);
    const int place = std::mismatch(ranks, ranks + copies, other).first - ranks;
    return place == copies ? 0 : ranks[place] - other[place];
  }

  // Take a pool's tokens out and pour them level over its ranks; whether anything changed.
  bool pour_out(Pool &pool) {
    for (int i = 0; i < pool.num_ranks; ++i) {
      base_[i] = load_[pool.ranks[i]] - pool.share[i];
    }
    level(pool.num_ranks, pool.tokens);
    bool changed = false;
    for (int i = 0; i < pool.num_ranks; ++i) {
      changed |= poured_[i] != pool.share[i];
      pool.share[i] = poured_[i];
      load_[pool.ranks[i]] = base_[i] + poured_[i];
    }
    return changed;
  }

  // Vessels whose grounds are base_ stand level but for one token: the first ones have the rest.
  void level(int num_vessels, Tokens tokens) {
    for (int vessel = 0; vessel < num_vessels; ++vessel) {  // few: sorted by insertion
      int place = vessel;
      for (; place > 0 && sorted_[place - 1] > base_[vessel]; --place) {
        sorted_[place] = sorted_[place - 1];
      }
      sorted_[place] = base_[vessel];
    }
    int count = 1;  // vessels that the water reaches
    Tokens filled = sorted_[0] + tokens;
    while (count < num_vessels && sorted_[count] * count <= filled) {
      filled += sorted_[count];
      ++count;
    }
    const Tokens height = filled / count;
    Tokens rest = filled % count;
    for (int vessel = 0; vessel < num_vessels; ++vessel) {
      const bool is_reached = base_[vessel] <= height, has_one_more = is_reached && rest > 0;
      poured_[vessel] = is_reached ? height + has_one_more - base_[vessel] : 0;
      rest -= has_one_more;
    }
  }

  // The shares of a pool's experts: a rank's own tokens stay, as far as its share reaches; the
  // others fill what is left, in the order of experts and ranks.
  void share_out(const Pool &pool) {
    Tokens *room = poured_.data();
    std::copy(pool.share.begin(), pool.share.end(), room);
    for (int number = pool.first_expert; number >= 0; number = next_expert_[number]) {
      for (int i = 0; i < pool.num_ranks; ++i) {
        const Tokens stays = std::min(count(pool.ranks[i], number), room[i]);
        share(number, pool.ranks[i]) = stays;
        room[i] -= stays;
      }
    }
    for (int number = pool.first_expert; number >= 0; number = next_expert_[number]) {
      const Expert &expert = experts_[number];
      Tokens left = expert.tokens -
                    std::accumulate(expert.share, expert.share + expert.num_copies, Tokens(0));
      for (int i = 0; i < pool.num_ranks; ++i) {
        const Tokens moved = std::min(left, room[i]);
        share(number, pool.ranks[i]) += moved;
        room[i] -= moved;
        left -= moved;
      }
    }
  }

  Tokens &share(int number, int rank) {
    const Expert &expert = experts_[number];
    return expert.share[std::find(expert.ranks, expert.ranks + expert.num_copies, rank) -
                        expert.ranks];
  }

  // Each expert's tokens to one copy, so that no rank has many experts; load_ counts experts here.
  void gather(int sweeps) {
    for (Expert &expert : experts_) {
      if (expert.num_copies == 1 && expert.tokens > 0) {
        expert.share[0] = expert.tokens;
        ++load_[expert.ranks[0]];
      }
    }
    std::vector<int> order;
    for (int number = 0; number < num_experts_; ++number) {
      if (experts_[number].num_copies > 1 && experts_[number].tokens > 0) {
        order.push_back(number);
      }
    }
    std::stable_sort(order.begin(), order.end(), [&](int first, int second) {
      const Expert &one = experts_[first], &other = experts_[second];
      return std::make_tuple(one.num_copies, -one.tokens) <
             std::make_tuple(other.num_copies, -other.tokens);
    });
    bool changed = true;
    for (int sweep = 0; sweep < std::max(sweeps, 1) && changed; ++sweep) {
      changed = false;
      for (const int expert : order) {
        changed |= move(expert);
      }
    }
  }

  // To the rank with the fewest other experts, then to that with most tokens of its own, then to
  // the lowest.
  bool move(int number) {
    Expert &expert = experts_[number];
    int best = 0;
    for (int copy = 0; copy < expert.num_copies; ++copy) {
      load_[expert.ranks[copy]] -= expert.share[copy] > 0;
      best = is_better(number, expert.ranks[copy], expert.ranks[best]) ? copy : best;
    }
    ++load_[expert.ranks[best]];
    if (expert.share[best] > 0) {
      return false;
    }
    std::fill(expert.share, expert.share + expert.num_copies, 0);
    expert.share[best] = expert.tokens;
    return true;
  }

  bool is_better(int expert, int rank, int than) const {
    if (load_[rank] != load_[than]) {
      return load_[rank] < load_[than];
    }
    const Tokens here = count(rank, expert), there = count(than, expert);
    return here != there ? here > there : rank < than;
  }

  // Which source ranks fill each share: the copy's own first, then those near it, level by level,
  // then the others in rank order.
  void assign() {
    for (int number = 0; number < num_experts_; ++number) {
      const Expert &expert = experts_[number];
      Tokens *room = expert.share;
      for (int source = 0; source < num_ranks_; ++source) {
        left_[source] = count(source, number);
      }
      for (int copy = 0; copy < expert.num_copies; ++copy) {
        const int rank = expert.ranks[copy];
        const Tokens here = std::min(left_[rank], room[copy]);
        assigned(rank, number, copy) = here;
        left_[rank] -= here;
        room[copy] -= here;
      }
      const int num_levels = expert.num_copies > 1 ? num_levels_ : 0;
      for (int level = 0; level < num_levels; ++level) {
        meet(number, nearness_ + level * num_ranks_);
      }
      meet(number, everyone_.data());
    }
  }

  // What is left moves within its group.
  void meet(int number, const std::int32_t *groups) {
    const Expert &expert = experts_[number];
    int first = 0;  // that has room
    for (int source = 0; source < num_ranks_; ++source) {
      while (first < expert.num_copies && expert.share[first] == 0) {
        ++first;
      }
      for (int copy = first; left_[source] > 0 && copy < expert.num_copies; ++copy) {
        if (groups[source] == groups[expert.ranks[copy]]) {
          const Tokens moved = std::min(left_[source], expert.share[copy]);
          assigned(source, number, copy) += moved;
          left_[source] -= moved;
          expert.share[copy] -= moved;
        }
      }
    }
  }

  const Tokens *counts_;          // [W, E]
  const std::int32_t *nearness_;  // [N, W]
  Tokens *assigned_;              // [W, E, C]
  int num_ranks_, num_experts_, num_copies_, num_levels_;
  std::vector<std::int32_t> everyone_;  // [W] zeros: one group
  std::vector<Expert> experts_;
  std::vector<Tokens> shares_;         // [E, C]
  std::vector<Tokens> load_;           // [W] tokens, or experts, of each rank
  std::vector<Pool> pools_;
  std::vector<int> sorted_ranks_;               // [E, C] of each expert that has a choice
  std::vector<int> next_expert_;                // [E] of its pool; -1: none
  std::vector<Tokens> base_, poured_, sorted_;  // [C] of the pool whose turn it is
  std::vector<Tokens> left_;                    // [W] of one expert, not assigned yet
};

// Every expert has a home, every copy a rank of its own.
bool is_sound(const std::int32_t *copy_ranks, int num_ranks, int num_experts, int num_copies) {
  std::vector<int> last_expert(num_ranks, -1);
  for (int expert = 0; expert < num_experts; ++expert) {
    bool ended = false;
    for (int copy = 0; copy < num_copies; ++copy) {
      const int rank = copy_ranks[static_cast<std::size_t>(expert) * num_copies + copy];
      if (rank == -1 && copy > 0) {
        ended = true;
      } else if (ended || rank < 0 || rank >= num_ranks || last_expert[rank] == expert) {
        return false;
      } else {
        last_expert[rank] = expert;
      }
    }
  }
  return true;
}

}  // namespace

// counts [W, E], copy_ranks [E, C] (home first, then -1), nearness [N, W] -> assigned [W, E, C], all
// zeros before. Routes are numbered as in light_ops.h. Returns 0, or 1 where the copies or sizes
// make no sense.
extern "C" __attribute__((visibility("default"))) int light_route_assign(
    const std::int64_t *counts, const std::int32_t *copy_ranks, const std::int32_t *nearness,
    int num_ranks, int num_experts, int num_copies, int num_levels, int route, int sweeps,
    std::int64_t *assigned) {
  if (num_ranks < 1 || num_experts < 1 || num_copies < 1 || num_levels < 0 || route < kHome ||
      route > kFewest ||
      !is_sound(copy_ranks, num_ranks, num_experts, num_copies)) {
    return 1;
  }
  Router(counts, copy_ranks, nearness, num_ranks, num_experts, num_copies, num_levels, assigned)
      .run(static_cast<Route>(route), sweeps);
  return 0;
}
