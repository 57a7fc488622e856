// Hopper's producer on the host, with consumers that look at what it brings: test_hopper_units.py.
// The CTAs are threads of one CTA of the emulator, which run in shuffled order.
#include "cuda_on_host.h"

namespace {

constexpr int kConsumers = 2, kCtaThreads = 128 + 32;  // whole warps
int num_ctas;

inline int any_thread() { return emulator::Cta::running()->thread(); }

}  // namespace

#undef threadIdx
#define threadIdx (emulator::Index{any_thread() % kCtaThreads})
#define blockIdx (emulator::Index{any_thread() / kCtaThreads})
#define gridDim (emulator::Index{num_ctas})

#include "hopper_producer.cuh"

namespace {

using namespace light;
using Tile = HopperTile<int, 64, 16, 64, 1, 1, 1, 16, false>;
using Launch = HopperLaunch<light_grouped_gemm_args>;
using Memory = HopperMemory<Tile, light_grouped_gemm_args>;

constexpr int kMostScaleThreads = 64;
int num_scale_threads;

struct Scales {
  static int num_threads(const Launch &) { return num_scale_threads; }
  explicit Scales(const Launch &launch) : launch(launch) {}
  static unsigned list(const Launch &launch, unsigned stage, unsigned turn, int thread) {
    return stage + launch.stage.scales_offset + (turn * kMostScaleThreads + thread) * 8;
  }
  void begin(const HopperUnit &next) { unit = next; }
  void write(unsigned stage, unsigned turn) const {
    put_numbers(list(launch, stage, turn, threadIdx.x - 64), unit.first_pair, unit.weight_block);
  }
  const Launch &launch;
  HopperUnit unit;
};

struct Operand {
  using Args = light_grouped_gemm_args;
  using Scales = ::Scales;
  static void copy(const Launch &launch, unsigned barrier, unsigned stage, const HopperUnit &unit,
                   int depth) {
    put_numbers(stage, unit.slot, unit.weight_block);
    put_numbers(stage + 8, depth, unit.first_pair);
    copied(barrier, launch.stage.weights_bytes);
  }
};

// What a launch does, as test_hopper_units.py fills it in.
struct Run {
  light_grouped_gemm_args args;
  int tokens, num_stages, num_ctas, num_scale_threads;
  int num_late, late_after;  // CTAs that begin when so many units are done
  int consumer_turns;        // of all threads, that consumers let pass at each stage
  unsigned seed;
  int most_units;
  int (*units)[5];  // that consumers saw: CTA, slot, first pair, tokens, block of weights
  int num_units;
  int num_wrong;  // stages with something else than their unit's, entries that changed too early
};

bool stage_is_right(const Launch &launch, const HopperUnit &unit, unsigned stage, unsigned turn,
                    int depth) {
  const light_grouped_gemm_args &args = launch.args;
  bool right = has_numbers(stage, unit.slot, unit.weight_block) &&
               has_numbers(stage + 8, depth, unit.first_pair);
  const unsigned rows = stage + launch.stage.tokens_offset;
  for (int token = 0; token < unit.num_tokens; ++token) {
    if (args.pair_row == nullptr) {
      right &= has_numbers(rows + token * kPanelRowBytes, unit.first_pair + token, depth);
      continue;
    }
    for (int chunk = 0; chunk < 8 && depth + chunk * 8 < args.depth; ++chunk) {
      right &= has_numbers(rows + panel_offset(token, chunk),
                           args.pair_row[unit.first_pair + token], depth + chunk * 8);
    }
  }
  for (int thread = 0; thread < num_scale_threads; ++thread) {
    right &= has_numbers(Scales::list(launch, stage, turn, thread), unit.first_pair,
                         unit.weight_block);
  }
  return right;
}

void let_others_run(int turns) {
  for (int i = 0; i < turns; ++i) emulator::Cta::running()->wait_until([] { return true; });
}

void wait_for_stage(const Run &run, const Memory &memory, const StageCursor &cursor) {
  let_others_run(run.consumer_turns);
  wait_barrier(memory.full(cursor.index), cursor.parity);
  let_others_run(run.consumer_turns);
}

void consume(Run &run, const Launch &launch, const Memory &memory) {
  StageCursor cursor;
  const bool tells = threadIdx.x == 128;
  for (int index = 0;; ++index) {
    wait_for_stage(run, memory, cursor);
    const HopperUnit unit = memory.unit(index);
    if (!unit.exists()) return;
    for (int depth = 0; depth < run.args.depth; depth += Tile::kDepth) {
      if (depth > 0) wait_for_stage(run, memory, cursor);
      run.num_wrong += !stage_is_right(launch, unit, memory.stage(cursor.index), cursor.parity,
                                       depth);
      const HopperUnit again = memory.unit(index);
      run.num_wrong += again.first_pair != unit.first_pair ||
                       again.weight_block != unit.weight_block || again.slot != unit.slot;
      if (tells && depth + Tile::kDepth >= run.args.depth && run.num_units < run.most_units) {
        int *seen = run.units[run.num_units++];
        const int numbers[] = {blockIdx.x, unit.slot, unit.first_pair, unit.num_tokens,
                               unit.weight_block};
        std::copy(numbers, numbers + 5, seen);
      }
      arrive(memory.empty(cursor.index));
      cursor.advance(run.num_stages);
    }
  }
}

}  // namespace

// False where threads wait for what never comes.
extern "C" bool run_product(Run *run) {
  num_ctas = run->num_ctas;
  num_scale_threads = run->num_scale_threads;
  gathered_rows = static_cast<const char *>(run->args.rows);
  gathered_depth = run->args.depth;
  arrived_too_often = false;
  Launch launch{};
  launch.rows.words[0] = static_cast<unsigned long long>(run->tokens);
  launch.args = run->args;
  launch.stage = hopper_stage(64, run->tokens, 64, 16, 0, false);
  launch.stage.bytes += 2 * kMostScaleThreads * 8;
  launch.tokens = run->tokens;
  launch.num_stages = run->num_stages;
  barriers.clear();
  std::memset(shared_memory, 0, sizeof shared_memory);
  for (int cta = 0; cta < num_ctas; ++cta) {
    meetings[cta] = {0, 0};
    const Memory memory(launch, shared_memory + cta * kCtaBytes);
    for (int i = 0; i < run->num_stages; ++i) {
      init_barrier(memory.full(i), HopperProducer<Tile, Operand>::arrivals(launch));
      init_barrier(memory.empty(i), kConsumers);
    }
  }
  const bool ended = emulator::Cta(num_ctas * kCtaThreads, run->seed).run([&] {
    if (blockIdx.x < run->num_late) {
      emulator::Cta::running()->wait_until([&] { return run->num_units >= run->late_after; });
    }
    const Memory memory(launch, shared_memory + blockIdx.x * kCtaBytes);
    if (threadIdx.x < 128) {
      HopperProducer<Tile, Operand>(launch, memory).run();
    } else if (threadIdx.x < 128 + kConsumers) {
      consume(*run, launch, memory);
    }
  });
  run->num_wrong += arrived_too_often;
  return ended;
}
