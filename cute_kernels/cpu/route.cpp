// The route of CPU ranks: which copy of its expert every pair goes to, with the integers of
// lightmoe/kernels/route_reference.py. A library of its own with one C function: it needs neither
// CUDA nor Python, only a C++17 compiler.
#include <algorithm>
#include <cstddef>
#include <cstdint>
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

class Router {
 public:
  Router(const Tokens *counts, const std::int32_t *copy_ranks, int num_ranks, int num_experts,
         int num_copies, Tokens *assigned)
      : counts_(counts),
        assigned_(assigned),
        num_ranks_(num_ranks),
        num_experts_(num_experts),
        num_copies_(num_copies),
        shares_(static_cast<std::size_t>(num_experts) * num_copies),
        load_(num_ranks),
        base_(num_copies),
        poured_(num_copies),
        order_(num_copies),
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

  // Experts that have a choice, in the order of their turns.
  template <class Before>
  std::vector<int> turns(Before before) const {
    std::vector<int> found;
    for (int expert = 0; expert < num_experts_; ++expert) {
      if (experts_[expert].num_copies > 1 && experts_[expert].tokens > 0) {
        found.push_back(expert);
      }
    }
    std::stable_sort(found.begin(), found.end(), [&](int first, int second) {
      return before(experts_[first], experts_[second]);
    });
    return found;
  }

  void pour(int sweeps) {
    share_to_homes();
    const std::vector<int> order = turns(
        [](const Expert &first, const Expert &second) { return first.tokens > second.tokens; });
    bool changed = true;
    for (int sweep = 0; sweep < sweeps && changed; ++sweep) {
      changed = false;
      for (const int expert : order) {
        changed |= pour_out(experts_[expert]);
      }
    }
  }

  // Take an expert's tokens out and pour them level over its copies; whether anything changed.
  bool pour_out(Expert &expert) {
    const int num_copies = expert.num_copies;
    for (int copy = 0; copy < num_copies; ++copy) {
      base_[copy] = load_[expert.ranks[copy]] - expert.share[copy];
    }
    level(num_copies, expert.tokens);
    bool changed = false;
    for (int copy = 0; copy < num_copies; ++copy) {
      changed |= poured_[copy] != expert.share[copy];
      expert.share[copy] = poured_[copy];
      load_[expert.ranks[copy]] = base_[copy] + poured_[copy];
    }
    return changed;
  }

  // Vessels whose grounds are base_ stand level but for one token; ties go to the earlier one.
  void level(int num_copies, Tokens tokens) {
    for (int copy = 0; copy < num_copies; ++copy) {  // few: sorted by insertion
      int place = copy;
      for (; place > 0 && base_[order_[place - 1]] > base_[copy]; --place) {
        order_[place] = order_[place - 1];
      }
      order_[place] = copy;
    }
    int count = 1;  // vessels that the water reaches
    Tokens filled = base_[order_[0]] + tokens;
    while (count < num_copies && base_[order_[count]] * count <= filled) {
      filled += base_[order_[count]];
      ++count;
    }
    const Tokens height = filled / count, rest = filled % count;
    for (int place = 0; place < num_copies; ++place) {
      const int copy = order_[place];
      poured_[copy] = place < count ? height + (place < rest) - base_[copy] : 0;
    }
  }

  // Each expert's tokens to one copy, so that no rank has many experts; load_ counts experts here.
  void gather(int sweeps) {
    for (Expert &expert : experts_) {
      if (expert.num_copies == 1 && expert.tokens > 0) {
        expert.share[0] = expert.tokens;
        ++load_[expert.ranks[0]];
      }
    }
    const std::vector<int> order = turns([](const Expert &first, const Expert &second) {
      return first.num_copies != second.num_copies ? first.num_copies < second.num_copies
                                                   : first.tokens > second.tokens;
    });
    bool changed = true;
    for (int sweep = 0; sweep < std::max(sweeps, 1) && changed; ++sweep) {
      changed = false;
      for (const int expert : order) {
        changed |= move(expert);
      }
    }
  }

  // To the rank with the fewest other experts, then to that with most tokens of its own.
  bool move(int number) {
    Expert &expert = experts_[number];
    int best = 0;
    for (int copy = 0; copy < expert.num_copies; ++copy) {
      const int rank = expert.ranks[copy];
      load_[rank] -= expert.share[copy] > 0;
      const int best_rank = expert.ranks[best];
      if (load_[rank] < load_[best_rank] ||
          (load_[rank] == load_[best_rank] && count(rank, number) > count(best_rank, number))) {
        best = copy;
      }
    }
    ++load_[expert.ranks[best]];
    if (expert.share[best] > 0) {
      return false;
    }
    std::fill(expert.share, expert.share + expert.num_copies, 0);
    expert.share[best] = expert.tokens;
    return true;
  }

  // Which source ranks fill each share: their own copy's first, then the others in rank order.
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
      int copy = 0;
      for (int source = 0; source < num_ranks_; ++source) {
        while (left_[source] > 0) {
          while (room[copy] == 0) {
            ++copy;
          }
          const Tokens moved = std::min(left_[source], room[copy]);
          assigned(source, number, copy) += moved;
          left_[source] -= moved;
          room[copy] -= moved;
        }
      }
    }
  }

  const Tokens *counts_;  // [W, E]
  Tokens *assigned_;      // [W, E, C]
  int num_ranks_, num_experts_, num_copies_;
  std::vector<Expert> experts_;
  std::vector<Tokens> shares_;         // [E, C]
  std::vector<Tokens> load_;           // [W] tokens, or experts, of each rank
  std::vector<Tokens> base_, poured_;  // [C] of the expert whose turn it is
  std::vector<int> order_;             // [C] its copies, the lowest ground first
  std::vector<Tokens> left_;           // [W] of one expert, not assigned yet
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

// counts [W, E], copy_ranks [E, C] (home first, then -1) -> assigned [W, E, C], all zeros before.
// Routes are numbered as in light_ops.h. Returns 0, or 1 where the copies or sizes make no sense.
extern "C" __attribute__((visibility("default"))) int light_route_assign(
    const std::int64_t *counts, const std::int32_t *copy_ranks, int num_ranks, int num_experts,
    int num_copies, int route, int sweeps, std::int64_t *assigned) {
  if (num_ranks < 1 || num_experts < 1 || num_copies < 1 || route < kHome || route > kFewest ||
      !is_sound(copy_ranks, num_ranks, num_experts, num_copies)) {
    return 1;
  }
  Router(counts, copy_ranks, num_ranks, num_experts, num_copies, assigned)
      .run(static_cast<Route>(route), sweeps);
  return 0;
}
