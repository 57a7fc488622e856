// The library's own calls of light_ops.h; each stem's launcher is in a file of its own.
#include <cstring>

#include "launch.h"
#include "library.h"

light_status light_open(const char *directory, const char *architecture) {
  return light::Library::instance().open(directory, architecture);
}

light_status light_bind_device(int device) {
  return light::Library::instance().bind_device(device);
}

light_status light_architecture(char *name, int size) {
  std::string folder;
  LIGHT_TRY(light::Library::instance().current_folder(&folder));
  if (name == nullptr || size <= static_cast<int>(folder.size())) {
    return light::fail(LIGHT_BAD_ARGUMENT, "name has no room for %s", folder.c_str());
  }
  std::memcpy(name, folder.c_str(), folder.size() + 1);
  return LIGHT_OK;
}

int light_abi_version() { return LIGHT_OPS_ABI; }

int light_driver_version() {
  const char *why = nullptr;
  const light::driver::Table *driver = light::driver::table(&why);
  int version = 0;
  if (driver == nullptr || driver->cuDriverGetVersion(&version) != light::driver::kSuccess) {
    return 0;
  }
  return version;
}

const char *light_last_error() { return light::last_error(); }

void light_set_overlapped_launch(int on) { light::set_overlapped_launch(on != 0); }
