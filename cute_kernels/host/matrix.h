// What the two matrix stems share on the host: checks, the instance's name, the persistent grid.
#pragma once

#include "errors.h"
#include "light_ops.h"

namespace light {

// One launch of a matrix stem: what its args say, whichever stem's they are, and the instance.
struct MatrixLaunch {
  const char *stem;
  const light_tile &tile;
  light_dtype dtype;
  int num_bits;  // of a weight: 16, 8 or 4
  int max_ctas;
  light_stream stream;
  const light_pair_groups &groups;
  const void *rows, *weights, *output;
  int depth, num_features;
  bool swiglu, output_float32;
  const void *split_sums, *split_tickets;
  int depth_splits;

  template <class Args>
  MatrixLaunch(const char *stem, const Args &args, const light_tile &tile, light_dtype dtype,
               int num_bits, int max_ctas, light_stream stream)
      : stem(stem),
        tile(tile),
        dtype(dtype),
        num_bits(num_bits),
        max_ctas(max_ctas),
        stream(stream),
        groups(args.groups),
        rows(args.rows),
        weights(args.weights),
        output(args.output),
        depth(args.depth),
        num_features(args.num_features),
        swiglu(args.swiglu != 0),
        output_float32(args.output_float32 != 0),
        split_sums(args.split_sums),
        split_tickets(args.split_tickets),
        depth_splits(args.depth_splits) {}

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
