// The library's state: where the compiled programs are, and what is loaded in which context.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "launch.h"

namespace light {

// What a context's device is, and which folder of programs it uses.
struct DeviceInfo {
  int capability;  // 75
  int num_multiprocessors;
  int max_shared_bytes;  // of a CTA, static and dynamic
  std::string folder;    // "75", "75ptx"
};

class Library {
 public:
  static Library &instance();

  light_status open(const char *directory, const char *architecture);
  light_status bind_device(int ordinal);
  light_status find(const std::string &program, const std::string &name, int threads,
                    int shared_bytes, const Kernel **kernel);
  light_status current_folder(std::string *folder);

 private:
  light_status check_open() const;
  light_status current_device(driver::Context *context, const DeviceInfo **device);
  light_status read_device(DeviceInfo *device);
  light_status choose_folder(DeviceInfo *device);
  light_status load_module(driver::Context context, const DeviceInfo &device,
                           const std::string &program, driver::Module *module);
  light_status load_image(const std::string &image, const std::string &path,
                          driver::Module *module);
  light_status prepare(const DeviceInfo &device, driver::Module module, Kernel *kernel);

  using KernelKey = std::tuple<driver::Context, std::string, std::string, int, int>;

  std::mutex mutex_;
  const driver::Table *driver_ = nullptr;
  std::string directory_;
  std::string architecture_;  // empty: by the device
  std::map<driver::Context, DeviceInfo> devices_;
  std::map<std::pair<driver::Context, std::string>, driver::Module> modules_;  // by path
  std::map<KernelKey, Kernel> kernels_;  // by path, name, threads, dynamic shared bytes
};

}  // namespace light
