// Stands in for hopper_instructions.cuh where the producer runs on the host: the shared memory of
// all CTAs is one array, barriers are counted beside it, and copies are done at once. A copied row
// is two numbers at its begin: which one it is, and from which element of the depth on.
#pragma once

#include <cstring>
#include <map>

#include "hopper_launch.h"

#define __forceinline__ inline

struct int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline unsigned atomicInc(unsigned *count, unsigned most) {
  const unsigned before = *count;
  *count = before >= most ? 0 : before + 1;
  return before;
}

namespace light {

constexpr int kCtaBytes = 1 << 18, kMostCtas = 8;
alignas(16) inline unsigned char shared_memory[kMostCtas * kCtaBytes];

struct Barrier {
  int arrivals, missing, bytes, round;
};
inline std::map<unsigned, Barrier> barriers;

inline void advance_barrier(Barrier &barrier) {
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.missing = barrier.arrivals;
    ++barrier.round;
  }
}

inline unsigned shared_address(const void *pointer) {
  return static_cast<unsigned>(static_cast<const unsigned char *>(pointer) - shared_memory);
}
inline void init_barrier(unsigned barrier, int arrivals) {
  barriers[barrier] = {arrivals, arrivals, 0, 0};
}
// One arrival too many would end another round than its own.
inline bool arrived_too_often = false;
inline void arrive_expecting(unsigned address, int bytes) {
  Barrier &barrier = barriers.at(address);
  arrived_too_often |= barrier.missing == 0;
  barrier.bytes += bytes;
  --barrier.missing;
  advance_barrier(barrier);
}
inline void arrive(unsigned address) { arrive_expecting(address, 0); }
inline void arrive_when_copied(unsigned address) { arrive(address); }
inline void copied(unsigned address, int bytes) {
  Barrier &barrier = barriers.at(address);
  barrier.bytes -= bytes;
  advance_barrier(barrier);
}
inline void wait_barrier(unsigned address, unsigned parity) {
  const Barrier &barrier = barriers.at(address);
  emulator::Cta::running()->wait_until(
      [&barrier, parity] { return static_cast<unsigned>(barrier.round % 2) != parity; });
}

inline void put_numbers(unsigned address, int first, int second) {
  const int numbers[] = {first, second};
  std::memcpy(shared_memory + address, numbers, sizeof numbers);
}
inline bool has_numbers(unsigned address, int first, int second) {
  const int numbers[] = {first, second};
  return std::memcmp(shared_memory + address, numbers, sizeof numbers) == 0;
}

// The map of the rows has their tile's tokens.
inline void copy_box(const TensorMap &map, unsigned barrier, unsigned target, int depth, int row) {
  const int num_rows = row_box(static_cast<int>(map.words[0]));
  for (int i = 0; i < num_rows; ++i) put_numbers(target + i * kPanelRowBytes, row + i, depth);
  copied(barrier, num_rows * kPanelRowBytes);
}

inline const char *gathered_rows = nullptr;  // never read
inline int gathered_depth = 0;
inline void copy_async_16(unsigned target, const void *source, int bytes) {
  if (bytes == 0) return;
  const int element = static_cast<int>((static_cast<const char *>(source) - gathered_rows) / 2);
  put_numbers(target, element / gathered_depth, element % gathered_depth);
}

inline void follow_previous_kernel() {}

// Of the producers of each CTA.
struct Meeting {
  int arrived, round;
};
inline Meeting meetings[kMostCtas];
template <int Id, int Threads>
void sync_threads() {
  Meeting &meeting = meetings[blockIdx.x];
  const int round = meeting.round;
  if (++meeting.arrived == Threads) {
    meeting = {0, round + 1};
  }
  emulator::Cta::running()->wait_until([&meeting, round] { return meeting.round != round; });
}

}  // namespace light
