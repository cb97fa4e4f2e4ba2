// Python sees addresses, sizes and flags; torch stays on the other side (ifr_fast/kernels/native.py), so that
// one build serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#ifdef IFR_CUDA_ARCHS
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using ifr::DType;
using Address = uintptr_t;

template <typename T = void>
T *at(Address address) {
  return reinterpret_cast<T *>(address);
}

#define IFR_TABLE(isa)                                                                                   \
  {#isa, ifr::isa::norm_relu, ifr::isa::norm_relu_vjp, ifr::isa::norm_tail, ifr::isa::norm_tail_vjp,     \
   ifr::isa::step}

struct Table {
  const char *isa;
  decltype(&ifr::generic::norm_relu) norm_relu, norm_relu_vjp;
  decltype(&ifr::generic::norm_tail) norm_tail, norm_tail_vjp;
  decltype(&ifr::generic::step) step;
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

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "ifr_fast's compiled kernels; called through ifr_fast.kernels.native only.";
  using release = py::call_guard<py::gil_scoped_release>;
  kernels();  // a wrong IFR_FAST_ISA fails the import, not the first call

  // Types are module_local, so that two builds can be compared in one process.
  py::enum_<DType>(m, "DType", py::module_local()).value("f32", DType::f32).value("f64", DType::f64).value("bf16", DType::bf16);
  m.def("isa", [] { return kernels().isa; });
#ifdef IFR_CUDA_ARCHS
  m.attr("cuda_archs") = IFR_CUDA_ARCHS;
  auto cuda = m.def_submodule("cuda", "The CUDA kernels; called through ifr_fast.kernels.cuda only.");
  ifr::cuda::bind(cuda);
#else
  m.attr("cuda_archs") = "";
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif

  py::class_<ifr::NormShape>(m, "NormShape", py::module_local())
      .def(py::init([](int64_t n, int64_t channels, int64_t positions, int64_t groups, double eps, bool channels_last,
                       int threads) {
        return ifr::NormShape{n, channels, positions, groups, eps, channels_last, threads};
      }));

  m.def(
      "norm_relu",
      [](DType type, const ifr::NormShape &shape, Address y, Address weight, Address bias, Address mean, Address rstd,
         Address out) {
        ifr::NormRelu a{};
        a.y = at(y), a.weight = at(weight), a.bias = at(bias), a.mean = at(mean), a.rstd = at(rstd), a.out = at(out);
        kernels().norm_relu(type, shape, a);
      },
      release());
  m.def(
      "norm_relu_vjp",
      [](DType type, const ifr::NormShape &shape, Address grad, Address y, Address weight, Address bias, Address mean,
         Address rstd, Address grad_y, Address grad_weight, Address grad_bias) {
        ifr::NormRelu a{};
        a.y = at(y), a.weight = at(weight), a.bias = at(bias), a.mean = at(mean), a.rstd = at(rstd);
        a.grad = at(grad), a.grad_y = at(grad_y);
        a.grad_weight = at<double>(grad_weight), a.grad_bias = at<double>(grad_bias);
        kernels().norm_relu_vjp(type, shape, a);
      },
      release());
  m.def(
      "norm_tail",
      [](DType type, const ifr::NormShape &shape, bool post, Address y, Address r, Address weight_a, Address bias_a,
         Address weight_b, Address bias_b, Address mean_a, Address rstd_a, Address mean_b, Address rstd_b,
         Address out) {
        ifr::NormTail a{};
        a.post = post, a.y = at(y), a.r = at(r), a.out = at(out);
        a.weight_a = at(weight_a), a.bias_a = at(bias_a), a.weight_b = at(weight_b), a.bias_b = at(bias_b);
        a.mean_a = at(mean_a), a.rstd_a = at(rstd_a), a.mean_b = at(mean_b), a.rstd_b = at(rstd_b);
        kernels().norm_tail(type, shape, a);
      },
      release());
  m.def(
      "norm_tail_vjp",
      [](DType type, const ifr::NormShape &shape, bool post, Address grad, Address y, Address r, Address weight_a,
         Address bias_a, Address weight_b, Address bias_b, Address mean_a, Address rstd_a, Address mean_b,
         Address rstd_b, Address grad_y, Address grad_r, Address grad_weight_a, Address grad_bias_a,
         Address grad_weight_b, Address grad_bias_b) {
        ifr::NormTail a{};
        a.post = post, a.y = at(y), a.r = at(r), a.grad = at(grad), a.grad_y = at(grad_y), a.grad_r = at(grad_r);
        a.weight_a = at(weight_a), a.bias_a = at(bias_a), a.weight_b = at(weight_b), a.bias_b = at(bias_b);
        a.mean_a = at(mean_a), a.rstd_a = at(rstd_a), a.mean_b = at(mean_b), a.rstd_b = at(rstd_b);
        a.grad_weight_a = at<double>(grad_weight_a), a.grad_bias_a = at<double>(grad_bias_a);
        a.grad_weight_b = at<double>(grad_weight_b), a.grad_bias_b = at<double>(grad_bias_b);
        kernels().norm_tail_vjp(type, shape, a);
      },
      release());
  py::enum_<ifr::Method>(m, "Method", py::module_local())
      .value("broyden", ifr::Method::broyden)
      .value("anderson", ifr::Method::anderson)
      .value("picard", ifr::Method::picard);
  m.def(
      "step",
      [](DType state, DType history_type, ifr::Method method, Address f, Address z, Address value, Address history,
         Address gram, Address p, Address q, Address step, Address norms, Address status, Address iterations,
         Address improved, Address residual, Address trace, Address previous, int64_t n, int64_t size, int64_t rows,
         int64_t row, int64_t evaluation, int64_t window, double rtol, double divergence, double ridge, bool affine,
         int threads) {
        return kernels().step(
            state, history_type,
            {method, at(f), at(z), at(value), at(history), at<double>(gram), at<double>(p), at<double>(q),
             at<double>(step), at<double>(norms), at<int64_t>(status), at<int64_t>(iterations), at<bool>(improved),
             at(residual), at(trace), at(previous), n, size, rows, row, evaluation, window, rtol, divergence, ridge,
             affine, threads});
      },
      release());
}
