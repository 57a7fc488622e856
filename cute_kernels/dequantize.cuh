// Codes to 16-bit weights in registers: scale * (code - zero), one rounding, two weights at a time.
//
// A code becomes a float by writing its bits under the exponent that gives them weight one: 0x6400
// is the half 1024, 0x4300 the bfloat16 128, 0x4b000000 the float 2^23. Subtracting that constant
// together with the zero point is exact, so only the product with the scale rounds.
#pragma once

#include "instructions.cuh"

namespace light {

__device__ __forceinline__ unsigned twice(unsigned low) { return __byte_perm(low, low, 0x1010); }

// (value & mask) | magic
__device__ __forceinline__ unsigned insert_bits(unsigned value, unsigned mask, unsigned magic) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "r"(mask), "r"(magic));
  return result;
}

template <class Element>
struct Pairs;  // two 16-bit values in a register

template <>
struct Pairs<Float16> {
  static __device__ __forceinline__ unsigned add(unsigned a, unsigned b) {
    unsigned result;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }
  static __device__ __forceinline__ unsigned subtract(unsigned a, unsigned b) {
    unsigned result;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }
  static __device__ __forceinline__ unsigned multiply(unsigned a, unsigned b) {
    unsigned result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }
  static __device__ __forceinline__ unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
    unsigned result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
  }
};

#if __CUDA_ARCH__ >= 800
template <>
struct Pairs<BFloat16> {
  static __device__ __forceinline__ unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
    unsigned result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
  }
  static __device__ __forceinline__ unsigned subtract(unsigned a, unsigned b) {
    return multiply_add(b, 0xbf80bf80, a);  // a - 1.0 * b
  }
  static __device__ __forceinline__ unsigned multiply(unsigned a, unsigned b) {
    return multiply_add(a, b, 0x80008000);  // a * b - 0.0
  }
};
#endif

// Scale and zero point of one row of weights in one group, ready for a pair of them.
template <class Element, int NumBits>
class Dequantizer;

template <>
class Dequantizer<Float16, 4> {
 public:
  // Both take fp16 bits.
  __device__ __forceinline__ void set_scale(unsigned scale) { scale_ = twice(scale); }
  __device__ __forceinline__ void set_zero(unsigned zero) {
    offset_ = Pairs<Float16>::add(twice(zero), 0x64006400);
    shifted_offset_ = Pairs<Float16>::subtract(0xd400d400, twice(zero));  // -(64 + zero)
  }

  // The weights of one of the fragment's four registers: nibbles `index` and `index` + 4.
  template <int Index>
  __device__ __forceinline__ unsigned weights(unsigned codes) const {
    const unsigned word = Index < 2 ? codes : codes >> 8;
    if constexpr (Index % 2 == 0) {
      const unsigned values = insert_bits(word, 0x000f000f, 0x64006400);
      return Pairs<Float16>::multiply(Pairs<Float16>::subtract(values, offset_), scale_);
    } else {
      // 1024 + 16 * code; a sixteenth of it is 64 + code
      const unsigned values = insert_bits(word, 0x00f000f0, 0x64006400);
      return Pairs<Float16>::multiply(
          Pairs<Float16>::multiply_add(values, 0x2c002c00, shifted_offset_), scale_);
    }
  }

 private:
  unsigned scale_;
  unsigned offset_;
  unsigned shifted_offset_;
};

template <>
class Dequantizer<Float16, 8> {
 public:
  __device__ __forceinline__ void set_scale(unsigned scale) { scale_ = twice(scale); }
  __device__ __forceinline__ void set_zero(unsigned zero) {
    offset_ = Pairs<Float16>::add(twice(zero), 0x64006400);
  }

  // Bytes 2 * `half` and 2 * `half` + 1.
  __device__ __forceinline__ unsigned weights(unsigned codes, int half) const {
    const unsigned values = __byte_perm(codes, 0x64646464, half ? 0x4342 : 0x4140);
    return Pairs<Float16>::multiply(Pairs<Float16>::subtract(values, offset_), scale_);
  }

 private:
  unsigned scale_;
  unsigned offset_;
};

#if __CUDA_ARCH__ >= 800
template <>
class Dequantizer<BFloat16, 4> {
 public:
  __device__ __forceinline__ void set_scale(unsigned scale) { scale_ = twice(scale); }
  __device__ __forceinline__ void set_zero(unsigned zero) {
    offset_ = Pairs<BFloat16>::multiply_add(twice(zero), 0x3f803f80, 0x43004300);
  }

  template <int Index>
  __device__ __forceinline__ unsigned weights(unsigned codes) const {
    const unsigned values = insert_bits(codes >> (4 * Index), 0x000f000f, 0x43004300);
    return Pairs<BFloat16>::multiply(Pairs<BFloat16>::subtract(values, offset_), scale_);
  }

 private:
  unsigned scale_;
  unsigned offset_;
};

template <>
class Dequantizer<BFloat16, 8> {
 public:
  __device__ __forceinline__ void set_scale(unsigned scale) { scale_ = twice(scale); }
  __device__ __forceinline__ void set_zero(unsigned zero) {
    offset_ = __uint_as_float(zero << 16) + 8388608.0f;
  }

  __device__ __forceinline__ unsigned weights(unsigned codes, int half) const {
    const float low = __uint_as_float(__byte_perm(codes, 0x4b000000, half ? 0x7442 : 0x7440));
    const float high = __uint_as_float(__byte_perm(codes, 0x4b000000, half ? 0x7443 : 0x7441));
    const unsigned values = BFloat16::pack(low - offset_, high - offset_);
    return Pairs<BFloat16>::multiply(values, scale_);
  }

 private:
  unsigned scale_;
  float offset_;
};
#endif

// The zero point of symmetric codes, 8 or 128, in the element's bits.
template <class Element, int NumBits>
constexpr unsigned kSymmetricZero =
    Element::kIsHalf ? (NumBits == 4 ? 0x4800 : 0x5800) : (NumBits == 4 ? 0x4100 : 0x4300);

// The fragment of 16 rows at a step of 16 in a block's 64 of depth: of row g = lane / 4 (`upper`)
// in a0 and a2, of row g + 8 in a1 and a3. The lane's 16 bytes hold four steps of 4 bits or two of
// 8.
template <class Element, int NumBits>
__device__ __forceinline__ void dequantize_fragment(const uint4 &packed, int step,
                                                    const Dequantizer<Element, NumBits> &upper,
                                                    const Dequantizer<Element, NumBits> &lower,
                                                    unsigned (&a)[4]) {
  if constexpr (NumBits == 4) {
    const unsigned codes = step == 0   ? packed.x
                           : step == 1 ? packed.y
                           : step == 2 ? packed.z
                                       : packed.w;
    a[0] = upper.template weights<0>(codes);
    a[1] = lower.template weights<1>(codes);
    a[2] = upper.template weights<2>(codes);
    a[3] = lower.template weights<3>(codes);
  } else {
    const unsigned first = step % 2 ? packed.z : packed.x;
    const unsigned second = step % 2 ? packed.w : packed.y;
    a[0] = upper.weights(first, 0);
    a[1] = lower.weights(first, 1);
    a[2] = upper.weights(second, 0);
    a[3] = lower.weights(second, 1);
  }
}

}  // namespace light
