// The C ABI of liblight_ops.so, and the argument structs that its kernels take by value.
//
// One header for three readers: callers (C, the pybind11 binding), the host library, and the device
// code that NVRTC compiles, so it includes nothing. Every pointer in an argument struct is a device
// pointer; every call enqueues on `stream` and returns at once, allocates nothing and never
// synchronises, so it may be captured into a CUDA graph. Sizes that change from step to step (pairs
// per slot) are read from device memory.
//
// Words: T tokens, D model width, F expert width, E experts, K experts per token, R rows, P pairs,
// S slots of the pool, G groups of pairs (one group: the pairs of one slot).
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

#define LIGHT_OPS_ABI 2

#if defined(__GNUC__) && !defined(__CUDACC__)
#define LIGHT_API __attribute__((visibility("default")))
#else
#define LIGHT_API
#endif

typedef enum light_status {
  LIGHT_OK = 0,
  LIGHT_NO_DRIVER = 1,         // libcuda.so.1 is absent, or lacks a symbol of the table
  LIGHT_DRIVER_TOO_OLD = 2,    // the driver refuses the cubin's version
  LIGHT_NO_KERNEL = 3,         // no cubin for this device's architecture, or no such instance in it
  LIGHT_BAD_ARGUMENT = 4,      // a size, pointer or dtype that no kernel takes
  LIGHT_DRIVER_ERROR = 5,      // any other error of the driver; light_last_error has its name
} light_status;

typedef enum light_dtype {
  LIGHT_FLOAT16 = 0,
  LIGHT_BFLOAT16 = 1,
  LIGHT_FLOAT32 = 2,
} light_dtype;

typedef void *light_stream;  // a CUstream

// A tile of the matrix kernels; the name of the instance that computes it is made from these
// numbers. Weights are the mma's A operand and tokens its B operand, so a token's sums never depend
// on how many tokens stand beside it. An instance of Hopper's warpgroup mma (limit > 0) computes
// tiles of any number of tokens up to its limit, with any number of stages.
typedef struct light_tile {
  int weight_rows;   // rows of the weight matrix a CTA computes (gate and up rows both count)
  int tokens;        // tokens a CTA computes; for warpgroups at most: 8, or a multiple of 16
  int depth;         // elements of the summed dimension per pipeline stage
  int stages;        // pipeline stages in shared memory
  int warps_weight;  // warps along weight_rows
  int warps_tokens;  // warps along tokens
  int half_accumulate;  // 1: fp16 accumulators, promoted to fp32 after every stage (fp16 only)
  int limit;         // tokens whose sums a warpgroup's registers hold; 0: the mma of a warp
  int depth_parts;   // warpgroups that share the depth of a stage; else 1
} light_tile;

// Where each slot's pairs begin, and which CTA tile belongs to which group. Written on the device
// by light_topk_gate or light_sort_pairs for one value of tokens_per_tile.
typedef struct light_pair_groups {
  const int *slots;         // [G] slot of each group; null: group g is slot g
  const int *offsets;       // [G + 1] first pair of each group; null: one group of num_pairs rows
  const int *tile_offsets;  // [G + 1] first tile of each group; tile_offsets[G] tiles in all
  const int *tile_groups;   // [tiles] group of each tile
  int num_groups;           // G
  int num_pairs;            // P, or the most it can be (bounds the launch)
} light_pair_groups;

// On Hopper a product may read its weights, and its groups' tables where groups_settled, while the
// kernel in front of it still runs: neither may be what that kernel writes.
//
// output[p, n] = sum_d rows[pair_row[p], d] * weight[slot of p][n, d]
// With swiglu != 0 the weight holds F gate rows, then F up rows, and
// output[p, f] = silu(gate[p, f]) * up[p, f].
typedef struct light_grouped_gemm_args {
  light_pair_groups groups;
  const void *rows;          // [R, depth] of dtype
  const int *pair_row;       // [P] row of each pair; null: row p is pair p
  const void *weights;       // first slot's matrix [num_features or 2 num_features, depth]
  long long slot_bytes;      // from one slot's matrix to the next slot's
  const float *pair_weight;  // [P] multiplies a pair's output; null: 1
  void *output;              // [P, num_features] of dtype, or float32 where output_float32
  int depth;                 // summed dimension, a multiple of 8
  int num_features;          // columns of the output, a multiple of 8
  int swiglu;
  int output_float32;        // only without swiglu
  void *split_sums;          // fp32 partial sums of light_split_bytes; null where depth_splits is 1
  int *split_tickets;        // one of each output tile, zero before the first call; left zero
  int depth_splits;          // CTAs that share an output tile's depth, their sums added in order
  int groups_settled;        // the groups' tables are older than the kernel in front of this one
} light_grouped_gemm_args;

// The same product from weight-only quantised experts, prepacked as lightmoe/quant/fragments.py
// says: blocks of 16 weight rows x 64 of depth in mma fragment order.
typedef struct light_quant_gemm_args {
  light_pair_groups groups;
  const void *rows;
  const int *pair_row;
  const void *weights;       // first slot's blocks [N/16, depth/64, 32 lanes, 16 or 2 x 16 bytes]
  const void *scales;        // first slot's scales [N/16, depth/group_size, 16] of dtype
  const void *zeros;         // the same shape and dtype, zero points as numbers; null: symmetric
  long long slot_bytes;      // from one slot's blob to the next's (weights, scales, zeros alike)
  const float *pair_weight;
  void *output;
  int depth;
  int num_features;
  int swiglu;                // rows of a 16-row block: 8 gate rows, then the 8 up rows beside them
  int output_float32;
  int num_bits;              // 4 or 8
  int group_size;            // 32, 64 or 128 elements of depth share a scale
  void *split_sums;          // fp32 partial sums of light_split_bytes; null where depth_splits is 1
  int *split_tickets;        // one of each output tile, zero before the first call; left zero
  int depth_splits;          // CTAs that share an output tile's depth, their sums added in order
  int groups_settled;        // the groups' tables are older than the kernel in front of this one
} light_quant_gemm_args;

// Pairs sorted by expert, then token, then k, and CTA tiles of `tokens_per_tile` pairs of one
// expert. An expert's number is its group's. `workspace` (16-byte aligned) is all zeros before its
// first use and belongs to one launch at a time; every launch leaves it ready for the next,
// whatever the sizes. CTAs of a launch wait for each other: there is at most one for each
// multiprocessor, and what else runs on the device must not wait for this launch.
typedef struct light_pair_sort {
  int *pair_row;       // [P] token of each sorted pair
  int *pair_index;     // [T, K] where each pair went; -1 for an expert that does not exist
  float *pair_weight;  // [P] weight of each sorted pair; null: not wanted
  int *offsets;        // [E + 1] first pair of each expert
  int *counts;         // [E] pairs of each expert: its load; null: not wanted
  int *tile_offsets;   // [E + 1] first tile of each expert
  int *tile_groups;    // [P / tokens_per_tile + E], of which tile_offsets[E] are written
  void *workspace;
  long long workspace_bytes;
  int tokens_per_tile;        // a multiple of 8 up to 256
  int num_tokens;             // T
  int num_experts;            // E, at most 512
  int num_experts_per_token;  // K, at most 16
  int num_ctas, tokens_per_cta, tokens_per_warp;  // the launcher's
} light_pair_sort;

// Experts and weights of each token, and the permutation of the pairs. Scores are softmax over the
// experts or sigmoid; NaN counts as -inf, ties go to the lowest index. With more groups than groups
// per token, only experts of a token's best groups take part: a group is as good as its best expert
// (softmax) or as the sum of its best two biased scores (sigmoid).
typedef struct light_topk_gate_args {
  const void *logits;         // [T, E] of `input`; null: computed from the next two
  const void *hidden;         // [T, width] of `input`, float16 or bfloat16; at most 64 tokens
  const void *router_weight;  // [E, width] of `router`: the dtype of hidden, or float32
  const float *bias;          // [E] added to sigmoid scores for the choice only; null: 0
  int *experts;               // [T, K] best first
  float *weights;             // [T, K]
  light_pair_sort sort;       // offsets null: no permutation
  int width;                  // a multiple of 8
  int sigmoid;                // 0: softmax
  int renormalize;            // divide a token's weights by their sum
  float scale;                // multiplies the weights
  int num_groups;
  int num_groups_per_token;
} light_topk_gate_args;

// logits[t, e] = sum_d hidden[t, d] * router_weight[e, d] in float32, with the bits that
// light_topk_gate's own product has.
typedef struct light_router_logits_args {
  const void *hidden;         // [T, width] of `input`, float16 or bfloat16
  const void *router_weight;  // [E, width] of `router`: the dtype of hidden, or float32
  float *logits;              // [T, E]
  int num_tokens;
  int num_experts;
  int width;  // a multiple of 8
} light_router_logits_args;

// The permutation alone, of experts [T, K] that are given.
typedef struct light_sort_pairs_args {
  const int *experts;    // [T, K]; a pair of an expert that does not exist is left out
  const float *weights;  // [T, K]; null: no pair_weight
  light_pair_sort sort;
} light_sort_pairs_args;

// output[t] = sum over ascending k of weights[t, k] * pairs[pair_index[t, k]], plus addend[t], in
// float32, rounded once.
typedef struct light_combine_args {
  const void *pairs;      // [P, width] of dtype
  const int *pair_index;  // [T, K]; negative: adds nothing
  const float *weights;   // [T, K]; null: 1
  const void *addend;     // [T, width] of dtype; null: 0
  void *output;           // [T, width] of dtype
  int num_tokens;
  int num_pairs_per_token;  // K
  int width;                // a multiple of 8
} light_combine_args;

// Rows packed in the order they are sent. Without scales the bytes are copied; with scales rows of
// dtype become int8: scale = largest magnitude / 127, a row of zeros has scale 0, one with elements
// that are not finite NaN. In e4m3 it is 448, not 127, and a scale may be that of a row or of 128
// elements of it. Rows with one scale have at most 16384 elements.
typedef struct light_permute_args {
  const void *rows;      // [R, width]
  const int *row_index;  // [num_rows] source of each row; null: in place
  void *output;          // [num_rows, width]
  float *scales;         // [num_rows] written, [R] read; e4m3: also [num_rows, ceil(width / 128)]
  int num_rows;
  int width;             // elements, or bytes where they are copied: a multiple of 16 bytes
  const int *row_count;  // of light_permute: rows there are, if fewer than num_rows; null: all
} light_permute_args;

// The library's own calls. `directory` holds a folder of compiled programs per architecture, as
// cute_kernels/build.py makes it. `architecture` names the folder to use ("75", "90", "75ptx");
// null: for each device its own, or the nearest older one of the same major number. Opening again
// changes the directory of later launches. Needs the driver, but no device context yet.
LIGHT_API light_status light_open(const char *directory, const char *architecture);

// Make the device's primary context this thread's current one if the thread has none: the CUDA
// runtime does so only at a thread's first call of it.
LIGHT_API light_status light_bind_device(int device);

// The folder that launches on the current context's device use, up to `size` bytes with the 0.
LIGHT_API light_status light_architecture(char *name, int size);

// LIGHT_OPS_ABI of the library, and the CUDA version that the driver speaks (12020), 0 without one.
LIGHT_API int light_abi_version(void);
LIGHT_API int light_driver_version(void);

// What the last call of this thread that failed has to say; never null.
LIGHT_API const char *light_last_error(void);

// On sm_90 and later a kernel may start while the one before it ends (the kernels wait for its
// results themselves). On (1) at first; 0 to time kernels apart.
LIGHT_API void light_set_overlapped_launch(int on);

// A launch needs a current context; the first one of an instance in a context loads it. Grids are
// persistent: at most `max_ctas` CTAs (0: as many as the device holds at once).
LIGHT_API light_status light_grouped_gemm(const light_grouped_gemm_args *args,
                                          const light_tile *tile, light_dtype dtype, int max_ctas,
                                          light_stream stream);
LIGHT_API light_status light_quant_gemm(const light_quant_gemm_args *args, const light_tile *tile,
                                        light_dtype dtype, int max_ctas, light_stream stream);

// What a product split along its depth needs: a ticket for each tile of its output, these at most
// light_output_tiles (weight_rows counts gate and up rows both), and so many bytes of split_sums.
LIGHT_API long long light_output_tiles(const light_tile *tile, int num_pairs, int num_groups,
                                       int weight_rows);
LIGHT_API long long light_split_bytes(const light_tile *tile, long long num_output_tiles,
                                      int depth_splits);

// Bytes of workspace for light_topk_gate; 0 tokens where the logits are given, as for
// light_sort_pairs.
LIGHT_API long long light_topk_gate_workspace_bytes(int num_experts, int num_tokens, int width);
LIGHT_API light_status light_topk_gate(const light_topk_gate_args *args, light_dtype input,
                                       light_dtype router, int max_ctas, light_stream stream);
LIGHT_API light_status light_router_logits(const light_router_logits_args *args,
                                           light_dtype input, light_dtype router, int max_ctas,
                                           light_stream stream);
LIGHT_API light_status light_sort_pairs(const light_sort_pairs_args *args, int max_ctas,
                                        light_stream stream);
LIGHT_API light_status light_combine(const light_combine_args *args, light_dtype dtype,
                                     int max_ctas, light_stream stream);
LIGHT_API light_status light_permute(const light_permute_args *args, int max_ctas,
                                     light_stream stream);
LIGHT_API light_status light_permute_int8(const light_permute_args *args, light_dtype dtype,
                                          int max_ctas, light_stream stream);
// `group_size`: 128 elements with a scale (the last ones of a row may be fewer), or 0: the row's.
LIGHT_API light_status light_permute_fp8(const light_permute_args *args, light_dtype dtype,
                                         int group_size, int max_ctas, light_stream stream);
LIGHT_API light_status light_dequantize_rows(const light_permute_args *args, light_dtype dtype,
                                             int max_ctas, light_stream stream);

#ifdef __cplusplus
}
#endif
