// e4m3 weights times e4m3 rows on Hopper. The tensor cores add up 128 of depth, and threads these
// sums in fp32: an fp8 mma keeps about 14 bits of its sum (DeepSeek-V3 Technical Report, 3.3.2).
//
//     producer   two warps bring a stage's scales ──> shared memory
//     consumers  sums of 128 of depth x token's scale x weights' scale, added in fp32
//
// By channels nothing is multiplied but the total.
#pragma once

#include "hopper_weights.cuh"

namespace light {

__device__ __forceinline__ const float *scales_of(const light_fp8_gemm_args &args, int slot) {
  return reinterpret_cast<const float *>(reinterpret_cast<const char *>(args.scales) +
                                         slot * args.slot_bytes);
}

// The list of a panel of a stage in one of its two turns.
template <class Tile, class Launch>
__device__ __forceinline__ unsigned scale_list(const Launch &launch, unsigned stage,
                                               unsigned turn, int panel) {
  return stage + launch.stage.scales_offset +
         (turn * Tile::kPanels + panel) * scale_list_bytes(launch.tokens);
}

// The producer's part, of its third and fourth warp: they wait for scales, those that start the
// copy engine must not.
template <class Tile>
class ScaleWriter {
  using Launch = HopperLaunch<light_fp8_gemm_args>;
  static constexpr int kMostThreads = 64;
  static constexpr int kTokens = (Tile::kLimit + kMostThreads - 1) / kMostThreads;  // of a thread
  static_assert(Tile::kWeightRows <= 2 * kScaleSpan, "a tile has two blocks of rows at most");
  static_assert(Tile::kFeatures % kScaleSpan == 0 || kScaleSpan % Tile::kFeatures == 0,
                "a tile begins no block of weights but with its own begin");

 public:
  // Whole warps.
  static __device__ __forceinline__ int num_threads(const Launch &launch) {
    return launch.args.by_channels ? 0 : min(round_up(launch.tokens, 32), kMostThreads);
  }

  __device__ __forceinline__ explicit ScaleWriter(const Launch &launch)
      : launch_(launch),
        num_groups_((launch.args.depth + kScaleSpan - 1) / kScaleSpan),
        first_token_(threadIdx.x % kMostThreads) {}

  __device__ __forceinline__ void begin(const HopperUnit &unit) {
    const light_fp8_gemm_args &args = launch_.args;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int token = first_token_ + i * kMostThreads;
      const int pair = unit.first_pair + (token < unit.num_tokens ? token : 0);
      const long long row = args.pair_row ? args.pair_row[pair] : pair;
      rows_[i] = args.row_scales + row * num_groups_;
    }
    const int num_blocks = (args.num_features + kScaleSpan - 1) / kScaleSpan;
    const int first = unit.weight_block * Tile::kFeatures / kScaleSpan;
    const int second = Tile::kSwiglu ? num_blocks + first : min(first + 1, num_blocks - 1);
    weights_ = scales_of(args, unit.slot) + (first_token_ == 0 ? first : second) * num_groups_;
    group_ = 0;
    load();
  }

  // Stages in order. Those of the next one are on their way then.
  __device__ __forceinline__ void write(unsigned stage, unsigned turn) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const unsigned list = scale_list<Tile>(launch_, stage, turn, panel) + first_token_ * 4;
      if (first_token_ < 2) store_shared_float(list, weight_scale_[panel]);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (first_token_ + i * kMostThreads < launch_.tokens) {
          store_shared_float(list + token_scale(i * kMostThreads), row_scale_[panel][i]);
        }
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
      if (first_token_ < 2) weight_scale_[panel] = weights_[group];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) row_scale_[panel][i] = rows_[i][group];
    }
  }

  const Launch &launch_;
  int num_groups_;
  int first_token_;
  int group_;
  const float *rows_[kTokens];
  const float *weights_;  // of the first thread the first block's, of the second the other's
  float row_scale_[Tile::kPanels][kTokens];
  float weight_scale_[Tile::kPanels];
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
        row_group_(row_group) {}

  // A panel's, of the blocks of weights and of this thread's two tokens of every eight.
  template <int Width>
  struct PanelScales {
    float2 weights;
    float2 tokens[Width / 8];

    __device__ __forceinline__ void load(unsigned list) {
      weights = load_shared_floats(list);
#pragma unroll
      for (int j = 0; j < Width / 8; ++j) tokens[j] = tokens_at(list, j);
    }
  };

  __device__ __forceinline__ unsigned list(unsigned stage, unsigned turn, int panel) const {
    return scale_list<Tile>(launch_, stage, turn, panel);
  }

  // Add the sums of a panel's depth of block `block` of the row group. With one block the scales
  // are loaded already.
  template <int Width>
  __device__ __forceinline__ void add(unsigned stage, unsigned turn, int panel, int block,
                                      const PanelScales<Width> &scales,
                                      const float (&part)[Width / 2],
                                      float (&sums)[Tile::kLimit / 2]) const {
    constexpr bool kLoaded = Tile::kBlocks == 1;
    if (launch_.args.by_channels) {
#pragma unroll
      for (int i = 0; i < Width / 2; ++i) sums[i] += part[i];
      return;
    }
    const unsigned from = list(stage, turn, panel);
    const float2 weights = kLoaded ? scales.weights : load_shared_floats(from);
    const bool second = (row_group_ * Tile::kBlocks + block) * 64 >= kScaleSpan;
    const float upper = !Tile::kSwiglu && second ? weights.y : weights.x;
    const float lower = Tile::kSwiglu ? weights.y : upper;
#pragma unroll
    for (int j = 0; j < Width / 8; ++j) {
      const float2 scale = kLoaded ? scales.tokens[j] : tokens_at(from, j);
      sums[4 * j] = fmaf(part[4 * j], scale.x * upper, sums[4 * j]);
      sums[4 * j + 1] = fmaf(part[4 * j + 1], scale.y * upper, sums[4 * j + 1]);
      sums[4 * j + 2] = fmaf(part[4 * j + 2], scale.x * lower, sums[4 * j + 2]);
      sums[4 * j + 3] = fmaf(part[4 * j + 3], scale.y * lower, sums[4 * j + 3]);
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
  static __device__ __forceinline__ float2 tokens_at(unsigned list, int j) {
    return load_shared_floats(list + token_scale(0) + threadIdx.x % 4 * 8 + j * 32);
  }

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
};

}  // namespace light
