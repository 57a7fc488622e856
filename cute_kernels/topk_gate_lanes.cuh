// Small tools of the gate: numbers as ordered integers, reductions over the lanes of a token, waits
// between CTAs.
#pragma once

#include "rows.cuh"

namespace light::gate {

constexpr unsigned kAllLanes = 0xffffffffu;

// NaN would compare false with everything: it counts as the lowest number there is.
__device__ inline float without_nan(float value) {
  return value == value ? value : __int_as_float(0xff800000);
}

// Unsigned integers in the order of the numbers; 0 is below all of them. -0 becomes +0: they tie.
__device__ inline unsigned ordered_key(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float from_ordered_key(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Maximum over groups of kLanes neighbouring lanes; every lane of the warp takes part.
template <int kLanes>
__device__ inline unsigned lanes_max(unsigned value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ inline unsigned lanes_max<32>(unsigned value) {
  return __reduce_max_sync(kAllLanes, value);
}
#endif

// The sum in a fixed order, the same bits in every lane.
template <int kLanes>
__device__ inline float lanes_sum(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

__device__ inline int inclusive_scan(int value, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, offset);
    value += lane >= offset ? below : 0;
  }
  return value;
}

// One bit for each lane of this token where `predicate` holds.
template <int kLanes>
__device__ inline unsigned lanes_ballot(bool predicate) {
  const unsigned bits = __ballot_sync(kAllLanes, predicate);
  if constexpr (kLanes == 32) {
    return bits;
  } else {
    return bits >> (threadIdx.x % 32 / kLanes * kLanes) & ((1u << kLanes) - 1);
  }
}

__device__ inline unsigned load_acquire(const unsigned *address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Four neighbours; the address is a multiple of 8 bytes.
__device__ inline void store_relaxed(unsigned short *address, uint2 value) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(value.x),
               "r"(value.y)
               : "memory");
}

// Two neighbours at once; the address is a multiple of 4 bytes.
__device__ inline unsigned load_relaxed(const unsigned short *address) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Every CTA of `num_ctas` arrives before any leaves; all of them have to be resident. A round adds
// 2^31 in all, so the counter's low bits are as before and any number of CTAs may come next.
__device__ inline void wait_for_all_ctas(unsigned *counter, int num_ctas) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned arrival = blockIdx.x == 0 ? 0x80000000u - (num_ctas - 1) : 1;
    __threadfence();
    const unsigned before = atomicAdd(counter, arrival);
    while (((before ^ load_acquire(counter)) & 0x80000000u) == 0) {
    }
  }
  __syncthreads();
}

// The `num_last` CTAs of a grid that arrive last get 0, 1, ... once all have arrived, and see what
// the others wrote; the others get less than 0 at once and may leave, so those that wait never keep
// a CTA from starting. A round adds 2^31 in all, as above.
__device__ inline int arrive_among_last(unsigned *counter, int num_ctas, int num_last) {
  __shared__ int place;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned before = atomicAdd(counter, 1);
    const int arrival = before & 0x7fffffff;
    if (arrival == num_ctas - 1) {
      atomicAdd(counter, 0x80000000u - num_ctas);
      __threadfence();
    } else if (arrival >= num_ctas - num_last) {
      unsigned now;
      do {
        now = load_acquire(counter);
      } while (((now ^ before) & 0x80000000u) == 0 && (now & 0x7fffffff) != num_ctas);
    }
    place = arrival - (num_ctas - num_last);
  }
  __syncthreads();
  return place;
}

}  // namespace light::gate
