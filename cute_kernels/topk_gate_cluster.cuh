// The CTAs of one cluster (sm_90): barriers, and stores into each other's shared memory that count
// themselves as they arrive. Elsewhere every CTA is a cluster of its own.
#pragma once

#include "shared_barriers.cuh"
#include "topk_gate_lanes.cuh"

namespace light::gate {

#if __CUDA_ARCH__ >= 900

__device__ inline int cluster_ctas() {
  int number;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(number));
  return number;
}

// Every thread of the cluster arrives, then waits: it sees what the others wrote before.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// The address of the same place in the shared memory of another CTA.
__device__ inline unsigned address_in(int rank, const void *pointer) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

// Two neighbours to an address in a CTA of the cluster.
__device__ inline void store_in_cluster(unsigned address, float first, float second) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second)
               : "memory");
}

// `arrivals` is complete when so many bytes were stored through it.
__device__ inline void expect_bytes(unsigned long long *arrivals, int num_bytes) {
  const unsigned address = shared_address(arrivals);
  init_barrier(address, 1);
  publish_barriers();
  arrive_expecting(address, num_bytes);
}

__device__ inline void store_counted_in(int rank, uint2 *pointer, uint2 value,
                                        unsigned long long *arrivals) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
          address_in(rank, pointer)),
      "r"(value.x), "r"(value.y), "r"(address_in(rank, arrivals))
      : "memory");
}

__device__ inline void wait_for_bytes(unsigned long long *arrivals) {
  wait_barrier(shared_address(arrivals), 0);
}

#else

__device__ inline constexpr int cluster_ctas() { return 1; }
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() {}
__device__ inline unsigned address_in(int, const void *) { return 0; }
__device__ inline void store_in_cluster(unsigned, float, float) {}
__device__ inline void expect_bytes(unsigned long long *, int) {}
__device__ inline void store_counted_in(int, uint2 *, uint2, unsigned long long *) {}
__device__ inline void wait_for_bytes(unsigned long long *) {}

#endif

}  // namespace light::gate
