// Codes of a row with one scale: what the packing of rows and the exchange share.
#pragma once

namespace light {

constexpr float kLeastMagnitude = 1e-30f;  // of elements that are not all zeros by their scale

// To the nearest integer, ties to even; NaN becomes 0.
struct Int8 {
  static constexpr float kLargest = 127.0f;

  __device__ static unsigned short two(float first, float second) {
    return __byte_perm(__float2int_rn(first), __float2int_rn(second), 0x0040);
  }
};

template <typename Code>
__device__ inline float scale_of(float magnitude) {
  return magnitude < kLeastMagnitude ? 0.0f : magnitude / Code::kLargest;  // of NaN: NaN
}

template <typename Code>
__device__ inline float inverse_of(float magnitude) {
  return magnitude < kLeastMagnitude ? 0.0f : Code::kLargest / magnitude;
}

}  // namespace light
