// The steps from a naive grouped product to a pipelined one, bf16 with fp32 sums, one thing changed
// at a time. Nothing here is used by the library; its own kernels are the last steps of ladder.py.
//
// output[p, n] = sum_d rows[p, d] * weight[group of p][n, d]: rows sorted by group.

#define LIGHT_DEVICE __device__ __forceinline__

constexpr int kTile = 128;   // rows, and features, of a CTA
constexpr int kDepth = 64;   // elements of depth in shared memory at a time
constexpr int kThreads = 256;
constexpr int kStageElements = 2 * kTile * kDepth;

LIGHT_DEVICE float widen(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

LIGHT_DEVICE unsigned short narrow(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

LIGHT_DEVICE unsigned narrow_pair(float first, float second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Step 1: a thread an output, every operand from global memory.
extern "C" __global__ void naive(const unsigned short *rows, const unsigned short *weights,
                                 const int *offsets, unsigned short *output, int num_pairs,
                                 int depth, int features) {
  const int feature = blockIdx.x * 16 + threadIdx.x % 16;
  const int pair = blockIdx.y * 16 + threadIdx.x / 16;
  if (pair >= num_pairs || feature >= features) return;
  int group = 0;
  while (offsets[group + 1] <= pair) ++group;
  const unsigned short *row = rows + (long long)pair * depth;
  const unsigned short *weight = weights + ((long long)group * features + feature) * depth;
  float sum = 0.0f;
  for (int d = 0; d < depth; ++d) sum += widen(row[d]) * widen(weight[d]);
  output[(long long)pair * features + feature] = narrow(sum);
}

LIGHT_DEVICE unsigned shared_address(const void *pointer) {
  return (unsigned)__cvta_generic_to_shared(pointer);
}

LIGHT_DEVICE void load_matrices(unsigned (&words)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

LIGHT_DEVICE void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where 16-byte piece `piece` of row `row` lies in a tile of kDepth elements a row. Without the
// exclusive or, the eight rows that one ldmatrix phase reads lie in the same four banks.
template <bool SWIZZLED>
LIGHT_DEVICE int element(int row, int piece) {
  return row * kDepth + 8 * (SWIZZLED ? piece ^ (row & 7) : piece);
}

struct Operands {
  const unsigned short *rows;     // first row of the tile
  const unsigned short *weights;  // first feature of the tile
  int num_rows;                   // of the tile that exist
  int depth;
};

template <bool SWIZZLED, bool ASYNC>
LIGHT_DEVICE void load_stage(unsigned short *stage, const Operands &operands, int first_depth) {
#pragma unroll
  for (int i = 0; i < 2 * kTile * kDepth / 8 / kThreads; ++i) {
    const int at = i * kThreads + threadIdx.x;
    const int row = at / (kDepth / 8), piece = at % (kDepth / 8);
    const bool is_weight = row >= kTile;
    const bool exists = is_weight || row < operands.num_rows;
    const unsigned short *source =
        (is_weight ? operands.weights + (long long)(row - kTile) * operands.depth
                   : operands.rows + (long long)(exists ? row : 0) * operands.depth) +
        first_depth + 8 * piece;
    unsigned short *target = stage + element<SWIZZLED>(row, piece);
    if (ASYNC) {
      const int num_bytes = exists ? 16 : 0;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
                   "l"(source), "r"(num_bytes)
                   : "memory");
    } else {
      *reinterpret_cast<uint4 *>(target) =
          exists ? *reinterpret_cast<const uint4 *>(source) : uint4{};
    }
  }
}

// Warps 2 x 4, each 64 rows x 32 features.
template <bool SWIZZLED>
LIGHT_DEVICE void multiply_stage(float (&sums)[4][4][4], const unsigned short *stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = warp % 2 * 64, first_feature = kTile + warp / 2 * 32;
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    unsigned a[4][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 16 * i + lane % 16;
      load_matrices(a[i],
                    shared_address(stage + element<SWIZZLED>(row, 2 * step + lane / 16)));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = first_feature + 16 * j + lane % 8 + lane / 16 * 8;
      load_matrices(b[j],
                    shared_address(stage + element<SWIZZLED>(row, 2 * step + lane / 8 % 2)));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

LIGHT_DEVICE void store(const float (&sums)[4][4][4], unsigned short *output, int num_rows,
                        int features) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp % 2 * 64 + 16 * i + 8 * half + lane / 4;
      if (row >= num_rows) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int feature = warp / 2 * 32 + 8 * j + lane % 4 * 2;
        *reinterpret_cast<unsigned *>(output + (long long)row * features + feature) =
            narrow_pair(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
      }
    }
}

// Steps 2 to 4. STAGES 1: load, wait, multiply. More: cp.async keeps STAGES - 1 loads under way.
template <bool SWIZZLED, int STAGES>
LIGHT_DEVICE void tiled_product(const unsigned short *rows, const unsigned short *weights,
                                const int *offsets, const int *tile_offsets,
                                const int *tile_groups, unsigned short *output, int depth,
                                int features) {
  extern __shared__ __align__(128) unsigned short shared[];
  const int group = tile_groups[blockIdx.x];
  const int first_pair = offsets[group] + (blockIdx.x - tile_offsets[group]) * kTile;
  const int first_feature = blockIdx.y * kTile;
  const int num_rows = min(offsets[group + 1] - first_pair, kTile);
  const Operands operands{
      rows + (long long)first_pair * depth,
      weights + ((long long)group * features + first_feature) * depth, num_rows, depth};
  const int num_stages = depth / kDepth;
  float sums[4][4][4] = {};
  if (STAGES == 1) {
    for (int stage = 0; stage < num_stages; ++stage) {
      load_stage<SWIZZLED, false>(shared, operands, stage * kDepth);
      __syncthreads();
      multiply_stage<SWIZZLED>(sums, shared);
      __syncthreads();
    }
  } else {
    for (int stage = 0; stage < STAGES - 1; ++stage) {
      if (stage < num_stages) {
        load_stage<SWIZZLED, true>(shared + stage * kStageElements, operands, stage * kDepth);
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (int stage = 0; stage < num_stages; ++stage) {
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
      __syncthreads();
      const int next = stage + STAGES - 1;
      if (next < num_stages) {
        load_stage<SWIZZLED, true>(shared + next % STAGES * kStageElements, operands,
                                   next * kDepth);
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
      multiply_stage<SWIZZLED>(sums, shared + stage % STAGES * kStageElements);
    }
  }
  store(sums, output + (long long)first_pair * features + first_feature, num_rows, features);
}

#define LIGHT_STEP(NAME, SWIZZLED, STAGES)                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads)                                      \
      NAME(const unsigned short *rows, const unsigned short *weights, const int *offsets,     \
           const int *tile_offsets, const int *tile_groups, unsigned short *output, int depth, \
           int features) {                                                                    \
    tiled_product<SWIZZLED, STAGES>(rows, weights, offsets, tile_offsets, tile_groups, output, \
                                    depth, features);                                         \
  }
LIGHT_STEP(tiled, false, 1)
LIGHT_STEP(swizzled, true, 1)
LIGHT_STEP(pipelined, true, 3)
