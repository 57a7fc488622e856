// Attention over the pages of a KV cache, without gathering them. A position's outputs are the same
// chain of operations in every kernel here, so its bits depend on nothing but what it sees:
//
//     for each section of 256 positions       split: a CTA each; whole: one CTA, one by one
//       for each tile of keys                 copies of the tiles ahead are in flight
//         scores = queries x keys             mma, the query heads of one KV head as its rows
//         weights = 2^(scores - largest)      what a row does not see weighs nothing, exactly
//         outputs = outputs x decay + weights x values
//     fold the sections in ascending order    split: paged_attention_merge
#include "attention_merge.cuh"
#include "attention_rows.cuh"

namespace light::attention {

template <class Element_, int Width, int RowTiles, bool Whole>
struct Shape {
  using Element = Element_;
#if defined(__CUDA_ARCH__)
  static constexpr Sizes kSizes{Width, __CUDA_ARCH__ / 10};
#else
  static constexpr Sizes kSizes{Width, 0};
#endif
  static constexpr int kRowTiles = RowTiles;
  static constexpr bool kWhole = Whole;
  static constexpr bool kPaired = kSizes.pairs_slots(Whole);
  static constexpr int kSlots = kSizes.slots(Whole);
  static constexpr int kParts = kSizes.parts(Whole);
  static constexpr int kThreads = kSizes.threads(RowTiles, Whole);
};

template <class Shape>
class Attention {
  static constexpr Sizes kSizes = Shape::kSizes;
  static constexpr int kTilesPerSection = kSection / kSizes.tile_keys();

 public:
  __device__ __forceinline__ Attention(const light_paged_attention_args &args,
                                       unsigned char *shared, float4 *all_outputs)
      : args_(args),
        row_tile_(threadIdx.x / 32 / Shape::kParts),
        slots_(shared_address(shared)),
        queries_(slots_ + Shape::kSlots * kSizes.slot_bytes()),
        pages_(args, slots_),
        rows_(args, queries_ + row_tile_ * kRows * kSizes.row_bytes(),
              reinterpret_cast<float4 *>(shared + Shape::kSlots * kSizes.slot_bytes() +
                                         kSizes.query_bytes(Shape::kRowTiles)) +
                  row_tile_ * kRows * kSizes.tile_keys() / 4,
              all_outputs) {}

  __device__ __forceinline__ void look_up(const Unit &unit) { pages_.look_up(unit); }
  __device__ __forceinline__ void begin() { pages_.begin(); }

  __device__ __forceinline__ void follow(const Unit &unit, bool exists) {
    if (exists) {
      pages_.follow(unit);
    } else {
      pages_.follow_none();
    }
  }

  __device__ __forceinline__ void run(const Unit &unit) {
    // Nobody reads queries of the unit before: all have met since they multiplied the last tile.
    if constexpr (kSizes.query_in_shared()) store_queries(unit);
    rows_.begin(unit, unit.first_row + row_tile_ * kRows);
    const int num_tiles = attention::num_tiles<Shape>(unit);
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      run_tile(unit.section * kSection + tile * kSizes.tile_keys());
      const bool ends = tile % kTilesPerSection == kTilesPerSection - 1 || tile == num_tiles - 1;
      if (ends) rows_.end_section(tile < kTilesPerSection);
    }
    if (num_tiles == 0) rows_.end_section(true);
    if (Shape::kWhole || args_.partials == nullptr) {
      rows_.store_outputs();
    } else {
      rows_.store_partials(unit);
    }
  }

 private:
  __device__ __forceinline__ void run_tile(int first_key) {
    const bool sees = rows_.sees(first_key);
    meet();
    if constexpr (Shape::kPaired) pages_.copy_next();
    const unsigned keys = next_slot();
    if (sees) rows_.multiply_keys(keys);
    if constexpr (Shape::kParts > 1) {
      __syncthreads();
      if (sees) rows_.gather_scores();
    }
    if (sees) rows_.weigh_keys(first_key);
    unsigned values = keys;
    if constexpr (!kSizes.values_are_keys()) {
      if constexpr (!Shape::kPaired) {
        pages_.end_copy();
        meet();
      }
      values = next_slot();
    }
    if (sees) rows_.multiply_values(values);
    pages_.end_copy();
  }

  // Wait for what comes next, and ask for another tile: into the slot before it.
  __device__ __forceinline__ void meet() {
    pages_.wait();
    __syncthreads();
    pages_.copy_next();
  }

  __device__ __forceinline__ unsigned next_slot() {
    const unsigned slot = slots_ + compute_slot_ * kSizes.slot_bytes();
    compute_slot_ = compute_slot_ + 1 == Shape::kSlots ? 0 : compute_slot_ + 1;
    return slot;
  }

  __device__ __forceinline__ void store_queries(const Unit &unit) {
    constexpr int kChunks = kSizes.width / 8;
    const int group = args_.num_heads / args_.num_kv_heads;
    for (int i = threadIdx.x; i < Shape::kRowTiles * kRows * kChunks; i += Shape::kThreads) {
      const int row = unit.first_row + i / kChunks, column = i % kChunks * 8;
      const long long head =
          (unit.first_token + row / group) * args_.query_stride +
          (unit.kv_head * group + row % group) * args_.width;
      const unsigned short *source =
          static_cast<const unsigned short *>(args_.query) + head + column;
      const bool exists = row < unit.num_rows && column < args_.width;
      store_shared_16(queries_ + i / kChunks * kSizes.row_bytes() + 2 * column,
                      load_global_16(source, exists));
    }
  }

  const light_paged_attention_args &args_;
  int row_tile_;
  unsigned slots_;
  unsigned queries_;
  Pages<Shape> pages_;
  Rows<Shape> rows_;
  int compute_slot_ = 0;
};

template <class Shape>
__device__ __forceinline__ void run_split(const light_paged_attention_args &args) {
  extern __shared__ __align__(128) unsigned char shared[];
  let_next_kernel_begin();
  Attention<Shape> attention(args, shared, nullptr);
  Unit unit, next;
  int index = blockIdx.x;
  bool exists = find_split_unit(args, index, &unit);
  if (exists) attention.look_up(unit);
  wait_for_kernel_before();  // the tables are older: only queries, keys and values are not
  if (exists) attention.begin();
#pragma unroll 1
  while (exists) {
    exists = find_split_unit(args, index += gridDim.x, &next);
    attention.follow(next, exists);
    attention.run(unit);
    unit = next;
  }
}

template <class Shape>
__device__ __forceinline__ void run_whole(const light_paged_attention_args &args) {
  extern __shared__ __align__(128) unsigned char shared[];
  pass_on_and_wait();
  Unit unit;
  if (!find_whole_unit(args, blockIdx.x, Shape::kRowTiles * kRows, &unit)) return;
  // In local memory, whatever the compiler thinks of it: they are needed once a section, and
  // registers are scarce.
  float4 all_outputs[Rows<Shape>::kValueQuads];
  float4 *kept = all_outputs;
  asm volatile("" : "+l"(kept)::"memory");
  Attention<Shape> attention(args, shared, kept);
  attention.look_up(unit);
  attention.begin();
  attention.run(unit);
}

template <class Scalar, int kWidth>
__device__ __forceinline__ void run_merge(const light_paged_attention_args &args) {
  pass_on_and_wait();
  const int item = blockIdx.x * kMergeWarps + threadIdx.x / 32;
  const int sequence = item / args.num_heads, head = item % args.num_heads;
  if (sequence >= args.num_sequences || num_queries(args, sequence) != 1) return;
  Merge<Scalar, kWidth> merge(args, item);
  merge.fold_all(num_sections(args.lengths[sequence]));
  const long long row = static_cast<long long>(args.query_starts[sequence]) * args.num_heads + head;
  merge.store(static_cast<Scalar *>(args.output) + row * args.width);
}

#if LIGHT_DTYPE == 0
using Element = Float16;
using Scalar = __half;
#else
using Element = BFloat16;
using Scalar = __nv_bfloat16;
#endif
#if defined(__CUDA_ARCH__)
constexpr int kRowTiles = Sizes{LIGHT_WIDTH, __CUDA_ARCH__ / 10}.row_tiles();
#else
constexpr int kRowTiles = 1;
#endif
using Split = Shape<Element, LIGHT_WIDTH, 1, false>;
using Whole = Shape<Element, LIGHT_WIDTH, kRowTiles, true>;

}  // namespace light::attention

#define LIGHT_ATTENTION_NAME_(name, kind) name##_##kind
#define LIGHT_ATTENTION_NAME(name, kind) LIGHT_ATTENTION_NAME_(name, kind)
#define LIGHT_ATTENTION_KERNEL(kind, threads, ...)                    \
  extern "C" __global__ void __launch_bounds__(threads, 1)            \
      LIGHT_ATTENTION_NAME(LIGHT_KERNEL_NAME, kind)(                  \
          const __grid_constant__ light_paged_attention_args args) {  \
    light::attention::run_##kind<__VA_ARGS__>(args);                  \
  }

LIGHT_ATTENTION_KERNEL(split, light::attention::Split::kThreads, light::attention::Split)
LIGHT_ATTENTION_KERNEL(whole, light::attention::Whole::kThreads, light::attention::Whole)
LIGHT_ATTENTION_KERNEL(merge, 32 * light::attention::kMergeWarps, light::attention::Scalar,
                       LIGHT_WIDTH)
