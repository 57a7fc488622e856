// Stands in for instructions.cuh where the router product runs on the host: shared memory is one
// array for the CTAs of a cluster, copies are done at once, an mma adds its products one by one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};

namespace light {

constexpr bool kAsyncCopies = __CUDA_ARCH__ >= 800;
constexpr int kCtaBytes = 1 << 18;
alignas(16) inline char shared_memory[2 * kCtaBytes];

inline unsigned shared_address(const void *pointer) {
  return static_cast<unsigned>(static_cast<const char *>(pointer) - shared_memory);
}
inline uint4 load_shared_16(unsigned address) {
  uint4 value;
  std::memcpy(&value, shared_memory + address, sizeof value);
  return value;
}
inline void store_shared_16(unsigned address, const uint4 &value) {
  std::memcpy(shared_memory + address, &value, sizeof value);
}
inline uint4 load_global_16(const void *source, bool valid) {
  uint4 value{};
  if (valid) {
    std::memcpy(&value, source, sizeof value);
  }
  return value;
}
inline void copy_async_16(unsigned target, const void *source, int bytes) {
  store_shared_16(target, load_global_16(source, bytes == 16));
}
inline void commit_copies() {}
template <int Pending>
inline void wait_copies() {}

inline float half_of(unsigned word, int half) {
  return __bfloat162float({static_cast<unsigned short>(word >> 16 * half)});
}

// m16n8k16. Lane 4g + t holds rows g and g + 8 of A, column g of B at depth 2t, 2t + 1 and 8 more;
// of the sums rows g and g + 8, columns 2t and 2t + 1.
struct BFloat16 {
  static void mma(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned words[6][32];
    for (int i = 0; i < 6; ++i) {
      const long long *given = lane_values(i < 4 ? a[i] : b[i - 4]);
      for (int lane = 0; lane < 32; ++lane) {
        words[i][lane] = static_cast<unsigned>(given[lane]);
      }
    }
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      for (int depth = 0; depth < 16; ++depth) {
        const int holder = depth % 8 / 2, upper = depth / 8;
        sums[i] += half_of(words[i / 2 + 2 * upper][row * 4 + holder], depth % 2) *
                   half_of(words[4 + upper][(column + i % 2) * 4 + holder], depth % 2);
      }
    }
  }
};
using Float16 = BFloat16;

}  // namespace light
