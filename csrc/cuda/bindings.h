// The CUDA kernels for Python (ifr_fast/kernels/cuda): dictionaries of addresses, sizes and flags; streams by address.
#pragma once
#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "fields.h"
#include "kernels.h"

namespace ifr::cuda {

using Address = uintptr_t;

inline Stream stream_at(Address address) { return reinterpret_cast<Stream>(address); }

template <typename Arguments>
void bind_norm(py::module_ &m, const char *name,
               void (*kernel)(DType, const NormPlan &, const Arguments &, Stream)) {
  m.def(name, [kernel](DType type, const NormPlan &plan, Address stream, const py::dict &given) {
    const auto [arguments] = read<Arguments>(given);
    kernel(type, plan, arguments, stream_at(stream));
  });
}

// The types are module_local: tests load a second build of the same kernels. DType and Method are ifr_fast._native's.
inline void bind(py::module_ &m) {
  py::class_<NormPlan>(m, "NormPlan", py::module_local())
      .def(py::init([](const py::dict &given) { return NormPlan(std::get<0>(read<NormCut>(given))); }))
      .def_property_readonly("blocks", [](const NormPlan &plan) { return plan.slices * plan.strips; })
      .def_property_readonly("workspace", &NormPlan::workspace);
  bind_norm(m, "norm_relu", norm_relu);
  bind_norm(m, "norm_relu_vjp", norm_relu_vjp);
  bind_norm(m, "norm_tail", norm_tail);
  bind_norm(m, "norm_tail_vjp", norm_tail_vjp);

  py::class_<Solver>(m, "Solver", py::module_local()).def(py::init([](const py::dict &given) {
    return std::get<0>(read<Solver>(given));
  }));
  m.def("splits", splits);
  m.def("fits_cluster", fits_cluster, py::kw_only(), py::arg("size"), py::arg("rows"), py::arg("window"),
        py::arg("history_type"));
  m.def("residual", [](const Solver &a, const std::vector<std::pair<Address, DType>> &f, Address stream) {
    Sum sum{};
    if (f.size() > 3) throw std::invalid_argument("residual: more than three addends");
    for (const auto &[address, type] : f)
      sum.addends[sum.count] = reinterpret_cast<void *>(address), sum.types[sum.count++] = type;
    residual(a, sum, stream_at(stream));
  });
  for (auto [name, function] : {std::pair("gram_row", gram_row), std::pair("rule", rule), std::pair("combine", combine),
                                std::pair("finish", finish), std::pair("cluster_step", cluster_step),
                                std::pair("first_scale", first_scale)})
    m.def(name, [function = function](const Solver &a, Address stream) { function(a, stream_at(stream)); });

  m.def("has_parts", has_parts);
  m.def("begin_part", [](Address status, int64_t n, int64_t least, int64_t most, Address outer, Address inner) {
    begin_part(reinterpret_cast<const int64_t *>(status), n, least, most, stream_at(outer), stream_at(inner));
  });
  m.def("end_part", [](Address inner) { end_part(stream_at(inner)); });
}

}  // namespace ifr::cuda
