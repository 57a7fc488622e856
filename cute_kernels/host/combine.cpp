// light_combine: the weighted sum of each token's pairs.
#include <algorithm>

#include "launch.h"

light_status light_combine(const light_combine_args *args, light_dtype dtype, int max_ctas,
                           light_stream stream) {
  constexpr int kThreads = 128, kColumns = 8;
  if (args == nullptr || args->num_tokens < 0 || args->num_pairs_per_token < 1 ||
      args->width < kColumns || args->width % kColumns != 0) {
    return light::fail(LIGHT_BAD_ARGUMENT, "combine: %d tokens of %d pairs of width %d",
                       args == nullptr ? 0 : args->num_tokens,
                       args == nullptr ? 0 : args->num_pairs_per_token,
                       args == nullptr ? 0 : args->width);
  }
  if (dtype != LIGHT_FLOAT16 && dtype != LIGHT_BFLOAT16) {
    return light::fail(LIGHT_BAD_ARGUMENT, "combine: dtype %d is neither fp16 nor bf16", dtype);
  }
  if (args->num_tokens == 0) {
    return LIGHT_OK;
  }
  if (args->pairs == nullptr || args->pair_index == nullptr || args->output == nullptr) {
    return light::fail(LIGHT_BAD_ARGUMENT, "combine: pairs, pair_index or output is null");
  }
  const long long num_vectors = 1LL * args->num_tokens * (args->width / kColumns);
  if (num_vectors > 0x7fffffff) {
    return light::fail(LIGHT_BAD_ARGUMENT, "combine: %d tokens of width %d are too many",
                       args->num_tokens, args->width);
  }
  const light::Kernel *kernel = nullptr;
  LIGHT_TRY(light::find_kernel("combine", dtype == LIGHT_FLOAT16 ? "combine_f16" : "combine_bf16",
                               kThreads, 0, &kernel));
  const int most = max_ctas > 0 ? max_ctas : kernel->resident_ctas();
  const long long num_ctas = std::min<long long>((num_vectors + kThreads - 1) / kThreads, most);
  return light::launch(*kernel, {static_cast<unsigned int>(num_ctas)}, *args, stream);
}
