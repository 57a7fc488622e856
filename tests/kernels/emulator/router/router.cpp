// The router product on the host, of few tokens and of many: test_router_product.py compares them.
// A cluster is one CTA of the emulator, whose threads are those of two; they run in shuffled order.
#include "cuda_on_host.h"

#define __forceinline__ inline

namespace {

int first_cta, grid_ctas, threads_per_cta;

inline int cluster_thread() { return emulator::Cta::running()->thread(); }

// Threads of a CTA wait for each other; a warp looks until all have come.
int arrived[2], rounds[2];
inline void wait_for_cta() {
  const int cta = cluster_thread() / threads_per_cta, round = rounds[cta];
  __syncwarp();
  if (++arrived[cta] == threads_per_cta) {
    arrived[cta] = 0;
    ++rounds[cta];
  }
  while (__any_sync(~0u, rounds[cta] == round)) {
  }
}

}  // namespace

#undef threadIdx
#define threadIdx (emulator::Index{cluster_thread() % threads_per_cta})
#define blockIdx (emulator::Index{first_cta + cluster_thread() / threads_per_cta})
#define blockDim (emulator::Index{threads_per_cta})
#define gridDim (emulator::Index{grid_ctas})
#define __syncthreads wait_for_cta

#include "topk_gate_mma.cuh"
#include "topk_gate_tiles.cuh"

namespace {

using namespace light;
using namespace light::gate;

template <int kExperts, int kTokens>
bool run_tiles(const light_router_logits_args &args) {
  bool done = true;
  for (first_cta = 0; first_cta < grid_ctas; first_cta += kPairedCtas ? 2 : 1) {
    done = emulator::Cta(threads_per_cta * (kPairedCtas ? 2 : 1), 1).run([&] {
      char *shared = shared_memory + cluster_thread() / threads_per_cta * kCtaBytes;
      RouterTiles<BFloat16, kExperts, kTokens>(args, shared).write_all();
    }) && done;
  }
  return done;
}

}  // namespace

// bfloat16 stands for both.
float __half2float(__half) { return 0.0f; }

extern "C" bool multiply_tiles(const void *hidden, const void *router, float *logits,
                               int num_tokens, int num_experts, int width, int experts, int tokens,
                               int grid) {
  const light_router_logits_args args{hidden, router, logits, num_tokens, num_experts, width};
  grid_ctas = grid;
  threads_per_cta = kTileThreads;
  switch (experts * 1000 + tokens) {
    case 16064: return run_tiles<16, 64>(args);
    case 16128: return run_tiles<16, 128>(args);
    case 32064: return run_tiles<32, 64>(args);
    case 32128: return run_tiles<32, 128>(args);
    case 64064: return run_tiles<64, 64>(args);
    case 64128: return run_tiles<64, 128>(args);
    default: return run_tiles<128, 128>(args);
  }
}

extern "C" bool multiply_slices(const void *hidden, const void *router, float *partials,
                                int num_tokens, int num_experts, int width, int grid) {
  light_topk_gate_args args{};
  args.hidden = hidden;
  args.router_weight = router;
  args.width = width;
  args.sort.num_tokens = num_tokens;
  args.sort.num_experts = num_experts;
  grid_ctas = grid;
  threads_per_cta = 64;
  bool done = true;
  for (first_cta = 0; first_cta < grid_ctas; ++first_cta) {
    done = emulator::Cta(threads_per_cta, 1).run([&] {
      write_slices<BFloat16>(args, partials);
    }) && done;
  }
  return done;
}
