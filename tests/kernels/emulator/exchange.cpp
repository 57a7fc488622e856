// The row kernels of exchange.cu on the host, one CTA each: test_exchange.py compares them with the
// reference.
#include "cuda_on_host.h"

#include <cmath>
#include <cstring>

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

constexpr int kEmulatedThreads = 96;
#define blockIdx (emulator::Index{0})
#define gridDim (emulator::Index{1})
#define blockDim (emulator::Index{kEmulatedThreads})

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __shfl_sync(unsigned lanes, float value, int lane) {
  return __uint_as_float(__shfl_sync(lanes, static_cast<int>(__float_as_uint(value)), lane));
}
inline unsigned long long __shfl_sync(unsigned, unsigned long long value, int lane) {
  return lane_values(static_cast<long long>(value))[lane & 31];
}
inline unsigned __shfl_xor_sync(unsigned lanes, unsigned value, int mask) {
  return __shfl_xor_sync(lanes, static_cast<int>(value), mask);
}
inline int min(int first, int second) { return first < second ? first : second; }
inline int max(int first, int second) { return first > second ? first : second; }
inline float __fadd_rn(float first, float second) { return first + second; }
inline float __fmul_rn(float first, float second) { return first * second; }
inline int __float2int_rn(float value) {
  return value != value ? 0 : static_cast<int>(std::nearbyint(value));
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __ffsll(unsigned long long bits) {
  return __builtin_ffsll(static_cast<long long>(bits));
}
inline unsigned __byte_perm(unsigned first, unsigned second, unsigned) {
  return (first & 0xff) | (second & 0xff) << 8;  // by the only selector that is used, 0x0040
}
template <class Value>
Value __ldg(const Value *from) {
  return *from;
}
template <class Value>
Value __ldcg(const Value *from) {
  return *from;
}
inline void atomicAdd(unsigned long long *sum, unsigned long long value) { *sum += value; }

#include "exchange_rows.cuh"

namespace {

template <class Args>
bool run(void (*kernel)(const Args &), const Args *args) {
  emulator::Cta cta(kEmulatedThreads);
  return cta.run([&] { kernel(*args); });
}

}  // namespace

extern "C" {

bool run_pull(const light_exchange_pull_args *args, bool as_int8) {
  return run(as_int8 ? light::pull<light::Int8Row<__nv_bfloat16>> : light::pull<light::AnyRow>,
             args);
}

bool run_give(const light_exchange_give_args *args) { return run(light::give, args); }

bool run_sum(const light_exchange_sum_args *args, bool is_float32, bool as_int8) {
  if (is_float32) {
    return run(light::sum_pairs<float>, args);
  }
  return run(
      as_int8 ? light::sum_pairs_as_int8<__nv_bfloat16> : light::sum_pairs<__nv_bfloat16>, args);
}

bool run_combine(const light_exchange_combine_args *args, bool is_float32, bool as_int8) {
  if (is_float32) {
    return run(light::combine<light::FullRow<float>>, args);
  }
  return run(as_int8 ? light::combine<light::Int8Row<__nv_bfloat16>>
                     : light::combine<light::FullRow<__nv_bfloat16>>,
             args);
}

bool run_count(const light_exchange_count_args *args) { return run(light::count_sent, args); }
}
