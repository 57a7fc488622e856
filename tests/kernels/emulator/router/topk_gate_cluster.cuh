// Stands in for topk_gate_cluster.cuh: a cluster is two CTAs of 256 threads that run side by side.
#pragma once

#include "instructions.cuh"

namespace light::gate {

inline int cluster_arrived, cluster_round, round_of_thread[512];

inline void cluster_arrive() {
  round_of_thread[cluster_thread()] = cluster_round;
  if (++cluster_arrived == 512) {
    cluster_arrived = 0;
    ++cluster_round;
  }
}
inline void cluster_wait() {
  while (__any_sync(~0u, cluster_round == round_of_thread[cluster_thread()])) {
  }
}
inline unsigned address_in(int rank, const void *pointer) {
  return shared_address(pointer) % kCtaBytes + rank * kCtaBytes;
}
inline void store_in_cluster(unsigned address, float first, float second) {
  const float values[] = {first, second};
  std::memcpy(shared_memory + address, values, sizeof values);
}

}  // namespace light::gate
