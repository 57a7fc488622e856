// Rows packed in the order they are sent, copied as they are, as int8 with a scale per row or as
// e4m3 with one per row or per 128 elements, and int8 rows back to 16 bits.
#include "light_ops.h"
#include "row_codes.cuh"
#include "rows.cuh"

namespace light {

constexpr int kVectorsInFlight = 4;
constexpr int kMaxVectors = 8;  // 16-byte vectors that a thread holds of a row with one scale
constexpr int kLanesPerScale = 16;  // of 8 elements each
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int source_row(const light_permute_args &args, int row) {
  return args.row_index == nullptr ? row : args.row_index[row];
}

// A warp takes a row at a time.
__device__ void copy_rows(const light_permute_args &args) {
  wait_for_previous_kernel();
  const int num_vectors = args.width / 16, lane = threadIdx.x % 32;
  const int num_warps = gridDim.x * (blockDim.x / 32);
  const int num_rows = args.row_count ? min(*args.row_count, args.num_rows) : args.num_rows;
  for (int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < num_rows;
       row += num_warps) {
    const uint4 *source =
        static_cast<const uint4 *>(args.rows) + (long long)source_row(args, row) * num_vectors;
    uint4 *target = static_cast<uint4 *>(args.output) + (long long)row * num_vectors;
    for (int first = lane; first < num_vectors; first += 32 * kVectorsInFlight) {
      uint4 vectors[kVectorsInFlight];
#pragma unroll
      for (int i = 0; i < kVectorsInFlight; ++i) {
        if (first + 32 * i < num_vectors) {
          vectors[i] = source[first + 32 * i];
        }
      }
#pragma unroll
      for (int i = 0; i < kVectorsInFlight; ++i) {
        if (first + 32 * i < num_vectors) {
          target[first + 32 * i] = vectors[i];
        }
      }
    }
  }
}

// Magnitudes of 16-bit numbers are ordered like their bits; what is not finite has the largest.
template <typename Scalar>
__device__ inline unsigned largest_pair(const Eight<Scalar> &eight) {
  const uint4 vector = eight.vector;
  return __vmaxu2(__vmaxu2(vector.x & 0x7fff7fffu, vector.y & 0x7fff7fffu),
                  __vmaxu2(vector.z & 0x7fff7fffu, vector.w & 0x7fff7fffu));
}

__device__ inline unsigned larger_half(unsigned pair) { return max(pair & 0xffff, pair >> 16); }

// NaN for what is not finite.
template <typename Scalar>
__device__ inline float magnitude_of(unsigned bits) {
  union {
    unsigned short bits;
    Scalar scalar;
  } magnitude;
  magnitude.bits = bits;
  const float value = to_float(magnitude.scalar);
  return value - value == 0.0f ? value : __int_as_float(0x7fffffff);
}

// Largest magnitude of the CTA's row, in every thread; NaN where an element is not finite.
template <typename Scalar>
__device__ inline float largest_magnitude(const Eight<Scalar> (&vectors)[kMaxVectors]) {
  __shared__ unsigned row_largest;
  if (threadIdx.x == 0) {
    row_largest = 0;
  }
  unsigned largest = 0;
#pragma unroll
  for (int i = 0; i < kMaxVectors; ++i) {
    largest = __vmaxu2(largest, largest_pair(vectors[i]));
  }
  largest = larger_half(largest);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, offset));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    atomicMax(&row_largest, largest);
  }
  __syncthreads();
  const float value = magnitude_of<Scalar>(row_largest);
  __syncthreads();
  return value;
}

#if __CUDA_ARCH__ >= 890
// To the nearest e4m3, ties to even; NaN becomes 0x7f.
struct Float8 {
  static constexpr float kLargest = 448.0f;

  __device__ static unsigned short two(float first, float second) {
    unsigned short codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
    return codes;
  }
};
#endif

template <typename Code, typename Scalar>
__device__ inline uint2 quantize(const Eight<Scalar> &eight, float inverse) {
  union {
    uint2 vector;
    unsigned short pairs[4];
  } packed;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    packed.pairs[j] = Code::two(__fmul_rn(to_float(eight.scalars[2 * j]), inverse),
                                __fmul_rn(to_float(eight.scalars[2 * j + 1]), inverse));
  }
  return packed.vector;
}

// A CTA takes a row at a time and holds it in registers: as few warps as can.
template <typename Scalar, typename Code>
__device__ void quantize_rows(const light_permute_args &args) {
  wait_for_previous_kernel();
  const int num_vectors = args.width / 8;
  for (int row = blockIdx.x; row < args.num_rows; row += gridDim.x) {
    const long long source = (long long)source_row(args, row) * num_vectors;
    Eight<Scalar> vectors[kMaxVectors];
#pragma unroll
    for (int i = 0; i < kMaxVectors; ++i) {
      const int place = i * blockDim.x + threadIdx.x;
      vectors[i].vector = uint4{};
      if (place < num_vectors) {
        vectors[i] = load_eight<Scalar>(args.rows, source + place);
      }
    }
    const float magnitude = largest_magnitude<Scalar>(vectors);
    const float inverse = inverse_of<Code>(magnitude);
    if (threadIdx.x == 0) {
      args.scales[row] = scale_of<Code>(magnitude);
    }
    uint2 *target = static_cast<uint2 *>(args.output) + (long long)row * num_vectors;
#pragma unroll
    for (int i = 0; i < kMaxVectors; ++i) {
      const int place = i * blockDim.x + threadIdx.x;
      if (place < num_vectors) {
        target[place] = quantize<Code>(vectors[i], inverse);
      }
    }
  }
}

// A warp takes a span of a row at a time, 16 lanes the elements of one scale.
template <typename Scalar, typename Code>
__device__ void quantize_groups(const light_permute_args &args) {
  wait_for_previous_kernel();
  constexpr int kSpanVectors = 32 * kVectorsInFlight;
  const int num_vectors = args.width / 8, lane = threadIdx.x % 32;
  const int num_scales = (num_vectors + kLanesPerScale - 1) / kLanesPerScale;
  const int spans_per_row = (num_vectors + kSpanVectors - 1) / kSpanVectors;
  const unsigned num_spans = args.num_rows * spans_per_row;
  const unsigned num_warps = gridDim.x * (blockDim.x / 32);
  for (unsigned span = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; span < num_spans;
       span += num_warps) {
    const int row = span / spans_per_row, first = span % spans_per_row * kSpanVectors + lane;
    const long long source = (long long)source_row(args, row) * num_vectors;
    Eight<Scalar> vectors[kVectorsInFlight];
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      vectors[i].vector = uint4{};
      if (first + 32 * i < num_vectors) {
        vectors[i] = load_eight<Scalar>(args.rows, source + first + 32 * i);
      }
    }
    unsigned largest[kVectorsInFlight];
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      largest[i] = larger_half(largest_pair(vectors[i]));
#pragma unroll
      for (int offset = kLanesPerScale / 2; offset > 0; offset /= 2) {
        largest[i] = max(largest[i], __shfl_xor_sync(kAllLanes, largest[i], offset));
      }
    }
    uint2 *target = static_cast<uint2 *>(args.output) + (long long)row * num_vectors;
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      const int place = first + 32 * i;
      if (place < num_vectors) {
        const float magnitude = magnitude_of<Scalar>(largest[i]);
        target[place] = quantize<Code>(vectors[i], inverse_of<Code>(magnitude));
        if (lane % kLanesPerScale == 0) {
          args.scales[(long long)row * num_scales + place / kLanesPerScale] =
              scale_of<Code>(magnitude);
        }
      }
    }
  }
}

template <typename Scalar>
__device__ void dequantize_rows(const light_permute_args &args) {
  wait_for_previous_kernel();
  const unsigned num_vectors = args.width / 8;
  const unsigned total = args.num_rows * num_vectors;
#pragma unroll 4
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < total;
       i += gridDim.x * blockDim.x) {
    const int row = i / num_vectors, column = i % num_vectors;
    const int source = source_row(args, row);
    const float scale = args.scales[source];
    union {
      uint2 vector;
      signed char scalars[8];
    } packed;
    packed.vector =
        static_cast<const uint2 *>(args.rows)[(long long)source * num_vectors + column];
    Eight<Scalar> output;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      output.scalars[j] = from_float<Scalar>(__fmul_rn(scale, packed.scalars[j]));
    }
    static_cast<uint4 *>(args.output)[i] = output.vector;
  }
}

}  // namespace light

#define LIGHT_ROWS_KERNEL(name, ...)                          \
  extern "C" __global__ void __launch_bounds__(256)           \
      name(const __grid_constant__ light_permute_args args) { \
    light::__VA_ARGS__(args);                                 \
  }

LIGHT_ROWS_KERNEL(permute_rows, copy_rows)
LIGHT_ROWS_KERNEL(permute_int8_f16, quantize_rows<__half, light::Int8>)
LIGHT_ROWS_KERNEL(permute_int8_bf16, quantize_rows<__nv_bfloat16, light::Int8>)
LIGHT_ROWS_KERNEL(dequantize_rows_f16, dequantize_rows<__half>)
LIGHT_ROWS_KERNEL(dequantize_rows_bf16, dequantize_rows<__nv_bfloat16>)
#if __CUDA_ARCH__ >= 890
LIGHT_ROWS_KERNEL(permute_fp8_row_f16, quantize_rows<__half, light::Float8>)
LIGHT_ROWS_KERNEL(permute_fp8_row_bf16, quantize_rows<__nv_bfloat16, light::Float8>)
LIGHT_ROWS_KERNEL(permute_fp8_g128_f16, quantize_groups<__half, light::Float8>)
LIGHT_ROWS_KERNEL(permute_fp8_g128_bf16, quantize_groups<__nv_bfloat16, light::Float8>)
#endif
