// Looks the driver up at run time, so that the library also loads where there is none.
#include "driver.h"

#include <dlfcn.h>

#include <string>

namespace light::driver {
namespace {

struct Lookup {
  Table table{};
  std::string missing;  // empty: all found

  Lookup() {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      missing = std::string("no NVIDIA driver (") + dlerror() + "): install one";
      return;
    }
#define LIGHT_LOOK_UP(name, parameters)                                                   \
  table.name = reinterpret_cast<decltype(table.name)>(dlsym(library, #name));             \
  if (table.name == nullptr && missing.empty()) {                                         \
    missing = "libcuda.so.1 lacks " #name ": install a driver of CUDA 12 (525) or later"; \
  }
    LIGHT_DRIVER_SYMBOLS(LIGHT_LOOK_UP)
#undef LIGHT_LOOK_UP
  }
};

}  // namespace

const Table *table(const char **why) {
  static const Lookup lookup;
  *why = lookup.missing.c_str();
  return lookup.missing.empty() ? &lookup.table : nullptr;
}

}  // namespace light::driver
