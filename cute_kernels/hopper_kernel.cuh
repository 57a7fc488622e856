// The body of the matrix stems on Hopper: one warpgroup copies, the others multiply.
//
//     producer   looks units up ──> weights (copy engine), token rows (copy engine or cp.async)
//     consumers  wait for a stage ──> wgmma ──> give the stage back ──> epilogue of a unit
//
// Weights are the mma's 64 rows and tokens its columns, so a tile takes the instruction whose width
// fits its tokens: 8, 16, ... kLimit. Each output is one chain of mma along the depth in ascending
// order, whatever the width, so a row's bits never depend on its neighbours.
#pragma once

#include "hopper_epilogue.cuh"
#include "hopper_producer.cuh"
#include "hopper_weights.cuh"

namespace light {

template <int Limit>
struct MmaWidths;
template <>
struct MmaWidths<16> {
  using List = cute::int_sequence<8, 16>;
};
template <>
struct MmaWidths<64> {
  using List = cute::int_sequence<8, 16, 24, 32, 48, 64>;
};
template <>
struct MmaWidths<128> {
  using List = cute::int_sequence<8, 16, 24, 32, 48, 64, 80, 96, 112, 128>;
};
template <>
struct MmaWidths<176> {
  using List = cute::int_sequence<8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176>;
};

template <class Tile, class Operand>
class HopperConsumer {
  using Args = typename Operand::Args;
  using Element = typename Tile::Element;

 public:
  // Of a stage's readers, a warp each.
  static constexpr int kArrivals = 4 * Tile::kRowGroups * Tile::kDepthParts;

  __device__ __forceinline__ HopperConsumer(const HopperLaunch<Args> &launch,
                                            const HopperMemory<Tile, Args> &memory, int warpgroup)
      : memory_(memory),
        num_stages_(launch.num_stages),
        num_steps_((launch.args.depth + Tile::kDepth - 1) / Tile::kDepth),
        tokens_offset_(launch.stage.tokens_offset),
        panel_bytes_(launch.tokens * kPanelRowBytes),
        gathered_(launch.args.pair_row != nullptr),
        row_group_(warpgroup % Tile::kRowGroups),
        part_(warpgroup / Tile::kRowGroups),
        operand_(make_operand(launch, row_group_)),
        epilogue_({launch.args.output, launch.args.output_rows, launch.args.pair_weight,
                   launch.args.num_features, launch.args.output_float32},
                  row_group_, 1 + warpgroup) {}

  __device__ __forceinline__ void run() {
    for (int index = 0;; ++index) {
      wait_stage();
      const HopperUnit unit = memory_.unit(index);
      if (!unit.exists()) return;
      multiply_by_width(unit.num_tokens, typename MmaWidths<Tile::kLimit>::List{});
      const unsigned stage = memory_.stage(cursor_.index);
      if constexpr (Operand::kScaled) operand_.finish(unit, sums_);
      if (Tile::kDepthParts == 1 || add_parts(stage)) epilogue_(unit, stage, sums_);
      fence_async_proxy();  // before the copy engine writes where the epilogue was
      release(cursor_.index);
      cursor_.advance(num_stages_);
    }
  }

 private:
  static __device__ __forceinline__ Operand make_operand(const HopperLaunch<Args> &launch,
                                                         int warpgroup) {
    if constexpr (Operand::kInRegisters || Operand::kScaled) {
      return Operand(launch, warpgroup);
    } else {
      return Operand();
    }
  }

  template <int... Widths>
  __device__ __forceinline__ void multiply_by_width(int num_tokens,
                                                    cute::int_sequence<Widths...>) {
    bool found = false;
    ((found = found || (num_tokens <= Widths && multiply<Widths>())), ...);
  }

  // All of a unit's depth. Its last stage stays this warpgroup's until the epilogue is done.
  template <int Width>
  __device__ __forceinline__ bool multiply() {
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < Width / 2; ++i) sums_[block][i] = 0.0f;
    }
    if constexpr (Operand::kInRegisters) {
      multiply_registers<Width>();
    } else if constexpr (Operand::kScaled) {
      multiply_scaled<Width>();
    } else {
      multiply_shared<Width>();
    }
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < Width / 2; ++i) asm volatile("" : "+f"(sums_[block][i])::"memory");
    }
    return true;
  }

  template <int Width>
  __device__ __forceinline__ void multiply_shared() {
    int previous = 0;
#pragma unroll 1
    for (int left = num_steps_; left > 0; --left) {
      const bool first = left == num_steps_;
      if (!first) wait_stage();
      const unsigned stage = memory_.stage(cursor_.index);
      cute::warpgroup_arrive();
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) {
        const unsigned long long tokens = tokens_at(stage, step);
#pragma unroll
        for (int block = 0; block < Tile::kBlocks; ++block) {
          mma_shared<Element, Width>(Operand::descriptor(stage, row_group_, block, step), tokens,
                                     sums_[block], cute::make_int_sequence<Width / 2>{});
        }
      }
      cute::warpgroup_commit_batch();
      if (!first) {
        cute::warpgroup_wait<1>();
        release(previous);
      }
      previous = cursor_.index;
      if (left > 1) cursor_.advance(num_stages_);
    }
  }

  // The sums of a panel's depth are multiplied and added by threads, while the tensor cores work
  // for another warpgroup. A stage is given back when its mma are done: its scales stay for a round.
  template <int Width>
  __device__ __forceinline__ void multiply_scaled() {
    constexpr int kPieces = Tile::kPanels * Tile::kBlocks;
    float part[Width / 2] = {};
#pragma unroll 1
    for (int left = num_steps_; left > 0; --left) {
      if (left < num_steps_) wait_stage();
      const int index = cursor_.index;
      const unsigned stage = memory_.stage(index), turn = cursor_.parity;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int panel = piece / Tile::kBlocks, block = piece % Tile::kBlocks;
        begin_panel<Width>(stage, panel, block, part);
        typename Operand::template PanelScales<Width> scales;
        // One block's scales are loaded under its mma; for more there are no registers left.
        if (Tile::kBlocks == 1) scales.load(operand_.list(stage, turn, panel));
        cute::warpgroup_wait<0>();
        hold(part);
        if (piece == kPieces - 1 && left > 1) {
          release(index);
          cursor_.advance(num_stages_);
        }
        operand_.template add<Width>(stage, turn, panel, block, scales, part, sums_[block]);
      }
    }
  }

  template <int Width>
  __device__ __forceinline__ void begin_panel(unsigned stage, int panel, int block,
                                              float (&part)[Width / 2]) const {
    hold(part);
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = panel * 4; step < panel * 4 + 4; ++step) {
      mma_shared<E4M3, Width>(Operand::descriptor(stage, row_group_, block, step),
                              tokens_at(stage, step), part, cute::make_int_sequence<Width / 2>{},
                              step % 4 ? kAdd : kOverwrite);
    }
    cute::warpgroup_commit_batch();
  }

  // What the mma write is not moved past this.
  template <int Count>
  static __device__ __forceinline__ void hold(float (&sums)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
  }

  // The weights of a panel become numbers while the tensor cores work on the one before it; where
  // registers hold but one panel, on another warpgroup's.
  template <int Width>
  __device__ __forceinline__ void multiply_registers() {
    constexpr int kPanels = Tile::kPanels / Tile::kDepthParts;
    constexpr bool kFewRegisters = Tile::kCtasPerSm * Tile::kWarpgroups > 2 && Tile::kLimit > 16;
    constexpr int kBuffers = kFewRegisters ? 1 : kPanels;
    static_assert(kBuffers <= 2, "a stage is released when the panel behind it has begun");
    unsigned a[kBuffers][4][Tile::kBlocks][4];
    int previous = 0;
#pragma unroll 1
    for (int left = num_steps_; left > 0; --left) {
      const bool first = left == num_steps_;
      if (!first) wait_stage();
      const unsigned stage = memory_.stage(cursor_.index);
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        const int panel = (Tile::kDepthParts > 1 ? part_ * kPanels : 0) + i;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
#pragma unroll
          for (int block = 0; block < Tile::kBlocks; ++block) {
            operand_.fragment(stage, block, panel, step, i == 0, a[i % kBuffers][step][block]);
          }
        }
        cute::warpgroup_arrive();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
#pragma unroll
          for (int block = 0; block < Tile::kBlocks; ++block) {
            mma_registers<Element, Width>(a[i % kBuffers][step][block],
                                          tokens_at(stage, panel * 4 + step), sums_[block],
                                          cute::make_int_sequence<Width / 2>{});
          }
        }
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<kBuffers - 1>();
        if (kBuffers > 1 && i == 0 && !first) release(previous);
      }
      previous = cursor_.index;
      if (left > 1) {
        if (kBuffers == 1) release(previous);
        cursor_.advance(num_stages_);
      }
    }
  }

  // The sums of all parts of the depth, in their order; true for the warpgroup that has them. They
  // pass through the last stage, behind its last reader.
  __device__ __forceinline__ bool add_parts(unsigned stage) {
    constexpr int kThreads = 128 * Tile::kDepthParts, kSums = Tile::kLimit / 2;
    constexpr int kStageBytes = Tile::kWeightBytes + Tile::kLimit * Tile::kDepth * 2;
    constexpr int kOtherBytes = (Tile::kDepthParts - 1) * kSums * 128 * 4;
    static_assert(Tile::kDepthParts == 1 || (Tile::kBlocks == 1 && kOtherBytes <= kStageBytes),
                  "the sums of all parts but one fit into a stage");
    const unsigned mine = stage + threadIdx.x % 128 * 16;
    sync_threads<8, kThreads>();
    if (part_ > 0) {
#pragma unroll
      for (int i = 0; i < kSums; i += 4) {
        const float *s = &sums_[0][i];
        store_shared_16(mine + ((part_ - 1) * kSums + i) * 512,
                        {__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]),
                         __float_as_uint(s[3])});
      }
    }
    sync_threads<8, kThreads>();
    if (part_ > 0) return false;
#pragma unroll
    for (int part = 0; part < Tile::kDepthParts - 1; ++part) {
#pragma unroll
      for (int i = 0; i < kSums; i += 4) {
        const uint4 other = load_shared_16(mine + (part * kSums + i) * 512);
        sums_[0][i] += __uint_as_float(other.x);
        sums_[0][i + 1] += __uint_as_float(other.y);
        sums_[0][i + 2] += __uint_as_float(other.z);
        sums_[0][i + 3] += __uint_as_float(other.w);
      }
    }
    return true;
  }

  // Gathered rows were written by threads: the fence lets the tensor cores see them. It stands here
  // because the producer's would wait for all copies on their way.
  __device__ __forceinline__ void wait_stage() const {
    wait_barrier(memory_.full(cursor_.index), cursor_.parity);
    if (gathered_) fence_async_proxy();
  }

  __device__ __forceinline__ unsigned long long tokens_at(unsigned stage, int step) const {
    return panel_descriptor(stage + tokens_offset_ + step / 4 * panel_bytes_ + step % 4 * 32);
  }

  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(memory_.empty(stage));
  }

  const HopperMemory<Tile, Args> &memory_;
  int num_stages_;
  int num_steps_;
  int tokens_offset_;
  int panel_bytes_;
  bool gathered_;
  int row_group_;
  int part_;
  Operand operand_;
  HopperEpilogue<Tile> epilogue_;
  StageCursor cursor_;
  float sums_[Tile::kBlocks][Tile::kLimit / 2];
};

// Registers of a thread once the roles are known: together no more than the launch's, which are the
// most that CTAs of this many threads can have, in eights.
template <class Tile>
struct RoleRegisters {
  static constexpr int kEach = 65536 / Tile::kCtasPerSm / Tile::kThreads / 8 * 8;
  static constexpr bool kManyThreads = Tile::kCtasPerSm > 1 || Tile::kWarpgroups > 2;
  static constexpr int kSums = Tile::kBlocks * Tile::kLimit / 2;
  static constexpr int kPanelSums = Tile::kRowBits == 8 ? Tile::kLimit / 2 : 0;
  static constexpr bool kManySums = kSums + kPanelSums > 128;
  static constexpr int kProducer = kManyThreads ? 48 : kManySums ? 72 : 88;
  static constexpr int kConsumer =
      (kEach * (1 + Tile::kWarpgroups) - kProducer) / Tile::kWarpgroups / 8 * 8;
};

template <class Tile, class Operand>
__device__ __forceinline__ void run_hopper_kernel(
    const HopperLaunch<typename Operand::Args> &launch) {
  using Args = typename Operand::Args;
  using Producer = HopperProducer<Tile, Operand>;
  using Consumer = HopperConsumer<Tile, Operand>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const HopperMemory<Tile, Args> memory(launch, shared);
  if (threadIdx.x == 0) {
    prefetch_map(launch.weights);
    const int arrivals = Producer::arrivals(launch);
    for (int i = 0; i < launch.num_stages; ++i) {
      init_barrier(memory.full(i), arrivals);
      init_barrier(memory.empty(i), Consumer::kArrivals);
    }
    publish_barriers();
  }
  __syncthreads();
  // One branch for each role, so that the registers can move from one to the other.
  if (threadIdx.x < 128) {
    give_registers<RoleRegisters<Tile>::kProducer>();
    Producer(launch, memory).run();
  } else {
    take_registers<RoleRegisters<Tile>::kConsumer>();
    Consumer(launch, memory, threadIdx.x / 128 - 1).run();
  }
}

}  // namespace light
