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
  FIELD(const int64_t *, status) /* (n): stopped samples are left out; null: none has stopped */ \
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
  FIELD(void *, grad_y) /* of y's type; not written if there are `coefficients` */                     \
  FIELD(float *, coefficients) /* (n, 5, channels) for a Convolution that reads grad_y, or null */     \
  FIELD(void *, grad_shortcut) /* of out's type; not written without a second norm: it is grad */      \
  FIELD(double *, first_grad_weight) FIELD(double *, first_grad_bias) /* (n, channels), or all null */ \
  FIELD(double *, second_grad_weight) FIELD(double *, second_grad_bias)
IFR_STRUCT(NormBackward, IFR_NORM_BACKWARD)

// The statistics of a GroupNorm from sums of its input y over parts of it: the first channels' y, then their y * y.
#define IFR_NORM_SUMS(FIELD)                                                              \
  FIELD(const float *, y)                                                                 \
  FIELD(const double *, sums) /* (n, parts, 2, channels) */                               \
  FIELD(int64_t, parts)                                                                   \
  FIELD(const float *, weight)                                                            \
  FIELD(float *, coefficients) /* (n, 2, channels): gn(y) = (y - first) * second + bias */
IFR_STRUCT(NormSums, IFR_NORM_SUMS)

// What a Convolution convolves, by the tensors that it is computed from while it is read. a..e are the coefficients in
// order. sum: x + other. norm_relu: relu((x - a) * b + bias). norm_vjp: x * c - d - (other - a) * e. norm_relu_vjp: the
// same, with x set to 0 unless (other - a) * b + bias > 0.
enum class Read : int { plain, sum, norm_relu, norm_vjp, norm_relu_vjp };

// Transforms the weights of a 3x3 convolution for Winograd's algorithm.
#define IFR_WINOGRAD_WEIGHTS(FIELD)                                    \
  FIELD(const float *, weight) /* (3, 3, channels, out_channels) */    \
  FIELD(float *, transformed) /* 36 * channels * out_channels */       \
  FIELD(int64_t, channels) FIELD(int64_t, out_channels)                \
  FIELD(int, threads)
IFR_STRUCT(WinogradWeights, IFR_WINOGRAD_WEIGHTS)

// A 3x3 convolution with padding 1 of n samples by Winograd's algorithm. Activations are (n, height, width, channels)
// in memory; both numbers of channels are multiples of 32. Parts are rows of tiles, (height + 3) / 4 a sample.
#define IFR_CONVOLUTION(FIELD)                                                                         \
  FIELD(Read, read)                                                                                    \
  FIELD(const float *, x) FIELD(const float *, other)                                                  \
  FIELD(const float *, coefficients) /* (n, 2 or 5, channels) */                                       \
  FIELD(const float *, bias) /* (channels) */                                                          \
  FIELD(const float *, weights) /* as winograd_weights wrote them */                                   \
  FIELD(float *, y)                                                                                    \
  FIELD(double *, sums) /* (n, parts, 2, out_channels): of y, and of y * y; or null */                 \
  FIELD(float *, workspace) /* winograd_workspace floats */                                            \
  FIELD(const int64_t *, status) /* (n): stopped samples are left out; null: none has stopped */       \
  FIELD(int64_t, n) FIELD(int64_t, height) FIELD(int64_t, width)                                       \
  FIELD(int64_t, channels) FIELD(int64_t, out_channels)                                                \
  FIELD(int, threads)
IFR_STRUCT(Convolution, IFR_CONVOLUTION)

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

// F's tail as a step computes it, of float in channels_last: u = first(y) + z + injection, then second(relu(u)) where
// there is a second norm. sums: as NormSums has them, of y.
#define IFR_TAIL(FIELD)                                                                                 \
  FIELD(const float *, y)                                                                               \
  FIELD(const double *, sums) FIELD(int64_t, parts)                                                     \
  FIELD(const float *, injection) /* null: no shortcut, neither z nor the injection are added */        \
  FIELD(const float *, first_weight) FIELD(const float *, first_bias)                                   \
  FIELD(const float *, second_weight) FIELD(const float *, second_bias) /* null: no second norm */      \
  FIELD(float *, u) /* (n, size), scratch */                                                            \
  FIELD(int64_t, channels) FIELD(int64_t, groups)                                                       \
  FIELD(double, eps)
IFR_STRUCT(Tail, IFR_TAIL)

// An evaluation that is a sum of two or three tensors of float.
#define IFR_TOTAL(FIELD) \
  FIELD(const float *, first) FIELD(const float *, second) FIELD(const float *, third) /* or null */
IFR_STRUCT(Total, IFR_TOTAL)

// Two arrays of `count` floats.
#define IFR_PAIR(FIELD) FIELD(const float *, a) FIELD(const float *, b) FIELD(int64_t, count) FIELD(int, threads)
IFR_STRUCT(Pair, IFR_PAIR)

// norm_relu: out = relu(first(y)). norm_tail: u = first(y) + shortcut, then second(relu(u)) where there is a second
// norm. step: returns how many samples still run; step_tail and step_total compute what the step reads as f (null).
// equal: bit for bit.
#define IFR_DECLARE_KERNELS(isa)                                      \
  namespace isa {                                                     \
  void norm_relu(DType, const NormShape &, const NormForward &);      \
  void norm_relu_vjp(DType, const NormShape &, const NormBackward &); \
  void norm_tail(DType, const NormShape &, const NormForward &);      \
  void norm_tail_vjp(DType, const NormShape &, const NormBackward &); \
  void norm_sums(const NormShape &, const NormSums &);                \
  int64_t step(const Step &);                                         \
  int64_t step_tail(const Step &, const Tail &);                      \
  int64_t step_total(const Step &, const Total &);                    \
  void winograd_weights(const WinogradWeights &);                     \
  int64_t winograd_workspace(const Convolution &);                    \
  void winograd(const Convolution &);                                 \
  bool equal(const Pair &);                                           \
  }

IFR_DECLARE_KERNELS(generic)
#ifdef IFR_HAVE_AVX2
IFR_DECLARE_KERNELS(avx2)
#endif
#ifdef IFR_HAVE_AVX512
IFR_DECLARE_KERNELS(avx512)
#endif

}  // namespace ifr
