// The launches of the exchange over arenas that all ranks address.
#include <algorithm>
#include <string>

#include "../exchange_sizes.h"
#include "launch.h"

namespace light {
namespace {

constexpr int kThreads = 512, kFlagThreads = 64;
constexpr int kBulkCopiesFrom = 90;
constexpr int kFewestPulledTokens = 4096;  // in bulk: with fewer, the plain kernel's warps are faster
constexpr int kFewestBulkTokens = 1024;  // of a sum: fewer are cut into parts of rows

// Kernels that wait for other ranks, or that others wait for, do not start ahead of their turn:
// waiting they would hold room that a product needs.
constexpr LaunchOptions kInTurn{false, 0, false};

light_status check_group(const char *stem, int rank, int num_ranks) {
  if (num_ranks < 1 || num_ranks > LIGHT_MAX_RANKS || rank < 0 || rank >= num_ranks) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: rank %d of %d ranks; it takes 1 to %d", stem, rank,
                num_ranks, LIGHT_MAX_RANKS);
  }
  return LIGHT_OK;
}

light_status check_width(const char *stem, int width_bytes, int num_experts_per_token) {
  if (width_bytes < 16 || width_bytes % 16 != 0) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: rows of %d bytes, which must be a multiple of 16", stem,
                width_bytes);
  }
  if (num_experts_per_token < 1 || num_experts_per_token > 16) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: %d experts per token; it takes 1 to 16", stem,
                num_experts_per_token);
  }
  return LIGHT_OK;
}

// The number of a chunk's tokens, where its ranks and experts per token are in order.
light_status check_chunk(const char *stem, const light_chunk &chunk, long long *num_tokens) {
  LIGHT_TRY(check_group(stem, chunk.rank, chunk.num_ranks));
  LIGHT_TRY(check_width(stem, 16, chunk.num_experts_per_token));
  *num_tokens = 0;
  for (int rank = 0; rank < chunk.num_ranks; ++rank) {
    *num_tokens += chunk.count[rank];
  }
  if (*num_tokens > 0x7fffffff) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: %lld tokens are too many", stem, *num_tokens);
  }
  return LIGHT_OK;
}

// What a kernel's name ends with.
light_status find_suffix(const char *stem, light_dtype dtype, bool as_int8, const char **suffix) {
  const char *const suffixes[] = {"_f16", "_bf16", "_f32"};
  if (dtype != LIGHT_FLOAT16 && dtype != LIGHT_BFLOAT16 && (as_int8 || dtype != LIGHT_FLOAT32)) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: dtype %d is %s", stem, dtype,
                as_int8 ? "neither fp16 nor bf16" : "none of fp16, bf16, fp32");
  }
  *suffix = suffixes[dtype];
  return LIGHT_OK;
}

template <class Args>
light_status launch_exchange(const char *name, int threads, long long num_ctas, int max_ctas,
                             const Args &args, light_stream stream) {
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find_kernel("exchange", name, threads, 0, &kernel));
  const long long most = max_ctas > 0 ? max_ctas : kernel->resident_ctas();
  const long long bounded = std::max(1LL, std::min(num_ctas, most));
  return launch(*kernel, {static_cast<unsigned int>(bounded)}, args, stream, kInTurn);
}

// A warp takes a token.
template <class Args>
light_status launch_tokens(const std::string &name, long long num_tokens, int max_ctas,
                           const Args &args, light_stream stream) {
  const int per_cta = kThreads / 32;
  return launch_exchange(name.c_str(), kThreads, (num_tokens + per_cta - 1) / per_cta, max_ctas,
                         args, stream);
}

// Whether the device has bulk copies, by a plain kernel for it.
light_status copies_in_bulk(const std::string &plain, bool *can) {
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find_kernel("exchange", plain, kThreads, 0, &kernel));
  *can = kernel->architecture >= kBulkCopiesFrom;
  return LIGHT_OK;
}

template <class Args>
light_status launch_bulk(const std::string &name, int num_warps, int shared_bytes,
                         long long most_warps, int max_ctas, const Args &args,
                         light_stream stream) {
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find_kernel("exchange", name, 32 * num_warps, shared_bytes, &kernel));
  const long long most = max_ctas > 0 ? max_ctas : kernel->resident_ctas();
  const long long wanted = (most_warps + num_warps - 1) / num_warps;
  return launch(*kernel, {static_cast<unsigned int>(std::min(wanted, most))}, args, stream,
                kInTurn);
}

// The bulk kernel, where a warp has 4 to 32 tokens at a time, if there are enough of them.
light_status launch_pull(long long num_tokens, int max_ctas, const light_exchange_pull_args &args,
                         light_stream stream) {
  const char *const name = "exchange_pull";
  bool can = false;
  LIGHT_TRY(copies_in_bulk(name, &can));
  if (!can || num_tokens < kFewestPulledTokens) {
    return launch_tokens(name, num_tokens, max_ctas, args, stream);
  }
  return launch_bulk("exchange_pull_bulk", ring::kWarps, ring::kBytes, (num_tokens + 3) / 4,
                     max_ctas, args, stream);
}

}  // namespace
}  // namespace light

light_status light_exchange_share(const light_exchange_share_args *args, int max_ctas,
                                  light_stream stream) {
  LIGHT_TRY(light::check_group("exchange_share", args->flags.rank, args->flags.num_ranks));
  LIGHT_TRY(light::check_width("exchange_share", args->width_bytes, args->num_experts_per_token));
  if (args->num_tokens < 0 || args->num_tokens >= 1 << LIGHT_CHOICE_POSITION_BITS ||
      args->num_experts < 1 || args->num_experts > 512 || args->num_chunks < 1) {
    return light::fail(LIGHT_BAD_ARGUMENT,
                       "exchange_share: %d tokens in %d chunks, %d experts; it takes fewer than %d"
                       " tokens and 1 to 512 experts",
                       args->num_tokens, args->num_chunks, args->num_experts,
                       1 << LIGHT_CHOICE_POSITION_BITS);
  }
  // Not by pair_index: of a rank without tokens that is null, too.
  if (args->prefixes == nullptr) {
    if (args->num_tokens * args->num_experts_per_token > LIGHT_COUNTED_PAIRS ||
        args->num_chunks != 1) {
      return light::fail(LIGHT_BAD_ARGUMENT,
                         "exchange_share: %d tokens of %d experts in %d chunks are not counted here",
                         args->num_tokens, args->num_experts_per_token, args->num_chunks);
    }
    return light::launch_exchange("exchange_share_counted", LIGHT_COUNTED_PAIRS, 1, 1, *args,
                                  stream);
  }
  const long long hidden = args->hidden == nullptr ? 0 : args->width_bytes / 16;
  const long long work =
      std::max(args->num_tokens * std::max<long long>(args->num_experts_per_token, hidden),
               1LL * args->num_chunks * (args->num_experts + 1));
  return light::launch_exchange("exchange_share", light::kThreads,
                                (work + light::kThreads - 1) / light::kThreads, max_ctas, *args,
                                stream);
}

light_status light_exchange_meet(const light_exchange_flags *args, light_stream stream) {
  LIGHT_TRY(light::check_group("exchange_meet", args->rank, args->num_ranks));
  return light::launch_exchange("exchange_meet", light::kFlagThreads, 1, 1, *args, stream);
}

light_status light_exchange_pull(const light_exchange_pull_args *args, light_dtype dtype,
                                 int as_int8, int max_ctas, light_stream stream) {
  const char *const stem = "exchange_pull";
  long long num_tokens = 0;
  LIGHT_TRY(light::check_chunk(stem, args->chunk, &num_tokens));
  LIGHT_TRY(light::check_width(stem, args->width_bytes, args->chunk.num_experts_per_token));
  if ((args->weights == nullptr) != (args->pair_weight == nullptr)) {
    return light::fail(LIGHT_BAD_ARGUMENT, "%s: weights and pair_weight go together", stem);
  }
  if (as_int8 && args->output_rows != nullptr) {
    return light::fail(LIGHT_BAD_ARGUMENT, "%s: int8 is for sums, not for results", stem);
  }
  if (!as_int8) {
    return light::launch_pull(num_tokens, max_ctas, *args, stream);
  }
  const char *suffix = nullptr;
  LIGHT_TRY(light::find_suffix(stem, dtype, true, &suffix));
  return light::launch_tokens(std::string("exchange_pull_int8") + suffix, num_tokens, max_ctas,
                              *args, stream);
}

light_status light_exchange_give(const light_exchange_give_args *args, int max_ctas,
                                 light_stream stream) {
  LIGHT_TRY(light::check_width("exchange_give", args->width_bytes, 1));
  if (args->most_pairs <= 0) {
    return LIGHT_OK;
  }
  return light::launch_tokens("exchange_give", args->most_pairs, max_ctas, *args, stream);
}

light_status light_exchange_sum(const light_exchange_sum_args *args, light_dtype dtype,
                                int as_int8, int max_ctas, light_stream stream) {
  const char *const stem = "exchange_sum";
  long long num_tokens = 0;
  LIGHT_TRY(light::check_chunk(stem, args->chunk, &num_tokens));
  LIGHT_TRY(light::check_width(stem, args->width_bytes, args->chunk.num_experts_per_token));
  if (as_int8 && args->width_bytes % 32 != 0) {
    return light::fail(LIGHT_BAD_ARGUMENT,
                       "%s: rows of %d elements as int8, which must be a multiple of 16", stem,
                       args->width_bytes / 2);
  }
  const char *suffix = nullptr;
  LIGHT_TRY(light::find_suffix(stem, dtype, as_int8, &suffix));
  return light::launch_tokens(std::string(as_int8 ? "exchange_sum_int8" : stem) + suffix,
                              num_tokens, max_ctas, *args, stream);
}

light_status light_exchange_combine(const light_exchange_combine_args *args, light_dtype dtype,
                                    int as_int8, int max_ctas, light_stream stream) {
  const char *const stem = "exchange_combine";
  LIGHT_TRY(light::check_group(stem, args->rank, LIGHT_MAX_RANKS));
  LIGHT_TRY(light::check_width(stem, args->width_bytes, args->num_experts_per_token));
  const char *suffix = nullptr;
  LIGHT_TRY(light::find_suffix(stem, dtype, as_int8, &suffix));
  if (as_int8 && !args->summed) {
    return light::fail(LIGHT_BAD_ARGUMENT, "%s: int8 is for sums, not for results", stem);
  }
  if (args->num_tokens == 0) {
    return LIGHT_OK;
  }
  const std::string name = std::string(as_int8 ? "exchange_combine_int8" : stem) + suffix;
  const bool bulk = !args->summed && args->num_tokens >= light::kFewestBulkTokens;
  bool can = false;
  LIGHT_TRY(light::copies_in_bulk(name, &can));
  if (bulk && can) {
    return light::launch_bulk(std::string("exchange_combine_bulk") + suffix,
                              light::ring::kCombineWarps, light::ring::kCombineBytes,
                              args->num_tokens, max_ctas, *args, stream);
  }
  // Few tokens are cut into parts of rows, 32 times 16 bytes each.
  const long long parts = (args->width_bytes + 511) / 512;
  return light::launch_tokens(name, args->num_tokens * parts, max_ctas, *args, stream);
}

light_status light_exchange_count(const light_exchange_count_args *args, light_stream stream) {
  long long num_tokens = 0;
  LIGHT_TRY(light::check_chunk("exchange_count", args->chunk, &num_tokens));
  return light::launch_tokens("exchange_count", num_tokens, 0, *args, stream);
}
