// Status codes with a text: what failed, the value, and the remedy where there is one.
#pragma once

#include "driver.h"
#include "light_ops.h"

namespace light {

// Keep the text for light_last_error and return `status`.
__attribute__((format(printf, 2, 3))) light_status fail(light_status status, const char *format,
                                                        ...);

// The status of a driver call: LIGHT_OK, or a failure that names the call and the driver's error.
light_status check(const driver::Table &driver, driver::Result result, const char *what);

const char *last_error();

}  // namespace light

// Return from the enclosing function where `expression` is not LIGHT_OK.
#define LIGHT_TRY(expression)                                         \
  if (const light_status status = (expression); status != LIGHT_OK) { \
    return status;                                                    \
  }
