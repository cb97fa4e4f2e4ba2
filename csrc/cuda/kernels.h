// The CUDA kernels as their callers see them. Every function launches on the stream, returns at once and throws
// std::runtime_error where a launch fails. It allocates nothing and can be captured in a CUDA graph. Pointers are to
// dense device memory owned by the caller. No CUDA header is needed here.
#pragma once
#include "types.h"

struct CUstream_st;

namespace ifr::cuda {

using Stream = CUstream_st *;

// A solve, as ifr_fast.kernels.gpu.DeviceState describes it, and what one step of it is told. Where 8 divides `size`,
// every array of unknowns must be aligned to 16 bytes. The order of the fields matters: with the data types elsewhere
// the cluster kernel spills registers.
#define IFR_CUDA_SOLVER(FIELD)                                                                                  \
  FIELD(Method, method)                                                                                         \
  FIELD(DType, history_type) FIELD(DType, injection_type) FIELD(DType, r_type) /* history: f32, bf16 or e5m2 */ \
  FIELD(int64_t, n) FIELD(int64_t, size) /* unknowns a sample */                                                \
  FIELD(int, rows)                                                                                              \
  FIELD(int, row) /* negative: the last evaluation, judged only */                                              \
  FIELD(int, window)                                                                                            \
  FIELD(int64_t, evaluation) /* 0 takes nothing from the state but `start` */                                   \
  FIELD(float, rtol) FIELD(float, divergence) FIELD(float, ridge)                                               \
  FIELD(bool, affine) /* residuals are relative to |g_0|, not to |f| */                                         \
  FIELD(float *, z) /* (n, size) */                                                                             \
  FIELD(float *, value) /* z, or (n, size) for the best iterate, where the history is one row */                \
  FIELD(const float *, start) /* (n, size), or null for zero */                                                 \
  FIELD(const void *, injection) /* (n, size): X; null where there is no r */                                   \
  FIELD(void *, r) /* (n, size): z + X, what the next evaluation's first convolution reads */                   \
  FIELD(void *, history) /* (n, rows, size) */                                                                  \
  FIELD(float *, scales) /* (n, rows): a residual is scale * row; null where the history has no 8 bits */       \
  FIELD(float *, next_scale) /* (n): with scales, of the row that `residual` writes */                          \
  FIELD(float *, gram) FIELD(float *, p) FIELD(float *, q) /* (n, rows, rows) */                                \
  FIELD(float *, step) FIELD(float *, total) FIELD(float *, best) /* (n, rows); the last two: of stored rows */ \
  FIELD(float *, norms) /* (n, 3): |g|^2, |f|^2, |g_0| */                                                       \
  FIELD(float *, residual) /* (n): the best so far */                                                           \
  FIELD(float *, trace) /* (n): this evaluation's */                                                            \
  FIELD(const float *, previous) /* (n): the trace of the evaluation before; at the first: trace */             \
  FIELD(int64_t *, status) FIELD(int64_t *, iterations) FIELD(bool *, improved) /* (n) */                       \
  FIELD(float *, norm_partials) /* (n, parts, 2): sums of g^2 and f^2 */                                        \
  FIELD(float *, gram_partials) /* (n, splits(size), rows) */                                                   \
  FIELD(int, parts)
IFR_STRUCT(Solver, IFR_CUDA_SOLVER)

// f, as a sum of one to three arrays (n, size).
struct Sum {
  const void *addends[3];
  DType types[3];
  int count;
};

constexpr int MOST_ROWS = 64;

// Into how many parts the kernels split a sample. Its size alone decides, so results do not depend on batch mates.
int splits(int64_t size);

// g = f - z: its history row, and parts = splits(size) partial sums of g^2 and f^2.
void residual(const Solver &, const Sum &f, Stream);
// next_scale by the residual's own norms, for the first row.
void first_scale(const Solver &, Stream);
// Partial inner products of the newest row with those in the window.
void gram_row(const Solver &, Stream);
// Finishes the sums, judges the samples, chooses the step and the next row's scale.
void rule(const Solver &, Stream);
// Moves the running samples, and forms r.
void combine(const Solver &, Stream);
// The best iterate of every sample, in value.
void finish(const Solver &, Stream);

// gram_row, rule and combine in one kernel, for compute capability 9.0. fits_cluster: the rows of the window fit the
// shared memory of a cluster, and 8 divides the size.
bool fits_cluster(int64_t size, int rows, int window, DType history_type);
void cluster_step(const Solver &, Stream);

// Parts of the graph that `outer` records, to be run only if of n samples least … most have the status of one that runs.
// What `inner` is told between begin_part and end_part is the part. has_parts: this build and the driver know them.
bool has_parts();
void begin_part(const int64_t *status, int64_t n, int64_t least, int64_t most, Stream outer, Stream inner);
void end_part(Stream inner);

// How a GroupNorm chain over n samples of NHWC is cut.
#define IFR_CUDA_NORM_CUT(FIELD)                                 \
  FIELD(int64_t, n)                                              \
  FIELD(int, channels) FIELD(int, positions) FIELD(int, groups)  \
  FIELD(float, eps)                                              \
  FIELD(int, width) /* channels that a block of threads takes */ \
  FIELD(int, length) /* positions that it takes */               \
  FIELD(int, threads) /* a block */                              \
  FIELD(bool, whole) /* a block takes all positions of whole groups, and one launch does everything */
IFR_STRUCT(NormCut, IFR_CUDA_NORM_CUT)

struct NormPlan : NormCut {
  int per_group, strips, slices;  // channels a group; strips of channels and slices of positions a sample

  explicit NormPlan(const NormCut &cut)
      : NormCut(cut), per_group(channels / groups), strips((channels + width - 1) / width),
        slices((positions + length - 1) / length) {}

  int64_t sums() const { return whole ? 0 : 3 * n * slices * channels; }
  // Floats that a chain needs beside its arrays.
  int64_t workspace() const { return whole ? 0 : sums() + 2 * n * groups; }
};

// y, shortcut, out and z are (n, positions, channels): y and the shortcut of the chain's type, z float32. Weights and
// biases are (channels), means and rstds (n, groups), all float32.
#define IFR_CUDA_NORM_FORWARD(FIELD)                                                                        \
  FIELD(const void *, y)                                                                                    \
  FIELD(const void *, shortcut) /* null: nothing is added */                                                \
  FIELD(const float *, first_weight) FIELD(const float *, first_bias)                                       \
  FIELD(const float *, second_weight) FIELD(const float *, second_bias) /* null: there is no second norm */ \
  FIELD(float *, first_mean) FIELD(float *, first_rstd)                                                     \
  FIELD(float *, second_mean) FIELD(float *, second_rstd)                                                   \
  FIELD(void *, out) /* of the chain's type (norm_relu) or float32; null: history and norms instead */      \
  FIELD(const float *, z)                                                                                   \
  FIELD(void *, history) /* out - z, history_stride numbers from sample to sample; null: not stored */      \
  FIELD(DType, history_type)                                                                                \
  FIELD(int64_t, history_stride)                                                                            \
  FIELD(const float *, next_scale) /* (n): a row in 8 bits is (out - z) / next_scale; else null */          \
  FIELD(float *, norms) /* (n, slices * strips, 2): sums of (out - z)^2 and out^2 */                        \
  FIELD(float *, workspace) /* plan.workspace() floats */                                                   \
  FIELD(const int64_t *, status) /* (n), or null: every sample is computed */
IFR_STRUCT(NormForward, IFR_CUDA_NORM_FORWARD)

#define IFR_CUDA_NORM_BACKWARD(FIELD)                                                                    \
  FIELD(const void *, grad) /* of out, in out's type */                                                  \
  FIELD(const void *, y)                                                                                 \
  FIELD(const void *, shortcut)                                                                          \
  FIELD(const float *, first_weight) FIELD(const float *, first_bias)                                    \
  FIELD(const float *, second_weight) FIELD(const float *, second_bias)                                  \
  FIELD(const float *, first_mean) FIELD(const float *, first_rstd)                                      \
  FIELD(const float *, second_mean) FIELD(const float *, second_rstd)                                    \
  FIELD(void *, grad_y) /* of the chain's type */                                                        \
  FIELD(float *, grad_shortcut) /* null without a second norm; else null only where the plan is whole */ \
  FIELD(float *, first_grad_weight) FIELD(float *, first_grad_bias) /* (n, channels), or all null */     \
  FIELD(float *, second_grad_weight) FIELD(float *, second_grad_bias)                                    \
  FIELD(float *, workspace)                                                                              \
  FIELD(const int64_t *, status)
IFR_STRUCT(NormBackward, IFR_CUDA_NORM_BACKWARD)

// norm_relu: out = relu(first(y)); out may be y. norm_tail: u = first(y) + shortcut, then second(relu(u)) where there
// is a second norm; out may be y where both are float32.
void norm_relu(DType, const NormPlan &, const NormForward &, Stream);
void norm_tail(DType, const NormPlan &, const NormForward &, Stream);
void norm_relu_vjp(DType, const NormPlan &, const NormBackward &, Stream);
void norm_tail_vjp(DType, const NormPlan &, const NormBackward &, Stream);

}  // namespace ifr::cuda
