// The weights' side of a Hopper tile (the mma's A operand): the copies that bring a stage of them,
// and what the tensor cores take: shared memory for 16-bit weights, registers for quantised ones.
#pragma once

#include "dequantize.cuh"
#include "hopper_tile.cuh"

namespace light {

// Of an operand whose sums are whole when its mma are done.
struct NoScales {
  template <class Launch>
  static __device__ __forceinline__ int num_threads(const Launch &) {
    return 0;
  }
  template <class Launch>
  __device__ __forceinline__ explicit NoScales(const Launch &) {}
  __device__ __forceinline__ void begin(const HopperUnit &) {}
  __device__ __forceinline__ void write(unsigned, unsigned) {}
};

// Rows as the mma takes them. With SwiGLU 8 gate rows and the 8 up rows beside them take turns: the box has an
// axis of rows, one of gate and up, and one of blocks.
template <class Tile, class ArgsType = light_grouped_gemm_args>
class PlainOperand {
 public:
  using Args = ArgsType;
  static_assert(Tile::kPanels == 1 || Tile::kRowGroups == 1, "a row group's rows lie together");
  static constexpr bool kInRegisters = false;
  using Scales = NoScales;
  static constexpr bool kScaled = false;  // the sums of a panel, by what Scales makes

  static __device__ __forceinline__ void copy(const HopperLaunch<Args> &launch, unsigned barrier,
                                              unsigned stage, const HopperUnit &unit, int depth) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const unsigned target = stage + panel * Tile::kWeightRows * kPanelRowBytes;
      const int at = depth + panel * Tile::kPanelDepth, block = unit.weight_block;
      if constexpr (Tile::kSwiglu) {
        copy_box(launch.weights, barrier, target, at, 0, 0, block * (Tile::kWeightRows / 16),
                 unit.slot);
      } else {
        copy_box(launch.weights, barrier, target, at, block * Tile::kWeightRows, unit.slot);
      }
    }
  }

  // The descriptor of block `block` of a row group at a step of 32 bytes of depth.
  static __device__ __forceinline__ unsigned long long descriptor(unsigned stage, int row_group,
                                                                  int block, int step) {
    const int row = (row_group * Tile::kBlocks + block) * 64;
    const int panel = step / 4 * Tile::kWeightRows;
    return panel_descriptor(stage + (panel + row) * kPanelRowBytes + step % 4 * 32);
  }
};

// Packed blocks of 16 rows x 64 of depth, in fragment order (lightmoe/quant/fragments.py): a
// warp's 16 rows of a block of 64 are the A fragment of a warpgroup's mma as of a warp's.
template <class Tile>
class PackedOperand {
  using Element = typename Tile::Element;
  static constexpr int kBits = Tile::kNumBits;
  static constexpr int kBlockBytes = kBlockRows * kBlockDepth * kBits / 8;

  // fragment() reads the scales of a group of 128 with the first panel alone.
  static_assert(Tile::kPanels / Tile::kDepthParts <= 2, "a stage's panels are of one group of 128");

 public:
  using Args = light_quant_gemm_args;
  static constexpr bool kInRegisters = true;
  using Scales = NoScales;
  static constexpr bool kScaled = false;

  static __device__ __forceinline__ void copy(const HopperLaunch<Args> &launch, unsigned barrier,
                                              unsigned stage, const HopperUnit &unit, int depth) {
    const int block = unit.weight_block * (Tile::kWeightRows / kBlockRows);
    copy_box(launch.weights, barrier, stage, 0, depth / kBlockDepth, block, unit.slot);
    const int group = depth >> (31 - __clz(launch.args.group_size));
    copy_box(launch.scales, barrier, stage + launch.stage.scales_offset, 0, group, block,
             unit.slot);
    if (launch.args.zeros) {
      copy_box(launch.zeros, barrier, stage + launch.stage.zeros_offset, 0, group, block,
               unit.slot);
    }
  }

  __device__ __forceinline__ PackedOperand(const HopperLaunch<Args> &launch, int row_group)
      : scales_offset_(launch.stage.scales_offset),
        zeros_offset_(launch.args.zeros ? launch.stage.zeros_offset : 0),
        group_shift_(31 - __clz(launch.args.group_size)),
        stage_groups_(max(Tile::kDepth >> group_shift_, 1)),
        first_block_(row_group * Tile::kBlocks * 4 + threadIdx.x / 32 % 4) {
#pragma unroll
    for (int i = 0; i < Tile::kBlocks; ++i) {
      upper_[i].set_zero(kSymmetricZero<Element, kBits>);
      lower_[i].set_zero(kSymmetricZero<Element, kBits>);
    }
  }

  // The fragment of block `block` of the row group at a step of 16 of a panel's depth. For the
  // steps in order, the panels of a stage too, of which the first says so.
  __device__ __forceinline__ void fragment(unsigned stage, int block, int panel, int step,
                                           bool first_panel, unsigned (&a)[4]) {
    constexpr int kStepsPerLoad = kBits == 4 ? 4 : 2;
    const int row_block = first_block_ + block * 4;
    if (step % kStepsPerLoad == 0) {
      packed_[block] = load_shared_16(stage + (row_block * Tile::kPanels + panel) * kBlockBytes +
                                      step / kStepsPerLoad * 512 + threadIdx.x % 32 * 16);
    }
    const bool new_panel_group = first_panel || stage_groups_ >= Tile::kPanels;
    const bool half_panel_groups = stage_groups_ > Tile::kPanels;
    if (step == 0 ? new_panel_group : step * 16 == kSmallestGroup && half_panel_groups) {
      load_scales(stage, row_block, (panel * Tile::kPanelDepth + step * 16) >> group_shift_, block);
    }
    dequantize_fragment(packed_[block], step, upper_[block], lower_[block], a);
  }

 private:
  // Of rows lane / 4 (the upper half of the fragment) and lane / 4 + 8.
  __device__ __forceinline__ void load_scales(unsigned stage, int row_block, int group,
                                              int block) {
    const unsigned at = stage + (row_block * stage_groups_ + group) * kBlockRows * 2 +
                        threadIdx.x % 32 / 4 * 2;
    upper_[block].set_scale(load_shared_u16(at + scales_offset_));
    lower_[block].set_scale(load_shared_u16(at + scales_offset_ + 16));
    if (zeros_offset_) {
      upper_[block].set_zero(load_shared_u16(at + zeros_offset_));
      lower_[block].set_zero(load_shared_u16(at + zeros_offset_ + 16));
    }
  }

  int scales_offset_;
  int zeros_offset_;
  int group_shift_;
  int stage_groups_;
  int first_block_;
  uint4 packed_[Tile::kBlocks];
  Dequantizer<Element, kBits> upper_[Tile::kBlocks];
  Dequantizer<Element, kBits> lower_[Tile::kBlocks];
};

}  // namespace light
