// The text of a thread's last failure.
#include "errors.h"

#include <cstdarg>
#include <cstdio>

namespace light {
namespace {

thread_local char text[1024] = "";

light_status status_of(driver::Result result) {
  switch (result) {
    case driver::kSuccess:
      return LIGHT_OK;
    case driver::kNoDevice:
      return LIGHT_NO_DRIVER;
    case driver::kUnsupportedPtxVersion:
      return LIGHT_DRIVER_TOO_OLD;
    case driver::kNoBinaryForGpu:
    case driver::kNotFound:
      return LIGHT_NO_KERNEL;
    default:
      return LIGHT_DRIVER_ERROR;
  }
}

}  // namespace

light_status fail(light_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return status;
}

light_status check(const driver::Table &driver, driver::Result result, const char *what) {
  if (result == driver::kSuccess) {
    return LIGHT_OK;
  }
  const char *name = nullptr, *meaning = nullptr;
  if (driver.cuGetErrorName(result, &name) != driver::kSuccess ||
      driver.cuGetErrorString(result, &meaning) != driver::kSuccess) {
    name = "an error without a name", meaning = "unknown";
  }
  return fail(status_of(result), "%s: %s (%d): %s", what, name, result, meaning);
}

const char *last_error() { return text; }

}  // namespace light
