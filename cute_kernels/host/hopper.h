// Launches of Hopper's matrix kernels: tensor maps for the copy engine beside the stem's arguments.
#pragma once

#include "hopper_launch.h"
#include "matrix.h"

namespace light {

// An array in global memory as the copy engine sees it: extents in elements, innermost first, and
// the box of it that one copy brings.
struct MappedArray {
  static constexpr int kMostAxes = 5;
  enum class Type { kFloat16, kBFloat16, kWord, kByte };

  const void *address;
  Type type;
  bool swizzled;  // boxes of 128-byte rows, for the tensor cores
  int num_axes = 0;
  unsigned long long extents[kMostAxes] = {};
  unsigned long long stride_bytes[kMostAxes] = {};  // of axis i to the next; the first is dense
  unsigned int box[kMostAxes] = {};

  void add_axis(long long extent, long long stride, int box_extent);
  void add_slots(long long slot_bytes);  // the last axis; 0 bytes: there is one slot
};

MappedArray::Type mapped_type(const MatrixLaunch &launch);

light_status encode_map(const MatrixLaunch &launch, const MappedArray &array, TensorMap *map);

// Weights as the mma takes them, row by row; with swiglu 8 gate rows and the 8 up rows beside them
// take turns.
light_status encode_weights(const MatrixLaunch &launch, long long slot_bytes, TensorMap *map);

// The rows of the output's pairs, where they are the input's rows in their order.
light_status encode_rows(const MatrixLaunch &launch, TensorMap *map);

light_status launch_hopper_bytes(const MatrixLaunch &launch, const HopperStage &stage,
                                 const void *args);

// Complete `prepared`, whose maps of weights the stem has made, and launch.
template <class Args>
light_status launch_hopper(const MatrixLaunch &launch, const Args &args, const HopperStage &stage,
                           HopperLaunch<Args> *prepared) {
  prepared->args = args;
  prepared->stage = stage;
  prepared->tokens = launch.tile.tokens;
  prepared->num_stages = launch.tile.stages;
  if (args.pair_row == nullptr) {
    LIGHT_TRY(encode_rows(launch, &prepared->rows));
  }
  return launch_hopper_bytes(launch, stage, prepared);
}

}  // namespace light
