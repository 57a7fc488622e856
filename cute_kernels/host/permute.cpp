// light_permute, light_permute_int8 and light_dequantize_rows: rows in another order, or as int8.
#include <algorithm>
#include <string>

#include "launch.h"

namespace light {
namespace {

constexpr int kThreads = 256;
constexpr int kRowVectors = 8;  // 16-byte vectors of a row to int8 that a thread holds

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
  const int elements_per_warp = 8 * 32 * light::kRowVectors;
  const int threads = (args->width + elements_per_warp - 1) / elements_per_warp * 32;
  if (threads > light::kThreads) {
    return light::fail(LIGHT_BAD_ARGUMENT, "permute_int8: width %d is over %d", args->width,
                       light::kThreads * 8 * light::kRowVectors);
  }
  return light::launch_rows("permute_int8", dtype, *args, threads, args->num_rows, max_ctas,
                            stream);
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
