// The wait for the kernel before, of kernels that may start before it ends (sm_90).
#pragma once

namespace light {

// Wait for the kernel before this one, then let the next one begin: it waits in the same way.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace light
