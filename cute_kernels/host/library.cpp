// Opens the folder of compiled programs, chooses among its architectures, and loads what is asked.
#include "library.h"

#include <filesystem>
#include <fstream>
#include <sstream>

namespace light {
namespace {

// A driver runs the machine code of every compiler of its own major version and of those before.
constexpr int kOldestDriver = 12000;
constexpr int kSharedBytesWithoutOptIn = 48 << 10;

bool is_ptx(const std::string &folder) { return folder.find("ptx") != std::string::npos; }

// Loading allocates, which a capture of the thread forbids by default; it is no part of the graph.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const driver::Table &driver) : driver_(driver) {
    exchanged_ = driver_.cuThreadExchangeStreamCaptureMode(&mode_) == driver::kSuccess;
  }
  ~RelaxedCapture() {
    if (exchanged_) {
      driver_.cuThreadExchangeStreamCaptureMode(&mode_);
    }
  }
  RelaxedCapture(const RelaxedCapture &) = delete;
  RelaxedCapture &operator=(const RelaxedCapture &) = delete;

 private:
  const driver::Table &driver_;
  int mode_ = driver::kCaptureModeRelaxed;
  bool exchanged_;
};

}  // namespace

Library &Library::instance() {
  static Library library;
  return library;
}

light_status Library::open(const char *directory, const char *architecture) {
  if (directory == nullptr || !std::filesystem::is_directory(directory)) {
    return fail(LIGHT_BAD_ARGUMENT, "no directory %s", directory ? directory : "(null)");
  }
  const char *why = nullptr;
  const driver::Table *driver = driver::table(&why);
  if (driver == nullptr) {
    return fail(LIGHT_NO_DRIVER, "%s", why);
  }
  LIGHT_TRY(check(*driver, driver->cuInit(0), "cuInit"));
  int version = 0;
  LIGHT_TRY(check(*driver, driver->cuDriverGetVersion(&version), "cuDriverGetVersion"));
  if (version < kOldestDriver) {
    return fail(LIGHT_DRIVER_TOO_OLD, "the driver ends at CUDA %d.%d: install 525 or later",
                version / 1000, version % 1000 / 10);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  driver_ = driver;
  directory_ = directory;
  architecture_ = architecture == nullptr ? "" : architecture;
  devices_.clear();
  return LIGHT_OK;
}

light_status Library::bind_device(int ordinal) {
  const std::lock_guard<std::mutex> lock(mutex_);
  LIGHT_TRY(check_open());
  driver::Context context = nullptr;
  LIGHT_TRY(check(*driver_, driver_->cuCtxGetCurrent(&context), "cuCtxGetCurrent"));
  if (context != nullptr) {
    return LIGHT_OK;
  }
  driver::Device device = 0;
  LIGHT_TRY(check(*driver_, driver_->cuDeviceGet(&device, ordinal), "cuDeviceGet"));
  LIGHT_TRY(check(*driver_, driver_->cuDevicePrimaryCtxRetain(&context, device),
                  "cuDevicePrimaryCtxRetain"));
  return check(*driver_, driver_->cuCtxSetCurrent(context), "cuCtxSetCurrent");
}

light_status Library::current_folder(std::string *folder) {
  const std::lock_guard<std::mutex> lock(mutex_);
  driver::Context context = nullptr;
  const DeviceInfo *device = nullptr;
  LIGHT_TRY(current_device(&context, &device));
  *folder = device->folder;
  return LIGHT_OK;
}

light_status Library::find(const std::string &program, const std::string &name, int threads,
                           int shared_bytes, const Kernel **kernel) {
  const std::lock_guard<std::mutex> lock(mutex_);
  driver::Context context = nullptr;
  const DeviceInfo *device = nullptr;
  LIGHT_TRY(current_device(&context, &device));
  const std::string path = directory_ + "/" + device->folder + "/" + program;
  const KernelKey key{context, path, name, threads, shared_bytes};
  const auto found = kernels_.find(key);
  if (found != kernels_.end()) {
    *kernel = &found->second;
    return LIGHT_OK;
  }
  const RelaxedCapture relaxed(*driver_);
  driver::Module module = nullptr;
  LIGHT_TRY(load_module(context, *device, program, &module));
  Kernel prepared{driver_,      nullptr, name, std::stoi(device->folder), threads,
                  shared_bytes, device->num_multiprocessors, 0};
  LIGHT_TRY(prepare(*device, module, &prepared));
  *kernel = &kernels_.emplace(key, prepared).first->second;
  return LIGHT_OK;
}

light_status Library::check_open() const {
  return driver_ != nullptr ? LIGHT_OK
                            : fail(LIGHT_BAD_ARGUMENT, "not open: call light_open first");
}

light_status Library::current_device(driver::Context *context, const DeviceInfo **device) {
  LIGHT_TRY(check_open());
  LIGHT_TRY(check(*driver_, driver_->cuCtxGetCurrent(context), "cuCtxGetCurrent"));
  if (*context == nullptr) {
    return fail(LIGHT_DRIVER_ERROR, "this thread has no current CUDA context");
  }
  const auto found = devices_.find(*context);
  if (found != devices_.end()) {
    *device = &found->second;
    return LIGHT_OK;
  }
  DeviceInfo info;
  LIGHT_TRY(read_device(&info));
  LIGHT_TRY(choose_folder(&info));
  *device = &devices_.emplace(*context, info).first->second;
  return LIGHT_OK;
}

light_status Library::read_device(DeviceInfo *info) {
  driver::Device device = 0;
  LIGHT_TRY(check(*driver_, driver_->cuCtxGetDevice(&device), "cuCtxGetDevice"));
  int major = 0, minor = 0;
  const std::pair<int *, int> wanted[] = {
      {&major, driver::kComputeCapabilityMajor},
      {&minor, driver::kComputeCapabilityMinor},
      {&info->num_multiprocessors, driver::kMultiprocessorCount},
      {&info->max_shared_bytes, driver::kMaxSharedMemoryPerBlockOptin}};
  for (const auto &[value, attribute] : wanted) {
    LIGHT_TRY(check(*driver_, driver_->cuDeviceGetAttribute(value, attribute, device),
                    "cuDeviceGetAttribute"));
  }
  info->capability = 10 * major + minor;
  return LIGHT_OK;
}

light_status Library::choose_folder(DeviceInfo *device) {
  const auto exists = [this](const std::string &folder) {
    return std::filesystem::is_directory(directory_ + "/" + folder);
  };
  const int oldest = device->capability - device->capability % 10;
  for (int number = device->capability; architecture_.empty() && number >= oldest; --number) {
    if (exists(std::to_string(number))) {
      device->folder = std::to_string(number);
      return LIGHT_OK;
    }
  }
  if (!architecture_.empty() && exists(architecture_)) {
    device->folder = architecture_;
    return LIGHT_OK;
  }
  const std::string wanted =
      architecture_.empty() ? std::to_string(device->capability) : architecture_;
  return fail(LIGHT_NO_KERNEL, "%s holds no kernels for sm_%s: make kernels ARCHS=%s",
              directory_.c_str(), wanted.c_str(), wanted.c_str());
}

light_status Library::load_module(driver::Context context, const DeviceInfo &device,
                                  const std::string &program, driver::Module *module) {
  const char *suffix = is_ptx(device.folder) ? ".ptx" : ".cubin";
  const std::string path = directory_ + "/" + device.folder + "/" + program + suffix;
  const auto found = modules_.find({context, path});
  if (found != modules_.end()) {
    *module = found->second;
    return LIGHT_OK;
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return fail(LIGHT_NO_KERNEL, "no file %s: that kernel was not built: make kernels",
                path.c_str());
  }
  std::ostringstream image;
  image << file.rdbuf();
  LIGHT_TRY(load_image(image.str(), path, module));
  modules_.emplace(std::make_pair(context, path), *module);
  return LIGHT_OK;
}

light_status Library::load_image(const std::string &image, const std::string &path,
                                 driver::Module *module) {
  char log[512] = "";
  int options[] = {driver::kJitErrorLogBuffer, driver::kJitErrorLogBufferBytes};
  void *values[] = {log, reinterpret_cast<void *>(sizeof(log))};
  const driver::Result result =
      driver_->cuModuleLoadDataEx(module, image.c_str(), 2, options, values);
  return check(*driver_, result, ("loading " + path + (*log ? ": " : "") + log).c_str());
}

light_status Library::prepare(const DeviceInfo &device, driver::Module module, Kernel *kernel) {
  const char *name = kernel->name.c_str();
  LIGHT_TRY(check(*driver_, driver_->cuModuleGetFunction(&kernel->function, module, name), name));
  int static_bytes = 0;
  LIGHT_TRY(check(*driver_,
                  driver_->cuFuncGetAttribute(&static_bytes, driver::kFunctionSharedBytes,
                                              kernel->function),
                  name));
  const int most = device.max_shared_bytes - static_bytes;
  if (kernel->shared_bytes > most) {
    return fail(LIGHT_BAD_ARGUMENT, "%s needs %d bytes of shared memory, a CTA here has %d", name,
                kernel->shared_bytes, most);
  }
  if (kernel->shared_bytes + static_bytes > kSharedBytesWithoutOptIn) {
    LIGHT_TRY(check(*driver_,
                    driver_->cuFuncSetAttribute(
                        kernel->function, driver::kFunctionMaxDynamicSharedBytes, most),
                    name));
  }
  LIGHT_TRY(check(*driver_,
                  driver_->cuOccupancyMaxActiveBlocksPerMultiprocessor(
                      &kernel->ctas_per_multiprocessor, kernel->function, kernel->threads,
                      static_cast<size_t>(kernel->shared_bytes)),
                  name));
  if (kernel->ctas_per_multiprocessor < 1) {
    return fail(LIGHT_BAD_ARGUMENT, "%s does not fit on a multiprocessor with %d threads", name,
                kernel->threads);
  }
  return LIGHT_OK;
}

}  // namespace light
