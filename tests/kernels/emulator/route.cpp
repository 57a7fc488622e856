// route.cu on the host, as one C function: test_route.py compares it with the reference.
#include "cuda_on_host.h"

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(value); }
inline int __ffsll(unsigned long long bits) {
  return __builtin_ffsll(static_cast<long long>(bits));
}
inline int __shfl_sync(unsigned, int value, int lane, int width) {
  return lane_values(value)[threadIdx.x % 32 / width * width + (lane & (width - 1))];
}
inline int __shfl_up_sync(unsigned, int value, int distance, int width) {
  const int lane = threadIdx.x % 32;
  return lane_values(value)[lane % width >= distance ? lane - distance : lane];
}
inline int __mulhi(int first, int second) {
  return static_cast<int>(static_cast<long long>(first) * second >> 32);
}

struct {
  unsigned x;
} blockIdx;

namespace light::route {
extern char memory[];
}

#include "route.cu"

namespace light::route {
alignas(16) char memory[227 << 10];  // what a CTA has on sm_90
}

extern "C" bool run_route(const light_route_split_args *args, unsigned seed) {
  const light::route::Layout layout(args->num_experts, args->num_ranks);
  if (layout.bytes > static_cast<int>(sizeof light::route::memory)) {
    return false;
  }
  std::fill_n(light::route::memory, sizeof light::route::memory, '\x5a');
  light_route_split_chunks chunks{};
  blockIdx.x = seed % LIGHT_MAX_CHUNKS;
  chunks.chunk[blockIdx.x] = *args;
  emulator::Cta cta(light::route::kThreads, seed);
  return cta.run([&] {
    const bool is_narrow = args->num_ranks <= light::route::kRanksOfOneLane;
    if (args->num_levels > 0) {
      is_narrow ? route_split_near_w32(chunks) : route_split_near_w64(chunks);
    } else {
      is_narrow ? route_split_w32(chunks) : route_split_w64(chunks);
    }
  });
}
