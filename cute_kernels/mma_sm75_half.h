// mma.m16n8k8 with fp16 accumulators, the atom that CuTe lacks for Turing: GeForce Turing runs it
// at twice the rate of the one with fp32 accumulators.
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k8"), lane 4g + t, lo before hi:
//     A  a0: row g, depth 2t, + 1      a1: row g + 8, the same depth
//     B  b0: column g, depth 2t, + 1
//     C  c0: row g, column 2t, + 1     c1: row g + 8, the same columns
#pragma once

#include <cute/arch/mma_sm75.hpp>
#include <cute/atom/mma_traits.hpp>

namespace cute {

struct SM75_16x8x8_F16F16F16F16_TN {
  using DRegisters = uint32_t[2];
  using ARegisters = uint32_t[2];
  using BRegisters = uint32_t[1];
  using CRegisters = uint32_t[2];

  CUTE_HOST_DEVICE static void fma(uint32_t &d0, uint32_t &d1, const uint32_t &a0,
                                   const uint32_t &a1, const uint32_t &b0, const uint32_t &c0,
                                   const uint32_t &c1) {
#if defined(CUTE_ARCH_MMA_SM75_ENABLED)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3}, {%4}, {%5, %6};"
        : "=r"(d0), "=r"(d1)
        : "r"(a0), "r"(a1), "r"(b0), "r"(c0), "r"(c1));
#else
    CUTE_INVALID_CONTROL_PATH("mma.m16n8k8 with fp16 accumulators needs sm_75");
#endif
  }
};

template <>
struct MMA_Traits<SM75_16x8x8_F16F16F16F16_TN> {
  using ValTypeD = half_t;
  using ValTypeA = half_t;
  using ValTypeB = half_t;
  using ValTypeC = half_t;

  using Shape_MNK = Shape<_16, _8, _8>;
  using ThrID = Layout<_32>;
  // ((t, g), (lo or hi, row half)) -> row + 16 * column
  using ALayout =
      Layout<Shape<Shape<_4, _8>, Shape<_2, _2>>, Stride<Stride<_32, _1>, Stride<_16, _8>>>;
  using BLayout = Layout<Shape<Shape<_4, _8>, _2>, Stride<Stride<_16, _1>, _8>>;
  using CLayout = ALayout;
};

}  // namespace cute
