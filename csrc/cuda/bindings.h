// The CUDA kernels for Python (ifr_fast/kernels/cuda.py and cuda_norm.py): addresses, sizes and flags.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "kernels.h"

namespace ifr::cuda {

using Address = uintptr_t;

template <typename T = void>
T *at(Address address) {
  return reinterpret_cast<T *>(address);
}

inline Stream stream_at(Address address) { return at<CUstream_st>(address); }

inline void bind_solver(pybind11::module_ &m) {
  namespace py = pybind11;
  py::enum_<Method>(m, "Method", py::module_local())
      .value("broyden", Method::broyden)
      .value("anderson", Method::anderson)
      .value("picard", Method::picard);
  py::class_<Solver>(m, "Solver", py::module_local())
      .def(py::init([](Method method, int64_t n, int64_t size, int rows, int row, int window, int64_t evaluation,
                       float rtol, float divergence, float ridge, bool affine, Address z, Address value, Address start,
                       Address injection, DType injection_type, Address r, DType r_type, Address history,
                       DType history_type, Address gram, Address p, Address q, Address step, Address total,
                       Address best, Address norms, Address residual, Address trace, Address previous, Address status,
                       Address iterations, Address improved, Address norm_partials, int parts,
                       Address gram_partials) {
        Solver a{};
        a.method = method, a.n = n, a.size = size, a.rows = rows, a.row = row, a.window = window;
        a.evaluation = evaluation, a.rtol = rtol, a.divergence = divergence, a.ridge = ridge, a.affine = affine;
        a.z = at<float>(z), a.value = at<float>(value), a.start = at<float>(start);
        a.injection = at(injection), a.injection_type = injection_type, a.r = at(r), a.r_type = r_type;
        a.history = at(history), a.history_type = history_type;
        a.gram = at<float>(gram), a.p = at<float>(p), a.q = at<float>(q);
        a.step = at<float>(step), a.total = at<float>(total), a.best = at<float>(best), a.norms = at<float>(norms);
        a.residual = at<float>(residual), a.trace = at<float>(trace), a.previous = at<float>(previous);
        a.status = at<int64_t>(status), a.iterations = at<int64_t>(iterations), a.improved = at<bool>(improved);
        a.norm_partials = at<float>(norm_partials), a.parts = parts, a.gram_partials = at<float>(gram_partials);
        return a;
      }));
  m.def("splits", splits);
  m.def("residual", [](const Solver &a, const std::vector<std::pair<Address, DType>> &f, Address stream) {
    Sum sum{};
    if (f.size() > 3) throw std::invalid_argument("residual: more than three addends");
    for (const auto &[address, type] : f) sum.addends[sum.count] = at(address), sum.types[sum.count++] = type;
    residual(a, sum, stream_at(stream));
  });
  for (auto [name, function] : {std::pair("gram_row", gram_row), std::pair("rule", rule), std::pair("combine", combine),
                                std::pair("finish", finish), std::pair("cluster_step", cluster_step)})
    m.def(name, [function = function](const Solver &a, Address stream) { function(a, stream_at(stream)); });
  m.def("fits_cluster", fits_cluster);
}

inline void bind_norms(pybind11::module_ &m) {
  namespace py = pybind11;
  py::class_<NormPlan>(m, "NormPlan", py::module_local())
      .def(py::init<int64_t, int, int, int, float, int, int, int, bool>())
      .def_property_readonly("blocks", [](const NormPlan &plan) { return plan.slices * plan.strips; })
      .def_property_readonly("workspace", &NormPlan::workspace);
  m.def("norm_relu", [](DType type, const NormPlan &plan, Address y, Address weight, Address bias, Address mean,
                        Address rstd, Address out, Address partial, int64_t parts, Address workspace, Address status,
                        Address stream) {
    NormForward a{};
    a.y = at(y), a.weight1 = at<float>(weight), a.bias1 = at<float>(bias);
    a.mean1 = at<float>(mean), a.rstd1 = at<float>(rstd), a.out = at(out);
    a.partial = at<float>(partial), a.parts = parts;
    a.workspace = at<float>(workspace), a.status = at<int64_t>(status);
    norm_relu(type, plan, a, stream_at(stream));
  });
  m.def("norm_relu_vjp", [](DType type, const NormPlan &plan, Address grad, Address y, Address weight, Address bias,
                            Address mean, Address rstd, Address grad_y, Address grad_weight, Address grad_bias,
                            Address workspace, Address status, Address stream) {
    NormBackward a{};
    a.grad = at(grad), a.y = at(y), a.weight1 = at<float>(weight), a.bias1 = at<float>(bias);
    a.mean1 = at<float>(mean), a.rstd1 = at<float>(rstd), a.grad_y = at(grad_y);
    a.grad_weight1 = at<float>(grad_weight), a.grad_bias1 = at<float>(grad_bias);
    a.workspace = at<float>(workspace), a.status = at<int64_t>(status);
    norm_relu_vjp(type, plan, a, stream_at(stream));
  });
  m.def("norm_tail", [](DType type, const NormPlan &plan, Address y, Address r, Address weight1, Address bias1,
                        Address weight2, Address bias2, Address mean1, Address rstd1, Address mean2, Address rstd2,
                        Address out, Address z, Address history, DType history_type, int64_t history_stride,
                        Address norms, Address partial, int64_t parts, Address workspace, Address status,
                        Address stream) {
    NormForward a{};
    a.y = at(y), a.r = at(r);
    a.weight1 = at<float>(weight1), a.bias1 = at<float>(bias1);
    a.weight2 = at<float>(weight2), a.bias2 = at<float>(bias2);
    a.mean1 = at<float>(mean1), a.rstd1 = at<float>(rstd1), a.mean2 = at<float>(mean2), a.rstd2 = at<float>(rstd2);
    a.out = at(out), a.z = at<float>(z);
    a.history = at(history), a.history_type = history_type, a.history_stride = history_stride;
    a.norms = at<float>(norms), a.partial = at<float>(partial), a.parts = parts;
    a.workspace = at<float>(workspace), a.status = at<int64_t>(status);
    norm_tail(type, plan, a, stream_at(stream));
  });
  m.def("norm_tail_vjp", [](DType type, const NormPlan &plan, Address grad, Address y, Address r, Address weight1,
                            Address bias1, Address weight2, Address bias2, Address mean1, Address rstd1,
                            Address mean2, Address rstd2, Address grad_y, Address grad_r, Address grad_weight1,
                            Address grad_bias1, Address grad_weight2, Address grad_bias2, Address workspace,
                            Address status, Address stream) {
    NormBackward a{};
    a.grad = at(grad), a.y = at(y), a.r = at(r);
    a.weight1 = at<float>(weight1), a.bias1 = at<float>(bias1);
    a.weight2 = at<float>(weight2), a.bias2 = at<float>(bias2);
    a.mean1 = at<float>(mean1), a.rstd1 = at<float>(rstd1), a.mean2 = at<float>(mean2), a.rstd2 = at<float>(rstd2);
    a.grad_y = at(grad_y), a.grad_r = at<float>(grad_r);
    a.grad_weight1 = at<float>(grad_weight1), a.grad_bias1 = at<float>(grad_bias1);
    a.grad_weight2 = at<float>(grad_weight2), a.grad_bias2 = at<float>(grad_bias2);
    a.workspace = at<float>(workspace), a.status = at<int64_t>(status);
    norm_tail_vjp(type, plan, a, stream_at(stream));
  });
}

// module_local throughout: tests load a second build of the same kernels.
inline void bind(pybind11::module_ &m) {
  namespace py = pybind11;
  py::enum_<DType>(m, "DType", py::module_local())
      .value("f32", DType::f32)
      .value("bf16", DType::bf16)
      .value("f16", DType::f16);
  bind_norms(m);
  bind_solver(m);
}

}  // namespace ifr::cuda
