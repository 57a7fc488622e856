// The body that grouped_gemm and quant_gemm share: a persistent loop over tiles and stages.
//
//     queue ──> copies into the stages (ahead) ──> fragments ──> mma ──> epilogue
//
// Copies, fragments and mma of neighbouring tiles overlap: to the pipeline, the last stage of a
// tile and the first of the next are neighbours like any two. Each output is one chain of mma along
// the depth in ascending order, whatever the tile, so a row's bits never depend on its neighbours.
#pragma once

#include "epilogue.cuh"
#include "token_rows.cuh"
#include "work_queue.cuh"

namespace light {

__host__ __device__ constexpr int min_int(int a, int b) { return a < b ? a : b; }

template <class Tile, class Weights>
class MatrixKernel {
  using Queue = WorkQueue<Tile>;
  using Unit = typename Queue::Unit;

 public:
  template <class Args>
  __device__ __forceinline__ MatrixKernel(const Args &args, unsigned char *shared)
      : stages_(shared_address(shared)),
        depth_(args.depth),
        split_(args.depth, args.depth_splits),
        warp_row_(threadIdx.x / 32 % Tile::kWarpsWeight * Tile::kWarpWeightRows),
        warp_token_(threadIdx.x / 32 / Tile::kWarpsWeight * Tile::kWarpTokens),
        queue_(shared + Tile::kStages * Tile::kStageBytes.total(), args.groups, args.pair_row,
               Tile::kSwiglu ? 2 * args.num_features : args.num_features, args.depth_splits),
        weights_(args, warp_row_),
        tokens_(args.rows, args.depth, warp_token_),
        epilogue_({args.output, args.output_rows, args.pair_weight, args.num_features,
                   args.output_float32},
                  warp_row_, warp_token_),
        split_sums_(static_cast<float4 *>(args.split_sums)),
        split_tickets_(args.split_tickets) {}

  // `settled`: the previous kernel may still run, and nothing but the rows depends on it.
  __device__ __forceinline__ void run(bool settled) {
    num_units_ = queue_.num_units();
    if (num_units_ > 0) {
      queue_.look_up(0);
      __syncthreads();
    }
    if (settled) {
      if (kAsyncCopies && num_units_ > 0) copy_early_weights();
      follow_previous_kernel();
    }
    if (num_units_ == 0) return;
    queue_.put_row(0, queue_.row_of(queue_.unit(0)));
    __syncthreads();
    fill_pipeline();
    unit_steps_left_ = split_.steps(queue_.unit(0).split);
    clear_sums();
#pragma unroll
    for (int i = 0; i < Tile::kWeightAtoms; ++i) weights_.fragment(stages_, 0, i, a_[i]);
    tokens_.fragments(stages_, 0, 0, b_[0]);
#pragma unroll 1
    while (compute_unit_ < num_units_) run_stage();
  }

 private:
  // The depth in `count` parts of whole stages, the last one perhaps shorter.
  struct DepthSplit {
    int count;
    int total;
    int part;

    __device__ __forceinline__ DepthSplit(int depth, int count)
        : count(count),
          total((depth + Tile::kDepth - 1) / Tile::kDepth),
          part((total + count - 1) / count) {}
    __device__ __forceinline__ int begin(int split) const { return split * part * Tile::kDepth; }
    __device__ __forceinline__ int steps(int split) const {
      return min(part, total - split * part);
    }
    __device__ __forceinline__ int fewest_steps() const { return steps(count - 1); }
  };

  static constexpr int kAhead = kAsyncCopies ? Tile::kStages - 1 : 2;  // stages

  __device__ __forceinline__ unsigned stage(int index) const {
    return stages_ + index * Tile::kStageBytes.total();
  }

  // When within a stage the copies are made, counted in pairs of token tiles. With cp.async all at
  // once: measured faster than spread between the mma. Without it a copy is a store of what the
  // last stage fetched, and a fetch: half of them in each half of the stage.
  static constexpr int kSlots = kAsyncCopies ? 1 : min_int(2, Tile::kSteps * Tile::kTokenPairs - 1);
  static constexpr int kCopies = Weights::kCopies + TokenRows<Tile>::kCopies;

  // The first stages' weights, for rows that are not there yet.
  __device__ __forceinline__ void copy_early_weights() {
    const Unit unit = queue_.unit(0);
    weights_.begin_tile(unit.slot, unit.weight_block);
    early_stages_ = min_int(split_.steps(unit.split), kAhead);
    for (int i = 0; i < early_stages_; ++i) {
      weights_.begin_copies(split_.begin(unit.split) + i * Tile::kDepth, 16);
#pragma unroll
      for (int copy = 0; copy < Weights::kCopies; ++copy) weights_.copy(stage(i), copy);
    }
  }

  __device__ __forceinline__ void fill_pipeline() {
    for (int i = 0; i < kAhead; ++i) {
      begin_copies();
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) copy_slot(slot, i >= early_stages_);
      end_copies();
    }
    if constexpr (kAsyncCopies) wait_copies<Tile::kStages - 2>();
    __syncthreads();
  }

  __device__ __forceinline__ void begin_copies() {
    if (copy_depth_ >= copy_end_ && copy_unit_ < num_units_) begin_unit_copies();
    const int bytes = copy_depth_ < copy_end_ ? 16 : 0;
    weights_.begin_copies(copy_depth_, bytes);
    tokens_.begin_copies(copy_depth_, bytes);
  }

  __device__ __forceinline__ void copy_slot(int slot, bool with_weights = true) {
    const unsigned target = stage(copy_stage_);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i * kSlots / kCopies != slot) continue;
      if (i < Weights::kCopies) {
        if (with_weights) copy_one(weights_, target, i);
      } else {
        copy_one(tokens_, target, i - Weights::kCopies);
      }
    }
  }

  template <class Operand>
  __device__ __forceinline__ void copy_one(Operand &operand, unsigned target, int i) {
    if constexpr (kAsyncCopies) {
      operand.copy(target, i);
    } else {
      operand.store(target, i);  // the first time: of nothing, to the stage that comes second
      operand.fetch(i);
    }
  }

  __device__ __forceinline__ void end_copies() {
    copy_depth_ += Tile::kDepth;
    copy_stage_ = copy_stage_ + 1 == Tile::kStages ? 0 : copy_stage_ + 1;
    if constexpr (kAsyncCopies) {
      commit_copies();  // empty groups behind the end keep the count of pending ones right
    } else if (row_fetched_ >= 0 && row_age_++ > 0) {
      queue_.put_row(row_fetched_, fetched_row_);
      row_fetched_ = -1;
    }
  }

  // The copies reach a new unit: take its rows, ask for those of the unit after it.
  __device__ __forceinline__ void begin_unit_copies() {
    // With few stages a unit the rows asked for one unit ago may still be on their way.
    const bool short_units = split_.fewest_steps() <= kAhead + 1;
    if (short_units) {
      wait_copies<0>();
      __syncthreads();
    }
    const Unit unit = queue_.unit(copy_unit_);
    weights_.begin_tile(unit.slot, unit.weight_block);
    tokens_.begin_tile(queue_.rows(copy_unit_));
    copy_depth_ = split_.begin(unit.split);
    copy_end_ = min(copy_depth_ + split_.steps(unit.split) * Tile::kDepth, depth_);
    const int next = ++copy_unit_;
    if (next >= num_units_) return;
    if (next % kQueueTiles == 0) {
      queue_.look_up(next);
      __syncthreads();
    }
    const Unit next_unit = queue_.unit(next);
    if constexpr (kAsyncCopies) {
      queue_.put_row_async(next, next_unit);
    } else if (short_units) {
      queue_.put_row(next, queue_.row_of(next_unit));
    } else {
      row_fetched_ = next;
      row_age_ = 0;
      fetched_row_ = queue_.row_of(next_unit);
    }
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < Tile::kWeightAtoms; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kTokenAtoms; ++j) {
#pragma unroll
        for (int s = 0; s < 4; ++s) sums_[i][j][s] = 0.0f;
      }
    }
  }

  // Before each pair of token tiles is multiplied, the operands of the next one are asked for. All
  // of a stage is read before the barrier in front of its last pair; then the copies may reuse it.
  __device__ __forceinline__ void run_stage() {
    unsigned at = stage(compute_stage_);
    if constexpr (Tile::kHalfAccumulate) clear_half_sums();
    run_pairs(at, cute::make_int_sequence<Tile::kSteps * Tile::kTokenPairs>{});
    if constexpr (Tile::kHalfAccumulate) promote_half_sums();
    if (--unit_steps_left_ == 0) end_unit();
  }

  // A loop that the compiler cannot but unroll: which operands are live is known at each pair.
  template <int... Pairs>
  __device__ __forceinline__ void run_pairs(unsigned &at, cute::int_sequence<Pairs...>) {
    (run_pair<Pairs>(at), ...);
  }

  template <int Index>
  __device__ __forceinline__ void run_pair(unsigned &at) {
    constexpr int kStep = Index / Tile::kTokenPairs, kPair = Index % Tile::kTokenPairs;
    constexpr bool kLastPair = kPair == Tile::kTokenPairs - 1;
    constexpr int kNextStep = kLastPair ? (kStep + 1) % Tile::kSteps : kStep;
    if constexpr (kLastPair && kNextStep == 0) at = next_stage();
    tokens_.fragments(at, kNextStep, kLastPair ? 0 : kPair + 1, b_[1 - Index % 2]);
    if constexpr (Index == 0) begin_copies();
    if constexpr (Index < kSlots) copy_slot(Index);
    if constexpr (Index == kSlots - 1) end_copies();
    multiply(b_[Index % 2], kPair, at, kNextStep);
  }

  __device__ __forceinline__ void end_unit() {
    const Unit unit = queue_.unit(compute_unit_);
    if (split_.count == 1 || add_splits(unit.split, queue_.output(compute_unit_))) {
      epilogue_(unit, sums_);
    }
    // The condition keeps the compiler from peeling the next unit's first step off the loop.
    if (++compute_unit_ < num_units_) {
      unit_steps_left_ = split_.steps(queue_.unit(compute_unit_).split);
      clear_sums();
    }
  }

  // Leave this part's sums; whoever comes last adds all parts, in their order.
  __device__ __forceinline__ bool add_splits(int split, int output) {
    constexpr int kQuads = Tile::kWeightAtoms * Tile::kTokenAtoms;
    float4 *parts = split_sums_ +
                    static_cast<long long>(output) * split_.count * kQuads * Tile::kThreads +
                    threadIdx.x;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const float(&s)[4] = sums_[i / Tile::kTokenAtoms][i % Tile::kTokenAtoms];
      parts[(split * kQuads + i) * Tile::kThreads] = make_float4(s[0], s[1], s[2], s[3]);
    }
    __shared__ int ticket;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ticket = atomicAdd(&split_tickets_[output], 1);
    __syncthreads();
    if (ticket != split_.count - 1) return false;
    if (threadIdx.x == 0) split_tickets_[output] = 0;
    __threadfence();
    clear_sums();
#pragma unroll 1
    for (int part = 0; part < split_.count; ++part) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        const float4 s = __ldcg(&parts[(part * kQuads + i) * Tile::kThreads]);
        float(&sum)[4] = sums_[i / Tile::kTokenAtoms][i % Tile::kTokenAtoms];
        sum[0] += s.x;
        sum[1] += s.y;
        sum[2] += s.z;
        sum[3] += s.w;
      }
    }
    return true;
  }

  __device__ __forceinline__ unsigned next_stage() {
    if constexpr (kAsyncCopies) wait_copies<Tile::kStages - 2>();
    __syncthreads();
    compute_stage_ = compute_stage_ + 1 == Tile::kStages ? 0 : compute_stage_ + 1;
    return stage(compute_stage_);
  }

  // With the last pair of a step the weights' fragments have done their work: the next ones follow.
  __device__ __forceinline__ void multiply(const unsigned (&b)[2][2], int pair, unsigned at,
                                           int next_step) {
#pragma unroll
    for (int i = 0; i < Tile::kWeightAtoms; ++i) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int j = 2 * pair + (i + side) % 2;  // a serpentine reuses operands
        if (j >= Tile::kTokenAtoms) continue;
        if constexpr (Tile::kHalfAccumulate) {
          mma_half(half_sums_[i][j], a_[i], b[j % 2]);
        } else {
          Tile::Element::mma(sums_[i][j], a_[i], b[j % 2]);
        }
      }
      if (pair == Tile::kTokenPairs - 1) weights_.fragment(at, next_step, i, a_[i]);
    }
  }

  __device__ __forceinline__ void clear_half_sums() {
#pragma unroll
    for (int i = 0; i < Tile::kWeightAtoms; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kTokenAtoms; ++j) half_sums_[i][j][0] = half_sums_[i][j][1] = 0;
    }
  }

  __device__ __forceinline__ void promote_half_sums() {
#pragma unroll
    for (int i = 0; i < Tile::kWeightAtoms; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kTokenAtoms; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 values = unpack_half(half_sums_[i][j][half]);
          sums_[i][j][2 * half] += values.x;
          sums_[i][j][2 * half + 1] += values.y;
        }
      }
    }
  }

  unsigned stages_;
  int depth_;
  DepthSplit split_;
  int warp_row_;
  int warp_token_;
  Queue queue_;
  Weights weights_;
  TokenRows<Tile> tokens_;
  Epilogue<Tile> epilogue_;
  float4 *split_sums_;
  int *split_tickets_;

  int num_units_ = 0;
  int early_stages_ = 0;
  int copy_unit_ = 0;
  int copy_depth_ = 0;
  int copy_end_ = 0;
  int copy_stage_ = kAsyncCopies ? 0 : 1;  // where nothing was fetched yet, stage 1 comes first
  int row_fetched_ = -1;
  int row_age_ = 0;
  int fetched_row_ = 0;
  int compute_stage_ = 0;
  int compute_unit_ = 0;
  int unit_steps_left_;
  unsigned a_[Tile::kWeightAtoms][4];
  unsigned b_[2][2][2];
  float sums_[Tile::kWeightAtoms][Tile::kTokenAtoms][4];
  unsigned half_sums_[Tile::kHalfAccumulate ? Tile::kWeightAtoms : 1]
                     [Tile::kHalfAccumulate ? Tile::kTokenAtoms : 1][2];
};

template <class Tile, class Weights, class Args>
__device__ __forceinline__ void run_matrix_kernel(const Args &args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const bool settled = args.groups.offsets == nullptr || args.groups_settled;
  if (!settled) follow_previous_kernel();
  MatrixKernel<Tile, Weights>(args, shared).run(settled);
}

}  // namespace light
