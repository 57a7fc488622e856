// 16 rows of queries over tiles of keys and values: scores, their softmax, and the outputs, in the
// registers of a warp, or of several that have a part of the value columns each.
#pragma once

#include "attention_pages.cuh"
#include "attention_softmax.cuh"

namespace light::attention {

__device__ __forceinline__ void load_transposed(unsigned address, unsigned (&b)[2][2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0][0]), "=r"(b[0][1]), "=r"(b[1][0]), "=r"(b[1][1])
               : "r"(address));
}

template <class Shape>
class Rows {
  static constexpr Sizes kSizes = Shape::kSizes;
  using Element = typename Shape::Element;

 public:
  static constexpr int kKeyQuads = kSizes.tile_keys() / 8;  // of scores: 8 keys each
  static constexpr int kParts = Shape::kParts;
  static constexpr int kValueQuads = kSizes.width / kParts / 8;
  static constexpr int kSteps = kSizes.width / 16;

  __device__ __forceinline__ Rows(const light_paged_attention_args &args, unsigned query_tile,
                                  float4 *scores_tile, float4 *all_outputs)
      : args_(args),
        query_tile_(query_tile),
        scores_tile_(scores_tile),
        all_outputs_(all_outputs),
        part_(threadIdx.x / 32 % kParts),
        factor_(args.scale * 1.4426950408889634f) {}

  __device__ __forceinline__ void begin(const Unit &unit, int first_row) {
    const int group = args_.num_heads / args_.num_kv_heads;
    const unsigned char *query = static_cast<const unsigned char *>(args_.query);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + lane() / 4 + 8 * i, token = row / group;
      exists_[i] = row < unit.num_rows;
      position_[i] = exists_[i] ? unit.first_position + token : -1;
      token_[i] = unit.first_token + token;
      head_[i] = unit.kv_head * group + row % group;
      if constexpr (!kSizes.query_in_shared()) {
        load_query(query + 2 * (token_[i] * args_.query_stride + head_[i] * args_.width), i);
      }
    }
    const int last_row = min(first_row + kRows, unit.num_rows) - 1;
    last_position_ = first_row < unit.num_rows ? unit.first_position + last_row / group : -1;
    const bool all_exist = last_row == first_row + kRows - 1;
    all_see_before_ = all_exist ? unit.first_position + first_row / group + 1 : 0;
    clear();
  }

  __device__ __forceinline__ bool sees(int first_key) const { return first_key <= last_position_; }

  // Scores of the tile's keys; only this part's where warps share the rows.
  __device__ __forceinline__ void multiply_keys(unsigned keys) {
    if constexpr (kParts == 1) {
      multiply_all_keys(keys);
    } else if constexpr (!kSizes.query_in_shared()) {
      multiply_two_quads(keys, kQuadsOfPart * part_);
    } else {
      if (part_ * kQuadsOfPart < kKeyQuads) {
#pragma unroll
        for (int i = 0; i < kQuadsOfPart; ++i) multiply_some_keys(keys, part_ * kQuadsOfPart + i);
      }
    }
  }

  // The scores of all parts, once they are stored.
  __device__ __forceinline__ void gather_scores() {
#pragma unroll
    for (int j = 0; j < kKeyQuads; ++j) {
      const float4 quad = scores_tile_[32 * j + lane()];
      scores_[j][0] = quad.x, scores_[j][1] = quad.y, scores_[j][2] = quad.z;
      scores_[j][3] = quad.w;
    }
  }

  __device__ __forceinline__ void weigh_keys(int first_key) {
    if (first_key + kSizes.tile_keys() > all_see_before_) hide_keys(first_key);
    float decays[2];
    weigh(scores_, sums_, factor_, decays);
#pragma unroll
    for (int j = 0; j < kValueQuads; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) outputs_[j][i] = __fmul_rn(outputs_[j][i], decays[i / 2]);
    }
  }

  __device__ __forceinline__ void multiply_values(unsigned values) {
    const unsigned address = values + lane() % 16 * kSizes.row_bytes() + lane() / 16 * 16 +
                             part_ * kValueQuads * 16;
#pragma unroll
    for (int step = 0; step < kKeyQuads / 2; ++step) {
      const float(&low)[4] = scores_[2 * step], (&high)[4] = scores_[2 * step + 1];
      const unsigned a[4] = {Element::pack(low[0], low[1]), Element::pack(low[2], low[3]),
                             Element::pack(high[0], high[1]), Element::pack(high[2], high[3])};
#pragma unroll
      for (int j = 0; j < kValueQuads; j += 2) {
        unsigned b[2][2];
        load_transposed(address + step * 16 * kSizes.row_bytes() + j * 16, b);
        Element::mma(outputs_[j], a, b[0]);
        Element::mma(outputs_[j + 1], a, b[1]);
      }
    }
  }

  // The section that ends becomes part of all before it.
  __device__ __forceinline__ void end_section(bool is_first) {
#pragma unroll
    for (int row = 0; row < 2; ++row) sums_[row].total = row_sum(sums_[row].total);
    if constexpr (Shape::kWhole) {
      if (is_first) {
        all_sums_[0] = sums_[0], all_sums_[1] = sums_[1];
#pragma unroll
        for (int j = 0; j < kValueQuads; ++j) {
          const float(&quad)[4] = outputs_[j];
          all_outputs_[j] = make_float4(quad[0], quad[1], quad[2], quad[3]);
        }
      } else {
        fold();
      }
      clear();
    }
  }

  __device__ __forceinline__ void store_outputs() {
    if constexpr (Shape::kWhole) {
#pragma unroll
      for (int j = 0; j < kValueQuads; ++j) {
        const float4 quad = all_outputs_[j];
        outputs_[j][0] = quad.x, outputs_[j][1] = quad.y, outputs_[j][2] = quad.z;
        outputs_[j][3] = quad.w;
      }
      sums_[0] = all_sums_[0], sums_[1] = all_sums_[1];
    }
    store();
  }

  // For the merge of all sections: outputs as they are, and their sums.
  __device__ __forceinline__ void store_partials(const Unit &unit) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!exists_[i]) continue;
      const long long head = static_cast<long long>(unit.sequence) * args_.num_heads + head_[i];
      const long long item = head * args_.max_sections + unit.section;
      float *target = args_.partials + item * args_.width;
#pragma unroll
      for (int j = 0; j < kValueQuads; ++j) {
        const int column = this->column(j);
        if (column < args_.width) {
          *reinterpret_cast<float2 *>(target + column) =
              make_float2(outputs_[j][2 * i], outputs_[j][2 * i + 1]);
        }
      }
      if (part_ == 0 && lane() % 4 == 0) {
        reinterpret_cast<float2 *>(args_.partial_sums)[item] =
            make_float2(sums_[i].largest, sums_[i].total);
      }
    }
  }

 private:
  static constexpr int kQuadsOfPart = (kKeyQuads + kParts - 1) / kParts;
  static_assert(kParts == 1 || kSizes.query_in_shared() || kQuadsOfPart == 2,
                "a part has two quads where queries are in registers");

  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

  __device__ __forceinline__ int column(int quad) const {
    return (part_ * kValueQuads + quad) * 8 + lane() % 4 * 2;
  }

  // The mma's A operand in registers, row i of this lane's two.
  __device__ __forceinline__ void load_query(const unsigned char *row, int i) {
#pragma unroll
    for (int j = 0; j < 2 * kSteps; ++j) {
      const int column = 8 * j + lane() % 4 * 2;
      const bool exists = exists_[i] && column < args_.width;
      query_[j / 2][j % 2 * 2 + i] =
          exists ? *reinterpret_cast<const unsigned *>(row + 2 * column) : 0u;
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kValueQuads; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) outputs_[j][i] = 0.0f;
    }
    sums_[0] = sums_[1] = {minus_infinity(), 0.0f};
  }

  __device__ __forceinline__ void multiply_all_keys(unsigned keys) {
    const unsigned address = keys + (lane() % 8 + lane() / 16 * 8) * kSizes.row_bytes() +
                             lane() / 8 % 2 * 16;
#pragma unroll
    for (int j = 0; j < kKeyQuads; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores_[j][i] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kKeyQuads; j += 2) {
        unsigned b[2][2];
        load_matrices(address + j * 8 * kSizes.row_bytes() + step * 32, b[0][0], b[0][1], b[1][0],
                      b[1][1]);
        Element::mma(scores_[j], query_[step], b[0]);
        Element::mma(scores_[j + 1], query_[step], b[1]);
      }
    }
  }

  // Of 16 keys, with the chains of multiply_all_keys.
  __device__ __forceinline__ void multiply_two_quads(unsigned keys, int quad) {
    const unsigned address = keys +
                             (8 * quad + lane() % 8 + lane() / 16 * 8) * kSizes.row_bytes() +
                             lane() / 8 % 2 * 16;
    float first[4] = {}, second[4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned b[2][2];
      load_matrices(address + step * 32, b[0][0], b[0][1], b[1][0], b[1][1]);
      Element::mma(first, query_[step], b[0]);
      Element::mma(second, query_[step], b[1]);
    }
    float4 *target = scores_tile_ + 32 * quad + lane();
    target[0] = make_float4(first[0], first[1], first[2], first[3]);
    target[32] = make_float4(second[0], second[1], second[2], second[3]);
  }

  // Of 8 keys, as two chains: one alone would wait for every mma.
  __device__ __forceinline__ void multiply_some_keys(unsigned keys, int quad) {
    const unsigned address = keys + (8 * quad + lane() % 8) * kSizes.row_bytes() + lane() / 8 * 16;
    const unsigned query = query_tile_ + lane() % 16 * kSizes.row_bytes() + lane() / 16 * 16;
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      unsigned a[2][4], b[2][2];
      load_matrices(query + step * 32, a[0][0], a[0][1], a[0][2], a[0][3]);
      load_matrices(query + step * 32 + 32, a[1][0], a[1][1], a[1][2], a[1][3]);
      load_matrices(address + step * 32, b[0][0], b[0][1], b[1][0], b[1][1]);
      Element::mma(even, a[0], b[0]);
      Element::mma(odd, a[1], b[1]);
    }
    scores_tile_[32 * quad + lane()] =
        make_float4(__fadd_rn(even[0], odd[0]), __fadd_rn(even[1], odd[1]),
                    __fadd_rn(even[2], odd[2]), __fadd_rn(even[3], odd[3]));
  }

  __device__ __forceinline__ void hide_keys(int first_key) {
#pragma unroll
    for (int j = 0; j < kKeyQuads; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + 8 * j + lane() % 4 * 2 + i % 2;
        if (key > position_[i / 2]) scores_[j][i] = minus_infinity();
      }
    }
  }

  __device__ __forceinline__ void fold() {
    float before[2], after[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      all_sums_[row].fold(sums_[row], factor_, &before[row], &after[row]);
    }
#pragma unroll
    for (int j = 0; j < kValueQuads; ++j) {
      float4 &quad = all_outputs_[j];
      quad = make_float4(RowSums::folded(quad.x, before[0], outputs_[j][0], after[0]),
                         RowSums::folded(quad.y, before[0], outputs_[j][1], after[0]),
                         RowSums::folded(quad.z, before[1], outputs_[j][2], after[1]),
                         RowSums::folded(quad.w, before[1], outputs_[j][3], after[1]));
    }
  }

  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!exists_[i]) continue;
      const float inverse = sums_[i].inverse();
      unsigned short *target =
          static_cast<unsigned short *>(args_.output) +
          (static_cast<long long>(token_[i]) * args_.num_heads + head_[i]) * args_.width;
#pragma unroll
      for (int j = 0; j < kValueQuads; ++j) {
        const int column = this->column(j);
        if (column < args_.width) {
          *reinterpret_cast<unsigned *>(target + column) =
              Element::pack(__fmul_rn(outputs_[j][2 * i], inverse),
                            __fmul_rn(outputs_[j][2 * i + 1], inverse));
        }
      }
    }
  }

  const light_paged_attention_args &args_;
  unsigned query_tile_;   // of 16 rows, in shared memory
  float4 *scores_tile_;
  float4 *all_outputs_;   // of the sections before
  int part_;
  float factor_;  // of exponents of two
  bool exists_[2];
  int position_[2];  // -1 of a row that does not exist
  int token_[2];
  int head_[2];
  int last_position_;
  int all_see_before_;  // every row sees the positions below
  RowSums sums_[2];
  RowSums all_sums_[2];
  unsigned query_[kSizes.query_in_shared() ? 1 : kSteps][4];
  float scores_[kKeyQuads][4];
  float outputs_[kValueQuads][4];
};

}  // namespace light::attention
