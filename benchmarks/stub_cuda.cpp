// A libcuda without a GPU: it keeps CUDA's rules about contexts and handles, records every call, and fails on request.
// The real names with the same arguments; what begins with stub_ is for whoever watches.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

using Result = int;
enum : Result {
    kSuccess = 0,
    kInvalidValue = 1,
    kNotInitialized = 3,
    kInvalidDevice = 101,
    kInvalidContext = 201,
    kInvalidHandle = 400,
    kTimeout = 909
};

struct Context {
    int device;
};

struct Module {
    Context* context;
    std::string image;
};

struct Function {
    Module* module;
    std::string name;
    int max_dynamic_smem;
};

struct Call {
    const char* name;
    std::uint64_t thread;
    std::uint64_t numbers[10];
    std::string bytes;  // an image, a kernel's name, or a kernel's parameters
};

struct Failure {
    Result result;
    int calls_before;
};

// What cuLaunchKernelEx is given: CUlaunchConfig.
struct LaunchConfig {
    unsigned grid[3], block[3], smem;
    void* stream;
    void* attributes;
    unsigned attribute_count;
};

constexpr int kDefaultSmem = 48 * 1024;

std::mutex lock;
std::deque<Call> calls;
std::map<std::string, Failure> failures;
std::map<int, int> attributes = {{16, 80},      {75, 8},       {76, 0},    {97, 166912}, {10, 32}, {12, 65536},
                                 {13, 1410000}, {36, 1593000}, {37, 5120}, {81, 167936}};  // of every device, but for:
std::map<std::pair<int, int>, int> attributes_of;
std::string compiler_log;
std::size_t params_bytes = 0;
std::vector<std::size_t> param_sizes;
bool is_recording = true, is_initialized = false;
std::atomic<bool> is_held{false};
int device_count = 1;
int first_handle = 100;  // a handle need not be the ordinal
Context contexts[] = {{0}, {1}, {2}, {3}};
std::deque<Module> modules;
std::deque<Function> functions;

std::uint64_t this_thread() {
    static thread_local char place;
    return reinterpret_cast<std::uint64_t>(&place);
}

std::vector<Context*>& stack() {
    static thread_local std::vector<Context*> stack;
    return stack;
}

Context* primary_context(int ordinal) { return &contexts[ordinal]; }

Context* current() { return stack().empty() ? nullptr : stack().back(); }

std::uint64_t number(const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }

// Records the call; the error asked for, or the one that CUDA would give before it is initialised.
Result enter(const char* name, std::initializer_list<std::uint64_t> numbers, std::string bytes = "") {
    const std::lock_guard guard(lock);
    if (is_recording) {
        calls.push_back({name, this_thread(), {}, std::move(bytes)});
        std::memcpy(calls.back().numbers, numbers.begin(), numbers.size() * sizeof(std::uint64_t));
    }
    if (const auto found = failures.find(name); found != failures.end() && found->second.calls_before-- <= 0) {
        const Result result = found->second.result;
        failures.erase(found);
        return result;
    }
    return is_initialized || std::strcmp(name, "cuInit") == 0 ? kSuccess : kNotInitialized;
}

// Waits until it is no longer held; not for ever, so that whoever waits in turn for the caller fails and does not hang.
bool wait_while_held() {
    for (int milliseconds = 0; is_held; ++milliseconds) {
        if (milliseconds == 5000) return false;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
}

// The parameters of a launch: of our kernels there is one, of Triton's as many as stub_set_param_sizes says.
std::string copied(void** params) {
    if (param_sizes.empty()) return {static_cast<const char*>(params[0]), params_bytes};
    std::string bytes;
    for (std::size_t i = 0; i < param_sizes.size(); ++i) {
        bytes.append(static_cast<const char*>(params[i]), param_sizes[i]);
    }
    return bytes;
}

}  // namespace

#define STUB_ENTER(...)                                                           \
    if (const Result result = enter(__func__, __VA_ARGS__); result != kSuccess) { \
        return result;                                                            \
    }

extern "C" {

// ---- libcuda ----

Result cuInit(unsigned flags) {
    STUB_ENTER({flags})
    is_initialized = true;
    return kSuccess;
}

Result cuDriverGetVersion(int* version) {
    STUB_ENTER({})
    *version = 12090;
    return kSuccess;
}

Result cuGetErrorName(Result error, const char** text) {
    static const std::map<Result, const char*> names = {{kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
                                                        {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"},
                                                        {100, "CUDA_ERROR_NO_DEVICE"},
                                                        {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
                                                        {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
                                                        {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
                                                        {218, "CUDA_ERROR_INVALID_PTX"},
                                                        {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
                                                        {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
                                                        {500, "CUDA_ERROR_NOT_FOUND"},
                                                        {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                                        {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
    const auto found = names.find(error);
    if (found == names.end()) return kInvalidValue;
    *text = found->second;
    return kSuccess;
}

Result cuGetErrorString(Result error, const char** text) {
    static std::map<Result, std::string> texts;
    const std::lock_guard guard(lock);
    *text = texts.emplace(error, "stub text " + std::to_string(error)).first->second.c_str();
    return kSuccess;
}

Result cuDeviceGetCount(int* count) {
    STUB_ENTER({})
    *count = device_count;
    return kSuccess;
}

Result cuDeviceGet(int* device, int ordinal) {
    STUB_ENTER({static_cast<std::uint64_t>(ordinal)})
    if (ordinal < 0 || ordinal >= device_count) return kInvalidDevice;
    *device = first_handle + ordinal;
    return kSuccess;
}

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    STUB_ENTER({static_cast<std::uint64_t>(attribute), static_cast<std::uint64_t>(device)})
    const int ordinal = device - first_handle;
    if (ordinal < 0 || ordinal >= device_count) return kInvalidDevice;
    const auto found = attributes_of.find({ordinal, attribute});
    *value = found != attributes_of.end() ? found->second : attributes.at(attribute);
    return kSuccess;
}

Result cuDevicePrimaryCtxRetain(Context** context, int device) {
    STUB_ENTER({static_cast<std::uint64_t>(device)})
    const int ordinal = device - first_handle;
    if (ordinal < 0 || ordinal >= device_count) return kInvalidDevice;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // time for another thread to come and ask, too
    *context = primary_context(ordinal);
    return kSuccess;
}

Result cuCtxGetCurrent(Context** context) {
    STUB_ENTER({})
    *context = current();
    return kSuccess;
}

Result cuCtxPushCurrent_v2(Context* context) {
    STUB_ENTER({number(context)})
    if (context == nullptr) return kInvalidContext;
    stack().push_back(context);
    return kSuccess;
}

Result cuCtxPopCurrent_v2(Context** context) {
    STUB_ENTER({})
    if (stack().empty()) return kInvalidContext;
    *context = current();
    stack().pop_back();
    return kSuccess;
}

Result cuModuleLoadDataEx(Module** module, const void* image, unsigned count, const int* options, void** values) {
    const Result failure = enter(__func__, {number(current())}, static_cast<const char*>(image));
    char* log = nullptr;
    std::size_t log_bytes = 0;
    for (unsigned i = 0; i < count; ++i) {
        if (options[i] == 5) log = static_cast<char*>(values[i]);
        if (options[i] == 6) log_bytes = reinterpret_cast<std::size_t>(values[i]);
    }
    if (log != nullptr) std::strncpy(log, compiler_log.c_str(), log_bytes);
    if (failure != kSuccess) return failure;
    if (!wait_while_held()) return kTimeout;
    if (current() == nullptr) return kInvalidContext;
    const std::lock_guard guard(lock);
    modules.push_back({current(), static_cast<const char*>(image)});
    *module = &modules.back();
    return kSuccess;
}

Result cuModuleGetFunction(Function** function, Module* module, const char* name) {
    STUB_ENTER({number(module)}, name)
    if (current() != module->context) return kInvalidHandle;
    const std::lock_guard guard(lock);
    functions.push_back({module, name, kDefaultSmem});
    *function = &functions.back();
    return kSuccess;
}

Result cuFuncSetAttribute(Function* function, int attribute, int value) {
    STUB_ENTER({number(function), static_cast<std::uint64_t>(attribute), static_cast<std::uint64_t>(value)},
               function->name)
    if (attribute != 8) return kInvalidValue;
    function->max_dynamic_smem = value;
    return kSuccess;
}

Result cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned smem, void* stream, void** params, void** extra) {
    if (!is_recording) return kSuccess;
    const std::string bytes = copied(params);
    STUB_ENTER(
        {number(function), grid_x, grid_y, grid_z, block_x, block_y, block_z, smem, number(stream), number(current())},
        bytes)
    if (!wait_while_held()) return kTimeout;
    if (current() == nullptr) return kInvalidContext;
    if (current() != function->module->context) return kInvalidHandle;
    if (static_cast<int>(smem) > function->max_dynamic_smem || extra != nullptr) return kInvalidValue;
    return kSuccess;
}

// ---- what Triton's driver calls besides ----

Result cuCtxSetCurrent(Context* context) {
    STUB_ENTER({number(context)})
    if (!stack().empty()) stack().pop_back();
    if (context != nullptr) stack().push_back(context);
    return kSuccess;
}

Result cuModuleLoadData(Module** module, const void* image) {
    return cuModuleLoadDataEx(module, image, 0, nullptr, nullptr);
}

Result cuFuncGetAttribute(int* value, int attribute, Function* function) {
    STUB_ENTER({static_cast<std::uint64_t>(attribute), number(function)})
    *value = attribute == 0 ? 1024 : 0;  // threads of a block; no static shared memory, no spilled register
    return kSuccess;
}

Result cuFuncSetCacheConfig(Function*, int) { return kSuccess; }

// Any address is the device's.
Result cuPointerGetAttribute(void* value, int, std::uint64_t pointer) {
    *static_cast<std::uint64_t*>(value) = pointer;
    return kSuccess;
}

Result cuPointerGetAttributes(unsigned count, const int* which, void** values, std::uint64_t pointer) {
    for (unsigned i = 0; i < count; ++i) {
        if (which[i] == 3) {
            *static_cast<std::uint64_t*>(values[i]) = pointer;
        } else {
            *static_cast<int*>(values[i]) = 2;
        }
    }
    return kSuccess;
}

Result cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** params, void** extra) {
    if (!is_recording) return kSuccess;
    const std::string bytes = copied(params);
    const auto& [grid, block, smem, stream, attributes_given, attribute_count] = *config;
    STUB_ENTER({number(function), grid[0], grid[1], grid[2], block[0], block[1], block[2], smem, number(stream),
                number(current())},
               bytes)
    if (current() == nullptr) return kInvalidContext;
    if (current() != function->module->context) return kInvalidHandle;
    if (static_cast<int>(smem) > function->max_dynamic_smem || extra != nullptr) return kInvalidValue;
    return kSuccess;
}

Result cuCtxGetLimit(std::size_t*, int) { return kInvalidValue; }
Result cuCtxSetLimit(int, std::size_t) { return kInvalidValue; }
Result cuOccupancyMaxActiveClusters(int*, Function*, const LaunchConfig*) { return kInvalidValue; }
Result cuTensorMapEncodeTiled() { return kInvalidValue; }
Result cuTensorMapEncodeIm2col() { return kInvalidValue; }
Result cuModuleUnload(Module*) { return kSuccess; }

// ---- for whoever watches ----

// Not recorded: one comparison and out, for measuring the caller.
void stub_record(int on) { is_recording = on != 0; }

// Loading and launching wait while it is held, as on a GPU that is busy.
void stub_hold(int on) { is_held = on != 0; }

void stub_clear() {
    const std::lock_guard guard(lock);
    calls.clear();
}

int stub_calls() { return static_cast<int>(calls.size()); }

void stub_call(int i, const char** name, std::uint64_t* thread, std::uint64_t* numbers, const char** bytes,
               std::size_t* size) {
    const std::lock_guard guard(lock);
    const Call& call = calls.at(i);
    *name = call.name;
    *thread = call.thread;
    std::memcpy(numbers, call.numbers, sizeof call.numbers);
    *bytes = call.bytes.data();
    *size = call.bytes.size();
}

// Lets the function fail once, after so many successful calls.
void stub_fail(const char* function, Result result, int calls_before) {
    const std::lock_guard guard(lock);
    failures[function] = {result, calls_before};
}

void stub_set_device_count(int count) { device_count = count; }

// Triton takes ordinals for handles.
void stub_set_first_handle(int handle) { first_handle = handle; }

void stub_set_attribute(int ordinal, int attribute, int value) { attributes_of[{ordinal, attribute}] = value; }

void stub_set_compiler_log(const char* text) { compiler_log = text; }

void stub_set_params_bytes(std::size_t size) { params_bytes = size; }

// The sizes of the parameters of each launch that follows; none: there is one of stub_set_params_bytes.
void stub_set_param_sizes(const std::size_t* sizes, int count) { param_sizes.assign(sizes, sizes + count); }

const char* stub_image_of(const Function* function) { return function->module->image.c_str(); }

const char* stub_name_of(const Function* function) { return function->name.c_str(); }

int stub_device_of(const Context* context) { return context == nullptr ? -1 : context->device; }

int stub_current_device() { return stub_device_of(current()); }

void stub_make_current(int ordinal) { stack().push_back(primary_context(ordinal)); }

}  // extern "C"
