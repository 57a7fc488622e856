// Finds a compiled kernel for the current context and launches it: what every stem's launcher uses.
#pragma once

#include <string>

#include "driver.h"
#include "errors.h"

namespace light {

// A kernel in a context, ready for launches with these threads and dynamic shared bytes.
struct Kernel {
  const driver::Table *driver;
  driver::Function function;
  std::string name;
  int architecture;  // that it was compiled for: 75, also where the device is newer
  int threads;
  int shared_bytes;  // dynamic, per CTA
  int num_multiprocessors;
  int ctas_per_multiprocessor;  // that one multiprocessor holds at once

  int resident_ctas() const { return num_multiprocessors * ctas_per_multiprocessor; }
};

// Load (once) `name` out of the file `program` of the device's architecture. The kernel stays.
light_status find_kernel(const std::string &program, const std::string &name, int threads,
                         int shared_bytes, const Kernel **kernel);

// The driver of the library, once it is open.
light_status find_driver(const driver::Table **driver);

struct Grid {
  unsigned int x = 1, y = 1, z = 1;
};

struct LaunchOptions {
  bool cooperative = false;  // all CTAs resident at once, for grid-wide barriers
  int cluster = 0;           // CTAs of a cluster along x (sm_90); 0: none
  bool overlapped = true;    // may start while the kernel before it ends (sm_90): it waits itself
};

// Launch with `args` as the kernel's only parameter.
light_status launch_bytes(const Kernel &kernel, Grid grid, const void *args, light_stream stream,
                          LaunchOptions options);

template <class Args>
light_status launch(const Kernel &kernel, Grid grid, const Args &args, light_stream stream,
                    LaunchOptions options = {}) {
  return launch_bytes(kernel, grid, &args, stream, options);
}

// Whether the device takes a cluster of more than 8 CTAs of this kernel; allows it where it does.
light_status large_cluster_fits(const Kernel &kernel, int cluster, bool *fits);

void set_overlapped_launch(bool on);

}  // namespace light
