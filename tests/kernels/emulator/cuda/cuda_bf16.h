// bfloat16 on the host, for kernels run there.
#pragma once

#include <cstring>

struct __nv_bfloat16 {
  unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const unsigned bits = static_cast<unsigned>(value.bits) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline __nv_bfloat16 __float2bfloat16_rn(float number) {
  unsigned bits;
  std::memcpy(&bits, &number, sizeof bits);
  if (number != number) {
    return {0x7fff};
  }
  bits += 0x7fffu + (bits >> 16 & 1);
  return {static_cast<unsigned short>(bits >> 16)};
}
