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

#define LIGHT_OPS_ABI 7

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
  void *const *output_rows;  // [P] address of each pair's row, of dtype; null: rows of output
  int depth;                 // summed dimension, a multiple of 8
  int num_features;          // columns of the output, a multiple of 8
  int swiglu;
  int output_float32;        // only without swiglu
  void *split_sums;          // fp32 partial sums of light_split_bytes; null where depth_splits is 1
  int *split_tickets;        // one of each output tile, zero before the first call; left zero
  int depth_splits;          // CTAs that share an output tile's depth, their sums added in order
  int groups_settled;        // the groups' tables are older than the kernel in front of this one
  unsigned *unit_ticket;     // zero before the first launch; left zero: on Hopper CTAs then claim
                             // tiles, and one that starts late takes fewer; null: each has its own
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
  void *const *output_rows;
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

// The same product of e4m3 rows and e4m3 weights, both scaled, on Hopper alone. By blocks:
// row scales [R, ceil(depth / 128)]; the weights' [ceil(N / 128), ceil(depth / 128)], with swiglu of
// gate, then of up. By channels: [R], and one for each weight row.
typedef struct light_fp8_gemm_args {
  light_pair_groups groups;
  const void *rows;          // [R, depth] e4m3
  const float *row_scales;
  const int *pair_row;       // [P] row of each pair; null: row p is pair p
  const void *weights;       // first slot's matrix [num_features or 2 num_features, depth] e4m3
  const float *scales;       // first slot's
  long long slot_bytes;      // from one slot's to the next's (weights and scales alike)
  const float *pair_weight;  // [P] multiplies a pair's output; null: 1
  void *output;              // [P, num_features] of dtype, or float32 where output_float32
  void *const *output_rows;  // [P] address of each pair's row, of dtype; null: rows of output
  int depth;                 // a multiple of 16
  int num_features;          // a multiple of 8
  int swiglu;
  int output_float32;        // only without swiglu
  int by_channels;
  int groups_settled;        // the groups' tables are older than the kernel in front of this one
} light_fp8_gemm_args;

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

// The group of ranks that exchange rows by memory which all of them address. An arena is laid out
// alike on every rank; offsets are in bytes from its begin.
#define LIGHT_MAX_RANKS 64
#define LIGHT_CHOICE_POSITION_BITS 20  // a shared choice is expert << bits | place among the pairs

// One flag a rank in every arena, uint32 [W] at `offset`: rank r's has the number of its last round.
// A rank announces a round and waits for everyone's. Past the timeout the late rank's number + 1
// goes to `failure`, and this and every later wait end at once.
typedef struct light_exchange_flags {
  void *arenas[LIGHT_MAX_RANKS];  // each rank's, as this device addresses it
  long long offset;
  unsigned *counter;  // rounds so far; zero before the first
  unsigned *failure;  // zero; memory that the host reads, too
  long long timeout_nanoseconds;
  int rank;
  int num_ranks;
} light_exchange_flags;

// To every rank: this rank's choices int32 [T, K] at choice_offset, and for each of C chunks the
// prefix sums of its pairs per expert, [E + 1] at prefix_offset and each further chunk's after those
// of all ranks; its weights float32 [T, K] at weight_offset, where they are given; its hidden states
// to where others read them. Then they meet. Chunk c ends at T * (2 c + 1) / (2 C - 2), the last at T.
// The pairs of each expert are added to `load`, where it is given.
typedef struct light_exchange_share_args {
  light_exchange_flags flags;
  const int *experts;     // [T, K]
  const int *pair_index;  // [T, K] of light_sort_pairs over the token's chunk; null: counted here
  const int *prefixes;    // [C, E + 1] of light_sort_pairs: its offsets; null with pair_index
  const int *num_real;    // the first tokens count, the others are left out; null: all of them
  const float *weights;   // [T, K]; null: others need none
  const void *hidden;     // [T, width]; null: published already
  void *published;        // [T, width]
  unsigned *ticket;       // zero before the first launch; left zero
  int *load;              // [E]; null: not counted
  long long choice_offset;
  long long prefix_offset;
  long long weight_offset;
  int num_tokens;             // T
  int num_rows;               // tokens that there are, T or fewer; others are left out
  int num_experts_per_token;  // K, at most 16
  int num_experts;            // E, at most 512
  int num_chunks;             // C
  int width_bytes;            // a multiple of 16
} light_exchange_share_args;

// With so many pairs, T x K, and one chunk light_exchange_share may count them itself.
#define LIGHT_COUNTED_PAIRS 1024


// Where the pairs of a chunk are computed, as light_route_split writes it.
typedef struct light_places {
  const int *segments;    // [W, E, copies, 2]
  const int *copy_ranks;  // [E, copies]
  int num_experts;
  int num_copies;
} light_places;

// The tokens of a chunk on all ranks, and where their pairs go.
typedef struct light_chunk {
  int begin[LIGHT_MAX_RANKS];  // first token of the chunk on each rank
  int count[LIGHT_MAX_RANKS];  // tokens of the chunk on each rank
  light_places places;
  const int *choices;  // [W, choice_stride] in this rank's arena
  long long choice_stride;
  int rank;
  int num_ranks;
  int num_experts_per_token;
} light_chunk;

// rows[p] = hidden state of pair p's token, for every pair of the chunk that this rank computes,
// pair_weight[p] its weight, and output_rows[p] where its result goes: into results[s] of its token's
// rank s, where those of a chunk lie by expert, then position. So an expert's go side by side: apart
// they cost a third more over NVLink. As int8 the hidden states travel as light_permute_int8 makes
// them, and become scale * code in 16 bits.
typedef struct light_exchange_pull_args {
  const void *hidden[LIGHT_MAX_RANKS];  // [tokens, width] of each rank
  void *results[LIGHT_MAX_RANKS];       // [tokens * K, width] of each rank
  light_chunk chunk;
  const float *weights;    // [W, choice_stride]; null: no pair_weight
  float *pair_weight;      // [P]
  void **output_rows;      // [P]; null: no results; never as int8
  const int *prefixes;     // [W, E + 1] first pair of each expert among the chunk's, of each rank
  void *rows;              // [P, width]
  long long scale_offset;  // of int8: from a rank's codes to its scales [tokens], in bytes
  int width_bytes;         // of a row as it travels: a multiple of 16
} light_exchange_pull_args;

// sums[s][t] = the sum over ascending k of the results of token t of rank s that this rank has, which
// are weighted already, in float32, rounded once; tokens without any are left. As int8 the float32
// sums become codes and scales as light_permute_int8 makes them.
typedef struct light_exchange_sum_args {
  const void *pairs;            // [P, width]
  void *sums[LIGHT_MAX_RANKS];  // [tokens, width] for each rank, by the number of the token there
  light_chunk chunk;
  long long scale_offset;  // of int8: from a rank's codes to its scales [tokens], in bytes
  int width_bytes;         // of a result: a multiple of 16
} light_exchange_sum_args;

// Row p of what a rank has computed to its address, where the product did not write it there.
typedef struct light_exchange_give_args {
  const void *pairs;         // [P, width]
  void *const *output_rows;  // [P]
  const int *num_pairs;      // of which so many are there
  int most_pairs;            // P
  int width_bytes;           // a multiple of 16
} light_exchange_give_args;

// output[t] = sum over ascending k of weights[t, k] * the result of pair (t, k), in float32, rounded
// once. Where results are summed already: the sum of the sums of token t, one a rank that has some,
// over ascending ranks.
typedef struct light_exchange_combine_args {
  const void *results[LIGHT_MAX_RANKS];  // what each rank gave: [tokens * K, width], or its sums
  light_places places;
  const int *prefixes;     // [E + 1] first pair of each expert among the chunk's, of this rank
  const int *choices;      // [tokens, K] of this rank
  const float *weights;    // [tokens, K]; not read where the results are summed
  void *output;            // [num_tokens, width]
  long long scale_offset;  // of int8: from a rank's codes to its scales [tokens], in bytes
  int first_token;         // of the chunk
  int num_tokens;          // of the chunk
  int rank;
  int num_experts_per_token;
  int width_bytes;  // of a row as it travels: a multiple of 16
  int together;     // what all ranks gave lies at results[rank]
  int summed;       // what light_exchange_sum made; always so as int8
} light_exchange_combine_args;

// What this rank sends in a chunk, added to rows_sent [W], tokens of its own of which each rank has a
// pair, and results_sent [W], results it has for each rank; where they are summed, one a token.
typedef struct light_exchange_count_args {
  light_chunk chunk;
  unsigned long long *rows_sent;
  unsigned long long *results_sent;
  int summed;
} light_exchange_count_args;

// Which copy of its expert every pair goes to, from the counts of all ranks: the integers of
// lightmoe/kernels/route_reference.py. A pair of source rank s and expert e at position q among that
// source's pairs of that expert goes to the first copy c with q < end[s, e, c]; there it lies at
// base[s, e, c] + q - end[s, e, c - 1] among the pairs by expert, source rank and position. All
// ranks have fewer than 2^26 pairs together.
typedef struct light_route_split_args {
  const int *source_offsets;  // [W, source_stride] first pair of each expert on rank s, then all
  const int *copy_ranks;      // [E, C] ranks that hold a copy of each expert, home first, then -1
  int *segments;              // [W, E, C, 2] end, base; of no copy: not written
  int *group_offsets;         // [E + 1] this rank's pairs: light_pair_groups, group e is expert e
  int *tile_offsets;          // [E + 1]
  int *tile_groups;           // [most_tiles]
  int *rank_pairs;            // [W] pairs of each rank
  int *active_experts;        // [W] experts with pairs on each rank; null: not wanted
  const int *nearness;        // [num_levels, W] ranks of one number are near; the nearest first
  int source_stride;          // E + 1 or more
  int num_ranks;              // W, at most 64
  int num_experts;            // E, at most 512
  int num_copies;             // C, at most W
  int rank;
  int route;   // 0: to the homes; 1: evenly; 2: poured level; 3: fewest active experts per rank
  int sweeps;  // of 2 and 3, at most
  int tokens_per_tile;
  int most_tiles;
  int num_levels;  // at most 3; 0: all ranks are as near
} light_route_split_args;

// Those of the chunks of one layer, made at once by a CTA each.
#define LIGHT_MAX_CHUNKS 8
typedef struct light_route_split_chunks {
  light_route_split_args chunk[LIGHT_MAX_CHUNKS];
} light_route_split_chunks;

// Attention of the queries of sequences that each have a KV cache in blocks: position p of sequence b
// is row p % block_size of block block_tables[b, p / block_size]. Rows query_starts[b] ..
// query_starts[b + 1] of the step are the sequence's last positions before lengths[b], and each sees
// what is not after it. Query heads h / (H / KV heads) share a KV head. What a position gets depends,
// bit by bit, on nothing but the positions that it sees; one that sees nothing gets zeros. Tables,
// starts and lengths may change between replays of a graph, as far as max_queries allows.
typedef struct light_paged_attention_args {
  const void *query;   // [T, H, width]
  const void *keys;    // [blocks, block_size, KV heads, width]
  const void *values;  // the same; may be the keys, and must be where width is above 256
  const int *block_tables;  // [B, table_stride]; what is beyond a length is not read
  const int *query_starts;  // [B + 1]
  const int *lengths;       // [B] positions, those of this step included
  void *output;             // [T, H, width]
  float *partials;  // the workspace: light_paged_attention_workspace_bytes, from a multiple of 16
  long long workspace_bytes;
  long long query_stride;  // elements from one token to the next, a multiple of 8
  float scale;             // of scores, positive
  int num_tokens;
  int num_sequences;
  int num_heads;     // H
  int num_kv_heads;
  int width;         // a multiple of 8
  int block_size;    // a power of 2 from 8 to 256
  int table_stride;  // blocks of the longest sequence that fits
  int max_queries;   // of a sequence, at most
  // The launcher's own
  float *partial_sums;
  int max_sections;
  int position_bytes;
  int splits_single_queries;
} light_paged_attention_args;

// Queries and keys on their way to attention, both RMS-normed first where weights are given: turned
// to x * cos + x' * sin, where x' is the element half a head away, in order. Keys and values go to
// their rows of the pages of a layer. Rounded to dtype after the norm, both products and their sum.
typedef struct light_rotary_cache_args {
  const void *heads;            // [T, H + 2 KV heads, width] of dtype: queries, keys, values
  const void *query_weight;     // [width] of dtype, and epsilon; null: no norms
  const void *key_weight;       // [width] of dtype
  const void *cos;              // [T, width] of dtype
  const void *sin;              // [T, width] of dtype: of the first half negated
  const long long *cache_rows;  // [T] row of each token's keys and values
  void *query;                  // [T, H, width]
  void *keys;                   // [rows, KV heads, width]
  void *values;                 // [rows, KV heads, width]
  long long table_stride;       // elements of cos and sin from one token to the next: times 4
  float epsilon;
  int num_tokens;
  int num_heads;  // H
  int num_kv_heads;
  int width;           // a multiple of 8
  int lanes_per_head;  // the launcher's own
} light_rotary_cache_args;

// sum = hidden + addend, rounded; normed = sum / sqrt(mean of its squares + epsilon) * weight, in
// float32, rounded once. Outputs may not be inputs.
typedef struct light_add_norm_args {
  const void *hidden;  // [R, width] of dtype
  const void *addend;  // [R, width]
  const void *weight;  // [width]
  void *sum;           // [R, width]
  void *normed;        // [R, width]
  float epsilon;
  int num_rows;  // R
  int width;     // a multiple of 8
} light_add_norm_args;

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

// The exchange over arenas. None of them waits for the host; a launch bounded by max_ctas leaves the
// other multiprocessors to the products that it hides behind.
LIGHT_API light_status light_exchange_share(const light_exchange_share_args *args, int max_ctas,
                                            light_stream stream);
LIGHT_API light_status light_exchange_meet(const light_exchange_flags *args, light_stream stream);
LIGHT_API light_status light_exchange_pull(const light_exchange_pull_args *args, light_dtype dtype,
                                           int as_int8, int max_ctas, light_stream stream);
LIGHT_API light_status light_exchange_sum(const light_exchange_sum_args *args, light_dtype dtype,
                                          int as_int8, int max_ctas, light_stream stream);
LIGHT_API light_status light_exchange_give(const light_exchange_give_args *args, int max_ctas,
                                           light_stream stream);
LIGHT_API light_status light_exchange_combine(const light_exchange_combine_args *args,
                                              light_dtype dtype, int as_int8, int max_ctas,
                                              light_stream stream);
LIGHT_API light_status light_exchange_count(const light_exchange_count_args *args,
                                            light_stream stream);

// `count` of them that differ in tables, route and tiles alone.
LIGHT_API light_status light_route_split(const light_route_split_chunks *args, int count,
                                         light_stream stream);

// Bytes of workspace; `most_positions` is table_stride * block_size. Needs no zeros.
LIGHT_API long long light_paged_attention_workspace_bytes(int num_sequences, int num_heads,
                                                          int width, int most_positions);
LIGHT_API light_status light_paged_attention(const light_paged_attention_args *args,
                                             light_dtype dtype, light_stream stream);

LIGHT_API light_status light_rotary_cache(const light_rotary_cache_args *args, light_dtype dtype,
                                          light_stream stream);
LIGHT_API light_status light_add_norm(const light_add_norm_args *args, light_dtype dtype,
                                      light_stream stream);

// On sm_90 alone.
LIGHT_API light_status light_fp8_gemm(const light_fp8_gemm_args *args, const light_tile *tile,
                                      light_dtype dtype, int max_ctas, light_stream stream);

#ifdef __cplusplus
}
#endif
