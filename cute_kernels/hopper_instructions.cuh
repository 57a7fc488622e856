// Hopper's own instructions: barriers in shared memory, the copy engine (TMA), warpgroup mma.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>

#include "hopper_launch.h"
#include "instructions.cuh"

namespace light {

// What this thread wrote or read with ordinary instructions comes before what the copy engine and
// the tensor cores do with the same shared memory.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int Id, int Threads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "n"(Threads) : "memory");
}

__device__ __forceinline__ void sync_warpgroup(int id) {
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

__device__ __forceinline__ void prefetch_map(const TensorMap &map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void copy_box(const TensorMap &map, unsigned barrier, unsigned target,
                                         int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

__device__ __forceinline__ void copy_box(const TensorMap &map, unsigned barrier, unsigned target,
                                         int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ __forceinline__ void copy_box(const TensorMap &map, unsigned barrier, unsigned target,
                                         int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

__device__ __forceinline__ void copy_box(const TensorMap &map, unsigned barrier, unsigned target,
                                         int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// A panel [rows, 128 bytes], depth contiguous, 128-byte swizzle, 1024 bytes for every
// 8 rows, as the tensor cores read it (PTX ISA, "Matrix descriptor"). `address` may be 32 bytes
// further for every mma of depth.
__device__ __forceinline__ unsigned long long panel_descriptor(unsigned address) {
  constexpr unsigned long long kEightRows = 1024 / 16, kSwizzle128 = 1;
  return (address & 0x3ffff) / 16 | 1ull << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

namespace gmma = cute::SM90::GMMA;
constexpr gmma::Major kDepthMajor = gmma::Major::K;

struct E4M3;

// sums [64 weights, Tokens] += weights [64, 32 bytes] x tokens [32 bytes, Tokens]
template <class Element, int Tokens>
struct WarpgroupMma;

#define LIGHT_WARPGROUP_MMA(tokens)                                                               \
  template <>                                                                                     \
  struct WarpgroupMma<Float16, tokens> {                                                          \
    using Shared = gmma::MMA_64x##tokens##x16_F32F16F16_SS<kDepthMajor, kDepthMajor>;             \
    using Registers = gmma::MMA_64x##tokens##x16_F32F16F16_RS<kDepthMajor, kDepthMajor>;          \
  };                                                                                              \
  template <>                                                                                     \
  struct WarpgroupMma<BFloat16, tokens> {                                                         \
    using Shared = gmma::MMA_64x##tokens##x16_F32BF16BF16_SS<kDepthMajor, kDepthMajor>;           \
    using Registers = gmma::MMA_64x##tokens##x16_F32BF16BF16_RS<kDepthMajor, kDepthMajor>;        \
  };
LIGHT_WARPGROUP_MMA(8)
LIGHT_WARPGROUP_MMA(16)
LIGHT_WARPGROUP_MMA(24)
LIGHT_WARPGROUP_MMA(32)
LIGHT_WARPGROUP_MMA(48)
LIGHT_WARPGROUP_MMA(64)
LIGHT_WARPGROUP_MMA(80)
LIGHT_WARPGROUP_MMA(96)
LIGHT_WARPGROUP_MMA(112)
LIGHT_WARPGROUP_MMA(128)
LIGHT_WARPGROUP_MMA(144)
LIGHT_WARPGROUP_MMA(160)
LIGHT_WARPGROUP_MMA(176)
#undef LIGHT_WARPGROUP_MMA

#define LIGHT_WARPGROUP_MMA_E4M3(tokens)                      \
  template <>                                                 \
  struct WarpgroupMma<E4M3, tokens> {                         \
    using Shared = gmma::MMA_64x##tokens##x32_F32E4M3E4M3_SS_TN<>; \
  };
LIGHT_WARPGROUP_MMA_E4M3(8)
LIGHT_WARPGROUP_MMA_E4M3(16)
LIGHT_WARPGROUP_MMA_E4M3(24)
LIGHT_WARPGROUP_MMA_E4M3(32)
LIGHT_WARPGROUP_MMA_E4M3(48)
LIGHT_WARPGROUP_MMA_E4M3(64)
LIGHT_WARPGROUP_MMA_E4M3(80)
LIGHT_WARPGROUP_MMA_E4M3(96)
LIGHT_WARPGROUP_MMA_E4M3(112)
LIGHT_WARPGROUP_MMA_E4M3(128)
#undef LIGHT_WARPGROUP_MMA_E4M3

constexpr gmma::ScaleOut kAdd = gmma::ScaleOut::One, kOverwrite = gmma::ScaleOut::Zero;

template <class Element, int Tokens, int Sums, int... I>
__device__ __forceinline__ void mma_shared(unsigned long long weights, unsigned long long tokens,
                                           float (&sums)[Sums], cute::int_sequence<I...>,
                                           gmma::ScaleOut before = kAdd) {
  WarpgroupMma<Element, Tokens>::Shared::fma(weights, tokens, sums[I]..., before);
}

template <class Element, int Tokens, int Sums, int... I>
__device__ __forceinline__ void mma_registers(const unsigned (&weights)[4],
                                              unsigned long long tokens, float (&sums)[Sums],
                                              cute::int_sequence<I...>) {
  WarpgroupMma<Element, Tokens>::Registers::fma(weights[0], weights[1], weights[2], weights[3],
                                                tokens, sums[I]...);
}

// Two 8 x 8 matrices of 16-bit elements from registers to shared memory, transposed.
__device__ __forceinline__ void store_matrices_transposed(unsigned address, unsigned r0,
                                                          unsigned r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(r0), "r"(r1)
               : "memory");
}

__device__ __forceinline__ void store_matrix_transposed(unsigned address, unsigned r0) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(r0)
               : "memory");
}

}  // namespace light
