// The wait for the kernel before, of kernels that may start before it ends (sm_90).
#pragma once

namespace light {

__device__ inline void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Wait for the kernel before this one, then let the next one begin: it waits in the same way.
__device__ inline void wait_for_previous_kernel() {
  wait_for_kernel_before();
  let_next_kernel_begin();
}

// The same, but the next one begins at once: what that reads before its own wait may not be what the
// kernel before this one writes. For kernels between products, which then fetch weights early.
__device__ inline void pass_on_and_wait() {
  let_next_kernel_begin();
  wait_for_kernel_before();
}

}  // namespace light
