// Rows between ranks without the host: every rank's arena is addressed by all of them, over NVLink
// or as pinned host memory. Choices are pushed, hidden states are pulled by whoever needs them, and
// the experts' products write each result where its token's rank adds it up. Flags that only grow
// say what is ready. No size is known to the host, so a whole step may be one CUDA graph.
//
// Order between ranks: a kernel that ends before the flag kernel of its stream starts, or a copy for
// which that stream has waited, is visible to a kernel that starts after the peer's wait ended. Waits
// and reads are kernels of their own, so nothing read can be older than the flag.
#include "exchange_bulk.cuh"
#include "exchange_bulk_combine.cuh"
#include "exchange_rows.cuh"
#include "light_ops.h"

namespace light {

__device__ inline void store_flag(unsigned *flag, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ inline unsigned load_flag(const unsigned *flag) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline long long nanoseconds() {
  long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

template <typename Value>
__device__ inline Value *in_arena(void *arena, long long offset) {
  return reinterpret_cast<Value *>(static_cast<char *>(arena) + offset);
}

// After this, thread 0 of one CTA alone goes on: what all CTAs wrote is visible on every device.
__device__ inline bool last_cta(unsigned *ticket) {
  __threadfence_system();
  __syncthreads();
  __shared__ bool last;
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1) == gridDim.x - 1;
    if (last) {
      *ticket = 0;
      __threadfence_system();
    }
  }
  __syncthreads();
  return last;
}

// Announce this rank's next round to all, and wait for theirs: thread p for rank p. One that is late
// is named, and nothing waits for anyone after that.
__device__ inline void meet(const light_exchange_flags &flags) {
  const unsigned round = *flags.counter + 1;
  const int peer = threadIdx.x;
  __syncthreads();
  if (peer < flags.num_ranks) {
    store_flag(in_arena<unsigned>(flags.arenas[peer], flags.offset) + flags.rank, round);
    const unsigned *theirs = in_arena<unsigned>(flags.arenas[flags.rank], flags.offset) + peer;
    const long long deadline = nanoseconds() + flags.timeout_nanoseconds;
    while ((int)(load_flag(theirs) - round) < 0 && *(volatile unsigned *)flags.failure == 0) {
      if (nanoseconds() > deadline) {
        atomicCAS_system(flags.failure, 0u, 1u + peer);
      }
    }
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    *flags.counter = round;
  }
}

// Chunk c ends here: lightmoe.moe.overlap_model.chunk_of.
__device__ inline int end_of_chunk(int chunk, int num_tokens, int num_chunks) {
  return chunk + 1 == num_chunks
             ? num_tokens
             : (int)((long long)num_tokens * (2 * chunk + 1) / (2 * num_chunks - 2));
}

__device__ inline int chunk_of(int token, int num_tokens, int num_chunks) {
  int chunk = 0;
  while (end_of_chunk(chunk, num_tokens, num_chunks) <= token) {
    ++chunk;
  }
  return chunk;
}

__device__ inline void give_choice(const light_exchange_share_args &args, int pair, int choice) {
  for (int peer = 0; peer < args.flags.num_ranks; ++peer) {
    in_arena<int>(args.flags.arenas[peer], args.choice_offset)[pair] = choice;
  }
  if (args.weights != nullptr && choice >= 0) {
    const float weight = args.weights[pair];
    for (int peer = 0; peer < args.flags.num_ranks; ++peer) {
      in_arena<float>(args.flags.arenas[peer], args.weight_offset)[pair] = weight;
    }
  }
}

__device__ inline void give_prefix(const light_exchange_share_args &args, int chunk, int expert,
                                   int value) {
  const long long row = (long long)chunk * args.flags.num_ranks * (args.num_experts + 1);
  for (int peer = 0; peer < args.flags.num_ranks; ++peer) {
    in_arena<int>(args.flags.arenas[peer], args.prefix_offset)[row + expert] = value;
  }
}

__device__ inline void add_load(const light_exchange_share_args &args, int expert, int num_pairs) {
  if (args.load != nullptr && num_pairs != 0) {
    atomicAdd(args.load + expert, num_pairs);
  }
}

__device__ inline void publish(const light_exchange_share_args &args, int first, int step) {
  if (args.hidden == nullptr) {
    return;
  }
  const long long num_vectors = (long long)args.num_rows * args.width_bytes / 16;
  for (long long i = first; i < num_vectors; i += step) {
    static_cast<uint4 *>(args.published)[i] = static_cast<const uint4 *>(args.hidden)[i];
  }
}

// The pairs were sorted by a kernel before.
__device__ void share_sorted(const light_exchange_share_args &args) {
  const int num_pairs = args.num_tokens * args.num_experts_per_token;
  const int prefix_size = args.num_experts + 1;
  const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  for (int pair = first; pair < num_pairs; pair += step) {
    const int token = pair / args.num_experts_per_token;
    const int chunk = chunk_of(token, args.num_tokens, args.num_chunks);
    const int expert = args.experts[pair], index = args.pair_index[pair];
    const int *prefix = args.prefixes + chunk * prefix_size;
    give_choice(args, pair,
                index < 0 ? -1 : (expert << kPositionBits) | (index - prefix[expert]));
  }
  for (int i = first; i < args.num_chunks * prefix_size; i += step) {
    const int expert = i % prefix_size;
    give_prefix(args, i / prefix_size, expert, args.prefixes[i]);
    if (expert < args.num_experts) {
      add_load(args, expert, args.prefixes[i + 1] - args.prefixes[i]);
    }
  }
  publish(args, first, step);
}

// One CTA, a thread a pair: its place is the number of pairs before it that have its expert.
__device__ void share_counted(const light_exchange_share_args &args) {
  constexpr int kMaxExperts = 512, kThreads = 1024, kWarps = kThreads / 32;
  __shared__ short counts[kWarps][kMaxExperts];
  __shared__ int totals[kMaxExperts];
  __shared__ int warp_sums[kWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int real = args.num_real == nullptr ? args.num_rows : min(*args.num_real, args.num_rows);
  for (int i = thread; i < kWarps * kMaxExperts; i += kThreads) {
    counts[i / kMaxExperts][i % kMaxExperts] = 0;
  }
  const int num_pairs = args.num_tokens * args.num_experts_per_token;
  int expert = -1;
  if (thread < real * args.num_experts_per_token) {
    expert = args.experts[thread];
    expert = (unsigned)expert < (unsigned)args.num_experts ? expert : -1;
  }
  __syncthreads();
  unsigned alike = 0;  // lanes with the same expert: a bit of its number at a time
  {
    alike = kAllLanes;
#pragma unroll
    for (int bit = 0; bit < 10; ++bit) {  // the tenth tells those without one
      const bool one = expert >> bit & 1;
      const unsigned ones = __ballot_sync(kAllLanes, one);
      alike &= one ? ones : ~ones;
    }
  }
  const int before = __popc(alike & ((1u << lane) - 1));
  if (expert >= 0 && before == 0) {
    counts[warp][expert] = (short)__popc(alike);
  }
  __syncthreads();
  for (int e = thread; e < args.num_experts; e += kThreads) {
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int here = counts[w][e];
      counts[w][e] = (short)sum;
      sum += here;
    }
    totals[e] = sum;
  }
  __syncthreads();
  if (thread < num_pairs) {
    give_choice(args, thread,
                expert < 0 ? -1 : (expert << kPositionBits) | (counts[warp][expert] + before));
  }
  // Exclusive prefix sums of the totals: at most one expert a thread.
  const int mine = thread < args.num_experts ? totals[thread] : 0;
  add_load(args, thread, mine);
  int sum = mine;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, distance);
    sum += lane >= distance ? other : 0;
  }
  if (lane == 31) {
    warp_sums[warp] = sum;
  }
  __syncthreads();
  for (int w = 0; w < warp; ++w) {
    sum += warp_sums[w];
  }
  if (thread <= args.num_experts) {
    give_prefix(args, 0, thread, sum - mine);
  }
  publish(args, thread, kThreads);
}

}  // namespace light

extern "C" __global__ void __launch_bounds__(1024)
    exchange_share_counted(const __grid_constant__ light_exchange_share_args args) {
  light::wait_for_previous_kernel();
  light::share_counted(args);
  __threadfence_system();
  light::meet(args.flags);
}

extern "C" __global__ void __launch_bounds__(512)
    exchange_share(const __grid_constant__ light_exchange_share_args args) {
  light::wait_for_previous_kernel();
  light::share_sorted(args);
  if (light::last_cta(args.ticket)) {
    light::meet(args.flags);
  }
}

extern "C" __global__ void __launch_bounds__(64)
    exchange_meet(const __grid_constant__ light_exchange_flags args) {
  light::wait_for_previous_kernel();
  __threadfence_system();
  light::meet(args);
}

#define LIGHT_ROWS(name, Args, ...)                                                       \
  extern "C" __global__ void __launch_bounds__(512) name(const __grid_constant__ Args args) { \
    light::wait_for_previous_kernel();                                                    \
    light::__VA_ARGS__(args);                                                             \
  }
LIGHT_ROWS(exchange_pull, light_exchange_pull_args, pull<light::AnyRow>)
LIGHT_ROWS(exchange_pull_int8_f16, light_exchange_pull_args, pull<light::Int8Row<__half>>)
LIGHT_ROWS(exchange_pull_int8_bf16, light_exchange_pull_args, pull<light::Int8Row<__nv_bfloat16>>)
LIGHT_ROWS(exchange_sum_f16, light_exchange_sum_args, sum_pairs<__half>)
LIGHT_ROWS(exchange_sum_bf16, light_exchange_sum_args, sum_pairs<__nv_bfloat16>)
LIGHT_ROWS(exchange_sum_f32, light_exchange_sum_args, sum_pairs<float>)
LIGHT_ROWS(exchange_sum_int8_f16, light_exchange_sum_args, sum_pairs_as_int8<__half>)
LIGHT_ROWS(exchange_sum_int8_bf16, light_exchange_sum_args, sum_pairs_as_int8<__nv_bfloat16>)
LIGHT_ROWS(exchange_give, light_exchange_give_args, give)
LIGHT_ROWS(exchange_combine_f16, light_exchange_combine_args, combine<light::FullRow<__half>>)
LIGHT_ROWS(exchange_combine_bf16, light_exchange_combine_args,
           combine<light::FullRow<__nv_bfloat16>>)
LIGHT_ROWS(exchange_combine_f32, light_exchange_combine_args, combine<light::FullRow<float>>)
LIGHT_ROWS(exchange_combine_int8_f16, light_exchange_combine_args,
           combine<light::Int8Row<__half>>)
LIGHT_ROWS(exchange_combine_int8_bf16, light_exchange_combine_args,
           combine<light::Int8Row<__nv_bfloat16>>)
LIGHT_ROWS(exchange_count, light_exchange_count_args, count_sent)

#if __CUDA_ARCH__ >= 900
extern __shared__ __align__(128) char bulk_memory[];

extern "C" __global__ void __launch_bounds__(32 * light::ring::kWarps)
    exchange_pull_bulk(const __grid_constant__ light_exchange_pull_args args) {
  light::wait_for_previous_kernel();
  light::pull_bulk(args, bulk_memory);
}

#define LIGHT_BULK_COMBINE(suffix, Scalar)                                      \
  extern "C" __global__ void __launch_bounds__(32 * light::ring::kCombineWarps) \
      exchange_combine_bulk_##suffix(                                          \
          const __grid_constant__ light_exchange_combine_args args) {          \
    light::wait_for_previous_kernel();                                         \
    light::combine_bulk<light::FullRow<Scalar>>(args, bulk_memory);            \
  }
LIGHT_BULK_COMBINE(f16, __half)
LIGHT_BULK_COMBINE(bf16, __nv_bfloat16)
LIGHT_BULK_COMBINE(f32, float)
#endif
