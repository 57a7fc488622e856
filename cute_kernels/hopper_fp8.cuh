// e4m3 weights times e4m3 rows on Hopper. The tensor cores add up 128 of depth, and threads these
// sums in fp32: an fp8 mma keeps about 14 bits of its sum (DeepSeek-V3 Technical Report, 3.3.2).
//
//     producer   row scale x weight scale of a stage, a thread a token ──> shared memory
//     consumers  sums of 128 of depth x these products, added in fp32
//
// By channels nothing is multiplied but the total.
#pragma once

#include "hopper_weights.cuh"

namespace light {

__device__ __forceinline__ const float *scales_of(const light_fp8_gemm_args &args, int slot) {
  return reinterpret_cast<const float *>(reinterpret_cast<const char *>(args.scales) +
                                         slot * args.slot_bytes);
}

// The producer's part: for each 128 of depth of a stage the two lists of hopper_launch.h.
template <class Tile>
class ScaleWriter {
  using Launch = HopperLaunch<light_fp8_gemm_args>;
  static constexpr bool kTwoLists = Tile::kSwiglu || Tile::kWeightRows > kScaleSpan;
  static_assert(Tile::kLimit <= 128, "a thread has one token");
  static_assert(Tile::kFeatures % kScaleSpan == 0 || kScaleSpan % Tile::kFeatures == 0,
                "a tile begins no block of weights but with its own begin");

 public:
  // Whole warps, of the first tokens.
  static __device__ __forceinline__ int num_threads(const Launch &launch) {
    return launch.args.by_channels ? 0 : round_up(launch.tokens, 32);
  }

  __device__ __forceinline__ explicit ScaleWriter(const Launch &launch)
      : launch_(launch),
        num_groups_((launch.args.depth + kScaleSpan - 1) / kScaleSpan) {}

  __device__ __forceinline__ void begin(const HopperUnit &unit) {
    const light_fp8_gemm_args &args = launch_.args;
    const int thread = threadIdx.x;
    const int pair = unit.first_pair + (thread < unit.num_tokens ? thread : 0);
    const long long row = args.pair_row ? args.pair_row[pair] : pair;
    row_ = args.row_scales + row * num_groups_;
    const int num_blocks = (args.num_features + kScaleSpan - 1) / kScaleSpan;
    const int first = unit.weight_block * Tile::kFeatures / kScaleSpan;
    const int second = Tile::kSwiglu ? num_blocks + first : min(first + 1, num_blocks - 1);
    first_ = scales_of(args, unit.slot) + first * num_groups_;
    second_ = scales_of(args, unit.slot) + second * num_groups_;
    group_ = 0;
    load();
  }

  // For the warps of num_threads, stages in order. Those of the next one are on their way then.
  __device__ __forceinline__ void write(unsigned stage) {
    if (threadIdx.x < launch_.tokens) {
      unsigned target = stage + launch_.stage.scales_offset + threadIdx.x * 4;
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        store_shared_float(target, row_scale_[panel] * first_scale_[panel]);
        target += launch_.tokens * 4;
        if (kTwoLists) store_shared_float(target, row_scale_[panel] * second_scale_[panel]);
        target += launch_.tokens * 4;
      }
    }
    group_ += Tile::kPanels;
    load();
  }

 private:
  // Behind the last group, where the mma make zeros, the last one's.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int group = min(group_ + panel, num_groups_ - 1);
      row_scale_[panel] = row_[group];
      first_scale_[panel] = first_[group];
      if (kTwoLists) second_scale_[panel] = second_[group];
    }
  }

  const Launch &launch_;
  int num_groups_;
  int group_;
  const float *row_;
  const float *first_;
  const float *second_;
  float row_scale_[Tile::kPanels];
  float first_scale_[Tile::kPanels];
  float second_scale_[Tile::kPanels];
};

// The consumers' part: weights in shared memory, and what becomes of their mma's sums.
template <class Tile>
class Fp8Operand : public PlainOperand<Tile, light_fp8_gemm_args> {
  using Launch = HopperLaunch<light_fp8_gemm_args>;
  static_assert(Tile::kPanelDepth == kScaleSpan, "a panel is one sum of the tensor cores");

 public:
  using Scales = ScaleWriter<Tile>;
  using Sums = float (&)[Tile::kBlocks][Tile::kLimit / 2];
  static constexpr bool kScaled = true;

  __device__ __forceinline__ Fp8Operand(const Launch &launch, int row_group)
      : launch_(launch),
        row_group_(row_group),
        offset_(launch.stage.scales_offset + threadIdx.x % 4 * 8) {}

  // Add the sums of a panel's depth of block `block` of the row group.
  template <int Width>
  __device__ __forceinline__ void add(unsigned stage, int panel, int block,
                                      const float (&part)[Width / 2],
                                      float (&sums)[Tile::kLimit / 2]) const {
    if (launch_.args.by_channels) {
#pragma unroll
      for (int i = 0; i < Width / 2; ++i) sums[i] += part[i];
      return;
    }
    const unsigned list_bytes = launch_.tokens * 4;
    const int row = (row_group_ * Tile::kBlocks + block) * 64;
    const int list = Tile::kSwiglu ? 0 : row / kScaleSpan;
    const unsigned first = stage + offset_ + (panel * 2 + list) * list_bytes;
#pragma unroll
    for (int j = 0; j < Width / 8; ++j) {
      const float2 upper = load_shared_floats(first + j * 32);
      const float2 lower =
          Tile::kSwiglu ? load_shared_floats(first + list_bytes + j * 32) : upper;
      sums[4 * j] = fmaf(part[4 * j], upper.x, sums[4 * j]);
      sums[4 * j + 1] = fmaf(part[4 * j + 1], upper.y, sums[4 * j + 1]);
      sums[4 * j + 2] = fmaf(part[4 * j + 2], lower.x, sums[4 * j + 2]);
      sums[4 * j + 3] = fmaf(part[4 * j + 3], lower.y, sums[4 * j + 3]);
    }
  }

  // By channels: the totals times the scales of their row and of their channel.
  __device__ __forceinline__ void finish(const HopperUnit &unit, Sums sums) const {
    const light_fp8_gemm_args &args = launch_.args;
    if (!args.by_channels) return;
    float upper[Tile::kBlocks], lower[Tile::kBlocks];
    load_channels(unit, upper, lower);
#pragma unroll
    for (int j = 0; j < Tile::kLimit / 8; ++j) {
      if (j * 8 >= unit.num_tokens) break;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int token = j * 8 + threadIdx.x % 4 * 2 + side;
        float scale = 0.0f;
        if (token < unit.num_tokens) {
          const int pair = unit.first_pair + token;
          scale = args.row_scales[args.pair_row ? args.pair_row[pair] : pair];
        }
#pragma unroll
        for (int block = 0; block < Tile::kBlocks; ++block) {
          sums[block][4 * j + side] *= scale * upper[block];
          sums[block][4 * j + 2 + side] *= scale * lower[block];
        }
      }
    }
  }

 private:
  // Of this thread's rows: with SwiGLU the upper is of gate, the lower of up.
  __device__ __forceinline__ void load_channels(const HopperUnit &unit,
                                                float (&upper)[Tile::kBlocks],
                                                float (&lower)[Tile::kBlocks]) const {
    const light_fp8_gemm_args &args = launch_.args;
    const float *scales = scales_of(args, unit.slot);
    constexpr int kWarpFeatures = Tile::kBlockFeatures / 4;
    const int first = unit.weight_block * Tile::kFeatures +
                      row_group_ * Tile::kBlocks * Tile::kBlockFeatures +
                      threadIdx.x / 32 % 4 * kWarpFeatures + threadIdx.x % 32 / 4;
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
      const int feature = first + block * Tile::kBlockFeatures;
      const int other = feature + (Tile::kSwiglu ? 0 : 8);
      upper[block] = feature < args.num_features ? scales[feature] : 0.0f;
      lower[block] = other < args.num_features
                         ? scales[other + (Tile::kSwiglu ? args.num_features : 0)]
                         : 0.0f;
    }
  }

  const Launch &launch_;
  int row_group_;
  unsigned offset_;  // of this thread's first token in a list
};

}  // namespace light
