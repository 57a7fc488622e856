// The machine instructions of the matrix kernels: CuTe's mma atoms, and copies by 32-bit
// shared-memory addresses, which the pipeline computes with.
#pragma once

#include <cute/arch/mma_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "mma_sm75_half.h"
#include "shared_barriers.cuh"

namespace light {

#if __CUDA_ARCH__ >= 800
constexpr bool kAsyncCopies = true;
#else
constexpr bool kAsyncCopies = false;
#endif

struct Float16 {
  static constexpr bool kIsHalf = true;

  // Two floats, the first in the lower half.
  static __device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned packed;
    asm("{ .reg .f16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b}; }"
        : "=r"(packed)
        : "f"(low), "f"(high));
    return packed;
  }

  static __device__ __forceinline__ void mma(float (&sums)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    cute::SM80_16x8x16_F32F16F16F32_TN::fma(sums[0], sums[1], sums[2], sums[3], a[0], a[1], a[2],
                                            a[3], b[0], b[1], sums[0], sums[1], sums[2], sums[3]);
#else
    cute::SM75_16x8x8_F32F16F16F32_TN::fma(sums[0], sums[1], sums[2], sums[3], a[0], a[1], b[0],
                                           sums[0], sums[1], sums[2], sums[3]);
    cute::SM75_16x8x8_F32F16F16F32_TN::fma(sums[0], sums[1], sums[2], sums[3], a[2], a[3], b[1],
                                           sums[0], sums[1], sums[2], sums[3]);
#endif
  }
};

struct BFloat16 {
  static constexpr bool kIsHalf = false;

#if __CUDA_ARCH__ >= 800
  static __device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }

  static __device__ __forceinline__ void mma(float (&sums)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
    cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(sums[0], sums[1], sums[2], sums[3], a[0], a[1], a[2],
                                              a[3], b[0], b[1], sums[0], sums[1], sums[2],
                                              sums[3]);
  }
#endif
};

// fp16 accumulators: GeForce Turing runs them at twice the rate of fp32 ones. Two accumulators of
// two halves each: (row g, tokens 2t, 2t + 1) and (row g + 8, the same tokens).
__device__ __forceinline__ void mma_half(unsigned (&sums)[2], const unsigned (&a)[4],
                                         const unsigned (&b)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    cute::SM75_16x8x8_F16F16F16F16_TN::fma(sums[0], sums[1], a[2 * half], a[2 * half + 1], b[half],
                                           sums[0], sums[1]);
  }
}

__device__ __forceinline__ float2 unpack_half(unsigned packed) {
  float2 values;
  asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(values.x), "=f"(values.y)
      : "r"(packed));
  return values;
}

__device__ __forceinline__ void load_matrices(unsigned address, unsigned &r0, unsigned &r1,
                                              unsigned &r2, unsigned &r3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(address));
}

__device__ __forceinline__ void load_matrices(unsigned address, unsigned &r0, unsigned &r1) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r0), "=r"(r1)
               : "r"(address));
}

// An 8 x 8 matrix of 16-bit elements spread over the warp, transposed.
__device__ __forceinline__ unsigned transpose_matrix(unsigned value) {
  unsigned result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(value));
  return result;
}

// 16 bytes from global to shared memory: the first `bytes` are copied, the rest is zeros.
__device__ __forceinline__ void copy_async_16(unsigned target, const void *source, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes));
#endif
}

// copy_async_16 by some threads only, without a branch.
__device__ __forceinline__ void copy_async_16_where(bool copies, unsigned target,
                                                    const void *source, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %3, 0;"
      " @p cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2; }" ::"r"(target),
      "l"(source), "r"(bytes), "r"(static_cast<unsigned>(copies)));
#endif
}

__device__ __forceinline__ void copy_async_4(unsigned target, const void *source) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source));
#endif
}

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}

template <int Pending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending));
#endif
}

__device__ __forceinline__ uint4 load_global_16(const void *source, bool valid) {
  uint4 value = {0, 0, 0, 0};
  if (valid) {
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(source));
  }
  return value;
}

__device__ __forceinline__ void store_shared_16(unsigned address, const uint4 &value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w));
}

__device__ __forceinline__ uint4 load_shared_16(unsigned address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address));
  return value;
}

__device__ __forceinline__ void store_shared_float(unsigned address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value));
}

__device__ __forceinline__ float2 load_shared_floats(unsigned address) {
  float2 values;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(values.x), "=f"(values.y)
               : "r"(address));
  return values;
}

__device__ __forceinline__ unsigned load_shared_u16(unsigned address) {
  unsigned short value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address));
  return value;
}

// Hopper and later: wait for what the kernel before this one wrote, then let the next one start.
// Whoever starts may so rely on everything older than the kernel before it.
__device__ __forceinline__ void follow_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace light
