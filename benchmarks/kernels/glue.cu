// What stands between two products that fuse nothing: the gather of rows and SwiGLU, bf16, eight
// elements a thread.

__device__ __forceinline__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(unsigned pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ float gated(float gate, float up) {
  return up * gate / (1.0f + __expf(-gate));
}
__device__ __forceinline__ unsigned gated_pair(unsigned gate, unsigned up) {
  unsigned pair;
  const float first = gated(low(gate), low(up)), second = gated(high(gate), high(up));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// gate_up [P, 2F] -> [P, F]; eights = F / 8.
extern "C" __global__ void silu_and_mul(const uint4 *gate_up, uint4 *out, int num_pairs,
                                        int eights) {
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= (long long)num_pairs * eights) return;
  const long long pair = at / eights, column = at % eights;
  const uint4 gate = gate_up[pair * 2 * eights + column];
  const uint4 up = gate_up[(pair * 2 + 1) * eights + column];
  out[at] = {gated_pair(gate.x, up.x), gated_pair(gate.y, up.y), gated_pair(gate.z, up.z),
             gated_pair(gate.w, up.w)};
}

// rows [R, D], index [N] -> [N, D]; eights = D / 8.
extern "C" __global__ void gather(const uint4 *rows, const int *index, uint4 *out, int num_rows,
                                  int eights) {
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= (long long)num_rows * eights) return;
  out[at] = rows[(long long)index[at / eights] * eights + at % eights];
}
