// What the matrix stems share on the host: checks, the instance's name, the persistent grid.
#pragma once

#include "errors.h"
#include "light_ops.h"

namespace light {

// CTAs that share the depth of an output tile, and where they add their sums up.
struct DepthSplits {
  const void *sums = nullptr, *tickets = nullptr;
  int count = 1;

  template <class Args>
  static DepthSplits of(const Args &args) {
    return {args.split_sums, args.split_tickets, args.depth_splits};
  }
};

// One launch of a matrix stem: what its args say, whichever stem's they are, and the instance.
struct MatrixLaunch {
  const char *stem;
  const light_tile &tile;
  light_dtype dtype;
  int num_bits;  // of a weight: 16, 8 or 4
  int row_bits;  // of an element of the rows: 16 or 8
  int max_ctas;
  light_stream stream;
  const light_pair_groups &groups;
  const void *rows, *weights, *output, *output_rows;
  int depth, num_features;
  bool swiglu, output_float32;
  DepthSplits splits;

  template <class Args>
  MatrixLaunch(const char *stem, const Args &args, const light_tile &tile, light_dtype dtype,
               int num_bits, int row_bits, int max_ctas, light_stream stream,
               const DepthSplits &splits = {})
      : stem(stem),
        tile(tile),
        dtype(dtype),
        num_bits(num_bits),
        row_bits(row_bits),
        max_ctas(max_ctas),
        stream(stream),
        groups(args.groups),
        rows(args.rows),
        weights(args.weights),
        output(args.output),
        output_rows(args.output_rows),
        depth(args.depth),
        num_features(args.num_features),
        swiglu(args.swiglu != 0),
        output_float32(args.output_float32 != 0),
        splits(splits) {}

  int weight_rows() const { return swiglu ? 2 * num_features : num_features; }
  bool on_warpgroups() const { return tile.limit > 0; }
};

// Refuse what no kernel takes: sizes, dtype, missing pointers.
light_status check_matrix(const MatrixLaunch &launch);

// Launch with `args`, the stem's own, as the kernel's parameter: not for warpgroups.
light_status launch_matrix(const MatrixLaunch &launch, const void *args);

// Launch the tile's instance, persistent, with so many bytes of dynamic shared memory.
light_status launch_instance(const MatrixLaunch &launch, int shared_bytes, const void *args);

}  // namespace light
