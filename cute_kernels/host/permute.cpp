// light_permute, light_permute_int8, light_permute_fp8 and light_dequantize_rows: rows in another
// order, as int8 or as e4m3.
#include <algorithm>
#include <string>

#include "launch.h"

namespace light {
namespace {

constexpr int kThreads = 256;
constexpr int kRowVectors = 8;  // 16-byte vectors that a thread holds of a row with one scale
constexpr int kGroupSize = 128;
constexpr int kSpanElements = 1024;  // of a row by groups that a warp takes at a time

light_status check_rows(const char *stem, const light_permute_args *args, int multiple,
                        bool scaled) {
  if (args == nullptr || args->num_rows < 0 || args->width < multiple ||
      args->width % multiple != 0) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: %d rows of width %d, which must be a multiple of %d",
                stem, args == nullptr ? 0 : args->num_rows, args == nullptr ? 0 : args->width,
                multiple);
  }
  if (args->num_rows > 0 && (args->rows == nullptr || args->output == nullptr ||
                             (scaled && args->scales == nullptr))) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: rows, output or scales is null", stem);
  }
  return LIGHT_OK;
}

light_status launch_rows(const char *name, light_dtype dtype, const light_permute_args &args,
                         int threads, long long num_ctas, int max_ctas, light_stream stream) {
  if (dtype != LIGHT_FLOAT16 && dtype != LIGHT_BFLOAT16) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: dtype %d is neither fp16 nor bf16", name, dtype);
  }
  if (args.num_rows == 0) {
    return LIGHT_OK;
  }
  const std::string kernel_name = name + std::string(dtype == LIGHT_FLOAT16 ? "_f16" : "_bf16");
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find_kernel("permute", kernel_name, threads, 0, &kernel));
  num_ctas = max_ctas > 0 ? std::min<long long>(num_ctas, max_ctas) : num_ctas;
  return launch(*kernel, {static_cast<unsigned int>(num_ctas)}, args, stream);
}

// One scale a row: a CTA holds the row in its registers.
light_status launch_whole_rows(const char *stem, const char *name, light_dtype dtype,
                               const light_permute_args &args, int max_ctas,
                               light_stream stream) {
  const int elements_per_warp = 8 * 32 * kRowVectors;
  const int threads = (args.width - 1) / elements_per_warp * 32 + 32;
  if (threads > kThreads) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: width %d is over %d", stem, args.width,
                kThreads * 8 * kRowVectors);
  }
  return launch_rows(name, dtype, args, threads, args.num_rows, max_ctas, stream);
}

light_status launch_groups(const char *stem, const char *name, light_dtype dtype,
                           const light_permute_args &args, int max_ctas, light_stream stream) {
  const long long spans_per_row = (args.width - 1) / kSpanElements + 1;
  const long long num_spans = args.num_rows * spans_per_row;
  if (num_spans > 0x7fffffff) {
    return fail(LIGHT_BAD_ARGUMENT, "%s: %d rows of width %d are too many", stem, args.num_rows,
                args.width);
  }
  const int warps_per_cta = kThreads / 32;
  const long long num_ctas = (num_spans + warps_per_cta - 1) / warps_per_cta;
  return launch_rows(name, dtype, args, kThreads, num_ctas, max_ctas, stream);
}

}  // namespace
}  // namespace light

light_status light_permute(const light_permute_args *args, int max_ctas, light_stream stream) {
  LIGHT_TRY(light::check_rows("permute", args, 16, false));
  if (args->num_rows == 0) {
    return LIGHT_OK;
  }
  const light::Kernel *kernel = nullptr;
  LIGHT_TRY(light::find_kernel("permute", "permute_rows", light::kThreads, 0, &kernel));
  const int rows_per_cta = light::kThreads / 32;
  const int num_ctas = (args->num_rows + rows_per_cta - 1) / rows_per_cta;
  const int bounded = max_ctas > 0 ? std::min(num_ctas, max_ctas) : num_ctas;
  return light::launch(*kernel, {static_cast<unsigned int>(bounded)}, *args, stream);
}

light_status light_permute_int8(const light_permute_args *args, light_dtype dtype, int max_ctas,
                                light_stream stream) {
  LIGHT_TRY(light::check_rows("permute_int8", args, 8, true));
  return light::launch_whole_rows("permute_int8", "permute_int8", dtype, *args, max_ctas, stream);
}

light_status light_permute_fp8(const light_permute_args *args, light_dtype dtype, int group_size,
                               int max_ctas, light_stream stream) {
  LIGHT_TRY(light::check_rows("permute_fp8", args, 8, true));
  if (group_size == 0) {
    return light::launch_whole_rows("permute_fp8", "permute_fp8_row", dtype, *args, max_ctas,
                                    stream);
  }
  if (group_size != light::kGroupSize) {
    return light::fail(LIGHT_BAD_ARGUMENT, "permute_fp8: group_size %d is neither %d nor 0",
                       group_size, light::kGroupSize);
  }
  return light::launch_groups("permute_fp8", "permute_fp8_g128", dtype, *args, max_ctas, stream);
}

light_status light_dequantize_rows(const light_permute_args *args, light_dtype dtype,
                                   int max_ctas, light_stream stream) {
  LIGHT_TRY(light::check_rows("dequantize_rows", args, 8, true));
  const long long num_vectors = 1LL * args->num_rows * (args->width / 8);
  if (num_vectors > 0x7fffffff) {
    return light::fail(LIGHT_BAD_ARGUMENT, "dequantize_rows: %d rows of width %d are too many",
                       args->num_rows, args->width);
  }
  const long long num_ctas = (num_vectors + light::kThreads - 1) / light::kThreads;
  return light::launch_rows("dequantize_rows", dtype, *args, light::kThreads, num_ctas, max_ctas,
                            stream);
}
