// The part of the CUDA driver API that the library uses, declared here so that neither the CUDA
// toolkit nor libcuda is needed to build it, and nothing newer than CUDA 12.2 slips in.
//
// tests/kernels/test_library.py holds this file against the cuda.h of CUDA 12.2.
#pragma once

#include <cstddef>

namespace light::driver {

using Result = int;  // CUresult
using Device = int;
using Context = struct CUctx_st *;
using Module = struct CUmod_st *;
using Function = struct CUfunc_st *;
using Stream = struct CUstream_st *;

constexpr Result kSuccess = 0;
constexpr Result kNoDevice = 100;
constexpr Result kNoBinaryForGpu = 209;
constexpr Result kUnsupportedPtxVersion = 222;
constexpr Result kNotFound = 500;

constexpr int kMultiprocessorCount = 16;  // CUdevice_attribute
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr int kMaxSharedMemoryPerBlockOptin = 97;

constexpr int kFunctionSharedBytes = 1;  // CUfunction_attribute
constexpr int kFunctionMaxDynamicSharedBytes = 8;
constexpr int kFunctionNonPortableClusterSizeAllowed = 14;

constexpr int kJitErrorLogBuffer = 5;  // CUjit_option
constexpr int kJitErrorLogBufferBytes = 6;

constexpr int kCaptureModeRelaxed = 2;  // CUstreamCaptureMode

constexpr int kAttributeCooperative = 2;  // CUlaunchAttributeID
constexpr int kAttributeClusterDimension = 4;
constexpr int kAttributeProgrammaticStreamSerialization = 6;

struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  char pad[4];
  union {
    char bytes[64];
    int flag;
    unsigned int cluster[3];
  } value;
};

struct LaunchConfig {  // CUlaunchConfig
  unsigned int grid_x, grid_y, grid_z;
  unsigned int block_x, block_y, block_z;
  unsigned int shared_bytes;
  Stream stream;
  LaunchAttribute *attributes;
  unsigned int num_attributes;
};

// Every name that is looked up: X(name as dlsym takes it, parameters). All return a CUresult.
#define LIGHT_DRIVER_SYMBOLS(X)                                                                  \
  X(cuInit, (unsigned int flags))                                                                \
  X(cuDriverGetVersion, (int *version))                                                          \
  X(cuCtxGetCurrent, (Context * context))                                                        \
  X(cuCtxGetDevice, (Device * device))                                                           \
  X(cuCtxSetCurrent, (Context context))                                                          \
  X(cuDeviceGet, (Device * device, int ordinal))                                                 \
  X(cuDevicePrimaryCtxRetain, (Context * context, Device device))                                \
  X(cuDeviceGetAttribute, (int *value, int attribute, Device device))                            \
  X(cuModuleLoadDataEx, (Module * module, const void *image, unsigned int num_options,           \
                         int *options, void **values))                                           \
  X(cuModuleGetFunction, (Function * function, Module module, const char *name))                 \
  X(cuFuncGetAttribute, (int *value, int attribute, Function function))                          \
  X(cuFuncSetAttribute, (Function function, int attribute, int value))                           \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor,                                                 \
    (int *num_blocks, Function function, int threads, size_t shared_bytes))                      \
  X(cuOccupancyMaxActiveClusters,                                                                \
    (int *num_clusters, Function function, const LaunchConfig *config))                          \
  X(cuLaunchKernelEx,                                                                            \
    (const LaunchConfig *config, Function function, void **parameters, void **extra))            \
  X(cuTensorMapEncodeTiled,                                                                      \
    (void *map, int type, unsigned int rank, void *address, const unsigned long long *extents,   \
     const unsigned long long *strides, const unsigned int *box, const unsigned int *steps,      \
     int interleave, int swizzle, int promotion, int fill))                                      \
  X(cuThreadExchangeStreamCaptureMode, (int *mode))                                              \
  X(cuGetErrorName, (Result error, const char **text))                                           \
  X(cuGetErrorString, (Result error, const char **text))

struct Table {
#define LIGHT_DECLARE(name, parameters) Result(*name) parameters;
  LIGHT_DRIVER_SYMBOLS(LIGHT_DECLARE)
#undef LIGHT_DECLARE
};

// The driver, looked up at the first call; null where there is none, and `why` says so.
const Table *table(const char **why);

}  // namespace light::driver
