// The CPU kernels. Every cpu/*.cpp is compiled once per instruction set into namespace ifr::<IFR_ISA>;
// bindings.cpp picks the widest one the machine has. All pointers are to dense memory owned by the caller.
#pragma once
#include <cstdint>

namespace ifr {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2 };

// As ifr_fast.solve.Status.
enum Status : int64_t { CONVERGED = 0, MAX_ITER = 1, DIVERGED = 2, NONFINITE = 3 };

// An activation of shape (n, channels, positions); channels_last: (n, positions, channels) in memory.
struct NormShape {
  int64_t n, channels, positions, groups;
  double eps;
  bool channels_last;
  int threads;
};

// Statistics are (n, groups) and affine parameters (channels), in double for f64 activations, else float.
struct NormRelu {
  const void *y;
  const void *weight, *bias;
  void *mean, *rstd;
  void *out;              // forward: relu(gn(y))
  const void *grad;       // vjp: gradient of out
  void *grad_y;           // vjp
  double *grad_weight, *grad_bias;  // vjp: (n, channels) each, or null
};

// out = post ? gn_b(relu(gn_a(y) + r)) : gn_a(y) + r, without r when it is null.
struct NormTail {
  const void *y, *r;
  const void *weight_a, *bias_a, *weight_b, *bias_b;
  void *mean_a, *rstd_a, *mean_b, *rstd_b;
  void *out;              // forward; float for bf16 activations
  const void *grad;       // vjp: gradient of out, of out's dtype
  void *grad_y, *grad_r;  // vjp: y's dtype, out's dtype
  double *grad_weight_a, *grad_bias_a, *grad_weight_b, *grad_bias_b;  // vjp: (n, channels) each, or null
  bool post;
};

enum class Method : int { broyden = 0, anderson = 1, picard = 2 };

// What follows an evaluation f = F(z) of n samples of `size` unknowns: the residual joins the history as row `row`,
// every running sample is judged, the method chooses its step, and z moves. row < 0: the last evaluation, judged only.
struct Step {
  Method method;
  const void *f;
  void *z, *value;          // (n, size); value takes z where it is the best so far
  void *history;            // (n, rows, size)
  double *gram;             // (n, rows, rows), symmetric
  double *p, *q;            // coefficients of Broyden's u_s and v_s, (n, rows, rows); p: Anderson's past steps
  double *step;             // (n, rows): coefficients of the step
  double *norms;            // (n, 3): |g|^2, |f|^2 and |g_0|
  int64_t *status, *iterations;
  bool *improved;
  void *residual, *trace;   // (n): best so far; this evaluation's
  const void *previous;     // the trace of the evaluation before, null at the first
  int64_t n, size, rows, row, evaluation, window;
  double rtol, divergence, ridge;
  bool affine;              // residuals are relative to |g_0|, not to |f|
  int threads;
};

#define IFR_DECLARE_KERNELS(isa)                            \
  namespace isa {                                           \
  void norm_relu(DType, const NormShape &, const NormRelu &);     \
  void norm_relu_vjp(DType, const NormShape &, const NormRelu &); \
  void norm_tail(DType, const NormShape &, const NormTail &);     \
  void norm_tail_vjp(DType, const NormShape &, const NormTail &); \
  int64_t step(DType state, DType history, const Step &);         \
  }

IFR_DECLARE_KERNELS(generic)
#ifdef IFR_HAVE_AVX2
IFR_DECLARE_KERNELS(avx2)
#endif
#ifdef IFR_HAVE_AVX512
IFR_DECLARE_KERNELS(avx512)
#endif

}  // namespace ifr
