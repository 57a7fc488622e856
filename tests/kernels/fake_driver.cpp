// A libcuda.so.1 for machines without a GPU: it says what was asked of it, one line a call that
// matters, and answers as the environment tells. test_launches.py runs liblight_ops over it.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "hopper_launch.h"

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

// What a launch on warpgroups passes beside its maps and the stem's own arguments.
template <class Args>
std::string beside(const void *parameter) {
  const auto *launch = static_cast<const light::HopperLaunch<Args> *>(parameter);
  std::string text;
  for (const int number : {launch->stage.tokens_offset, launch->stage.scales_offset,
                           launch->stage.zeros_offset, launch->stage.bytes,
                           launch->stage.weights_bytes, launch->tokens, launch->num_stages}) {
    text += " " + std::to_string(number);
  }
  return text;
}

std::string ticket(const void *parameter) {
  const auto *launch = static_cast<const light::HopperLaunch<light_grouped_gemm_args> *>(parameter);
  return std::to_string(reinterpret_cast<size_t>(launch->args.unit_ticket));
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
      *value = (capability >= 90 ? 227 : capability >= 80 ? 99 : 64) << 10;
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

// An axis is extent/box, and @bytes from one element of it to the next but for the first.
int cuTensorMapEncodeTiled(void *map, int type, unsigned int rank, void *address,
                           const unsigned long long *extents, const unsigned long long *strides,
                           const unsigned int *box, const unsigned int *steps, int interleave,
                           int swizzle, int promotion, int fill) {
  std::string axes, unsteady;
  for (unsigned int i = 0; i < rank; ++i) {
    axes += " " + std::to_string(extents[i]) + "/" + std::to_string(box[i]);
    if (i > 0) {
      axes += "@" + std::to_string(strides[i - 1]);
    }
    if (steps[i] != 1) {
      unsteady = " steps";
    }
  }
  dprintf(STDOUT_FILENO, "map%s type %d at %zu swizzle %d promotion %d%s%s\n", axes.c_str(), type,
          reinterpret_cast<size_t>(address), swizzle, promotion, unsteady.c_str(),
          interleave || fill || reinterpret_cast<size_t>(map) % 64 ? " odd" : "");
  std::memset(map, 0, sizeof(light::TensorMap));
  return setting("FAKE_MAP", 0);
}

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **) {
  const char *name = static_cast<char *>(function);
  if (std::strstr(name, "_wgmma_") != nullptr) {
    const auto is = [name](const char *stem) {
      return std::strncmp(name, stem, std::strlen(stem)) == 0;
    };
    dprintf(STDOUT_FILENO, "stage%s\n",
            (is("grouped_gemm") ? beside<light_grouped_gemm_args>(parameters[0])
             : is("fp8_gemm")   ? beside<light_fp8_gemm_args>(parameters[0])
                                : beside<light_quant_gemm_args>(parameters[0]))
                .c_str());
    if (is("grouped_gemm")) {
      dprintf(STDOUT_FILENO, "ticket %s\n", ticket(parameters[0]).c_str());
    }
  }
  std::string attributes;
  for (unsigned int i = 0; i < config->num_attributes; ++i) {
    attributes += " " + std::to_string(config->attributes[i].id);
  }
  dprintf(STDOUT_FILENO, "launch %s grid %u block %u shared %u stream %zu attributes%s\n",
          name, config->grid[0], config->block[0], config->shared_bytes,
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
