// light_paged_attention: sequences with one query section by section, the others tile by tile.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "launch.h"
#include "paged_attention_sizes.h"

namespace light {
namespace {

using attention::Sizes;

light_status check_sizes(const light_paged_attention_args &args) {
  if (args.num_tokens < 0 || args.num_sequences < 0 || args.num_kv_heads < 1 ||
      args.num_heads < 1 || args.num_heads % args.num_kv_heads != 0) {
    return fail(LIGHT_BAD_ARGUMENT,
                "paged_attention: %d tokens of %d sequences, %d heads over %d KV heads",
                args.num_tokens, args.num_sequences, args.num_heads, args.num_kv_heads);
  }
  const int widest = args.keys == args.values ? std::end(attention::kWidths)[-1]
                                              : attention::kMaxApart;
  if (args.width < 8 || args.width % 8 != 0 || args.width > widest) {
    return fail(LIGHT_BAD_ARGUMENT, "paged_attention: width %d is no multiple of 8 up to %d",
                args.width, widest);
  }
  if (args.block_size < attention::kMinBlock || args.block_size > attention::kMaxBlock ||
      (args.block_size & (args.block_size - 1)) != 0 || args.table_stride < 0) {
    return fail(LIGHT_BAD_ARGUMENT,
                "paged_attention: blocks of %d positions, which must be a power of 2 from %d to"
                " %d, %d of a sequence",
                args.block_size, attention::kMinBlock, attention::kMaxBlock, args.table_stride);
  }
  if (!(args.scale > 0.0f)) {
    return fail(LIGHT_BAD_ARGUMENT, "paged_attention: scale %g is not positive", args.scale);
  }
  return LIGHT_OK;
}

light_status check_pointers(const light_paged_attention_args &args) {
  if (args.query == nullptr || args.keys == nullptr || args.values == nullptr ||
      args.block_tables == nullptr || args.query_starts == nullptr || args.lengths == nullptr ||
      args.output == nullptr) {
    return fail(LIGHT_BAD_ARGUMENT, "paged_attention: an input or output is null");
  }
  return LIGHT_OK;
}

light_status find(const char *kind, const Sizes &sizes, light_dtype dtype, int row_tiles,
                  const Kernel **kernel) {
  const std::string program = std::string("paged_attention_") +
                              (dtype == LIGHT_FLOAT16 ? "f16" : "bf16") + "_w" +
                              std::to_string(sizes.width);
  const std::string name = program + "_" + kind;
  const bool whole = kind[0] == 'w';
  return row_tiles == 0
             ? find_kernel(program, name, 32 * attention::kMergeWarps, 0, kernel)
             : find_kernel(program, name, sizes.threads(row_tiles, whole),
                           sizes.shared_bytes(row_tiles, whole), kernel);
}

light_status launch_whole(const light_paged_attention_args &args, const Sizes &sizes,
                          light_dtype dtype, light_stream stream) {
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find("whole", sizes, dtype, sizes.row_tiles(), &kernel));
  const long long rows = 1LL * args.num_tokens * (args.num_heads / args.num_kv_heads);
  const long long most_tiles = rows / (sizes.row_tiles() * attention::kRows) + args.num_sequences;
  const long long num_ctas = most_tiles * args.num_kv_heads;
  return launch(*kernel, {static_cast<unsigned int>(num_ctas)}, args, stream);
}

light_status launch_split(const light_paged_attention_args &args, const Sizes &sizes,
                          light_dtype dtype, light_stream stream) {
  const Kernel *kernel = nullptr;
  LIGHT_TRY(find("split", sizes, dtype, 1, &kernel));
  const int group = args.num_heads / args.num_kv_heads;
  const int row_tiles = args.num_kv_heads * ((group - 1) / attention::kRows + 1);
  const long long units = 1LL * args.num_sequences * args.max_sections * row_tiles;
  const long long num_ctas = std::min<long long>(units, kernel->resident_ctas());
  LIGHT_TRY(launch(*kernel, {static_cast<unsigned int>(num_ctas)}, args, stream));
  if (args.partials == nullptr) {
    return LIGHT_OK;
  }
  LIGHT_TRY(find("merge", sizes, dtype, 0, &kernel));
  const long long items = 1LL * args.num_sequences * args.num_heads;
  const long long num_merges = (items + attention::kMergeWarps - 1) / attention::kMergeWarps;
  return launch(*kernel, {static_cast<unsigned int>(num_merges)}, args, stream);
}

}  // namespace
}  // namespace light

long long light_paged_attention_workspace_bytes(int num_sequences, int num_heads, int width,
                                                int most_positions) {
  const long long sections = (most_positions - 1LL) / light::attention::kSection + 1;
  return sections <= 1 ? 0 : sections * num_sequences * num_heads * (width + 2) * 4;
}

light_status light_paged_attention(const light_paged_attention_args *given, light_dtype dtype,
                                   light_stream stream) {
  using namespace light;
  if (given == nullptr || (dtype != LIGHT_FLOAT16 && dtype != LIGHT_BFLOAT16)) {
    return fail(LIGHT_BAD_ARGUMENT, "paged_attention: dtype %d is neither fp16 nor bf16", dtype);
  }
  light_paged_attention_args args = *given;
  LIGHT_TRY(check_sizes(args));
  if (args.num_tokens == 0 || args.num_sequences == 0) {
    return LIGHT_OK;
  }
  LIGHT_TRY(check_pointers(args));
  const long long most_positions = 1LL * args.table_stride * args.block_size;
  if (most_positions > 0x7fffffff) {
    return fail(LIGHT_BAD_ARGUMENT, "paged_attention: %lld positions are too many",
                most_positions);
  }
  const long long needed = light_paged_attention_workspace_bytes(
      args.num_sequences, args.num_heads, args.width, static_cast<int>(most_positions));
  args.max_sections =
      std::max(1, static_cast<int>((most_positions - 1) / attention::kSection + 1));
  args.position_bytes = 2 * args.num_kv_heads * args.width;
  args.splits_single_queries = args.max_queries <= 1 || args.num_sequences > 1;
  args.partial_sums = nullptr;
  if (needed == 0 || !args.splits_single_queries) {
    args.partials = nullptr;
  } else if (args.partials == nullptr || args.workspace_bytes < needed) {
    return fail(LIGHT_BAD_ARGUMENT, "paged_attention: the workspace needs %lld bytes, it has %lld",
                needed, args.partials == nullptr ? 0 : args.workspace_bytes);
  } else {
    args.partial_sums =
        args.partials +
        1LL * args.max_sections * args.num_sequences * args.num_heads * args.width;
  }
  char folder[16];
  LIGHT_TRY(light_architecture(folder, sizeof folder));
  const Sizes sizes{*std::find_if(std::begin(attention::kWidths), std::end(attention::kWidths),
                                  [&](int width) { return width >= args.width; }),
                    std::atoi(folder)};
  if (args.max_queries > 1) {
    LIGHT_TRY(launch_whole(args, sizes, dtype, stream));
  }
  return args.splits_single_queries ? launch_split(args, sizes, dtype, stream) : LIGHT_OK;
}
