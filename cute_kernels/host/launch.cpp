// Launches through cuLaunchKernelEx, which takes the attributes of every kind of launch.
#include "launch.h"

#include <atomic>

#include "library.h"

namespace light {
namespace {

constexpr int kOverlappedLaunchFrom = 90;

std::atomic<bool> overlapped_launch{true};

driver::LaunchAttribute flag(int id) {
  driver::LaunchAttribute attribute{};
  attribute.id = id;
  attribute.value.flag = 1;
  return attribute;
}

}  // namespace

light_status find_kernel(const std::string &program, const std::string &name, int threads,
                         int shared_bytes, const Kernel **kernel) {
  return Library::instance().find(program, name, threads, shared_bytes, kernel);
}

light_status launch_bytes(const Kernel &kernel, Grid grid, const void *args, light_stream stream,
                          LaunchOptions options) {
  driver::LaunchAttribute attributes[3];
  unsigned int count = 0;
  if (options.cooperative) {
    attributes[count++] = flag(driver::kAttributeCooperative);
  }
  if (options.cluster > 0) {
    driver::LaunchAttribute &attribute = attributes[count++];
    attribute = flag(driver::kAttributeClusterDimension);
    attribute.value.cluster[0] = static_cast<unsigned int>(options.cluster);
    attribute.value.cluster[1] = attribute.value.cluster[2] = 1;
  }
  // A kernel that was compiled for an older architecture cannot wait for the one before it.
  if (options.overlapped && overlapped_launch && kernel.architecture >= kOverlappedLaunchFrom) {
    attributes[count++] = flag(driver::kAttributeProgrammaticStreamSerialization);
  }
  const driver::LaunchConfig config{grid.x,
                                    grid.y,
                                    grid.z,
                                    static_cast<unsigned int>(kernel.threads),
                                    1,
                                    1,
                                    static_cast<unsigned int>(kernel.shared_bytes),
                                    static_cast<driver::Stream>(stream),
                                    attributes,
                                    count};
  void *parameters[] = {const_cast<void *>(args)};
  return check(*kernel.driver,
               kernel.driver->cuLaunchKernelEx(&config, kernel.function, parameters, nullptr),
               kernel.name.c_str());
}

void set_overlapped_launch(bool on) { overlapped_launch = on; }

}  // namespace light
