// The names of float16: kernels run on the host in bfloat16 and float32 only.
#pragma once

struct __half {
  unsigned short bits;
};

float __half2float(__half value);
__half __float2half_rn(float number);
