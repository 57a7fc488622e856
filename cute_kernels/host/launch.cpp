// Launches through cuLaunchKernelEx, which takes the attributes of every kind of launch.
#include "launch.h"

#include <atomic>
#include <map>
#include <mutex>
#include <utility>

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

driver::LaunchAttribute cluster_of(int ctas) {
  driver::LaunchAttribute attribute = flag(driver::kAttributeClusterDimension);
  attribute.value.cluster[0] = static_cast<unsigned int>(ctas);
  attribute.value.cluster[1] = attribute.value.cluster[2] = 1;
  return attribute;
}

driver::LaunchConfig config_of(const Kernel &kernel, Grid grid, light_stream stream,
                               driver::LaunchAttribute *attributes, unsigned int count) {
  return {grid.x,
          grid.y,
          grid.z,
          static_cast<unsigned int>(kernel.threads),
          1,
          1,
          static_cast<unsigned int>(kernel.shared_bytes),
          static_cast<driver::Stream>(stream),
          attributes,
          count};
}

light_status ask_for_large_cluster(const Kernel &kernel, int cluster, bool *fits) {
  LIGHT_TRY(check(*kernel.driver,
                  kernel.driver->cuFuncSetAttribute(
                      kernel.function, driver::kFunctionNonPortableClusterSizeAllowed, 1),
                  kernel.name.c_str()));
  driver::LaunchAttribute attribute = cluster_of(cluster);
  const driver::LaunchConfig config =
      config_of(kernel, {static_cast<unsigned int>(cluster)}, nullptr, &attribute, 1);
  int num_clusters = 0;
  LIGHT_TRY(check(
      *kernel.driver,
      kernel.driver->cuOccupancyMaxActiveClusters(&num_clusters, kernel.function, &config),
      kernel.name.c_str()));
  *fits = num_clusters > 0;
  return LIGHT_OK;
}

}  // namespace

light_status find_kernel(const std::string &program, const std::string &name, int threads,
                         int shared_bytes, const Kernel **kernel) {
  return Library::instance().find(program, name, threads, shared_bytes, kernel);
}

light_status find_driver(const driver::Table **driver) {
  const char *why = nullptr;
  *driver = driver::table(&why);
  return *driver != nullptr ? LIGHT_OK : fail(LIGHT_NO_DRIVER, "%s", why);
}

light_status launch_bytes(const Kernel &kernel, Grid grid, const void *args, light_stream stream,
                          LaunchOptions options) {
  driver::LaunchAttribute attributes[3];
  unsigned int count = 0;
  if (options.cooperative) {
    attributes[count++] = flag(driver::kAttributeCooperative);
  }
  if (options.cluster > 0) {
    attributes[count++] = cluster_of(options.cluster);
  }
  // A kernel that was compiled for an older architecture cannot wait for the one before it.
  if (options.overlapped && overlapped_launch && kernel.architecture >= kOverlappedLaunchFrom) {
    attributes[count++] = flag(driver::kAttributeProgrammaticStreamSerialization);
  }
  const driver::LaunchConfig config = config_of(kernel, grid, stream, attributes, count);
  void *parameters[] = {const_cast<void *>(args)};
  return check(*kernel.driver,
               kernel.driver->cuLaunchKernelEx(&config, kernel.function, parameters, nullptr),
               kernel.name.c_str());
}

light_status large_cluster_fits(const Kernel &kernel, int cluster, bool *fits) {
  static std::mutex mutex;
  static std::map<std::pair<const Kernel *, int>, bool> answers;  // kernels stay where they are
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = answers.find({&kernel, cluster});
  if (found != answers.end()) {
    *fits = found->second;
    return LIGHT_OK;
  }
  LIGHT_TRY(ask_for_large_cluster(kernel, cluster, fits));
  answers[{&kernel, cluster}] = *fits;
  return LIGHT_OK;
}

void set_overlapped_launch(bool on) { overlapped_launch = on; }

}  // namespace light
