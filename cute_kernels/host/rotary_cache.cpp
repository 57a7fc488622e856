// light_rotary_cache: queries and keys turned by their positions, keys and values into the pages.
#include "launch.h"

namespace light {
namespace {

constexpr int kThreads = 128;

light_status check_heads(const light_rotary_cache_args &args, light_dtype dtype) {
  if (args.num_tokens < 0 || args.num_heads < 1 || args.num_kv_heads < 1 || args.width < 8 ||
      args.width % 8 != 0 || args.table_stride % 4 != 0) {
    return fail(LIGHT_BAD_ARGUMENT,
                "rotary_cache: %d tokens of %d heads and %d of keys, width %d, table_stride %lld; "
                "the width must be a multiple of 8, the stride of 4",
                args.num_tokens, args.num_heads, args.num_kv_heads, args.width,
                args.table_stride);
  }
  if (dtype != LIGHT_FLOAT16 && dtype != LIGHT_BFLOAT16) {
    return fail(LIGHT_BAD_ARGUMENT, "rotary_cache: dtype %d is neither fp16 nor bf16", dtype);
  }
  if ((args.query_weight == nullptr) != (args.key_weight == nullptr)) {
    return fail(LIGHT_BAD_ARGUMENT, "rotary_cache: one of query_weight and key_weight is null");
  }
  if (args.num_tokens > 0 &&
      (args.heads == nullptr || args.cos == nullptr || args.sin == nullptr ||
       args.cache_rows == nullptr || args.query == nullptr || args.keys == nullptr ||
       args.values == nullptr)) {
    return fail(LIGHT_BAD_ARGUMENT, "rotary_cache: an input or output is null");
  }
  return LIGHT_OK;
}

// Lanes of a warp that share a head, 8 columns each: a power of two, so that they meet by shuffles.
int lanes_of(int width) {
  int lanes = 1;
  while (lanes < 32 && lanes * 8 < width) {
    lanes *= 2;
  }
  return lanes;
}

}  // namespace
}  // namespace light

light_status light_rotary_cache(const light_rotary_cache_args *args, light_dtype dtype,
                                light_stream stream) {
  if (args == nullptr) {
    return light::fail(LIGHT_BAD_ARGUMENT, "rotary_cache: args is null");
  }
  LIGHT_TRY(light::check_heads(*args, dtype));
  if (args->num_tokens == 0) {
    return LIGHT_OK;
  }
  light_rotary_cache_args launched = *args;
  launched.lanes_per_head = light::lanes_of(args->width);
  const int heads_per_cta = light::kThreads / launched.lanes_per_head;
  const long long num_heads = args->num_tokens * (args->num_heads + 2LL * args->num_kv_heads);
  if (num_heads > 0x7fffffff) {
    return light::fail(LIGHT_BAD_ARGUMENT, "rotary_cache: %lld heads of width %d are too many",
                       num_heads, args->width);
  }
  const unsigned int num_ctas = (static_cast<unsigned int>(num_heads) - 1) / heads_per_cta + 1;
  const light::Kernel *kernel = nullptr;
  LIGHT_TRY(light::find_kernel("rotary_cache",
                               dtype == LIGHT_FLOAT16 ? "rotary_cache_f16" : "rotary_cache_bf16",
                               light::kThreads, 0, &kernel));
  return light::launch(*kernel, {num_ctas}, launched, stream);
}
