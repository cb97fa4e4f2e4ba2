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

// One row of the history: g = f - z, its norm and its products with the rows first..row; row < 0: the norms only.
struct GramRow {
  const void *f, *z;      // (n, size)
  void *history;          // (n, rows, size)
  double *gram;           // (n, rows, rows), symmetric
  double *norms;          // (n, 3): |g|^2, |f|^2, and |g_0|, which assess() keeps
  const int64_t *status;  // (n)
  int64_t n, size, rows, row, first;
  int threads;
};

struct Combine {
  void *z, *value;        // (n, size); value takes z where improved, before z moves
  const void *history;
  const double *step;     // (n, rows): coefficients of the stored residuals
  const int64_t *status;
  const bool *improved;
  int64_t n, size, rows, count;
  bool advance;
  int threads;
};

struct Assess {
  double *norms;
  int64_t *status, *iterations;
  bool *improved;
  void *residual, *trace;  // (n): best so far; this evaluation's
  const void *previous;    // the trace of the evaluation before, null at the first
  int64_t n, evaluation;
  double rtol, divergence;
};

struct Rule {
  const double *gram;      // (n, rows, rows)
  double *p, *q;           // Broyden: coefficients of u_s and v_s, (n, rows, rows); Anderson: p holds past steps
  double *step;            // (n, rows)
  const int64_t *status;
  int64_t n, rows, row, window;
  double ridge;
};

#define IFR_DECLARE_KERNELS(isa)                            \
  namespace isa {                                           \
  void norm_relu(DType, const NormShape &, const NormRelu &);     \
  void norm_relu_vjp(DType, const NormShape &, const NormRelu &); \
  void norm_tail(DType, const NormShape &, const NormTail &);     \
  void norm_tail_vjp(DType, const NormShape &, const NormTail &); \
  void gram_row(DType state, DType history, const GramRow &);     \
  void combine(DType state, DType history, const Combine &);      \
  int64_t assess(DType state, const Assess &);                    \
  void broyden(const Rule &);                                     \
  void anderson(const Rule &);                                    \
  }

IFR_DECLARE_KERNELS(generic)
#ifdef IFR_HAVE_AVX2
IFR_DECLARE_KERNELS(avx2)
#endif
#ifdef IFR_HAVE_AVX512
IFR_DECLARE_KERNELS(avx512)
#endif

}  // namespace ifr
