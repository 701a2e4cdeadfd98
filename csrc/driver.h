// Devices, contexts, modules and launches of the CUDA driver. Everything may be called from any thread; nothing waits
// for a GPU or allocates its memory.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernel_table.h"
#include "libcuda.h"

namespace fastattn {

using Capability = std::pair<int, int>;

// The cubin or PTX with all kernels of an element type, for a device of that compute capability. It is called with the
// lock of the loader held, so no thread may enter the loader with a lock that the source waits for.
using ImageSource = std::function<std::string(const std::string& element, Capability)>;

struct Grid {
    long long x, y, z;
};

// One launch: what cuLaunchKernel gets, but for the parameters. kernel and element are positions in their tables.
struct Launch {
    int kernel, element, device;
    CudaStream stream;
    Grid grid;
};

inline std::string describe(const Launch& launch) {
    const Kernel& kernel = kKernels[launch.kernel];
    const auto [x, y, z] = launch.grid;
    return std::string(kernel.name) + " of " + kElements[launch.element] + " on device " +
           std::to_string(launch.device) + ", grid (" + std::to_string(x) + ", " + std::to_string(y) + ", " +
           std::to_string(z) + "), block " + std::to_string(kernel.threads) + ", " + std::to_string(kernel.smem) +
           " bytes of shared memory";
}

struct Device {
    CudaDevice handle = 0;
    Capability capability;
    int multiprocessors = 0, max_smem = 0;  // max_smem: bytes a block may ask for

    // Filled at the first use. Contexts and modules are kept to the end of the process: graphs may still launch them.
    std::atomic<CudaContext> primary{nullptr};
    std::array<CudaModule, kElementCount> modules{};
    std::array<std::array<std::atomic<CudaFunction>, kKernelCount>, kElementCount> functions{};
};

// The context is current within the guard's scope. Threads of torch's autograd may have none; and a call for a second
// device finds the first one's.
class CurrentContext {
  public:
    CurrentContext(const Libcuda& libcuda, CudaContext context) : libcuda_(libcuda) {
        CudaContext current = nullptr;
        libcuda_.check(libcuda_.context_current(&current), "cuCtxGetCurrent");
        if (current == context) return;
        libcuda_.check(libcuda_.context_push(context), "cuCtxPushCurrent");
        is_pushed_ = true;
    }
    CurrentContext(const CurrentContext&) = delete;
    CurrentContext& operator=(const CurrentContext&) = delete;
    ~CurrentContext() {
        CudaContext popped = nullptr;
        if (is_pushed_) libcuda_.context_pop(&popped);  // cannot fail: the scope's own push is on top
    }

  private:
    const Libcuda& libcuda_;
    bool is_pushed_ = false;
};

class Driver {
  public:
    // For example 12090.
    int version() {
        start();
        return version_;
    }

    int device_count() {
        start();
        return static_cast<int>(devices_.size());
    }

    const Device& device(int ordinal) { return device_at(ordinal); }

    // Every kernel is loaded anew, from this source.
    void set_image_source(ImageSource source) {
        const std::lock_guard lock(loading_);
        image_source_ = std::move(source);
        for (auto& device : devices_) {
            device->modules.fill(nullptr);
            for (auto& functions : device->functions) {
                for (auto& function : functions) function.store(nullptr, std::memory_order_release);
            }
        }
    }

    // Launches the kernel with the struct that params points to as its only argument.
    void launch(const Launch& launch, const void* params) {
        try {
            Device& device = device_at(launch.device);
            const CurrentContext context(libcuda_, primary_context(device));
            const CudaFunction function = loaded(device, launch);
            const auto [x, y, z] = launch.grid;
            const unsigned threads = kKernels[launch.kernel].threads, smem = kKernels[launch.kernel].smem;
            void* arguments[] = {const_cast<void*>(params)};
            libcuda_.check(
                libcuda_.launch_kernel(function, x, y, z, threads, 1, 1, smem, launch.stream, arguments, nullptr),
                "cuLaunchKernel");
        } catch (const DriverError& error) {
            throw DriverError(describe(launch) + ": " + error.what());
        }
    }

  private:
    // ---- devices ----

    void start() {
        std::call_once(started_, [this] {
            libcuda_.open();
            libcuda_.check(libcuda_.init(0), "cuInit");
            libcuda_.check(libcuda_.driver_version(&version_), "cuDriverGetVersion");
            int count = 0;
            libcuda_.check(libcuda_.device_count(&count), "cuDeviceGetCount");
            std::vector<std::unique_ptr<Device>> devices;
            for (int ordinal = 0; ordinal < count; ++ordinal) devices.push_back(describe_device(ordinal));
            const std::lock_guard lock(loading_);
            devices_ = std::move(devices);
        });
    }

    std::unique_ptr<Device> describe_device(int ordinal) const {
        auto device = std::make_unique<Device>();
        libcuda_.check(libcuda_.device_get(&device->handle, ordinal), "cuDeviceGet");
        device->capability = {attribute(*device, kCapabilityMajor), attribute(*device, kCapabilityMinor)};
        device->multiprocessors = attribute(*device, kMultiprocessorCount);
        device->max_smem = attribute(*device, kMaxSmemOptIn);
        return device;
    }

    int attribute(const Device& device, int which) const {
        int value = 0;
        libcuda_.check(libcuda_.device_attribute(&value, which, device.handle), "cuDeviceGetAttribute");
        return value;
    }

    Device& device_at(int ordinal) {
        start();
        if (ordinal < 0 || ordinal >= static_cast<int>(devices_.size())) {
            throw DriverError("device: must be below " + std::to_string(devices_.size()) + ", got " +
                              std::to_string(ordinal));
        }
        return *devices_[ordinal];
    }

    CudaContext primary_context(Device& device) {
        CudaContext context = device.primary.load(std::memory_order_acquire);
        if (context != nullptr) return context;
        const std::lock_guard lock(loading_);
        context = device.primary.load(std::memory_order_relaxed);
        if (context != nullptr) return context;
        libcuda_.check(libcuda_.primary_context_retain(&context, device.handle), "cuDevicePrimaryCtxRetain");
        device.primary.store(context, std::memory_order_release);
        return context;
    }

    // ---- modules; the device's context is current ----

    CudaFunction loaded(Device& device, const Launch& launch) {
        auto& slot = device.functions[launch.element][launch.kernel];
        CudaFunction function = slot.load(std::memory_order_acquire);
        if (function != nullptr) return function;
        const std::lock_guard lock(loading_);
        function = slot.load(std::memory_order_relaxed);
        if (function != nullptr) return function;
        CudaModule& module = device.modules[launch.element];
        if (module == nullptr) module = load_module(device, kElements[launch.element]);
        function = load_function(device, module, kKernels[launch.kernel]);
        slot.store(function, std::memory_order_release);
        return function;
    }

    CudaModule load_module(const Device& device, const char* element) const {
        if (!image_source_) throw DriverError("no image source: call set_image_source first");
        const std::string image = image_source_(element, device.capability);
        std::array<char, 8192> log{};
        int options[] = {kErrorLogBuffer, kErrorLogBytes};
        void* values[] = {log.data(), reinterpret_cast<void*>(log.size() - 1)};
        CudaModule module = nullptr;
        const CudaResult result = libcuda_.module_load(&module, image.c_str(), 2, options, values);
        if (result != kCudaSuccess) {
            const std::string said = log[0] == '\0' ? "" : std::string("\n") + log.data();
            throw DriverError("cuModuleLoadDataEx: " + libcuda_.text(result) + said);
        }
        return module;
    }

    // Without the attribute a block gets 48 KB at most, whatever the device has.
    CudaFunction load_function(const Device& device, CudaModule module, const Kernel& kernel) const {
        if (kernel.smem > device.max_smem) {
            throw DriverError("a block of this device may have " + std::to_string(device.max_smem) + " bytes");
        }
        CudaFunction function = nullptr;
        libcuda_.check(libcuda_.module_function(&function, module, kernel.name), "cuModuleGetFunction");
        libcuda_.check(libcuda_.function_set_attribute(function, kMaxDynamicSmem, kernel.smem), "cuFuncSetAttribute");
        return function;
    }

    Libcuda libcuda_;
    std::once_flag started_;
    int version_ = 0;
    std::vector<std::unique_ptr<Device>> devices_;
    std::mutex loading_;  // of the image source, and of whatever is filled at the first use
    ImageSource image_source_;
};

}  // namespace fastattn
