// The CPU kernels. Every cpu/*.cpp is compiled once per instruction set, into namespace ifr::<IFR_ISA>, and
// bindings.cpp picks the widest one that the machine has. All pointers are to dense memory owned by the caller.
#pragma once
#include "types.h"

namespace ifr {

// An activation of shape (n, channels, positions). channels_last: in memory it is (n, positions, channels).
#define IFR_NORM_SHAPE(FIELD)                                                                 \
  FIELD(int64_t, n) FIELD(int64_t, channels) FIELD(int64_t, positions) FIELD(int64_t, groups) \
  FIELD(double, eps)                                                                          \
  FIELD(bool, channels_last)                                                                  \
  FIELD(int, threads)
IFR_STRUCT(NormShape, IFR_NORM_SHAPE)

// Weights and biases are (channels), means and rstds (n, groups): double for f64 activations, else float.
#define IFR_NORM_FORWARD(FIELD)                                                                           \
  FIELD(const void *, y)                                                                                  \
  FIELD(const void *, shortcut) /* null: nothing is added */                                              \
  FIELD(const void *, first_weight) FIELD(const void *, first_bias)                                       \
  FIELD(const void *, second_weight) FIELD(const void *, second_bias) /* null: there is no second norm */ \
  FIELD(void *, first_mean) FIELD(void *, first_rstd)                                                     \
  FIELD(void *, second_mean) FIELD(void *, second_rstd)                                                   \
  FIELD(void *, out) /* of y's type; norm_tail's is float for bf16 */
IFR_STRUCT(NormForward, IFR_NORM_FORWARD)

#define IFR_NORM_BACKWARD(FIELD)                                                                       \
  FIELD(const void *, grad) /* of out, in out's type */                                                \
  FIELD(const void *, y)                                                                               \
  FIELD(const void *, shortcut)                                                                        \
  FIELD(const void *, first_weight) FIELD(const void *, first_bias)                                    \
  FIELD(const void *, second_weight) FIELD(const void *, second_bias)                                  \
  FIELD(void *, first_mean) FIELD(void *, first_rstd)                                                  \
  FIELD(void *, second_mean) FIELD(void *, second_rstd)                                                \
  FIELD(void *, grad_y) /* of y's type */                                                              \
  FIELD(void *, grad_shortcut) /* of out's type; not written without a second norm: it is grad */      \
  FIELD(double *, first_grad_weight) FIELD(double *, first_grad_bias) /* (n, channels), or all null */ \
  FIELD(double *, second_grad_weight) FIELD(double *, second_grad_bias)
IFR_STRUCT(NormBackward, IFR_NORM_BACKWARD)

// What follows an evaluation f = F(z) of n samples of `size` unknowns each. The residual joins the history as row
// `row`, every running sample is judged, the method chooses its step, and z moves.
#define IFR_STEP(FIELD)                                                                             \
  FIELD(DType, type) /* of f, z, value, residual, trace and previous: f32 or f64 */                 \
  FIELD(DType, history_type) /* `type` or bf16 */                                                   \
  FIELD(Method, method)                                                                             \
  FIELD(const void *, f)                                                                            \
  FIELD(void *, z) /* (n, size) */                                                                  \
  FIELD(void *, value) /* takes z where it is the best so far */                                    \
  FIELD(void *, history) /* (n, rows, size) */                                                      \
  FIELD(double *, gram) /* (n, rows, rows), symmetric */                                            \
  FIELD(double *, p) /* (n, rows, rows): coefficients of Broyden's u_s, or Anderson's past steps */ \
  FIELD(double *, q) /* (n, rows, rows): coefficients of Broyden's v_s */                           \
  FIELD(double *, step) /* (n, rows): coefficients of the step */                                   \
  FIELD(double *, norms) /* (n, 3): |g|^2, |f|^2 and |g_0| */                                       \
  FIELD(int64_t *, status) FIELD(int64_t *, iterations) FIELD(bool *, improved) /* (n) */           \
  FIELD(void *, residual) /* (n): the best so far */                                                \
  FIELD(void *, trace) /* (n): this evaluation's */                                                 \
  FIELD(const void *, previous) /* (n): the trace of the evaluation before; at the first: trace */  \
  FIELD(int64_t, n) FIELD(int64_t, size) FIELD(int64_t, rows)                                       \
  FIELD(int64_t, row) /* negative: the last evaluation, judged only */                              \
  FIELD(int64_t, evaluation) FIELD(int64_t, window)                                                 \
  FIELD(double, rtol) FIELD(double, divergence) FIELD(double, ridge)                                \
  FIELD(bool, affine) /* residuals are relative to |g_0|, not to |f| */                             \
  FIELD(int, threads)
IFR_STRUCT(Step, IFR_STEP)

// norm_relu: out = relu(first(y)). norm_tail: u = first(y) + shortcut, then second(relu(u)) where there is a second
// norm. step: returns how many samples still run.
#define IFR_DECLARE_KERNELS(isa)                                      \
  namespace isa {                                                     \
  void norm_relu(DType, const NormShape &, const NormForward &);      \
  void norm_relu_vjp(DType, const NormShape &, const NormBackward &); \
  void norm_tail(DType, const NormShape &, const NormForward &);      \
  void norm_tail_vjp(DType, const NormShape &, const NormBackward &); \
  int64_t step(const Step &);                                         \
  }

IFR_DECLARE_KERNELS(generic)
#ifdef IFR_HAVE_AVX2
IFR_DECLARE_KERNELS(avx2)
#endif
#ifdef IFR_HAVE_AVX512
IFR_DECLARE_KERNELS(avx512)
#endif

}  // namespace ifr
