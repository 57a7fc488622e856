// The heads of a fused product on their way to attention: queries and keys normed and turned by their
// positions, keys and values put into the pages of a layer. A group of lanes takes a head of a token,
// a lane columns 4i .. 4i + 3 together with those half a head behind, which turn with them.
//
// The roundings are those of the reference in 16 bits: of the norm, of both products, of their sum.
#include "light_ops.h"
#include "rows.cuh"

namespace light::rotary {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename Scalar>
union Four {
  uint2 vector;
  Scalar scalars[4];
};

// Column i of `first` turns with column i of `second`.
template <typename Scalar>
struct Pairs {
  Four<Scalar> first, second;
};

// `head` is the begin of a head, or of a row of a table or a weight as wide.
template <typename Scalar>
__device__ inline Pairs<Scalar> load_pairs(const Scalar *head, int place, int width) {
  Pairs<Scalar> pairs;
  pairs.first.vector = *reinterpret_cast<const uint2 *>(head + 4 * place);
  pairs.second.vector = *reinterpret_cast<const uint2 *>(head + width / 2 + 4 * place);
  return pairs;
}

template <typename Scalar>
__device__ inline void store_pairs(Scalar *head, int place, int width,
                                   const Pairs<Scalar> &pairs) {
  *reinterpret_cast<uint2 *>(head + 4 * place) = pairs.first.vector;
  *reinterpret_cast<uint2 *>(head + width / 2 + 4 * place) = pairs.second.vector;
}

template <typename Scalar>
__device__ inline float add_squares(const Four<Scalar> &four, float squares) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float value = to_float(four.scalars[j]);
    squares = __fmaf_rn(value, value, squares);
  }
  return squares;
}

// 1 / the root mean square of a head, the same bits in all lanes of its group.
template <typename Scalar>
__device__ inline float inverse_magnitude(const Scalar *head, int lane, bool exists,
                                          const light_rotary_cache_args &args) {
  float squares = 0.0f;
  if (exists) {
    for (int i = lane; i < args.width / 8; i += args.lanes_per_head) {
      const Pairs<Scalar> pairs = load_pairs(head, i, args.width);
      squares = add_squares(pairs.second, add_squares(pairs.first, squares));
    }
  }
  for (int offset = args.lanes_per_head / 2; offset > 0; offset /= 2) {
    squares = __fadd_rn(squares, __shfl_xor_sync(kAllLanes, squares, offset));
  }
  const float mean = __fdiv_rn(squares, static_cast<float>(args.width));
  return rsqrtf(__fadd_rn(mean, args.epsilon));
}

template <typename Scalar>
__device__ inline void scale(Four<Scalar> &four, const Four<Scalar> &weight, float inverse) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    four.scalars[j] = from_float<Scalar>(
        __fmul_rn(to_float(weight.scalars[j]), __fmul_rn(inverse, to_float(four.scalars[j]))));
  }
}

template <typename Scalar>
__device__ inline float rounded_product(Scalar left, Scalar right) {
  return to_float(from_float<Scalar>(__fmul_rn(to_float(left), to_float(right))));
}

template <typename Scalar>
__device__ inline Pairs<Scalar> turn(const Pairs<Scalar> &pairs, const Pairs<Scalar> &cos,
                                     const Pairs<Scalar> &sin) {
  Pairs<Scalar> turned;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Scalar first = pairs.first.scalars[j], second = pairs.second.scalars[j];
    turned.first.scalars[j] =
        from_float<Scalar>(__fadd_rn(rounded_product(first, cos.first.scalars[j]),
                                     rounded_product(second, sin.first.scalars[j])));
    turned.second.scalars[j] =
        from_float<Scalar>(__fadd_rn(rounded_product(second, cos.second.scalars[j]),
                                     rounded_product(first, sin.second.scalars[j])));
  }
  return turned;
}

// Where a head of a token goes: its queries beside each other, its keys and values into the pages.
template <typename Scalar>
__device__ inline Scalar *target_of(const light_rotary_cache_args &args, long long token,
                                    int head) {
  const int num_heads = args.num_heads, num_kv_heads = args.num_kv_heads;
  if (head < num_heads) {
    return static_cast<Scalar *>(args.query) + (token * num_heads + head) * args.width;
  }
  const int kv_head = head - num_heads;
  const bool is_key = kv_head < num_kv_heads;
  void *pages = is_key ? args.keys : args.values;
  return static_cast<Scalar *>(pages) +
         (args.cache_rows[token] * num_kv_heads + (is_key ? kv_head : kv_head - num_kv_heads)) *
             args.width;
}

template <typename Scalar>
__device__ void rotary_cache(const light_rotary_cache_args &args) {
  pass_on_and_wait();
  const unsigned heads_per_token = args.num_heads + 2 * args.num_kv_heads;
  const unsigned lanes = args.lanes_per_head;
  const unsigned unit = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes, width = args.width;
  const int token = unit / heads_per_token, number = unit % heads_per_token;
  const bool exists = token < args.num_tokens;
  const bool turns = number < args.num_heads + args.num_kv_heads;
  const long long begin = static_cast<long long>(unit) * width;
  const Scalar *head = static_cast<const Scalar *>(args.heads) + begin;
  const Scalar *weight = static_cast<const Scalar *>(
      number < args.num_heads ? args.query_weight : args.key_weight);
  float inverse = 1.0f;
  if (args.query_weight != nullptr) {  // for all lanes of a warp, which meet
    inverse = inverse_magnitude(head, lane, exists && turns, args);
  }
  if (!exists) {
    return;
  }
  const Scalar *cos = static_cast<const Scalar *>(args.cos) + token * args.table_stride;
  const Scalar *sin = static_cast<const Scalar *>(args.sin) + token * args.table_stride;
  Scalar *target = target_of<Scalar>(args, token, number);
  for (int i = lane; i < width / 8; i += args.lanes_per_head) {
    Pairs<Scalar> pairs = load_pairs(head, i, width);
    if (turns) {
      if (weight != nullptr) {
        const Pairs<Scalar> weights = load_pairs(weight, i, width);
        scale(pairs.first, weights.first, inverse);
        scale(pairs.second, weights.second, inverse);
      }
      pairs = turn(pairs, load_pairs(cos, i, width), load_pairs(sin, i, width));
    }
    store_pairs(target, i, width, pairs);
  }
}

}  // namespace light::rotary

extern "C" __global__ void __launch_bounds__(128)
    rotary_cache_f16(const __grid_constant__ light_rotary_cache_args args) {
  light::rotary::rotary_cache<__half>(args);
}

extern "C" __global__ void __launch_bounds__(128)
    rotary_cache_bf16(const __grid_constant__ light_rotary_cache_args args) {
  light::rotary::rotary_cache<__nv_bfloat16>(args);
}
