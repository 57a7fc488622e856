// route.cu on the host, as one C function: test_route.py compares it with the reference.
#include "cuda_on_host.h"

namespace light::route {
extern char memory[];
}

#include "route.cu"

namespace light::route {
alignas(16) char memory[227 << 10];  // what a CTA has on sm_90
}

extern "C" bool run_route(const light_route_split_args *args) {
  const light::route::Layout layout(args->num_experts, args->num_ranks);
  if (layout.bytes > static_cast<int>(sizeof light::route::memory)) {
    return false;
  }
  std::fill_n(light::route::memory, sizeof light::route::memory, '\x5a');
  emulator::Cta cta(light::route::kThreads);
  return cta.run([&] {
    if (args->num_ranks <= light::route::kRanksOfOneLane) {
      route_split_w32(*args);
    } else {
      route_split_w64(*args);
    }
  });
}
