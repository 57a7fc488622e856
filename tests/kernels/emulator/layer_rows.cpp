// rotary_cache.cu and add_norm.cu on the host, one CTA after the other: test_layer_rows.py compares
// them with the reference.
#include "cuda_on_host.h"

#include <cmath>
#include <cstring>

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

namespace {
int current_cta, threads_per_cta;
}

#undef __shared__
#define __shared__ static
#define blockIdx (emulator::Index{current_cta})
#define blockDim (emulator::Index{threads_per_cta})

inline float __shfl_xor_sync(unsigned lanes, float value, int mask) {
  int bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = __shfl_xor_sync(lanes, bits, mask);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __fadd_rn(float first, float second) { return first + second; }
inline float __fmul_rn(float first, float second) { return first * second; }
inline float __fdiv_rn(float first, float second) { return first / second; }
inline float __fmaf_rn(float first, float second, float third) {
  return std::fma(first, second, third);
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

#include "add_norm.cu"
#include "rotary_cache.cu"

// bfloat16 stands for both.
float __half2float(__half) { std::abort(); }
__half __float2half_rn(float) { std::abort(); }

namespace {

bool run_ctas(int num_ctas, int num_threads, const std::function<void()> &kernel) {
  threads_per_cta = num_threads;
  bool done = true;
  for (current_cta = 0; current_cta < num_ctas; ++current_cta) {
    done = emulator::Cta(num_threads).run(kernel) && done;
  }
  return done;
}

}  // namespace

extern "C" bool run_rotary_cache(const light_rotary_cache_args *args, int num_ctas,
                                 int num_threads) {
  return run_ctas(num_ctas, num_threads, [&] { rotary_cache_bf16(*args); });
}

extern "C" bool run_add_norm(const light_add_norm_args *args, int num_ctas, int num_threads) {
  return run_ctas(num_ctas, num_threads, [&] { add_norm_bf16(*args); });
}
