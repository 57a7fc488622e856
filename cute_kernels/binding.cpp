// The Python module of liblight_ops: pointers and sizes as integers in, a status out.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>

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
          tile[4].cast<int>(), tile[5].cast<int>(), tile[6].cast<int>()};
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
                 Address output, int depth, int num_features, bool swiglu, bool output_float32,
                 int max_ctas, Address split_sums, Address split_tickets, int depth_splits,
                 Address stream) {
  const light_grouped_gemm_args args{read_groups(groups),
                                     pointer<const void>(rows),
                                     pointer<const int>(pair_row),
                                     pointer<const void>(weights),
                                     slot_bytes,
                                     pointer<const float>(pair_weight),
                                     pointer<void>(output),
                                     depth,
                                     num_features,
                                     swiglu,
                                     output_float32,
                                     pointer<void>(split_sums),
                                     pointer<int>(split_tickets),
                                     depth_splits};
  const light_tile instance = read_tile(tile);
  const py::gil_scoped_release released;  // the first launch of an instance loads it
  return light_grouped_gemm(&args, &instance, static_cast<light_dtype>(dtype), max_ctas,
                            pointer<void>(stream));
}

int quant_gemm(const py::tuple &groups, const py::tuple &tile, int dtype, Address rows,
               Address pair_row, Address weights, Address scales, Address zeros,
               long long slot_bytes, Address pair_weight, Address output, int depth,
               int num_features, bool swiglu, bool output_float32, int num_bits, int group_size,
               int max_ctas, Address split_sums, Address split_tickets, int depth_splits,
               Address stream) {
  const light_quant_gemm_args args{read_groups(groups),
                                   pointer<const void>(rows),
                                   pointer<const int>(pair_row),
                                   pointer<const void>(weights),
                                   pointer<const void>(scales),
                                   pointer<const void>(zeros),
                                   slot_bytes,
                                   pointer<const float>(pair_weight),
                                   pointer<void>(output),
                                   depth,
                                   num_features,
                                   swiglu,
                                   output_float32,
                                   num_bits,
                                   group_size,
                                   pointer<void>(split_sums),
                                   pointer<int>(split_tickets),
                                   depth_splits};
  const light_tile instance = read_tile(tile);
  const py::gil_scoped_release released;
  return light_quant_gemm(&args, &instance, static_cast<light_dtype>(dtype), max_ctas,
                          pointer<void>(stream));
}

// How many tickets, and bytes of partial sums, a product split along its depth needs
py::tuple split_needs(const py::tuple &tile, int num_pairs, int num_groups, int weight_rows,
                      int depth_splits) {
  const light_tile instance = read_tile(tile);
  const long long num_tiles = light_output_tiles(&instance, num_pairs, num_groups, weight_rows);
  return py::make_tuple(num_tiles, light_split_bytes(&instance, num_tiles, depth_splits));
}

}  // namespace

PYBIND11_MODULE(_light_ops, module) {
  using py::arg;
  module.def("open", &open_library, arg("directory"), arg("architecture"));
  module.def("bind_device", &bind_device, arg("device"));
  module.def("architecture", &architecture);  // its name, or a status
  module.def("abi_version", &light_abi_version);
  module.def("driver_version", &light_driver_version);
  module.def("last_error", &light_last_error);
  module.def("set_overlapped_launch", &light_set_overlapped_launch, arg("on"));
  module.def("grouped_gemm", &grouped_gemm, py::kw_only(), arg("groups"), arg("tile"),
             arg("dtype"), arg("rows"), arg("pair_row"), arg("weights"), arg("slot_bytes"),
             arg("pair_weight"), arg("output"), arg("depth"), arg("num_features"), arg("swiglu"),
             arg("output_float32"), arg("max_ctas"), arg("split_sums") = 0, arg("split_tickets") = 0,
             arg("depth_splits") = 1, arg("stream"));
  module.def("quant_gemm", &quant_gemm, py::kw_only(), arg("groups"), arg("tile"), arg("dtype"),
             arg("rows"), arg("pair_row"), arg("weights"), arg("scales"), arg("zeros"),
             arg("slot_bytes"), arg("pair_weight"), arg("output"), arg("depth"),
             arg("num_features"), arg("swiglu"), arg("output_float32"), arg("num_bits"),
             arg("group_size"), arg("max_ctas"), arg("split_sums") = 0, arg("split_tickets") = 0,
             arg("depth_splits") = 1, arg("stream"));
  module.def("split_needs", &split_needs, arg("tile"), arg("num_pairs"), arg("num_groups"),
             arg("weight_rows"), arg("depth_splits"));
}
