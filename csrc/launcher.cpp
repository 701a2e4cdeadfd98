// The Python module fastattn._launcher: the table of kernels, and one call from tensors to a launch. It knows neither
// torch nor CUDA when it is built, and opens libcuda at the first launch or question about a device.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>

#include "driver.h"
#include "pack.h"

namespace fastattn {
namespace {

// The driver of this process. It is never destroyed: at exit libcuda may be gone before it.
Driver& the_driver() {
    static Driver& driver = *new Driver;
    return driver;
}

// ---- kernels ----

py::object named_tuple(py::module_& module, const char* name, const char* fields) {
    py::object type = py::module_::import("collections").attr("namedtuple")(name, fields);
    type.attr("__module__") = module.attr("__name__");
    module.attr(name) = type;
    return type;
}

py::tuple kernel_records(const py::object& type) {
    py::list records;
    for (const Kernel& k : kKernels) {
        records.append(type(k.name, k.pass, k.head_dim, k.block_m, k.block_n, k.threads, k.smem));
    }
    return records;
}

// ---- launch ----

using GridSizes = std::tuple<long long, long long, long long>;

int to_element(std::string_view name) {
    const int element = find_element(name);
    if (element < 0) throw py::value_error("element: must be float32, float16 or bfloat16, got " + std::string(name));
    return element;
}

// Positions of the two names, and the grid if CUDA can take it.
Launch to_launch(std::string_view kernel, std::string_view element, int device, std::uintptr_t stream,
                 const GridSizes& grid) {
    const auto [x, y, z] = grid;
    const Launch launch{find_kernel(kernel), to_element(element), device, reinterpret_cast<CudaStream>(stream),
                        Grid{x, y, z}};
    if (launch.kernel < 0) throw py::value_error("kernel: must be one of KERNELS, got " + std::string(kernel));
    if (x < 0 || y < 0 || z < 0 || x > INT_MAX || y > 65535 || z > 65535) {
        throw py::value_error("grid: must be within (2147483647, 65535, 65535), got " + describe(launch));
    }
    return launch;
}

// The GIL is released for all the driver does: loading takes long, a full launch queue makes cuLaunchKernel wait for
// the GPU, which may itself wait for a host function that needs the GIL, and the loader's lock is never waited for with
// it.
void launch(std::string_view kernel, std::string_view element, int device, std::uintptr_t stream, GridSizes grid,
            const py::tuple& p, const py::tuple& buffers) {
    const Launch launch = to_launch(kernel, element, device, stream, grid);
    if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) return;
    const AttentionParams params = pack(launch.element, p, buffers);
    const py::gil_scoped_release no_gil;
    the_driver().launch(launch, &params);
}

// ---- the driver ----

py::object driver(const py::object& type) {
    try {
        const int version = the_driver().version();
        return type(py::none(), py::make_tuple(version / 1000, version % 1000 / 10), the_driver().device_count());
    } catch (const DriverError& error) {
        return type(error.what(), py::none(), 0);
    }
}

}  // namespace

PYBIND11_MODULE(_launcher, module, py::mod_gil_not_used()) {
    module.doc() = "Launches the CUDA kernels through libcuda.";
    names();
    const py::object kernel_type = named_tuple(module, "Kernel", "name pass_ head_dim block_m block_n threads smem");
    const py::object driver_type = named_tuple(module, "Driver", "problem version devices");
    module.attr("KERNELS") = kernel_records(kernel_type);
    module.attr("ELEMENTS") = py::make_tuple(kElements[0], kElements[1], kElements[2]);
    module.def(
        "pack",
        [](std::string_view element, const py::tuple& p, const py::tuple& buffers) {
            const AttentionParams params = pack(to_element(element), p, buffers);
            return py::bytes(reinterpret_cast<const char*>(&params), sizeof params);
        },
        py::arg("element"), py::arg("p"), py::arg("buffers"));
    module.def("launch", &launch, py::arg("kernel"), py::arg("element"), py::arg("device"), py::arg("stream"),
               py::arg("grid"), py::arg("p"), py::arg("buffers"));
    module.def(
        "set_image_source", [](ImageSource source) { the_driver().set_image_source(std::move(source)); },
        py::arg("source").none(false), py::call_guard<py::gil_scoped_release>());
    module.def("driver", [driver_type] { return driver(driver_type); });
    module.def("capability", [](int device) { return the_driver().device(device).capability; }, py::arg("device"));
    module.def(
        "multiprocessors", [](int device) { return the_driver().device(device).multiprocessors; }, py::arg("device"));
    module.def("max_smem", [](int device) { return the_driver().device(device).max_smem; }, py::arg("device"));
}

}  // namespace fastattn
