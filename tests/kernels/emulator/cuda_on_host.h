// One CTA of a kernel on the host, for kernels of integers: its threads are fibers that run in turn
// up to the next barrier, shuffle or vote. It shows what a kernel computes, and in shuffled order
// whether that depends on who comes first; no speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __align__(bytes)
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct int2 {
  int x, y;
};

namespace emulator {

class Cta {
 public:
  // Threads run in their order, or with a seed in another one each time.
  explicit Cta(int num_threads, unsigned seed = 0)
      : fibers_(num_threads), warps_((num_threads + 31) / 32), order_(num_threads), seed_(seed) {
    std::iota(order_.begin(), order_.end(), 0);
  }

  static Cta *&running() {
    static Cta *cta = nullptr;
    return cta;
  }

  // Runs `kernel` in every thread; false where some wait for others that never come.
  bool run(const std::function<void()> &kernel) {
    running() = this;
    kernel_ = &kernel;
    for (Fiber &fiber : fibers_) {
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Cta::enter, 0);
    }
    int num_done = 0;
    for (bool moved = true; moved;) {
      moved = false;
      if (seed_ != 0) {
        std::shuffle(order_.begin(), order_.end(), std::minstd_rand(seed_++));
      }
      for (const int thread : order_) {
        thread_ = thread;
        Fiber &fiber = fibers_[thread_];
        if (fiber.done || (fiber.barrier != nullptr && fiber.barrier->round == fiber.round) ||
            (fiber.ready && !fiber.ready())) {
          continue;
        }
        fiber.barrier = nullptr;
        fiber.ready = nullptr;
        swapcontext(&scheduler_, &fiber.context);
        num_done += fiber.done;
        moved = true;
      }
    }
    return num_done == static_cast<int>(fibers_.size());
  }

  int thread() const { return thread_; }

  // Lets the others run at least once, too.
  void wait_until(std::function<bool()> ready) {
    Fiber &fiber = fibers_[thread_];
    fiber.ready = std::move(ready);
    swapcontext(&fiber.context, &scheduler_);
  }

  void wait_for_all() { wait(all_, static_cast<int>(fibers_.size())); }

  // All threads' answers: how many are true.
  int count(bool is_true) {
    counts_[all_.round % 2] += is_true;
    counts_[(all_.round + 1) % 2] = 0;
    const int round = all_.round;
    wait_for_all();
    return counts_[round % 2];
  }

  // Waits for the warp; then what every lane gave. It stays until the lanes gave something again.
  const long long *share(long long value) {
    Warp &warp = warps_[thread_ / 32];
    long long *values = warp.values[warp.barrier.round % 2];
    values[thread_ % 32] = value;
    wait(warp.barrier, 32);
    return values;
  }

 private:
  static constexpr std::size_t kStackBytes = 64 << 10;

  struct Barrier {
    int arrived = 0, round = 0;
  };
  struct Warp {
    Barrier barrier;
    long long values[2][32];
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    const Barrier *barrier = nullptr;  // that it waits at, since this round
    int round = 0;
    std::function<bool()> ready;  // else what it waits for
  };

  static void enter() {
    (*running()->kernel_)();
    running()->fibers_[running()->thread_].done = true;
  }

  void wait(Barrier &barrier, int num_threads) {
    if (++barrier.arrived == num_threads) {
      barrier.arrived = 0;
      ++barrier.round;
      return;
    }
    Fiber &fiber = fibers_[thread_];
    fiber.barrier = &barrier;
    fiber.round = barrier.round;
    swapcontext(&fiber.context, &scheduler_);
  }

  const std::function<void()> *kernel_ = nullptr;
  ucontext_t scheduler_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> order_;
  unsigned seed_;
  Barrier all_;
  int counts_[2] = {};
  int thread_ = 0;
};

struct Index {
  int x;
};

}  // namespace emulator

#define threadIdx (emulator::Index{emulator::Cta::running()->thread()})

inline const long long *lane_values(long long value) {
  return emulator::Cta::running()->share(value);
}
inline void __syncthreads() { emulator::Cta::running()->wait_for_all(); }
inline int __syncthreads_count(bool is_true) { return emulator::Cta::running()->count(is_true); }
inline void __syncwarp() { lane_values(0); }
inline int __shfl_sync(unsigned, int value, int lane) { return lane_values(value)[lane & 31]; }
inline int __shfl_xor_sync(unsigned, int value, int mask) {
  return lane_values(value)[threadIdx.x % 32 ^ mask];
}
inline int __shfl_up_sync(unsigned, int value, int distance) {
  const int lane = threadIdx.x % 32;
  return lane_values(value)[lane >= distance ? lane - distance : lane];
}
inline unsigned __ballot_sync(unsigned, bool is_true) {
  const long long *values = lane_values(is_true);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    votes |= static_cast<unsigned>(values[lane]) << lane;
  }
  return votes;
}
inline bool __any_sync(unsigned lanes, bool is_true) { return __ballot_sync(lanes, is_true) != 0; }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline unsigned __umulhi(unsigned first, unsigned second) {
  return static_cast<unsigned long long>(first) * second >> 32;
}
inline int atomicAdd(int *sum, int value) {
  const int before = *sum;
  *sum += value;
  return before;
}
inline void atomicOr(unsigned *bits, unsigned value) { *bits |= value; }
