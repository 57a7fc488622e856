// Encodes tensor maps and launches Hopper's matrix kernels.
#include "hopper.h"

#include "launch.h"

namespace light {
namespace {

// CUtensorMapDataType
int type_code(MappedArray::Type type) {
  switch (type) {
    case MappedArray::Type::kFloat16:
      return 6;
    case MappedArray::Type::kBFloat16:
      return 9;
    case MappedArray::Type::kWord:
      return 2;
    case MappedArray::Type::kByte:
      return 0;
  }
  return 0;
}

// The arguments do not count the slots: as many as any pool may hold.
constexpr long long kMostSlots = 1 << 16;
constexpr long long kSmallestStride = 16;

constexpr int kNoInterleave = 0, kNoSwizzle = 0, kSwizzle128Bytes = 3, kPromote256Bytes = 3,
              kFillZeros = 0;

// Of the rows, and of the weights that the mma takes as they are.
long long element_bytes(const MatrixLaunch &launch) { return launch.row_bits / 8; }

MappedArray::Type element_type(const MatrixLaunch &launch) {
  return launch.row_bits == 8 ? MappedArray::Type::kByte : mapped_type(launch);
}

}  // namespace

MappedArray::Type mapped_type(const MatrixLaunch &launch) {
  return launch.dtype == LIGHT_FLOAT16 ? MappedArray::Type::kFloat16 : MappedArray::Type::kBFloat16;
}

void MappedArray::add_axis(long long extent, long long stride, int box_extent) {
  extents[num_axes] = static_cast<unsigned long long>(extent);
  stride_bytes[num_axes] = static_cast<unsigned long long>(stride);
  box[num_axes] = static_cast<unsigned int>(box_extent);
  ++num_axes;
}

void MappedArray::add_slots(long long slot_bytes) {
  if (slot_bytes == 0) {
    add_axis(1, kSmallestStride, 1);
  } else {
    add_axis(kMostSlots, slot_bytes, 1);
  }
}

light_status encode_map(const MatrixLaunch &launch, const MappedArray &array, TensorMap *map) {
  const driver::Table *driver = nullptr;
  LIGHT_TRY(find_driver(&driver));
  const unsigned int steps[MappedArray::kMostAxes] = {1, 1, 1, 1, 1};
  return check(*driver,
               driver->cuTensorMapEncodeTiled(
                   map, type_code(array.type), static_cast<unsigned int>(array.num_axes),
                   const_cast<void *>(array.address), array.extents, array.stride_bytes + 1,
                   array.box, steps, kNoInterleave,
                   array.swizzled ? kSwizzle128Bytes : kNoSwizzle, kPromote256Bytes, kFillZeros),
               launch.stem);
}

light_status encode_weights(const MatrixLaunch &launch, long long slot_bytes, TensorMap *map) {
  const light_tile &tile = launch.tile;
  const long long row_bytes = element_bytes(launch) * launch.depth;
  MappedArray weights{launch.weights, element_type(launch), true};
  weights.add_axis(launch.depth, element_bytes(launch), panel_depth(launch.row_bits));
  if (launch.swiglu) {
    weights.add_axis(8, row_bytes, 8);
    weights.add_axis(2, row_bytes * launch.num_features, 2);
    weights.add_axis(launch.num_features / 8, 8 * row_bytes, tile.weight_rows / 16);
  } else {
    weights.add_axis(launch.num_features, row_bytes, tile.weight_rows);
  }
  weights.add_slots(slot_bytes);
  return encode_map(launch, weights, map);
}

light_status encode_rows(const MatrixLaunch &launch, TensorMap *map) {
  MappedArray rows{launch.rows, element_type(launch), true};
  rows.add_axis(launch.depth, element_bytes(launch), panel_depth(launch.row_bits));
  rows.add_axis(launch.groups.num_pairs, element_bytes(launch) * launch.depth,
                row_box(launch.tile.tokens));
  return encode_map(launch, rows, map);
}

light_status launch_hopper_bytes(const MatrixLaunch &launch, const HopperStage &stage,
                                 const void *args) {
  const int shared_bytes = launch.tile.stages * stage.bytes + kHopperTailBytes;
  return launch_instance(launch, shared_bytes, args);
}

}  // namespace light
