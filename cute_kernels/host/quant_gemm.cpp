// light_quant_gemm: the product with int4 or int8 weights.
#include "matrix.h"

light_status light_quant_gemm(const light_quant_gemm_args *args, const light_tile *tile,
                              light_dtype dtype, int max_ctas, light_stream stream) {
  if (args == nullptr || tile == nullptr) {
    return light::fail(LIGHT_BAD_ARGUMENT, "quant_gemm: args or tile is null");
  }
  if (args->num_bits != 4 && args->num_bits != 8) {
    return light::fail(LIGHT_BAD_ARGUMENT, "quant_gemm: weights of %d bits; 4 or 8",
                       args->num_bits);
  }
  if (args->group_size != 32 && args->group_size != 64 && args->group_size != 128) {
    return light::fail(LIGHT_BAD_ARGUMENT, "quant_gemm: groups of %d; 32, 64 or 128",
                       args->group_size);
  }
  const light::MatrixLaunch launch("quant_gemm", *args, *tile, dtype, args->num_bits, max_ctas,
                                   stream);
  LIGHT_TRY(light::check_matrix(launch));
  if (args->scales == nullptr) {
    return light::fail(LIGHT_BAD_ARGUMENT, "quant_gemm: no scales");
  }
  return light::launch_matrix(launch, args);
}
