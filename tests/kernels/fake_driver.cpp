// A libcuda.so.1 for machines without a GPU: it says what was asked of it, one line a call that
// matters, and answers as the environment tells. test_library.py runs liblight_ops over it.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

namespace {

struct Attribute {
  int id;
  char pad[4];
  unsigned int value[16];
};

struct Config {
  unsigned int grid[3], block[3], shared_bytes;
  void *stream;
  Attribute *attributes;
  unsigned int num_attributes;
};

int setting(const char *name, int otherwise) {
  const char *value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

std::set<std::string> &names() {
  static std::set<std::string> all;
  return all;
}

thread_local void *current = nullptr;
int contexts[2];

}  // namespace

extern "C" {

int cuInit(unsigned int) { return setting("FAKE_INIT", 0); }

int cuDriverGetVersion(int *version) {
  *version = setting("FAKE_DRIVER", 12020);
  return 0;
}

int cuCtxGetCurrent(void **context) {
  *context = current;
  return 0;
}

int cuCtxSetCurrent(void *context) {
  current = context;
  return 0;
}

int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return ordinal < 2 ? 0 : 101;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = &contexts[device];
  return 0;
}

int cuCtxGetDevice(int *device) {
  *device = current == &contexts[1];
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int) {
  const int capability = setting("FAKE_CAPABILITY", 75);
  switch (attribute) {
    case 16:
      *value = 68;
      return 0;
    case 75:
      *value = capability / 10;
      return 0;
    case 76:
      *value = capability % 10;
      return 0;
    case 97:
      *value = 64 << 10;
      return 0;
    default:
      return 1;
  }
}

// A file that pretends to be a kernel may begin with the number of the error that loading it gives.
int cuModuleLoadDataEx(void **module, const void *image, unsigned int, int *, void **) {
  const char *text = static_cast<const char *>(image);
  dprintf(STDOUT_FILENO, "load %s\n", text);
  *module = const_cast<char *>(names().insert(text).first->c_str());
  return std::atoi(text);
}

int cuModuleGetFunction(void **function, void *, const char *name) {
  *function = const_cast<char *>(names().insert(name).first->c_str());
  return std::strstr(name, "_t8_") ? 500 : 0;
}

int cuFuncGetAttribute(int *value, int, void *) {
  *value = 0;
  return 0;
}

int cuFuncSetAttribute(void *, int attribute, int value) {
  dprintf(STDOUT_FILENO, "set %d %d\n", attribute, value);
  return 0;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, void *, int threads, size_t) {
  *count = threads > 512 ? 1 : 512 / threads;  // a CTA has at most 1024
  return 0;
}

int cuOccupancyMaxActiveClusters(int *count, void *, const Config *) {
  *count = setting("FAKE_LARGE_CLUSTERS", 4);
  return 0;
}

int cuThreadExchangeStreamCaptureMode(int *mode) {
  dprintf(STDOUT_FILENO, "capture mode %d\n", *mode);
  *mode = 0;
  return 0;
}

int cuLaunchKernelEx(const Config *config, void *function, void **, void **) {
  std::string attributes;
  for (unsigned int i = 0; i < config->num_attributes; ++i) {
    attributes += " " + std::to_string(config->attributes[i].id);
  }
  dprintf(STDOUT_FILENO, "launch %s grid %u block %u shared %u stream %zu attributes%s\n",
          static_cast<char *>(function), config->grid[0], config->block[0], config->shared_bytes,
          reinterpret_cast<size_t>(config->stream), attributes.c_str());
  return setting("FAKE_LAUNCH", 0);
}

int cuGetErrorName(int, const char **text) {
  *text = "CUDA_ERROR_OF_THE_FAKE";
  return 0;
}

int cuGetErrorString(int, const char **text) {
  *text = "as the test wanted";
  return 0;
}
}
