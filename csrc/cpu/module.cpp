// The Python module fastattn._cpu: the kernels of the instruction sets that this CPU has, and one call from tensors to
// results. It knows nothing of torch when it is built.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../pack.h"
#include "work.h"

namespace fastattn {
namespace {

// The sets that run here, the best first.
std::vector<const CpuKernels*> find_kernels() {
    std::vector<const CpuKernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const auto has = [](bool feature) { return feature; };
    const bool has_avx2 = has(__builtin_cpu_supports("avx2")) && has(__builtin_cpu_supports("fma"));
    const bool has_avx512 = has(__builtin_cpu_supports("avx512f")) && has(__builtin_cpu_supports("avx512bw")) &&
                            has(__builtin_cpu_supports("avx512dq")) && has(__builtin_cpu_supports("avx512vl"));
    if (has_avx2 && has_avx512) found.push_back(avx512_kernels());
    if (has_avx2) found.push_back(avx2_kernels());
#endif
    found.push_back(baseline_kernels());
    return found;
}

const std::vector<const CpuKernels*>& all_kernels() {
    static const std::vector<const CpuKernels*> kernels = find_kernels();
    return kernels;
}

const CpuKernels& kernels_of(std::string_view isa) {
    std::string names;
    for (const CpuKernels* kernels : all_kernels()) {
        if (isa == kernels->name) return *kernels;
        names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    throw py::value_error("isa: must be one of those that this CPU has, " + names + ", got " + std::string(isa));
}

int element_of(std::string_view name) {
    const int element = find_element(name);
    if (element < 0) throw py::value_error("element: must be float32, float16 or bfloat16, got " + std::string(name));
    return element;
}

using Pass = void (*)(const CpuKernels&, const AttentionParams&, int element, int element_size, int threads);

template <Pass run>
void attention(std::string_view isa, std::string_view name, int threads, const py::tuple& p, const py::tuple& buffers) {
    const CpuKernels& kernels = kernels_of(isa);
    const int element = element_of(name);
    const AttentionParams params = pack(element, p, buffers);
    const py::gil_scoped_release no_gil;
    run(kernels, params, element, static_cast<int>(kElementBytes[element]), threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module, py::mod_gil_not_used()) {
    module.doc() = "Fused attention on the CPU.";
    names();
    Threads::get();  // before anything forks
    py::list isas;
    for (const CpuKernels* kernels : all_kernels()) isas.append(kernels->name);
    module.attr("ISAS") = py::tuple(isas);
    module.attr("BLOCK_M") = baseline_kernels()->block_m;
    module.attr("BLOCK_N") = baseline_kernels()->block_n;
    module.def("attention_fwd", &attention<forward>, py::arg("isa"), py::arg("element"), py::arg("threads"),
               py::arg("p"), py::arg("buffers"));
    module.def("attention_bwd", &attention<backward>, py::arg("isa"), py::arg("element"), py::arg("threads"),
               py::arg("p"), py::arg("buffers"));
    module.def("threading", [] { return Threads::get().name(); });
    module.def("use_pool", [](bool uses_pool) { Threads::get().use_pool(uses_pool); }, py::arg("uses_pool"));
    module.def(
        "random_words",
        [](std::string_view isa, std::uintptr_t words, long long seed, int b, int h, int rows, int row) {
            kernels_of(isa).random_words(reinterpret_cast<unsigned*>(words), seed, b, h, rows, row);
        },
        py::arg("isa"), py::arg("words"), py::arg("seed"), py::arg("b"), py::arg("h"), py::arg("rows"), py::arg("row"));
    module.def(
        "exp2",
        [](std::string_view isa, std::uintptr_t x, long count) {
            kernels_of(isa).exp2(reinterpret_cast<float*>(x), count);
        },
        py::arg("isa"), py::arg("x"), py::arg("count"));
}

}  // namespace fastattn
