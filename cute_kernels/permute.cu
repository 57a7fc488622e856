// Rows packed in the order they are sent, copied as they are or as int8 with a scale per row, and
// int8 rows back to 16 bits.
#include "light_ops.h"
#include "rows.cuh"

namespace light {

constexpr int kVectorsInFlight = 4;
constexpr int kMaxVectors = 8;  // 16-byte vectors of a row to int8 that a thread holds
constexpr float kLeastMagnitude = 1e-30f;  // of a row that is not all zeros to int8
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int source_row(const light_permute_args &args, int row) {
  return args.row_index == nullptr ? row : args.row_index[row];
}

// A warp takes a row at a time.
__device__ void copy_rows(const light_permute_args &args) {
  wait_for_previous_kernel();
  const int num_vectors = args.width / 16, lane = threadIdx.x % 32;
  const int num_warps = gridDim.x * (blockDim.x / 32);
  for (int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < args.num_rows;
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

// Largest magnitude of the CTA's row, in every thread; NaN where an element is not finite.
// Magnitudes of 16-bit numbers are ordered like their bits; what is not finite has the largest.
template <typename Scalar>
__device__ inline float largest_magnitude(const Eight<Scalar> (&vectors)[kMaxVectors]) {
  __shared__ unsigned row_largest;
  if (threadIdx.x == 0) {
    row_largest = 0;
  }
  unsigned largest = 0;
#pragma unroll
  for (int i = 0; i < kMaxVectors; ++i) {
    const uint4 vector = vectors[i].vector;
    largest = __vmaxu2(largest, __vmaxu2(vector.x & 0x7fff7fffu, vector.y & 0x7fff7fffu));
    largest = __vmaxu2(largest, __vmaxu2(vector.z & 0x7fff7fffu, vector.w & 0x7fff7fffu));
  }
  largest = max(largest & 0xffff, largest >> 16);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, offset));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    atomicMax(&row_largest, largest);
  }
  __syncthreads();
  union {
    unsigned short bits;
    Scalar scalar;
  } magnitude;
  magnitude.bits = row_largest;
  const float value = to_float(magnitude.scalar);
  __syncthreads();
  return value - value == 0.0f ? value : __int_as_float(0x7fffffff);
}

// Eight elements to the nearest integer, ties to even; NaN becomes 0.
template <typename Scalar>
__device__ inline uint2 quantize(const Eight<Scalar> &eight, float inverse) {
  union {
    uint2 vector;
    signed char scalars[8];
  } packed;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    packed.scalars[j] = __float2int_rn(__fmul_rn(to_float(eight.scalars[j]), inverse));
  }
  return packed.vector;
}

// A CTA takes a row at a time and holds it in registers: as few warps as can.
template <typename Scalar>
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
    const bool is_zero = magnitude < kLeastMagnitude;  // false for NaN
    const float inverse = is_zero ? 0.0f : 127.0f / magnitude;
    if (threadIdx.x == 0) {
      args.scales[row] = is_zero ? 0.0f : magnitude / 127.0f;
    }
    uint2 *target = static_cast<uint2 *>(args.output) + (long long)row * num_vectors;
#pragma unroll
    for (int i = 0; i < kMaxVectors; ++i) {
      const int place = i * blockDim.x + threadIdx.x;
      if (place < num_vectors) {
        target[place] = quantize<Scalar>(vectors[i], inverse);
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

#define LIGHT_ROWS_KERNEL(name, function)                                               \
  extern "C" __global__ void __launch_bounds__(256)                                     \
      name(const __grid_constant__ light_permute_args args) {                           \
    light::function(args);                                                        \
  }

LIGHT_ROWS_KERNEL(permute_rows, copy_rows)
LIGHT_ROWS_KERNEL(permute_int8_f16, quantize_rows<__half>)
LIGHT_ROWS_KERNEL(permute_int8_bf16, quantize_rows<__nv_bfloat16>)
LIGHT_ROWS_KERNEL(dequantize_rows_f16, dequantize_rows<__half>)
LIGHT_ROWS_KERNEL(dequantize_rows_bf16, dequantize_rows<__nv_bfloat16>)
