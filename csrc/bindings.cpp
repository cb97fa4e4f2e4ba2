// Python hands over dictionaries of addresses, sizes and flags. torch stays on Python's side (ifr_fast/kernels/cpu.py),
// so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "fields.h"
#ifdef IFR_CUDA_ARCHS
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

#define IFR_TABLE(isa)                                                                                   \
  {#isa, ifr::isa::norm_relu, ifr::isa::norm_relu_vjp, ifr::isa::norm_tail, ifr::isa::norm_tail_vjp,     \
   ifr::isa::norm_sums, ifr::isa::step, ifr::isa::step_tail, ifr::isa::step_total,                       \
   ifr::isa::winograd_weights, ifr::isa::winograd_workspace, ifr::isa::winograd, ifr::isa::equal}

struct Table {
  const char *isa;
  decltype(&ifr::generic::norm_relu) norm_relu;
  decltype(&ifr::generic::norm_relu_vjp) norm_relu_vjp;
  decltype(&ifr::generic::norm_tail) norm_tail;
  decltype(&ifr::generic::norm_tail_vjp) norm_tail_vjp;
  decltype(&ifr::generic::norm_sums) norm_sums;
  decltype(&ifr::generic::step) step;
  decltype(&ifr::generic::step_tail) step_tail;
  decltype(&ifr::generic::step_total) step_total;
  decltype(&ifr::generic::winograd_weights) winograd_weights;
  decltype(&ifr::generic::winograd_workspace) winograd_workspace;
  decltype(&ifr::generic::winograd) winograd;
  decltype(&ifr::generic::equal) equal;
};

// The widest variant that IFR_FAST_ISA allows: 0 generic, 1 avx2, 2 avx512.
int widest_allowed() {
  const char *asked = std::getenv("IFR_FAST_ISA");
  if (asked == nullptr || *asked == 0) return 2;
  const char *const names[] = {"generic", "avx2", "avx512"};
  for (int i = 0; i < 3; ++i)
    if (std::strcmp(asked, names[i]) == 0) return i;
  throw std::invalid_argument(std::string("IFR_FAST_ISA is '") + asked + "'; expected generic, avx2 or avx512.");
}

// The widest variant that is allowed, compiled and known to the processor.
const Table &kernels() {
  static const Table table = [] {
    [[maybe_unused]] const int widest = widest_allowed();
#ifdef IFR_HAVE_AVX512
    if (widest >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return Table IFR_TABLE(avx512);
#endif
#ifdef IFR_HAVE_AVX2
    if (widest >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Table IFR_TABLE(avx2);
#endif
    return Table IFR_TABLE(generic);
  }();
  return table;
}

// A kernel that takes a dictionary of the fields of its structs. It runs without the GIL.
template <typename Result, typename... Structs>
void bind(py::module_ &m, const char *name, Result (*Table::*kernel)(const Structs &...)) {
  m.def(name, [kernel](const py::dict &given) {
    const auto structs = ifr::read<Structs...>(given);
    const py::gil_scoped_release unlocked;
    return std::apply(kernels().*kernel, structs);
  });
}

// A norm's kernel: takes a data type, and a dictionary of fields. It runs without the GIL.
template <typename Arguments>
void bind_norm(py::module_ &m, const char *name,
               void (*Table::*kernel)(ifr::DType, const ifr::NormShape &, const Arguments &)) {
  m.def(name, [kernel](ifr::DType type, const py::dict &given) {
    const auto [shape, arguments] = ifr::read<ifr::NormShape, Arguments>(given);
    const py::gil_scoped_release unlocked;
    (kernels().*kernel)(type, shape, arguments);
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "ifr_fast's compiled kernels; called through ifr_fast.kernels.cpu and ifr_fast.kernels.cuda only.";
  kernels();  // a wrong IFR_FAST_ISA fails the import, not the first call
  m.def("isa", [] { return kernels().isa; });
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif

  // The types are module_local, so that two builds can be compared in one process.
  py::enum_<ifr::DType>(m, "DType", py::module_local())
      .value("f32", ifr::DType::f32)
      .value("f64", ifr::DType::f64)
      .value("bf16", ifr::DType::bf16)
      .value("f16", ifr::DType::f16)
      .value("e5m2", ifr::DType::e5m2);
  py::enum_<ifr::Method>(m, "Method", py::module_local())
      .value("broyden", ifr::Method::broyden)
      .value("anderson", ifr::Method::anderson)
      .value("picard", ifr::Method::picard);

  py::enum_<ifr::Read>(m, "Read", py::module_local())
      .value("plain", ifr::Read::plain)
      .value("sum", ifr::Read::sum)
      .value("norm_relu", ifr::Read::norm_relu)
      .value("norm_vjp", ifr::Read::norm_vjp)
      .value("norm_relu_vjp", ifr::Read::norm_relu_vjp);

  bind_norm(m, "norm_relu", &Table::norm_relu);
  bind_norm(m, "norm_relu_vjp", &Table::norm_relu_vjp);
  bind_norm(m, "norm_tail", &Table::norm_tail);
  bind_norm(m, "norm_tail_vjp", &Table::norm_tail_vjp);
  bind(m, "norm_sums", &Table::norm_sums);
  bind(m, "step", &Table::step);
  bind(m, "step_tail", &Table::step_tail);
  bind(m, "step_total", &Table::step_total);
  bind(m, "winograd_weights", &Table::winograd_weights);
  bind(m, "winograd_workspace", &Table::winograd_workspace);
  bind(m, "winograd", &Table::winograd);
  bind(m, "equal", &Table::equal);

#ifdef IFR_CUDA_ARCHS
  m.attr("cuda_archs") = IFR_CUDA_ARCHS;
  auto cuda = m.def_submodule("cuda", "The CUDA kernels; called through ifr_fast.kernels.cuda only.");
  ifr::cuda::bind(cuda);
#else
  m.attr("cuda_archs") = "";
#endif
}
