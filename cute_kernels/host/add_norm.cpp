// light_add_norm: a residual add and the RMS norm of the sum.
#include <algorithm>

#include "launch.h"

light_status light_add_norm(const light_add_norm_args *args, light_dtype dtype,
                            light_stream stream) {
  constexpr int kColumns = 8, kMostThreads = 1024;
  if (args == nullptr || args->num_rows < 0 || args->width < kColumns ||
      args->width % kColumns != 0) {
    return light::fail(LIGHT_BAD_ARGUMENT,
                       "add_norm: %d rows of width %d, which must be a multiple of 8",
                       args == nullptr ? 0 : args->num_rows, args == nullptr ? 0 : args->width);
  }
  if (dtype != LIGHT_FLOAT16 && dtype != LIGHT_BFLOAT16) {
    return light::fail(LIGHT_BAD_ARGUMENT, "add_norm: dtype %d is neither fp16 nor bf16", dtype);
  }
  if (args->num_rows == 0) {
    return LIGHT_OK;
  }
  if (args->hidden == nullptr || args->addend == nullptr || args->weight == nullptr ||
      args->sum == nullptr || args->normed == nullptr) {
    return light::fail(LIGHT_BAD_ARGUMENT, "add_norm: an input or output is null");
  }
  // A row's sum is cut by its width alone: its bits do not depend on the rows beside it.
  const int num_warps = (args->width / kColumns - 1) / 32 + 1;
  const light::Kernel *kernel = nullptr;
  LIGHT_TRY(light::find_kernel("add_norm",
                               dtype == LIGHT_FLOAT16 ? "add_norm_f16" : "add_norm_bf16",
                               std::min(num_warps * 32, kMostThreads), 0, &kernel));
  return light::launch(*kernel, {static_cast<unsigned int>(args->num_rows)}, *args, stream);
}
