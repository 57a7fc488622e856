// The warpgroup that feeds the others: weights, and token rows that lie together, through the copy
// engine; rows that are gathered through cp.async, by all of its threads.
#pragma once

#include "hopper_units.cuh"

namespace light {

template <class Tile, class Operand>
class HopperProducer {
  using Args = typename Operand::Args;
  using Scales = typename Operand::Scales;
  static constexpr int kGatherRows = (Tile::kLimit + 15) / 16;  // of a thread
  static constexpr int kBarrier = 9;                            // of the warpgroup

 public:
  // At a stage's barrier: the leader, threads whose copies are there, warps that wrote scales.
  static __device__ __forceinline__ int arrivals(const HopperLaunch<Args> &launch) {
    return 1 + (launch.args.pair_row ? 128 : 0) + Scales::num_threads(launch) / 32;
  }

  __device__ __forceinline__ HopperProducer(const HopperLaunch<Args> &launch,
                                            const HopperMemory<Tile, Args> &memory)
      : launch_(launch),
        args_(launch.args),
        memory_(memory),
        scales_(launch) {}

  __device__ __forceinline__ void run() {
    // The copy engine needs two threads, and their warps to look units up; claims are for all.
    const bool idle = !gathers() && threadIdx.x >= 64 && !writes_scales();
    if (idle && unit_ticket(args_) == nullptr) return;
    const bool settled = args_.groups.offsets == nullptr || args_.groups_settled;
    if (!settled) follow_previous_kernel();
    UnitLookup<Tile> lookup(args_.groups, launch_.tokens, args_.num_features, unit_ticket(args_));
    HopperUnit unit = lookup.unit(0);
    if (leads()) memory_.put_unit(0, unit);
    if (settled) {
      if (unit.exists()) copy_early_weights(unit);
      follow_previous_kernel();
    }
    for (int index = 0; unit.exists(); ++index) {
      copy_unit(index, unit);
      unit = next_unit(lookup, index + 1);
    }
    end();
  }

 private:
  __device__ __forceinline__ bool gathers() const { return args_.pair_row != nullptr; }
  __device__ __forceinline__ bool writes_scales() const {
    const int thread = static_cast<int>(threadIdx.x) - 64;  // behind those of the copy engine
    return thread >= 0 && thread < Scales::num_threads(launch_);
  }
  __device__ __forceinline__ bool leads() const { return threadIdx.x == 0; }
  __device__ __forceinline__ bool copies_rows() const {
    return !gathers() && threadIdx.x == 32;
  }
  __device__ __forceinline__ bool claims_for_all() const { return threadIdx.x == 96; }
  __device__ __forceinline__ int num_boxes(const HopperUnit &unit) const {
    return (unit.num_tokens + row_box(launch_.tokens) - 1) / row_box(launch_.tokens);
  }

  // A thread that copies nothing claims it while the others copy; where all gather rows it waits for
  // the ticket, with the stages that are full ahead. The barrier shows everyone the entry in the
  // ring, and nobody claims the next but one before the others begin with the next.
  __device__ __forceinline__ HopperUnit next_unit(UnitLookup<Tile> &lookup, int index) {
    if (!lookup.claims()) {
      const HopperUnit unit = lookup.unit(index);
      if (leads()) memory_.put_unit(index, unit);
      return unit;
    }
    if (claims_for_all()) memory_.put_unit(index, lookup.claim());
    __syncwarp();
    sync_threads<kBarrier, 128>();
    return memory_.unit(index);
  }

  // The stage of the unit that does not exist: full when all have come.
  __device__ __forceinline__ void end() {
    if (!leads() && !gathers() && !writes_scales()) return;
    wait_barrier(memory_.empty(cursor_.index), cursor_.parity ^ 1);
    if (leads()) arrive(memory_.full(cursor_.index));
    if (gathers()) arrive(memory_.full(cursor_.index));
    if (writes_scales() && threadIdx.x % 32 == 0) arrive(memory_.full(cursor_.index));
  }

  // The first stages' weights, for rows that the kernel in front still writes.
  __device__ __forceinline__ void copy_early_weights(const HopperUnit &unit) {
    StageCursor cursor;
    const int num_steps = (args_.depth + Tile::kDepth - 1) / Tile::kDepth;
    early_ = min(num_steps, launch_.num_stages);
    if (!leads()) return;
    for (int step = 0; step < early_; ++step) {
      copy_weights(unit, cursor.index, step * Tile::kDepth);
      cursor.advance(launch_.num_stages);
    }
  }

  __device__ __forceinline__ void copy_weights(const HopperUnit &unit, int stage, int depth) {
    const unsigned barrier = memory_.full(stage);
    const int row_bytes =
        gathers() ? 0 : num_boxes(unit) * row_box(launch_.tokens) * kPanelRowBytes * Tile::kPanels;
    arrive_expecting(barrier, launch_.stage.weights_bytes + row_bytes);
    Operand::copy(launch_, barrier, memory_.stage(stage), unit, depth);
  }

  // Only threads without whom a stage is not full wait for its barrier: another one could come when
  // the round that it waits for is over, and a parity does not tell that round from the next but
  // one.
  __device__ __forceinline__ void copy_unit(int index, const HopperUnit &unit) {
    if (gathers()) find_rows(unit);
    if (writes_scales()) scales_.begin(unit);
    if (gathers() || writes_scales() || leads() || copies_rows()) copy_stages(index, unit);
    __syncwarp();
  }

  __device__ __forceinline__ void copy_stages(int index, const HopperUnit &unit) {
    int step = 0;
    for (int depth = 0; depth < args_.depth; depth += Tile::kDepth, ++step) {
      const bool begun = index == 0 && step < early_;  // its weights were copied ahead
      if (gathers() || !leads() || !begun) {
        wait_barrier(memory_.empty(cursor_.index), cursor_.parity ^ 1);
      }
      if (leads() && !begun) copy_weights(unit, cursor_.index, depth);
      if (copies_rows()) copy_rows(unit, depth);
      if (gathers()) gather_rows(unit, depth);
      if (writes_scales()) write_scales();
      cursor_.advance(launch_.num_stages);
    }
  }

  __device__ __forceinline__ void write_scales() {
    scales_.write(memory_.stage(cursor_.index), cursor_.parity);
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(memory_.full(cursor_.index));
  }

  // Rows first_pair, first_pair + 1 ...; those behind the unit's last one are never stored.
  __device__ __forceinline__ void copy_rows(const HopperUnit &unit, int depth) const {
    const unsigned barrier = memory_.full(cursor_.index);
    unsigned target = memory_.stage(cursor_.index) + launch_.stage.tokens_offset;
    for (int box = 0; box < num_boxes(unit); ++box) {
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        copy_box(launch_.rows, barrier, target + panel * launch_.tokens * kPanelRowBytes,
                 depth + panel * Tile::kPanelDepth,
                 unit.first_pair + box * row_box(launch_.tokens));
      }
      target += row_box(launch_.tokens) * kPanelRowBytes;
    }
  }

  // This thread gathers 16 bytes of rows thread / 8, thread / 8 + 16 ... of the tile.
  __device__ __forceinline__ void find_rows(const HopperUnit &unit) {
#pragma unroll
    for (int i = 0; i < kGatherRows; ++i) {
      const int token = threadIdx.x / 8 + i * 16;
      row_[i] = token < unit.num_tokens ? args_.pair_row[unit.first_pair + token] : -1;
    }
  }

  __device__ __forceinline__ void gather_rows(const HopperUnit &unit, int depth) const {
    constexpr int kElementBytes = Tile::kRowBits / 8;
    const int first = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const unsigned target = memory_.stage(cursor_.index) + launch_.stage.tokens_offset +
                            panel_offset(first, chunk);
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int column = depth + panel * Tile::kPanelDepth + chunk * (16 / kElementBytes);
      const int bytes = column < args_.depth ? 16 : 0;
      const char *source =
          static_cast<const char *>(args_.rows) + (bytes ? column * kElementBytes : 0);
#pragma unroll
      for (int i = 0; i < kGatherRows; ++i) {
        if (i * 16 >= unit.num_tokens) break;
        if (row_[i] < 0) continue;
        copy_async_16(target + (panel * launch_.tokens + i * 16) * kPanelRowBytes,
                      source + static_cast<long long>(row_[i]) * args_.depth * kElementBytes,
                      bytes);
      }
    }
    arrive_when_copied(memory_.full(cursor_.index));
  }

  const HopperLaunch<Args> &launch_;
  const Args &args_;
  const HopperMemory<Tile, Args> &memory_;
  Scales scales_;
  StageCursor cursor_;
  int early_ = 0;  // stages of the first unit whose weights were copied ahead
  int row_[kGatherRows];
};

}  // namespace light
