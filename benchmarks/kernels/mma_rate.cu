// Register-only loops of one matrix instruction: the most that any kernel built from it can reach.
// Every warp keeps ROWS x COLUMNS accumulator tiles and random operands, as a matrix kernel does,
// so both the instruction-level parallelism and the power drawn are those of a real one.

struct half_k8 {
  static constexpr int a_words = 2, b_words = 1, c_words = 4, depth = 8;
  __device__ static void mma(unsigned *c, const unsigned *a, const unsigned *b) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  }
};

struct half_k8_half {
  static constexpr int a_words = 2, b_words = 1, c_words = 2, depth = 8;
  __device__ static void mma(unsigned *c, const unsigned *a, const unsigned *b) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%0,%1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  }
};

#define LIGHT_K16(NAME, TYPE)                                                                   \
  struct NAME {                                                                                 \
    static constexpr int a_words = 4, b_words = 2, c_words = 4, depth = 16;                     \
    __device__ static void mma(unsigned *c, const unsigned *a, const unsigned *b) {             \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                       \
                   ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                 \
                   : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));         \
    }                                                                                           \
  };
#if __CUDA_ARCH__ >= 800
LIGHT_K16(half_k16, "f16")
LIGHT_K16(bfloat_k16, "bf16")
#endif

// Two sets of operands alternate, so that the multipliers' inputs change with every instruction.
template <class Instruction, int ROWS, int COLUMNS>
__device__ void run(const unsigned *operands, unsigned *sink, int num_rounds) {
  constexpr int sets = 2;
  unsigned a[sets][ROWS][Instruction::a_words];
  unsigned b[sets][COLUMNS][Instruction::b_words];
  unsigned c[ROWS][COLUMNS][Instruction::c_words] = {};
  const unsigned *mine = operands + threadIdx.x;
  int taken = 0;
#pragma unroll
  for (int set = 0; set < sets; ++set) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
#pragma unroll
      for (int word = 0; word < Instruction::a_words; ++word)
        a[set][row][word] = mine[1024 * taken++];
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
      for (int word = 0; word < Instruction::b_words; ++word)
        b[set][column][word] = mine[1024 * taken++];
  }
#pragma unroll 1
  for (int round = 0; round < num_rounds; ++round) {
#pragma unroll
    for (int set = 0; set < sets; ++set)
#pragma unroll
      for (int row = 0; row < ROWS; ++row)
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
          Instruction::mma(c[row][column], a[set][row], b[set][column]);
  }
  unsigned all = 0;
#pragma unroll
  for (int row = 0; row < ROWS; ++row)
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
      for (int word = 0; word < Instruction::c_words; ++word) all ^= c[row][column][word];
  sink[blockIdx.x * blockDim.x + threadIdx.x] = all;
}

#define LIGHT_RATE(INSTRUCTION, ROWS, COLUMNS)                                                  \
  extern "C" __global__ void __launch_bounds__(256, 1) rate_##INSTRUCTION##_##ROWS##x##COLUMNS( \
      const unsigned *operands, unsigned *sink, int num_rounds) {                               \
    run<INSTRUCTION, ROWS, COLUMNS>(operands, sink, num_rounds);                                \
  }
#define LIGHT_RATES(INSTRUCTION)  \
  LIGHT_RATE(INSTRUCTION, 2, 4)   \
  LIGHT_RATE(INSTRUCTION, 4, 4)   \
  LIGHT_RATE(INSTRUCTION, 4, 8)

LIGHT_RATES(half_k8)
LIGHT_RATES(half_k8_half)
#if __CUDA_ARCH__ >= 800
LIGHT_RATES(half_k16)
LIGHT_RATES(bfloat_k16)
#endif
