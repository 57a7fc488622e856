// From router logits, or from the hidden rows and the router's weights, to experts, weights and the
// permutation of the pairs, in one launch. topk_gate_choose.cuh chooses, topk_gate_sort.cuh sorts,
// topk_gate_mma.cuh, topk_gate_tiles.cuh and topk_gate_router.cuh multiply; host/topk_gate.cpp says
// how many CTAs work.
#include "topk_gate_choose.cuh"
#include "topk_gate_mma.cuh"
#include "topk_gate_router.cuh"
#include "topk_gate_sort.cuh"
#include "topk_gate_tiles.cuh"

namespace light::gate {

template <int kBytes>
struct Vector;
template <>
struct Vector<2> { using type = unsigned short; };
template <>
struct Vector<4> { using type = unsigned; };
template <>
struct Vector<8> { using type = uint2; };
template <>
struct Vector<16> { using type = uint4; };

// A lane's neighbouring numbers of a row of `num_experts`, as wide as the row allows.
template <int kValues, typename Scalar>
__device__ inline void load_values(const Scalar *row, int first, int num_experts,
                                   float (&values)[kValues]) {
  constexpr int kBytes = kValues * sizeof(Scalar) < 16 ? kValues * sizeof(Scalar) : 16;
  constexpr int kPerVector = kBytes / sizeof(Scalar);
  union {
    typename Vector<kBytes>::type vectors[kValues / kPerVector];
    Scalar scalars[kValues];
  } raw;
  using Source = const typename Vector<kBytes>::type *;
  if (num_experts % kValues == 0 && first < num_experts) {
#pragma unroll
    for (int i = 0; i < kValues / kPerVector; ++i) {
      raw.vectors[i] = __ldcg(reinterpret_cast<Source>(row + first) + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      raw.scalars[i] = first + i < num_experts ? row[first + i] : Scalar(0.0f);
    }
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = to_float(raw.scalars[i]);
  }
}

template <typename Scalar>
struct GivenLogits {
  const Scalar *logits;  // [T, E]
  int num_experts;

  template <int kValues>
  __device__ void load(int token, int first, float (&values)[kValues]) const {
    load_values(logits + (long long)token * num_experts, first, num_experts, values);
  }
  __device__ float logit(int token, int expert) const {
    return to_float(logits[(long long)token * num_experts + expert]);
  }
};

// Sums over parts of the depth, in order; in halves: the first half's sum and that of the rest.
template <int kPartDepth, bool kInHalves>
struct SummedLogits {
  const float *partials;  // [T, parts, E]
  int num_experts, width;

  __device__ int num_parts() const { return (width + kPartDepth - 1) / kPartDepth; }
  __device__ int num_first() const {
    return kInHalves ? first_slices_of(num_parts()) : num_parts();
  }

  template <int kValues>
  __device__ void load(int token, int first, float (&values)[kValues]) const {
    // Parts on their way, as many as registers allow.
    constexpr int kAtOnce = kValues <= 2 ? 16 : kValues <= 8 ? 32 / kValues : 1;
    const float *row = partials + (long long)token * num_parts() * num_experts;
    float firsts[kValues];
    clear(values);
    clear(firsts);
    for (int begin = 0; begin < num_parts(); begin += kAtOnce) {
      float parts[kAtOnce][kValues];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i < num_parts()) {
          load_values(row + (begin + i) * num_experts, first, num_experts, parts[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (kInHalves && begin + i == num_first()) {
          copy(values, firsts);
          clear(values);
        }
        if (begin + i < num_parts()) {
          add(parts[i], values);
        }
      }
    }
    add(firsts, values);
  }
  __device__ float logit(int token, int expert) const {
    const float *part = partials + (long long)token * num_parts() * num_experts + expert;
    float first = 0.0f, sum = 0.0f;
    for (int i = 0; i < num_first(); ++i) {
      first += __ldcg(part + i * num_experts);
    }
    for (int i = num_first(); i < num_parts(); ++i) {
      sum += __ldcg(part + i * num_experts);
    }
    return first + sum;
  }

 private:
  template <int kValues>
  static __device__ void clear(float (&values)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = 0.0f;
    }
  }
  template <int kValues>
  static __device__ void copy(const float (&source)[kValues], float (&target)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      target[i] = source[i];
    }
  }
  template <int kValues>
  static __device__ void add(const float (&addend)[kValues], float (&values)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = addend[i] + values[i];
    }
  }
};

// The last pair of each lane stays in its registers.
template <int kLanes, int kValues, class Source>
__device__ Pair choose_tokens(const light_topk_gate_args &args, const Source &source,
                              TokenRange tokens, bool sorted, Sorter &sorter) {
  const int lane = threadIdx.x % kLanes, k = args.sort.num_experts_per_token;
  Pair last;
  const bool of_best_groups = args.num_groups_per_token < args.num_groups;
  const bool of_all = !args.sigmoid && !args.renormalize;  // the experts' scores add up to one
  constexpr int kAtOnce = 32 / kLanes;
#pragma unroll 1
  for (int first = tokens.begin; first < tokens.end; first += kAtOnce) {
    const int token = first + threadIdx.x % 32 / kLanes;
    const bool exists = token < tokens.end;
    float logits[kValues];
    unsigned keys[kValues];
    source.load(exists ? token : first, lane * kValues, logits);
    make_keys(args, logits, lane, keys);
    float sum = 1.0f;
    if (of_best_groups) {
      sum = of_all ? softmax_sum<kLanes>(keys) : sum;
      keep_best_groups<kLanes>(args, lane, keys);
    }
    const Choice choice =
        choose<kLanes, kValues>(keys, k, lane, sorter.chosen() + threadIdx.x % 32 - lane);
    const bool chosen = exists && lane < k;
    last = Pair{};
    if (chosen) {
      last = {token * k + lane, token, choice.expert};
    }
    if (sorted) {
      sorter.count(last);
      if (first + kAtOnce >= tokens.end) {
        sorter.counted();
      }
    }
    // The weights come while other warps exchange the counts.
    if (of_all && !of_best_groups) {
      sum = softmax_sum<kLanes>(keys);
    }
    float score = 0.0f;
    if (args.sigmoid) {
      score = chosen ? sigmoid(without_nan(source.logit(token, choice.expert))) : 0.0f;
    } else {
      score = relative_exp(from_ordered_key(choice.key), from_ordered_key(choice.best_key));
    }
    if (args.renormalize) {
      // Sigmoid scores may all be 0: DeepSeek-V3 adds this, too little to change any other sum.
      constexpr int kChosenLanes = kLanes < kMaxExpertsPerToken ? kLanes : kMaxExpertsPerToken;
      sum = lanes_sum<kChosenLanes>(lane < k ? score : 0.0f) + 1e-20f;
    }
    if (chosen) {
      last.weight = score / sum * args.scale;
      args.experts[last.index] = last.expert;
      args.weights[last.index] = last.weight;
    }
  }
  if (sorted && tokens.begin == tokens.end) {
    sorter.counted();
  }
  return last;
}

// For one of kExpertSizes.
template <int kSize, class Source>
__device__ Pair choose_tokens_of(const light_topk_gate_args &args, const Source &source,
                                 TokenRange tokens, bool sorted, Sorter &sorter) {
  constexpr int kLanes = kSize <= kFewExperts ? kSize : 32;
  return choose_tokens<kLanes, kSize / kLanes>(args, source, tokens, sorted, sorter);
}

template <class Source>
__device__ Pair choose_tokens_of_any(const light_topk_gate_args &args, const Source &source,
                                     TokenRange tokens, bool sorted, Sorter &sorter) {
  const int num_experts = args.sort.num_experts;
  if (num_experts <= 8) {
    return choose_tokens_of<8>(args, source, tokens, sorted, sorter);
  }
  if (num_experts <= 32) {
    return choose_tokens_of<32>(args, source, tokens, sorted, sorter);
  }
  if (num_experts <= 64) {
    return choose_tokens_of<64>(args, source, tokens, sorted, sorter);
  }
  if (num_experts <= 128) {
    return choose_tokens_of<128>(args, source, tokens, sorted, sorter);
  }
  if (num_experts <= 256) {
    return choose_tokens_of<256>(args, source, tokens, sorted, sorter);
  }
  return choose_tokens_of<512>(args, source, tokens, sorted, sorter);
}

// kSize 0: any of kExpertSizes.
template <int kSize, class Source>
__device__ void route(const light_topk_gate_args &args, const Source &source, int cta,
                      Sorter &sorter) {
  const bool sorted = args.sort.offsets != nullptr;
  if (sorted) {
    sorter.load_round();
  }
  const TokenRange tokens = TokenRange::of_warp(args.sort, cta);
  Pair last;
  if constexpr (kSize == 0) {
    last = choose_tokens_of_any(args, source, tokens, sorted, sorter);
  } else {
    last = choose_tokens_of<kSize>(args, source, tokens, sorted, sorter);
  }
  if (sorted) {
    const int num_tokens = tokens.end - tokens.begin;
    const int at_once = kSize > 0 ? tokens_at_once(kSize) : tokens_at_once(args.sort.num_experts);
    const int num_last = num_tokens > 0 ? (num_tokens - 1) % at_once + 1 : 0;
    sorter.place({tokens.begin, tokens.end - num_last}, args.experts, args.weights, last);
  }
}

template <int kSize, typename Scalar>
__device__ void gate_from_logits(const light_topk_gate_args &args) {
  extern __shared__ __align__(16) char shared[];
  Sorter sorter(args.sort, blockIdx.x, gridDim.x, true, shared);
  if (args.sort.offsets != nullptr) {
    sorter.clear();
  }
  wait_for_previous_kernel();
  const GivenLogits<Scalar> source{static_cast<const Scalar *>(args.logits),
                                   args.sort.num_experts};
  route<kSize>(args, source, blockIdx.x, sorter);
}

// The tokens are finished by the CTAs that are done last.
template <typename Hidden, typename Router>
__device__ void gate_from_hidden(const light_topk_gate_args &args) {
  const int num_experts = args.sort.num_experts;
  Exchange *exchange = static_cast<Exchange *>(args.sort.workspace);
  float *partials = reinterpret_cast<float *>(exchange + 1);
  extern __shared__ __align__(16) char shared[];
  using Mma = RouterMma<Hidden, Router>;
  if constexpr (Mma::kExists) {
    write_slices<Mma>(args, partials);
  } else {
    RouterTeam<Hidden, Router> team(args.hidden, args.router_weight, num_experts, args.width,
                                    reinterpret_cast<float *>(shared));
    write_partials(team, partials, args.sort.num_tokens, num_experts);
  }
  const int num_ctas = args.sort.num_ctas;
  const int cta = arrive_among_last(&exchange->router_counter, gridDim.x, num_ctas);
  if (cta < 0) {
    return;
  }
  Sorter sorter(args.sort, cta, num_ctas, true, shared);
  if (args.sort.offsets != nullptr) {
    sorter.clear();
  }
  const SummedLogits<Mma::kExists ? kSliceDepth : kUnitDepth, Mma::kExists> source{
      partials, num_experts, args.width};
  route<0>(args, source, cta, sorter);
}

template <typename Scalar, int kExperts, int kTokens>
__device__ void router_tiles(const light_router_logits_args &args) {
  extern __shared__ __align__(16) char shared[];
  RouterTiles<RouterMma<Scalar, Scalar>, kExperts, kTokens>(args, shared).write_all();
}

template <typename Hidden, typename Router>
__device__ void router_logits(const light_router_logits_args &args) {
  extern __shared__ __align__(16) char shared[];
  RouterTeam<Hidden, Router> team(args.hidden, args.router_weight, args.num_experts, args.width,
                                  reinterpret_cast<float *>(shared));
  write_logits(team, args);
}

__device__ void sort_given_pairs(const light_sort_pairs_args &args) {
  extern __shared__ __align__(16) char shared[];
  const int num_experts = args.sort.num_experts, k = args.sort.num_experts_per_token;
  Sorter sorter(args.sort, blockIdx.x, gridDim.x, false, shared);
  sorter.clear();
  wait_for_previous_kernel();
  sorter.load_round();
  const TokenRange tokens = TokenRange::of_warp(args.sort, blockIdx.x);
  for (int first = tokens.begin * k; first < tokens.end * k; first += 32) {
    const int pair = first + threadIdx.x % 32;
    const int expert = pair < tokens.end * k ? args.experts[pair] : -1;
    sorter.count({pair, 0, expert < num_experts ? max(expert, -1) : -1});
  }
  sorter.counted();
  sorter.place(tokens, args.experts, args.weights, Pair{});
}

}  // namespace light::gate

#define LIGHT_GATE_FROM_LOGITS(name, size, Scalar)                                 \
  extern "C" __global__ void __launch_bounds__(light::gate::most_threads(size), 1) \
      topk_gate_logits_##name(const __grid_constant__ light_topk_gate_args args) { \
    light::gate::gate_from_logits<size, Scalar>(args);                             \
  }
#define LIGHT_GATE_OF_SIZE(size)                         \
  LIGHT_GATE_FROM_LOGITS(f32_e##size, size, float)       \
  LIGHT_GATE_FROM_LOGITS(f16_e##size, size, __half)      \
  LIGHT_GATE_FROM_LOGITS(bf16_e##size, size, __nv_bfloat16)
#define LIGHT_GATE_FROM_HIDDEN(name, Hidden, Router)                               \
  extern "C" __global__ void __launch_bounds__(512, 1)                             \
      topk_gate_router_##name(const __grid_constant__ light_topk_gate_args args) { \
    light::gate::gate_from_hidden<Hidden, Router>(args);                           \
  }
#define LIGHT_ROUTER_LOGITS(name, Hidden, Router)                                   \
  extern "C" __global__ void __launch_bounds__(512, 1)                              \
      router_logits_##name(const __grid_constant__ light_router_logits_args args) { \
    light::gate::router_logits<Hidden, Router>(args);                               \
  }
#define LIGHT_ROUTER_TILE(name, Scalar, experts, tokens)               \
  extern "C" __global__ void __launch_bounds__(256, 1)                 \
      router_logits_##name##_e##experts##_t##tokens(                   \
          const __grid_constant__ light_router_logits_args args) {     \
    light::gate::router_tiles<Scalar, experts, tokens>(args);          \
  }
#define LIGHT_ROUTER_TILES(name, Scalar)    \
  LIGHT_ROUTER_TILE(name, Scalar, 16, 64)   \
  LIGHT_ROUTER_TILE(name, Scalar, 16, 128)  \
  LIGHT_ROUTER_TILE(name, Scalar, 32, 64)   \
  LIGHT_ROUTER_TILE(name, Scalar, 32, 128)  \
  LIGHT_ROUTER_TILE(name, Scalar, 64, 64)   \
  LIGHT_ROUTER_TILE(name, Scalar, 64, 128)

LIGHT_GATE_OF_SIZE(8)
LIGHT_GATE_OF_SIZE(32)
LIGHT_GATE_OF_SIZE(64)
LIGHT_GATE_OF_SIZE(128)
LIGHT_GATE_OF_SIZE(256)
LIGHT_GATE_OF_SIZE(512)
LIGHT_GATE_FROM_HIDDEN(f16_f16, __half, __half)
LIGHT_GATE_FROM_HIDDEN(f16_f32, __half, float)
LIGHT_GATE_FROM_HIDDEN(bf16_bf16, __nv_bfloat16, __nv_bfloat16)
LIGHT_GATE_FROM_HIDDEN(bf16_f32, __nv_bfloat16, float)
LIGHT_ROUTER_LOGITS(f16_f32, __half, float)
LIGHT_ROUTER_LOGITS(bf16_f32, __nv_bfloat16, float)
LIGHT_ROUTER_TILES(f16, __half)
#if __CUDA_ARCH__ >= 800
LIGHT_ROUTER_TILES(bf16, __nv_bfloat16)
#else
LIGHT_ROUTER_LOGITS(bf16_bf16, __nv_bfloat16, __nv_bfloat16)
#endif
#if __CUDA_ARCH__ >= 900
LIGHT_ROUTER_TILE(f16, __half, 128, 128)
LIGHT_ROUTER_TILE(bf16, __nv_bfloat16, 128, 128)
#endif

extern "C" __global__ void __launch_bounds__(1024, 1)
    sort_pairs(const __grid_constant__ light_sort_pairs_args args) {
  light::gate::sort_given_pairs(args);
}
