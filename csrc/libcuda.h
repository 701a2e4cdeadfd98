// The functions of libcuda that a launch needs, opened at run time: neither building nor importing asks for CUDA.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastattn {

// ---- what cuda.h says ----

using CudaResult = int;
using CudaDevice = int;
using CudaContext = struct CudaContextHandle*;
using CudaModule = struct CudaModuleHandle*;
using CudaFunction = struct CudaFunctionHandle*;
using CudaStream = struct CudaStreamHandle*;

constexpr CudaResult kCudaSuccess = 0;
constexpr int kMultiprocessorCount = 16, kCapabilityMajor = 75, kCapabilityMinor = 76,
              kMaxSmemOptIn = 97;                       // of a device
constexpr int kMaxDynamicSmem = 8;                      // of a function
constexpr int kErrorLogBuffer = 5, kErrorLogBytes = 6;  // options of the compiler in the driver

// name, symbol (with the version that cuda.h gives it), arguments
#define FASTATTN_LIBCUDA(FUNCTION)                                                                                 \
    FUNCTION(init, cuInit, (unsigned flags))                                                                       \
    FUNCTION(driver_version, cuDriverGetVersion, (int* version))                                                   \
    FUNCTION(error_name, cuGetErrorName, (CudaResult error, const char** text))                                    \
    FUNCTION(error_string, cuGetErrorString, (CudaResult error, const char** text))                                \
    FUNCTION(device_count, cuDeviceGetCount, (int* count))                                                         \
    FUNCTION(device_get, cuDeviceGet, (CudaDevice * device, int ordinal))                                          \
    FUNCTION(device_attribute, cuDeviceGetAttribute, (int* value, int attribute, CudaDevice device))               \
    FUNCTION(primary_context_retain, cuDevicePrimaryCtxRetain, (CudaContext * context, CudaDevice device))         \
    FUNCTION(context_current, cuCtxGetCurrent, (CudaContext * context))                                            \
    FUNCTION(context_push, cuCtxPushCurrent_v2, (CudaContext context))                                             \
    FUNCTION(context_pop, cuCtxPopCurrent_v2, (CudaContext * context))                                             \
    FUNCTION(module_load, cuModuleLoadDataEx,                                                                      \
             (CudaModule * module, const void* image, unsigned options, int* names, void** values))                \
    FUNCTION(module_function, cuModuleGetFunction, (CudaFunction * function, CudaModule module, const char* name)) \
    FUNCTION(function_set_attribute, cuFuncSetAttribute, (CudaFunction function, int attribute, int value))        \
    FUNCTION(launch_kernel, cuLaunchKernel,                                                                        \
             (CudaFunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,          \
              unsigned block_y, unsigned block_z, unsigned smem, CudaStream stream, void** params, void** extra))

// ---- errors ----

// What went wrong in the driver, in CUDA's words and ours.
struct DriverError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What a user can do about an error whose own text does not say; empty for the others.
inline std::string advice(CudaResult error) {
    switch (error) {
        case 1:  // CUDA_ERROR_INVALID_VALUE
            return "; a grid, block or shared memory beyond what the device takes is the usual reason";
        case 209:  // CUDA_ERROR_NO_BINARY_FOR_GPU
            return "; the kernels are built for other GPUs, see python -m fastattn.info";
        case 222:  // CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            return "; the driver is older than the compiler that made the kernels: update the driver";
        case 700:  // CUDA_ERROR_ILLEGAL_ADDRESS
        case 716:  // CUDA_ERROR_MISALIGNED_ADDRESS
        case 719:  // CUDA_ERROR_LAUNCH_FAILED
            return "; an earlier kernel failed, CUDA_LAUNCH_BLOCKING=1 shows which";
        case 900:  // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        case 901:  // CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
            return "; the first call of a kernel loads it, so make it once before capturing a CUDA graph";
        default:
            return "";
    }
}

// ---- the library ----

class Libcuda {
  public:
    // Opens libcuda.so.1, or what FASTATTN_LIBCUDA names, and looks every function up.
    void open() {
        const char* named = std::getenv("FASTATTN_LIBCUDA");
        const char* path = named != nullptr && *named != '\0' ? named : "libcuda.so.1";
        void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) throw DriverError(std::string("cannot load the CUDA driver: ") + dlerror());
#define FASTATTN_LOOK_UP(name, symbol, arguments) look_up(name, library, path, #symbol);
        FASTATTN_LIBCUDA(FASTATTN_LOOK_UP)
    }

    // Throws unless the call succeeded.
    void check(CudaResult result, const char* call) const {
        if (result != kCudaSuccess) throw DriverError(std::string(call) + ": " + text(result));
    }

    // For example "CUDA_ERROR_INVALID_VALUE (invalid argument)", and what to do about it.
    std::string text(CudaResult error) const {
        const char *name = nullptr, *description = nullptr;
        if (error_name(error, &name) != kCudaSuccess || name == nullptr) return "CUDA error " + std::to_string(error);
        error_string(error, &description);
        return std::string(name) + " (" + (description == nullptr ? "no description" : description) + ")" +
               advice(error);
    }

#define FASTATTN_DECLARE(name, symbol, arguments) CudaResult(*name) arguments = nullptr;
    FASTATTN_LIBCUDA(FASTATTN_DECLARE)

  private:
    template <class Function>
    static void look_up(Function& function, void* library, const char* path, const char* symbol) {
        function = reinterpret_cast<Function>(dlsym(library, symbol));
        if (function == nullptr) throw DriverError(std::string(path) + " has no " + symbol + ": the driver is too old");
    }
};

}  // namespace fastattn
