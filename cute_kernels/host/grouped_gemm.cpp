// light_grouped_gemm: the product with 16-bit weights.
#include "matrix.h"

light_status light_grouped_gemm(const light_grouped_gemm_args *args, const light_tile *tile,
                                light_dtype dtype, int max_ctas, light_stream stream) {
  if (args == nullptr || tile == nullptr) {
    return light::fail(LIGHT_BAD_ARGUMENT, "grouped_gemm: args or tile is null");
  }
  const light::MatrixLaunch launch("grouped_gemm", *args, *tile, dtype, 16, max_ctas, stream);
  LIGHT_TRY(light::check_matrix(launch));
  return light::launch_matrix(launch, args);
}
