// AttentionParams from a call's Python values. Tensors are known only by their methods data_ptr, stride, shape,
// is_contiguous and dtype, called through the C API: this is the launcher's way to a kernel, and each detour through
// general attribute look-up would cost as much as the launch itself.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <climits>
#include <cmath>
#include <string>

#include "attention.h"
#include "kernel_table.h"

namespace fastattn {

namespace py = pybind11;

// clang-format off
// Positions in fastattn.params.AttentionParams.
enum ParamsField {
    kQ, kK, kV, kMask, kBias, kSeed, kCuSeqlensQ, kCuSeqlensK, kSequsedK, kMaxSeqlenQ,
    kMaxSeqlenK, kScale, kSoftcap, kDropoutP, kLeft, kRight, kBottomRight, kParamsFields
};

// Positions in fastattn.params.Buffers.
enum BuffersField {
    kOut, kLse, kDout, kDlse, kDelta, kDq, kDk, kDv, kDqSum, kDbiasPartial, kDbias, kBuffersFields
};
// clang-format on

// ---- tensors, by their methods ----

struct MethodNames {
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* stride = PyUnicode_InternFromString("stride");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
};

inline const MethodNames& names() {
    static const MethodNames names;
    return names;
}

inline py::object owned(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

inline py::object call(py::handle tensor, PyObject* method) {
    PyObject* self = tensor.ptr();
    return owned(PyObject_VectorcallMethod(method, &self, 1, nullptr));
}

inline py::object attribute(py::handle tensor, PyObject* name) { return owned(PyObject_GetAttr(tensor.ptr(), name)); }

inline index_t to_index(py::handle number) {
    const index_t value = PyLong_AsLongLong(number.ptr());
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
}

inline int to_int(py::handle number, const char* name) {
    const index_t value = to_index(number);
    if (value < INT_MIN || value > INT_MAX) {
        throw py::value_error(std::string(name) + ": must fit 32 bits, got " + std::to_string(value));
    }
    return static_cast<int>(value);
}

inline int to_length(py::handle number, const char* name) {
    const index_t value = to_index(number);
    if (value < 0 || value >= kLongest) {
        throw py::value_error(std::string(name) + ": must be below 2^29, got " + std::to_string(value));
    }
    return static_cast<int>(value);
}

// Of dense tensors: a longer one would be memory of others.
inline void check_length(int number, index_t length, const char* name) {
    if (number > length) {
        throw py::value_error(std::string(name) + ": must be at most the tensor's length " + std::to_string(length) +
                              ", got " + std::to_string(number));
    }
}

inline double to_double(py::handle number) {
    const double value = PyFloat_AsDouble(number.ptr());
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
}

// The numbers of a shape or of strides.
struct Sizes {
    std::array<index_t, 5> values{};
    int count = 0;

    index_t operator[](int i) const { return values[i]; }
    index_t last() const { return values[count - 1]; }
};

inline Sizes to_sizes(const py::object& tuple, int count, const char* name) {
    if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != count) {
        throw py::value_error(std::string(name) + ": must have " + std::to_string(count) + " dimensions, got " +
                              std::string(py::str(tuple)));
    }
    Sizes sizes;
    sizes.count = count;
    for (int i = 0; i < count; ++i) sizes.values[i] = to_index(PyTuple_GET_ITEM(tuple.ptr(), i));
    return sizes;
}

inline Sizes shape(py::handle tensor, int count, const char* name) {
    return to_sizes(attribute(tensor, names().shape), count, name);
}

inline Sizes stride(py::handle tensor, int count, const char* name) {
    return to_sizes(call(tensor, names().stride), count, name);
}

// The tensor's memory; null for None.
template <class T>
T* data(py::handle tensor) {
    if (tensor.is_none()) return nullptr;
    return reinterpret_cast<T*>(to_index(call(tensor, names().data_ptr)));
}

// The memory of a tensor whose strides follow from its shape; null for None.
template <class T>
T* contiguous(py::handle tensor, const char* name) {
    if (!tensor.is_none() && call(tensor, names().is_contiguous).ptr() != Py_True) {
        throw py::value_error(std::string(name) + ": must be contiguous");
    }
    return data<T>(tensor);
}

// ---- the parts of AttentionParams ----

// What all tensors of one call have in common.
struct Layout {
    bool is_packed;
    index_t element_size;

    int dims() const { return is_packed ? 3 : 4; }
};

// Four elements are one access: 16 bytes of float, 8 of a half type. Strides of dimensions of size 1 do
// not matter; sizes are asked for only where they decide.
inline bool is_aligned(py::handle tensor, const void* data, const Sizes& strides, index_t last, const Layout& layout,
                       const char* name) {
    if (last % 4 != 0 || reinterpret_cast<std::size_t>(data) % (4 * layout.element_size) != 0) return false;
    const int outer = layout.dims() - 1;
    bool all = true;
    for (int i = 0; i < outer; ++i) all = all && strides[i] % 4 == 0;
    if (all) return true;
    const Sizes sizes = shape(tensor, layout.dims(), name);
    for (int i = 0; i < outer; ++i) {
        if (sizes[i] > 1 && strides[i] % 4 != 0) return false;
    }
    return true;
}

// last: the size of the last dimension.
inline Rows rows(py::handle tensor, index_t last, const Layout& layout, const char* name) {
    if (tensor.is_none()) return {};
    const Sizes strides = stride(tensor, layout.dims(), name);
    if (last > 1 && strides.last() != 1) {
        throw py::value_error(std::string(name) + ": the last dimension must be contiguous, got a stride of " +
                              std::to_string(strides.last()));
    }
    void* start = data<void>(tensor);
    const int aligned = is_aligned(tensor, start, strides, last, layout, name);
    if (layout.is_packed) return {start, 0, strides[1], strides[0], aligned};
    return {start, strides[0], strides[1], strides[2], aligned};
}

inline Scores scores(py::handle tensor, const char* name) {
    if (tensor.is_none()) return {};
    const Sizes sizes = shape(tensor, 4, name), strides = stride(tensor, 4, name);
    const auto step = [&](int i) { return sizes[i] == 1 ? 0 : strides[i]; };
    return {data<const void>(tensor), step(0), step(1), step(2), step(3)};
}

inline BiasType bias_type(py::handle bias) {
    const std::string dtype = py::str(attribute(bias, names().dtype));
    const std::string prefix = "torch.";
    const int element = dtype.rfind(prefix, 0) == 0 ? find_element(dtype.substr(prefix.size())) : -1;
    if (element < 0) {
        throw py::value_error("bias: dtype must be torch.float32, torch.float16 or torch.bfloat16, got " + dtype);
    }
    return static_cast<BiasType>(element);
}

inline BiasGrad bias_grad(py::handle partial, py::handle dbias) {
    if (partial.is_none()) return {};
    const char* name = "dbias_partial";
    const Sizes sizes = shape(partial, 5, name);
    const auto size = [&](int i) { return static_cast<int>(sizes[i]); };
    return {contiguous<void>(dbias, "dbias"),
            contiguous<float>(partial, name),
            size(0),
            size(1),
            size(2),
            size(3),
            size(4)};
}

// The share p of the 2^32 random words is dropped, the same words as in the reference: rounded half to even.
inline void set_dropout(AttentionParams& params, double p) {
    const double threshold = std::nearbyint(p * 4294967296.0);
    const bool drops_all = threshold >= 4294967296.0;
    params.dropout_threshold = drops_all ? 0 : static_cast<unsigned>(threshold);
    params.dropout_rescale = drops_all ? 0.0F : static_cast<float>(1.0 / (1.0 - p));
}

// ---- all of it ----

inline void check_fields(const py::tuple& tuple, std::size_t count, const char* name) {
    if (tuple.size() != count) {
        throw py::value_error(std::string(name) + ": must have " + std::to_string(count) + " fields, got " +
                              std::to_string(tuple.size()));
    }
}

inline py::handle field(const py::tuple& tuple, int i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }

// The sizes of the problem; dimensions are (total, heads, head_dim) if packed, else (batch, heads, rows, head_dim).
inline void set_sizes(AttentionParams& params, const py::tuple& p, const Layout& layout) {
    const int dims = layout.dims();
    const Sizes q = shape(field(p, kQ), dims, "q"), k = shape(field(p, kK), dims, "k"),
                v = shape(field(p, kV), dims, "v");
    if (layout.is_packed) {
        params.cu_seqlens_q = contiguous<const int>(field(p, kCuSeqlensQ), "cu_seqlens_q");
        params.cu_seqlens_k = contiguous<const int>(field(p, kCuSeqlensK), "cu_seqlens_k");
        params.total_q = q[0];
        params.total_k = k[0];
        params.batch = static_cast<int>(shape(field(p, kCuSeqlensQ), 1, "cu_seqlens_q")[0] - 1);
    } else {
        params.batch = static_cast<int>(q[0]);
    }
    params.nheads = static_cast<int>(q[1]);
    params.nheads_k = static_cast<int>(k[1]);
    params.seqused_k = contiguous<const int>(field(p, kSequsedK), "seqused_k");
    params.seqlen_q = to_length(field(p, kMaxSeqlenQ), "max_seqlen_q");
    params.seqlen_k = to_length(field(p, kMaxSeqlenK), "max_seqlen_k");
    if (!layout.is_packed) {
        check_length(params.seqlen_q, q[2], "max_seqlen_q");
        check_length(params.seqlen_k, k[2], "max_seqlen_k");
    }
    params.head_dim = static_cast<int>(q.last());
    params.head_dim_v = static_cast<int>(v.last());
}

inline void set_tensors(AttentionParams& params, const py::tuple& p, const py::tuple& buffers, const Layout& layout) {
    const auto head_dim_rows = [&](py::handle x, const char* name) { return rows(x, params.head_dim, layout, name); };
    const auto value_rows = [&](py::handle x, const char* name) { return rows(x, params.head_dim_v, layout, name); };
    params.q = head_dim_rows(field(p, kQ), "q");
    params.k = head_dim_rows(field(p, kK), "k");
    params.v = value_rows(field(p, kV), "v");
    params.out = value_rows(field(buffers, kOut), "out");
    params.dout = value_rows(field(buffers, kDout), "dout");
    params.dq = head_dim_rows(field(buffers, kDq), "dq");
    params.dk = head_dim_rows(field(buffers, kDk), "dk");
    params.dv = value_rows(field(buffers, kDv), "dv");

    // (nheads, total_q) if packed, else (batch, nheads, seqlen_q)
    const index_t head = layout.is_packed ? params.total_q : params.seqlen_q;
    const index_t batch = layout.is_packed ? 0 : params.nheads * head;
    const auto per_row = [&](int i, const char* name) {
        return PerRow{contiguous<float>(field(buffers, i), name), batch, head};
    };
    params.lse = per_row(kLse, "lse");
    params.dlse = per_row(kDlse, "dlse");
    params.delta = per_row(kDelta, "delta");
    params.dq_sum = per_row(kDqSum, "dq_sum");
}

// element: the position of q's in kElements.
inline AttentionParams pack(int element, const py::tuple& p, const py::tuple& buffers) {
    check_fields(p, kParamsFields, "p");
    check_fields(buffers, kBuffersFields, "buffers");
    AttentionParams params{};
    const Layout layout{!field(p, kCuSeqlensQ).is_none(), kElementBytes[element]};
    set_sizes(params, p, layout);
    set_tensors(params, p, buffers, layout);
    params.mask = scores(field(p, kMask), "mask");
    params.bias = scores(field(p, kBias), "bias");
    if (params.bias.data != nullptr) params.bias_type = bias_type(field(p, kBias));
    params.dbias = bias_grad(field(buffers, kDbiasPartial), field(buffers, kDbias));
    params.scale = static_cast<float>(to_double(field(p, kScale)));
    params.softcap = static_cast<float>(to_double(field(p, kSoftcap)));
    params.left = to_int(field(p, kLeft), "left");
    params.right = to_int(field(p, kRight), "right");
    params.bottom_right = PyObject_IsTrue(field(p, kBottomRight).ptr());
    params.seed = data<const index_t>(field(p, kSeed));
    set_dropout(params, to_double(field(p, kDropoutP)));
    return params;
}

}  // namespace fastattn
