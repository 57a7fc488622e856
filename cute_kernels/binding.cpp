// The Python module of liblight_ops: pointers and sizes as integers in, a status out.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "light_ops.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T *pointer(Address address) {
  return reinterpret_cast<T *>(address);
}

// (slots, offsets, tile_offsets, tile_groups, num_groups, num_pairs)
light_pair_groups read_groups(const py::tuple &groups) {
  return {pointer<const int>(groups[0].cast<Address>()),
          pointer<const int>(groups[1].cast<Address>()),
          pointer<const int>(groups[2].cast<Address>()),
          pointer<const int>(groups[3].cast<Address>()),
          groups[4].cast<int>(),
          groups[5].cast<int>()};
}

// The fields of light_tile in their order
light_tile read_tile(const py::tuple &tile) {
  return {tile[0].cast<int>(), tile[1].cast<int>(), tile[2].cast<int>(), tile[3].cast<int>(),
          tile[4].cast<int>(), tile[5].cast<int>(), tile[6].cast<int>(), tile[7].cast<int>(), tile[8].cast<int>()};
}

int open_library(const std::string &directory, const std::string &architecture) {
  return light_open(directory.c_str(), architecture.empty() ? nullptr : architecture.c_str());
}

int bind_device(int device) { return light_bind_device(device); }

py::object architecture() {
  std::array<char, 16> name{};
  const light_status status = light_architecture(name.data(), static_cast<int>(name.size()));
  return status == LIGHT_OK ? py::object(py::str(name.data())) : py::object(py::int_(int(status)));
}

int grouped_gemm(const py::tuple &groups, const py::tuple &tile, int dtype, Address rows,
                 Address pair_row, Address weights, long long slot_bytes, Address pair_weight,
                 Address output, Address output_rows, int depth, int num_features, bool swiglu, bool output_float32,
                 int max_ctas, Address split_sums, Address split_tickets, int depth_splits,
                 bool groups_settled, Address unit_ticket, Address stream) {
  const light_grouped_gemm_args args{read_groups(groups),
                                     pointer<const void>(rows),
                                     pointer<const int>(pair_row),
                                     pointer<const void>(weights),
                                     slot_bytes,
                                     pointer<const float>(pair_weight),
                                     pointer<void>(output),
                                     pointer<void *>(output_rows),
                                     depth,
                                     num_features,
                                     swiglu,
                                     output_float32,
                                     pointer<void>(split_sums),
                                     pointer<int>(split_tickets),
                                     depth_splits,
                                     groups_settled,
                                     pointer<unsigned>(unit_ticket)};
  const light_tile instance = read_tile(tile);
  const py::gil_scoped_release released;  // the first launch of an instance loads it
  return light_grouped_gemm(&args, &instance, static_cast<light_dtype>(dtype), max_ctas,
                            pointer<void>(stream));
}

int quant_gemm(const py::tuple &groups, const py::tuple &tile, int dtype, Address rows,
               Address pair_row, Address weights, Address scales, Address zeros,
               long long slot_bytes, Address pair_weight, Address output, Address output_rows, int depth,
               int num_features, bool swiglu, bool output_float32, int num_bits, int group_size,
               int max_ctas, Address split_sums, Address split_tickets, int depth_splits,
               bool groups_settled, Address stream) {
  const light_quant_gemm_args args{read_groups(groups),
                                   pointer<const void>(rows),
                                   pointer<const int>(pair_row),
                                   pointer<const void>(weights),
                                   pointer<const void>(scales),
                                   pointer<const void>(zeros),
                                   slot_bytes,
                                   pointer<const float>(pair_weight),
                                   pointer<void>(output),
                                   pointer<void *>(output_rows),
                                   depth,
                                   num_features,
                                   swiglu,
                                   output_float32,
                                   num_bits,
                                   group_size,
                                   pointer<void>(split_sums),
                                   pointer<int>(split_tickets),
                                   depth_splits,
                                   groups_settled};
  const light_tile instance = read_tile(tile);
  const py::gil_scoped_release released;
  return light_quant_gemm(&args, &instance, static_cast<light_dtype>(dtype), max_ctas,
                          pointer<void>(stream));
}

int fp8_gemm(const py::tuple &groups, const py::tuple &tile, int dtype, Address rows,
             Address row_scales, Address pair_row, Address weights, Address scales,
             long long slot_bytes, Address pair_weight, Address output, Address output_rows, int depth,
             int num_features, bool swiglu, bool output_float32, bool by_channels, int max_ctas,
             bool groups_settled, Address stream) {
  const light_fp8_gemm_args args{read_groups(groups),
                                 pointer<const void>(rows),
                                 pointer<const float>(row_scales),
                                 pointer<const int>(pair_row),
                                 pointer<const void>(weights),
                                 pointer<const float>(scales),
                                 slot_bytes,
                                 pointer<const float>(pair_weight),
                                 pointer<void>(output),
                                 pointer<void *>(output_rows),
                                 depth,
                                 num_features,
                                 swiglu,
                                 output_float32,
                                 by_channels,
                                 groups_settled};
  const light_tile instance = read_tile(tile);
  const py::gil_scoped_release released;
  return light_fp8_gemm(&args, &instance, static_cast<light_dtype>(dtype), max_ctas,
                        pointer<void>(stream));
}

// How many tickets, and bytes of partial sums, a product split along its depth needs
py::tuple split_needs(const py::tuple &tile, int num_pairs, int num_groups, int weight_rows,
                      int depth_splits) {
  const light_tile instance = read_tile(tile);
  const long long num_tiles = light_output_tiles(&instance, num_pairs, num_groups, weight_rows);
  return py::make_tuple(num_tiles, light_split_bytes(&instance, num_tiles, depth_splits));
}

// The fields of light_pair_sort in their order, but the launcher's
light_pair_sort read_sort(const py::tuple &sort) {
  return {pointer<int>(sort[0].cast<Address>()),
          pointer<int>(sort[1].cast<Address>()),
          pointer<float>(sort[2].cast<Address>()),
          pointer<int>(sort[3].cast<Address>()),
          pointer<int>(sort[4].cast<Address>()),
          pointer<int>(sort[5].cast<Address>()),
          pointer<int>(sort[6].cast<Address>()),
          pointer<void>(sort[7].cast<Address>()),
          sort[8].cast<long long>(),
          sort[9].cast<int>(),
          sort[10].cast<int>(),
          sort[11].cast<int>(),
          sort[12].cast<int>(),
          0,
          0,
          0};
}

int topk_gate(Address logits, Address hidden, Address router_weight, Address bias, Address experts,
              Address weights, const py::tuple &sort, int width, bool sigmoid, bool renormalize,
              float scale, int num_groups, int num_groups_per_token, int input, int router,
              int max_ctas, Address stream) {
  const light_topk_gate_args args{pointer<const void>(logits),
                                  pointer<const void>(hidden),
                                  pointer<const void>(router_weight),
                                  pointer<const float>(bias),
                                  pointer<int>(experts),
                                  pointer<float>(weights),
                                  read_sort(sort),
                                  width,
                                  sigmoid,
                                  renormalize,
                                  scale,
                                  num_groups,
                                  num_groups_per_token};
  const py::gil_scoped_release released;
  return light_topk_gate(&args, static_cast<light_dtype>(input), static_cast<light_dtype>(router),
                         max_ctas, pointer<void>(stream));
}

int router_logits(Address hidden, Address router_weight, Address logits, int num_tokens,
                  int num_experts, int width, int input, int router, int max_ctas,
                  Address stream) {
  const light_router_logits_args args{pointer<const void>(hidden),
                                      pointer<const void>(router_weight),
                                      pointer<float>(logits),
                                      num_tokens,
                                      num_experts,
                                      width};
  const py::gil_scoped_release released;
  return light_router_logits(&args, static_cast<light_dtype>(input),
                             static_cast<light_dtype>(router), max_ctas, pointer<void>(stream));
}

int sort_pairs(Address experts, Address weights, const py::tuple &sort, int max_ctas,
               Address stream) {
  const light_sort_pairs_args args{pointer<const int>(experts), pointer<const float>(weights),
                                   read_sort(sort)};
  const py::gil_scoped_release released;
  return light_sort_pairs(&args, max_ctas, pointer<void>(stream));
}

int combine(Address pairs, Address pair_index, Address weights, Address addend, Address output,
            int num_tokens, int num_pairs_per_token, int width, int dtype, int max_ctas,
            Address stream) {
  const light_combine_args args{pointer<const void>(pairs),
                                pointer<const int>(pair_index),
                                pointer<const float>(weights),
                                pointer<const void>(addend),
                                pointer<void>(output),
                                num_tokens,
                                num_pairs_per_token,
                                width};
  const py::gil_scoped_release released;
  return light_combine(&args, static_cast<light_dtype>(dtype), max_ctas, pointer<void>(stream));
}

light_permute_args read_permute(Address rows, Address row_index, Address output, Address scales,
                                int num_rows, int width) {
  return {pointer<const void>(rows), pointer<const int>(row_index), pointer<void>(output),
          pointer<float>(scales), num_rows, width, nullptr};
}

int permute(Address rows, Address row_index, Address output, int num_rows, int width_bytes,
            Address row_count, int max_ctas, Address stream) {
  light_permute_args args = read_permute(rows, row_index, output, 0, num_rows, width_bytes);
  args.row_count = pointer<const int>(row_count);
  const py::gil_scoped_release released;
  return light_permute(&args, max_ctas, pointer<void>(stream));
}

int permute_int8(Address rows, Address row_index, Address output, Address scales, int num_rows,
                 int width, int dtype, int max_ctas, Address stream) {
  const light_permute_args args =
      read_permute(rows, row_index, output, scales, num_rows, width);
  const py::gil_scoped_release released;
  return light_permute_int8(&args, static_cast<light_dtype>(dtype), max_ctas,
                            pointer<void>(stream));
}

int permute_fp8(Address rows, Address row_index, Address output, Address scales, int num_rows,
                int width, int group_size, int dtype, int max_ctas, Address stream) {
  const light_permute_args args =
      read_permute(rows, row_index, output, scales, num_rows, width);
  const py::gil_scoped_release released;
  return light_permute_fp8(&args, static_cast<light_dtype>(dtype), group_size, max_ctas,
                           pointer<void>(stream));
}

int dequantize_rows(Address rows, Address row_index, Address output, Address scales, int num_rows,
                    int width, int dtype, int max_ctas, Address stream) {
  const light_permute_args args =
      read_permute(rows, row_index, output, scales, num_rows, width);
  const py::gil_scoped_release released;
  return light_dequantize_rows(&args, static_cast<light_dtype>(dtype), max_ctas,
                               pointer<void>(stream));
}

template <class Element, class Value, std::size_t size>
void read_list(const py::sequence &from, Value (&to)[size]) {
  for (std::size_t i = 0; i < std::min(size, from.size()); ++i) {
    if constexpr (std::is_pointer_v<Value>) {
      to[i] = pointer<std::remove_pointer_t<Value>>(from[i].cast<Element>());
    } else {
      to[i] = from[i].cast<Element>();
    }
  }
}

// (arenas, offset, counter, failure, timeout in ns, rank): light_exchange_flags
light_exchange_flags read_flags(const py::tuple &flags) {
  light_exchange_flags read{};
  const auto arenas = flags[0].cast<py::sequence>();
  read_list<Address>(arenas, read.arenas);
  read.offset = flags[1].cast<long long>();
  read.counter = pointer<unsigned>(flags[2].cast<Address>());
  read.failure = pointer<unsigned>(flags[3].cast<Address>());
  read.timeout_nanoseconds = flags[4].cast<long long>();
  read.rank = flags[5].cast<int>();
  read.num_ranks = static_cast<int>(arenas.size());
  return read;
}

// (segments, copy_ranks, num_experts, num_copies): light_places
light_places read_places(const py::tuple &places) {
  return {pointer<const int>(places[0].cast<Address>()),
          pointer<const int>(places[1].cast<Address>()), places[2].cast<int>(),
          places[3].cast<int>()};
}

int exchange_share(const py::tuple &flags, Address experts, Address pair_index, Address prefixes,
                   Address num_real, Address weights, Address hidden, Address published,
                   Address ticket, Address load, long long choice_offset,
                   long long prefix_offset, long long weight_offset, int num_tokens, int num_rows,
                   int num_experts_per_token, int num_experts, int num_chunks, int width_bytes,
                   int max_ctas, Address stream) {
  const light_exchange_share_args args{read_flags(flags),
                                       pointer<const int>(experts),
                                       pointer<const int>(pair_index),
                                       pointer<const int>(prefixes),
                                       pointer<const int>(num_real),
                                       pointer<const float>(weights),
                                       pointer<const void>(hidden),
                                       pointer<void>(published),
                                       pointer<unsigned>(ticket),
                                       pointer<int>(load),
                                       choice_offset,
                                       prefix_offset,
                                       weight_offset,
                                       num_tokens,
                                       num_rows,
                                       num_experts_per_token,
                                       num_experts,
                                       num_chunks,
                                       width_bytes};
  const py::gil_scoped_release released;
  return light_exchange_share(&args, max_ctas, pointer<void>(stream));
}

int exchange_meet(const py::tuple &flags, Address stream) {
  const light_exchange_flags args = read_flags(flags);
  const py::gil_scoped_release released;
  return light_exchange_meet(&args, pointer<void>(stream));
}

// (begin, count, places, choices, choice_stride, rank, num_experts_per_token): light_chunk
light_chunk read_chunk(const py::tuple &chunk) {
  light_chunk read{};
  const auto begin = chunk[0].cast<py::sequence>();
  read_list<int>(begin, read.begin);
  read_list<int>(chunk[1].cast<py::sequence>(), read.count);
  read.places = read_places(chunk[2].cast<py::tuple>());
  read.choices = pointer<const int>(chunk[3].cast<Address>());
  read.choice_stride = chunk[4].cast<long long>();
  read.rank = chunk[5].cast<int>();
  read.num_ranks = static_cast<int>(begin.size());
  read.num_experts_per_token = chunk[6].cast<int>();
  return read;
}

int exchange_pull(const py::sequence &hidden, const py::sequence &results, const py::tuple &chunk,
                  Address weights, Address pair_weight, Address output_rows, Address prefixes,
                  Address rows, long long scale_offset, int width_bytes, int dtype,
                  bool as_int8, int max_ctas, Address stream) {
  light_exchange_pull_args args{};
  read_list<Address>(hidden, args.hidden);
  read_list<Address>(results, args.results);
  args.chunk = read_chunk(chunk);
  args.weights = pointer<const float>(weights);
  args.pair_weight = pointer<float>(pair_weight);
  args.output_rows = pointer<void *>(output_rows);
  args.prefixes = pointer<const int>(prefixes);
  args.rows = pointer<void>(rows);
  args.scale_offset = scale_offset;
  args.width_bytes = width_bytes;
  const py::gil_scoped_release released;
  return light_exchange_pull(&args, static_cast<light_dtype>(dtype), as_int8, max_ctas,
                             pointer<void>(stream));
}

int exchange_sum(Address pairs, const py::sequence &sums, const py::tuple &chunk,
                 long long scale_offset, int width_bytes, int dtype, bool as_int8, int max_ctas,
                 Address stream) {
  light_exchange_sum_args args{};
  args.pairs = pointer<const void>(pairs);
  read_list<Address>(sums, args.sums);
  args.chunk = read_chunk(chunk);
  args.scale_offset = scale_offset;
  args.width_bytes = width_bytes;
  const py::gil_scoped_release released;
  return light_exchange_sum(&args, static_cast<light_dtype>(dtype), as_int8, max_ctas,
                            pointer<void>(stream));
}

int exchange_give(Address pairs, Address output_rows, Address num_pairs, int most_pairs,
                  int width_bytes, int max_ctas, Address stream) {
  const light_exchange_give_args args{pointer<const void>(pairs), pointer<void *>(output_rows),
                                      pointer<const int>(num_pairs), most_pairs, width_bytes};
  const py::gil_scoped_release released;
  return light_exchange_give(&args, max_ctas, pointer<void>(stream));
}

int exchange_combine(const py::sequence &results, const py::tuple &places, Address prefixes,
                     Address choices, Address weights, Address output, long long scale_offset, int first_token,
                     int num_tokens, int rank, int num_experts_per_token, int width_bytes,
                     bool together, bool summed, int dtype, bool as_int8, int max_ctas,
                     Address stream) {
  light_exchange_combine_args args{};
  read_list<Address>(results, args.results);
  args.places = read_places(places);
  args.prefixes = pointer<const int>(prefixes);
  args.choices = pointer<const int>(choices);
  args.weights = pointer<const float>(weights);
  args.output = pointer<void>(output);
  args.scale_offset = scale_offset;
  args.first_token = first_token;
  args.num_tokens = num_tokens;
  args.rank = rank;
  args.num_experts_per_token = num_experts_per_token;
  args.width_bytes = width_bytes;
  args.together = together;
  args.summed = summed;
  const py::gil_scoped_release released;
  return light_exchange_combine(&args, static_cast<light_dtype>(dtype), as_int8, max_ctas,
                                pointer<void>(stream));
}

int exchange_count(const py::tuple &chunk, Address rows_sent, Address results_sent, bool summed,
                   Address stream) {
  const light_exchange_count_args args{read_chunk(chunk), pointer<unsigned long long>(rows_sent),
                                       pointer<unsigned long long>(results_sent), summed};
  const py::gil_scoped_release released;
  return light_exchange_count(&args, pointer<void>(stream));
}

// Of each chunk source_offsets, segments, group_offsets, tile_offsets, tile_groups, rank_pairs, then
// route, tokens_per_tile and most_tiles. Of all copy_ranks and nearness.
int route_split(const py::sequence &chunks, Address copy_ranks, Address nearness,
                int source_stride, int num_ranks, int num_experts, int num_copies, int rank,
                int sweeps, int num_levels, Address stream) {
  light_route_split_chunks args;
  const std::size_t count = chunks.size();
  for (std::size_t i = 0; i < std::min<std::size_t>(count, LIGHT_MAX_CHUNKS); ++i) {
    const auto chunk = chunks[i].cast<py::tuple>();
    const auto table = [&](int k) { return pointer<int>(chunk[k].cast<Address>()); };
    const auto number = [&](int k) { return chunk[k].cast<int>(); };
    args.chunk[i] = {
        table(0),      pointer<const int>(copy_ranks),
        table(1),      table(2),
        table(3),      table(4),
        table(5),      nullptr,
        pointer<const int>(nearness),
        source_stride, num_ranks,
        num_experts,   num_copies,
        rank,          number(6),
        sweeps,        number(7),
        number(8),     num_levels};
  }
  const py::gil_scoped_release released;
  return light_route_split(&args, static_cast<int>(count), pointer<void>(stream));
}

// sizes: the integers of light_paged_attention_args from num_tokens to max_queries, in their order
int paged_attention(Address query, Address keys, Address values, Address block_tables,
                    Address query_starts, Address lengths, Address output, Address workspace,
                    long long workspace_bytes, long long query_stride, float scale,
                    const py::tuple &sizes, int dtype, Address stream) {
  light_paged_attention_args args{};
  args.query = pointer<const void>(query);
  args.keys = pointer<const void>(keys);
  args.values = pointer<const void>(values);
  args.block_tables = pointer<const int>(block_tables);
  args.query_starts = pointer<const int>(query_starts);
  args.lengths = pointer<const int>(lengths);
  args.output = pointer<void>(output);
  args.partials = pointer<float>(workspace);
  args.workspace_bytes = workspace_bytes;
  args.query_stride = query_stride;
  args.scale = scale;
  int i = 0;
  for (int *size : {&args.num_tokens, &args.num_sequences, &args.num_heads, &args.num_kv_heads,
                    &args.width, &args.block_size, &args.table_stride, &args.max_queries}) {
    *size = sizes[i++].cast<int>();
  }
  const py::gil_scoped_release released;
  return light_paged_attention(&args, static_cast<light_dtype>(dtype), pointer<void>(stream));
}

// sizes: the integers of light_rotary_cache_args from num_tokens to width, in their order
int rotary_cache(Address heads, Address query_weight, Address key_weight, Address cos, Address sin,
                 Address cache_rows, Address query, Address keys, Address values,
                 long long table_stride, float epsilon, const py::tuple &sizes, int dtype,
                 Address stream) {
  const light_rotary_cache_args args{pointer<const void>(heads),
                                     pointer<const void>(query_weight),
                                     pointer<const void>(key_weight),
                                     pointer<const void>(cos),
                                     pointer<const void>(sin),
                                     pointer<const long long>(cache_rows),
                                     pointer<void>(query),
                                     pointer<void>(keys),
                                     pointer<void>(values),
                                     table_stride,
                                     epsilon,
                                     sizes[0].cast<int>(),
                                     sizes[1].cast<int>(),
                                     sizes[2].cast<int>(),
                                     sizes[3].cast<int>(),
                                     0};
  const py::gil_scoped_release released;
  return light_rotary_cache(&args, static_cast<light_dtype>(dtype), pointer<void>(stream));
}

int add_norm(Address hidden, Address addend, Address weight, Address sum, Address normed,
             float epsilon, int num_rows, int width, int dtype, Address stream) {
  const light_add_norm_args args{pointer<const void>(hidden),
                                 pointer<const void>(addend),
                                 pointer<const void>(weight),
                                 pointer<void>(sum),
                                 pointer<void>(normed),
                                 epsilon,
                                 num_rows,
                                 width};
  const py::gil_scoped_release released;
  return light_add_norm(&args, static_cast<light_dtype>(dtype), pointer<void>(stream));
}

// Define a launch, and let Python see the names of its arguments: at a call by names pybind11 makes
// a string of each, which takes as long as the launch. At a call by position it makes none.
template <class Function, class... Arguments>
void define(py::module_ &module, const char *stem, Function function,
            const Arguments &...arguments) {
  module.def(stem, function, arguments...);
  module.attr("parameters")[stem] = py::make_tuple(arguments.name...);
}

}  // namespace

PYBIND11_MODULE(_light_ops, module) {
  using py::arg;
  module.attr("parameters") = py::dict();
  module.def("open", &open_library, arg("directory"), arg("architecture"));
  module.def("bind_device", &bind_device, arg("device"));
  module.def("architecture", &architecture);  // its name, or a status
  module.def("abi_version", &light_abi_version);
  module.def("driver_version", &light_driver_version);
  module.def("last_error", &light_last_error);
  module.def("set_overlapped_launch", &light_set_overlapped_launch, arg("on"));
  define(module, "grouped_gemm", &grouped_gemm, arg("groups"), arg("tile"),
         arg("dtype"), arg("rows"), arg("pair_row"), arg("weights"), arg("slot_bytes"),
         arg("pair_weight"), arg("output"), arg("output_rows") = 0, arg("depth"), arg("num_features"), arg("swiglu"),
         arg("output_float32"), arg("max_ctas"), arg("split_sums") = 0,
         arg("split_tickets") = 0, arg("depth_splits") = 1, arg("groups_settled") = false,
         arg("unit_ticket") = 0, arg("stream"));
  define(module, "quant_gemm", &quant_gemm, arg("groups"), arg("tile"), arg("dtype"),
         arg("rows"), arg("pair_row"), arg("weights"), arg("scales"), arg("zeros"),
         arg("slot_bytes"), arg("pair_weight"), arg("output"), arg("output_rows") = 0, arg("depth"),
         arg("num_features"), arg("swiglu"), arg("output_float32"), arg("num_bits"),
         arg("group_size"), arg("max_ctas"), arg("split_sums") = 0, arg("split_tickets") = 0,
         arg("depth_splits") = 1, arg("groups_settled") = false, arg("stream"));
  define(module, "fp8_gemm", &fp8_gemm, arg("groups"), arg("tile"), arg("dtype"),
         arg("rows"), arg("row_scales"), arg("pair_row"), arg("weights"), arg("scales"),
         arg("slot_bytes"), arg("pair_weight"), arg("output"), arg("output_rows") = 0, arg("depth"),
         arg("num_features"), arg("swiglu"), arg("output_float32"), arg("by_channels"),
         arg("max_ctas"), arg("groups_settled") = false, arg("stream"));
  module.def("split_needs", &split_needs, arg("tile"), arg("num_pairs"), arg("num_groups"),
             arg("weight_rows"), arg("depth_splits"));
  define(module, "topk_gate", &topk_gate, arg("logits"), arg("hidden"),
         arg("router_weight"), arg("bias"), arg("experts"), arg("weights"), arg("sort"),
         arg("width"), arg("sigmoid"), arg("renormalize"), arg("scale"), arg("num_groups"),
         arg("num_groups_per_token"), arg("input"), arg("router"), arg("max_ctas"),
         arg("stream"));
  define(module, "router_logits", &router_logits, arg("hidden"), arg("router_weight"),
         arg("logits"), arg("num_tokens"), arg("num_experts"), arg("width"), arg("input"),
         arg("router"), arg("max_ctas"), arg("stream"));
  define(module, "sort_pairs", &sort_pairs, arg("experts"), arg("weights"), arg("sort"),
         arg("max_ctas"), arg("stream"));
  module.def("workspace_bytes", &light_topk_gate_workspace_bytes, arg("num_experts"),
             arg("num_tokens"), arg("width"));
  define(module, "combine", &combine, arg("pairs"), arg("pair_index"), arg("weights"),
         arg("addend"), arg("output"), arg("num_tokens"), arg("num_pairs_per_token"),
         arg("width"), arg("dtype"), arg("max_ctas"), arg("stream"));
  define(module, "permute", &permute, arg("rows"), arg("row_index"), arg("output"),
         arg("num_rows"), arg("width_bytes"), arg("row_count") = 0, arg("max_ctas"),
         arg("stream"));
  define(module, "permute_fp8", &permute_fp8, arg("rows"), arg("row_index"),
         arg("output"), arg("scales"), arg("num_rows"), arg("width"), arg("group_size"),
         arg("dtype"), arg("max_ctas"), arg("stream"));
  define(module, "exchange_share", &exchange_share, arg("flags"), arg("experts"),
         arg("pair_index"), arg("prefixes"), arg("num_real"), arg("weights"), arg("hidden"),
         arg("published"), arg("ticket"), arg("load"), arg("choice_offset"),
         arg("prefix_offset"), arg("weight_offset"), arg("num_tokens"), arg("num_rows"),
         arg("num_experts_per_token"), arg("num_experts"), arg("num_chunks"),
         arg("width_bytes"), arg("max_ctas"), arg("stream"));
  define(module, "exchange_meet", &exchange_meet, arg("flags"), arg("stream"));
  define(module, "exchange_pull", &exchange_pull, arg("hidden"), arg("results"),
         arg("chunk"), arg("weights"), arg("pair_weight"), arg("output_rows"),
         arg("prefixes"), arg("rows"), arg("scale_offset"), arg("width_bytes"),
         arg("dtype"), arg("as_int8"), arg("max_ctas"), arg("stream"));
  define(module, "exchange_give", &exchange_give, arg("pairs"), arg("output_rows"),
         arg("num_pairs"), arg("most_pairs"), arg("width_bytes"), arg("max_ctas"),
         arg("stream"));
  define(module, "exchange_sum", &exchange_sum, arg("pairs"), arg("sums"),
         arg("chunk"), arg("scale_offset"), arg("width_bytes"), arg("dtype"), arg("as_int8"),
         arg("max_ctas"), arg("stream"));
  define(module, "exchange_combine", &exchange_combine, arg("results"), arg("places"),
         arg("prefixes"), arg("choices"), arg("weights"), arg("output"), arg("scale_offset"),
         arg("first_token"), arg("num_tokens"), arg("rank"), arg("num_experts_per_token"),
         arg("width_bytes"), arg("together"), arg("summed"), arg("dtype"), arg("as_int8"),
         arg("max_ctas"), arg("stream"));
  define(module, "exchange_count", &exchange_count, arg("chunk"), arg("rows_sent"),
         arg("results_sent"), arg("summed"), arg("stream"));
  define(module, "route_split", &route_split, arg("chunks"), arg("copy_ranks"), arg("nearness"),
         arg("source_stride"), arg("num_ranks"), arg("num_experts"), arg("num_copies"),
         arg("rank"), arg("sweeps"), arg("num_levels"), arg("stream"));
  define(module, "paged_attention", &paged_attention, arg("query"), arg("keys"),
         arg("values"), arg("block_tables"), arg("query_starts"), arg("lengths"),
         arg("output"), arg("workspace"), arg("workspace_bytes"), arg("query_stride"),
         arg("scale"), arg("sizes"), arg("dtype"), arg("stream"));
  module.def("paged_attention_workspace_bytes", &light_paged_attention_workspace_bytes,
             arg("num_sequences"), arg("num_heads"), arg("width"), arg("most_positions"));
  define(module, "rotary_cache", &rotary_cache, arg("heads"), arg("query_weight"),
         arg("key_weight"), arg("cos"), arg("sin"), arg("cache_rows"), arg("query"),
         arg("keys"), arg("values"), arg("table_stride"), arg("epsilon"), arg("sizes"),
         arg("dtype"), arg("stream"));
  define(module, "add_norm", &add_norm, arg("hidden"), arg("addend"), arg("weight"),
         arg("sum"), arg("normed"), arg("epsilon"), arg("num_rows"), arg("width"),
         arg("dtype"), arg("stream"));
  for (const auto &[name, function] :
       {std::pair{"permute_int8", &permute_int8}, std::pair{"dequantize_rows", &dequantize_rows}}) {
    define(module, name, function, arg("rows"), arg("row_index"), arg("output"),
           arg("scales"), arg("num_rows"), arg("width"), arg("dtype"), arg("max_ctas"),
           arg("stream"));
  }
}
