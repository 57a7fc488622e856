// The weights' side of a tile (the mma's A operand), quantised: blocks of 16 rows x 64 of depth
// that lightmoe/quant/fragments.py packed in fragment order, so a lane's part is 16 bytes wherever
// the block lies: no swizzle, no ldmatrix. Scales and zero points travel with the stage.
#pragma once

#include "dequantize.cuh"
#include "matrix_tile.cuh"

namespace light {

template <class Tile>
class PackedWeights {
  using Element = typename Tile::Element;
  static constexpr int kBits = Tile::kNumBits;
  static constexpr int kBlockBytes = kBlockRows * kBlockDepth * kBits / 8;
  static constexpr int kBlocks = Tile::kWeightRows / kBlockRows;
  static constexpr int kBlockLanes = kBlockBytes / 16;
  static constexpr int kCodeCopies = kBlocks * kBlockLanes / Tile::kThreads;
  static constexpr int kGroupChunks = kBlocks * 2;  // 16 rows of one group: two copies
  static constexpr int kScaleThreads = 2 * kGroupChunks;  // a stage holds at most two groups
  static_assert(kBlocks * kBlockLanes % Tile::kThreads == 0, "a step stores whole blocks");
  static_assert(2 * kScaleThreads <= Tile::kThreads, "scales, and as many zeros, in one step");
  static_assert(kScaleThreads * 16 == Tile::kStageBytes.scales, "the stage has room for them");

 public:
  static constexpr int kCopies = kCodeCopies + 1;  // of 16 bytes a thread and stage

  __device__ __forceinline__ PackedWeights(const light_quant_gemm_args &args, int warp_row)
      : args_(args),
        last_block_((args.num_features + (Tile::kSwiglu ? 7 : 15)) / (Tile::kSwiglu ? 8 : 16) - 1),
        depth_blocks_((args.depth + kBlockDepth - 1) / kBlockDepth),
        groups_((depth_blocks_ * kBlockDepth + args.group_size - 1) / args.group_size),
        group_shift_(31 - __clz(args.group_size)),
        stage_groups_(args.group_size < kBlockDepth ? 2 : 1) {
    const int lane = threadIdx.x % 32;
    source_ = warp_row / kBlockRows * kBlockBytes + lane * 16;
    scale_source_ = Tile::kStageBytes.weights + (warp_row + lane / 4) * 2;
    const int copy = threadIdx.x % kScaleThreads;
    scale_block_ = copy % kGroupChunks / 2;
    scale_group_ = copy / kGroupChunks;
    copies_scales_ = threadIdx.x < (args.zeros ? 2 : 1) * kScaleThreads &&
                     scale_group_ < stage_groups_;
#pragma unroll
    for (int i = 0; i < Tile::kWeightAtoms; ++i) {
      upper_[i].set_zero(kSymmetricZero<Element, kBits>);
      lower_[i].set_zero(kSymmetricZero<Element, kBits>);
    }
  }

  // Blocks behind the last one are read as the last one: their sums are never stored.
  __device__ __forceinline__ void begin_tile(int slot, int weight_block) {
    const long long slot_offset = slot * args_.slot_bytes;
    const int first_block = weight_block * kBlocks;
#pragma unroll
    for (int i = 0; i < kCodeCopies; ++i) {
      const int block = first_block + (threadIdx.x + i * Tile::kThreads) / kBlockLanes;
      codes_[i] = static_cast<const char *>(args_.weights) + slot_offset +
                  static_cast<long long>(min(block, last_block_)) * depth_blocks_ * kBlockBytes +
                  threadIdx.x % kBlockLanes * 16;
    }
    const void *scales = threadIdx.x < kScaleThreads ? args_.scales : args_.zeros;
    scales_ = static_cast<const char *>(scales) + slot_offset + threadIdx.x % 2 * 16 +
              static_cast<long long>(min(first_block + scale_block_, last_block_)) * groups_ * 32;
  }

  __device__ __forceinline__ void begin_copies(int depth, int bytes) {
    code_offset_ = static_cast<unsigned>(depth) / kBlockDepth * kBlockBytes;
    bytes_ = bytes;
    const int group = (depth >> group_shift_) + scale_group_;
    scale_bytes_ = group < groups_ ? bytes : 0;
    scale_row_ = scales_ + min(group, groups_ - 1) * 32;
  }

  __device__ __forceinline__ void copy(unsigned stage, int i) const {
    if (i < kCodeCopies) {
      copy_async_16(stage + (threadIdx.x + i * Tile::kThreads) * 16, codes_[i] + code_offset_,
                    bytes_);
    } else {
      copy_async_16_where(copies_scales_, scale_target(stage), scale_row_, scale_bytes_);
    }
  }

  __device__ __forceinline__ void fetch(int i) {
    if (i < kCodeCopies) {
      staged_[i] = load_global_16(codes_[i] + code_offset_, bytes_ != 0);
    } else {
      staged_[i] = load_global_16(scale_row_, copies_scales_ && scale_bytes_ != 0);
    }
  }

  __device__ __forceinline__ void store(unsigned stage, int i) const {
    if (i < kCodeCopies) {
      store_shared_16(stage + (threadIdx.x + i * Tile::kThreads) * 16, staged_[i]);
    } else if (copies_scales_) {
      store_shared_16(scale_target(stage), staged_[i]);
    }
  }

  // The fragment of 16 rows at a step of 16 of depth.
  __device__ __forceinline__ void fragment(unsigned stage, int step, int atom, unsigned (&a)[4]) {
    constexpr int kStepsPerLoad = kBits == 4 ? 4 : 2;
    if (step % kStepsPerLoad == 0) {
      packed_[atom] = load_shared_16(stage + source_ + atom * kBlockBytes +
                                     step / kStepsPerLoad * (32 * 16));
    }
    if (step == 0) load_scales(stage, 0, atom);
    if (step * 16 == kSmallestGroup && stage_groups_ == 2) load_scales(stage, 1, atom);
    dequantize_fragment(packed_[atom], step, upper_[atom], lower_[atom], a);
  }

 private:
  __device__ __forceinline__ unsigned scale_target(unsigned stage) const {
    return stage + Tile::kStageBytes.weights + threadIdx.x * 16;
  }

  // Of rows lane / 4 (the upper half of the fragment) and lane / 4 + 8.
  __device__ __forceinline__ void load_scales(unsigned stage, int group, int atom) {
    const unsigned address =
        stage + scale_source_ + atom * kBlockRows * 2 + group * kGroupChunks * 16;
    upper_[atom].set_scale(load_shared_u16(address));
    lower_[atom].set_scale(load_shared_u16(address + 16));
    if (args_.zeros) {
      upper_[atom].set_zero(load_shared_u16(address + Tile::kStageBytes.scales));
      lower_[atom].set_zero(load_shared_u16(address + Tile::kStageBytes.scales + 16));
    }
  }

  const light_quant_gemm_args &args_;
  int last_block_;
  int depth_blocks_;
  int groups_;
  int group_shift_;
  int stage_groups_;
  unsigned source_;
  unsigned scale_source_;
  int scale_block_;
  int scale_group_;
  bool copies_scales_;

  const char *codes_[kCodeCopies];
  const char *scales_;
  unsigned code_offset_;
  int bytes_;
  int scale_bytes_;
  const char *scale_row_;
  uint4 staged_[kAsyncCopies ? 1 : kCopies];
  uint4 packed_[Tile::kWeightAtoms];
  Dequantizer<Element, kBits> upper_[Tile::kWeightAtoms];
  Dequantizer<Element, kBits> lower_[Tile::kWeightAtoms];
};

}  // namespace light
