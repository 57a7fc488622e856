// From a warp's accumulators to the output: SwiGLU, routing weight, rounding, and a transposition
// in registers, because the sums lie with weights along the mma's rows and the output with features
// along its own.
#pragma once

#include "matrix_tile.cuh"
#include "work_queue.cuh"

namespace light {

struct OutputArgs {
  void *output;
  void *const *output_rows;  // null: rows of `output`
  const float *pair_weight;
  int num_features;
  int float32;
};

// Where a pair's 16-bit row of the output begins: other ranks' memory, too.
__device__ __forceinline__ unsigned long long output_address(const OutputArgs &args, int pair) {
  if (args.output_rows != nullptr) {
    return __ldg(reinterpret_cast<const unsigned long long *>(args.output_rows) + pair);
  }
  return reinterpret_cast<unsigned long long>(args.output) +
         static_cast<unsigned long long>(pair) * args.num_features * 2;
}

__device__ __forceinline__ unsigned short *output_row(const OutputArgs &args, int pair) {
  return reinterpret_cast<unsigned short *>(output_address(args, pair));
}

// x / (1 + exp(-x)), in fp32, within some units of the last place.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// 4 x 4 transposition over the four lanes of a quad: lane t's block b becomes lane b's pair t.
__device__ __forceinline__ void transpose_quad(unsigned (&blocks)[4]) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & mask) continue;
      const unsigned sent = upper ? blocks[i] : blocks[i + mask];
      const unsigned received = __shfl_xor_sync(0xffffffff, sent, mask);
      (upper ? blocks[i] : blocks[i + mask]) = received;
    }
  }
}

template <class Tile>
class Epilogue {
  using Element = typename Tile::Element;
  // Blocks of 8 features x 8 tokens in a column of the warp's tiles.
  static constexpr int kBlocks = Tile::kWeightAtoms * (Tile::kSwiglu ? 1 : 2);
  static constexpr int kAtomFeatures = Tile::kSwiglu ? 8 : 16;

 public:
  __device__ __forceinline__ Epilogue(const OutputArgs &args, int warp_row, int warp_token)
      : args_(args), warp_feature_(warp_row / 16 * kAtomFeatures), warp_token_(warp_token) {}

  __device__ __forceinline__ void operator()(
      const typename WorkQueue<Tile>::Unit &unit,
      float (&sums)[Tile::kWeightAtoms][Tile::kTokenAtoms][4]) const {
    const int feature =
        unit.weight_block * (Tile::kWeightRows / 16 * kAtomFeatures) + warp_feature_;
    unsigned short *row = find_row(unit, warp_token_);
#pragma unroll
    for (int j = 0; j < Tile::kTokenAtoms; ++j) {
      const int token = warp_token_ + j * 8;
      if (token >= unit.num_tokens) break;
      unsigned short *const next_row = find_row(unit, token + 8);
      weigh(unit, token, sums, j);
      if (!Tile::kSwiglu && args_.float32) {
        store_float32(unit, token, feature, sums, j);
      } else {
        store(row, feature, sums, j);
      }
      row = next_row;
    }
  }

 private:
  __device__ __forceinline__ void weigh(const typename WorkQueue<Tile>::Unit &unit, int token,
                                        float (&sums)[Tile::kWeightAtoms][Tile::kTokenAtoms][4],
                                        int j) const {
    if (args_.pair_weight == nullptr) return;
    const int first = token + threadIdx.x % 4 * 2;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float weight = first + side < unit.num_tokens
                               ? args_.pair_weight[unit.first_pair + first + side]
                               : 0.0f;
#pragma unroll
      for (int i = 0; i < Tile::kWeightAtoms; ++i) {
        // After SwiGLU the product is gate * up: weigh one of them only.
        if (!Tile::kSwiglu) sums[i][j][side] *= weight;
        sums[i][j][2 + side] *= weight;
      }
    }
  }

  // Where the row goes that this lane stores of eight tokens from one on, asked for ahead of its
  // use; null: nowhere.
  __device__ __forceinline__ unsigned short *find_row(
      const typename WorkQueue<Tile>::Unit &unit, int first_token) const {
    const int token = first_token + threadIdx.x % 32 / 4;
    return token < unit.num_tokens ? output_row(args_, unit.first_pair + token) : nullptr;
  }

  // Null: of no token.
  __device__ __forceinline__ void store(unsigned short *row, int feature,
                                        float (&sums)[Tile::kWeightAtoms][Tile::kTokenAtoms][4],
                                        int j) const {
    unsigned blocks[kBlocks];
#pragma unroll
    for (int i = 0; i < Tile::kWeightAtoms; ++i) {
      const float(&s)[4] = sums[i][j];
      if constexpr (Tile::kSwiglu) {
        blocks[i] = transpose_matrix(Element::pack(silu(s[0]) * s[2], silu(s[1]) * s[3]));
      } else {
        blocks[2 * i] = transpose_matrix(Element::pack(s[0], s[1]));
        blocks[2 * i + 1] = transpose_matrix(Element::pack(s[2], s[3]));
      }
    }
    // Now this lane holds token `lane / 4` of the eight, and features 2t, 2t + 1 of each block.
    const int lane = threadIdx.x % 32;
    const bool stored = row != nullptr;
    if constexpr (kBlocks % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kBlocks; i += 4) {
        unsigned four[4] = {blocks[i], blocks[i + 1], blocks[i + 2], blocks[i + 3]};
        transpose_quad(four);
        const int column = feature + (i + lane % 4) * 8;
        if (stored && column < args_.num_features) {
          *reinterpret_cast<uint4 *>(row + column) = make_uint4(four[0], four[1], four[2], four[3]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        if (stored && feature + i * 8 < args_.num_features) {
          *reinterpret_cast<unsigned *>(row + feature + i * 8 + lane % 4 * 2) = blocks[i];
        }
      }
    }
  }

  __device__ __forceinline__ void store_float32(
      const typename WorkQueue<Tile>::Unit &unit, int token, int feature,
      float (&sums)[Tile::kWeightAtoms][Tile::kTokenAtoms][4], int j) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < Tile::kWeightAtoms; ++i) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const int column = feature + i * 16 + s / 2 * 8 + lane / 4;
        const int at = token + lane % 4 * 2 + s % 2;
        if (at < unit.num_tokens && column < args_.num_features) {
          static_cast<float *>(args_.output)[static_cast<long long>(unit.first_pair + at) *
                                                 args_.num_features +
                                             column] = sums[i][j][s];
        }
      }
    }
  }

  OutputArgs args_;
  int warp_feature_;
  int warp_token_;
};

}  // namespace light
