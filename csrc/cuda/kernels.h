// The CUDA kernels as their callers see them. Every function launches on the stream, returns at once and throws
// std::runtime_error where a launch fails; it allocates nothing and can be captured in a CUDA graph. Pointers are to dense
// device memory owned by the caller; a null `status` means that every sample is computed. No CUDA header is needed here.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace ifr::cuda {

using Stream = CUstream_st *;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// As ifr_fast.solve.Status; a sample of status MAX_ITER runs.
enum Status : int64_t { CONVERGED = 0, MAX_ITER = 1, DIVERGED = 2, NONFINITE = 3 };

enum class Method : int { broyden = 0, anderson = 1, picard = 2 };

// A solve, as ifr_fast.kernels.device.DeviceState names it, and what one step of it is told. With size % 8 == 0 every
// array of unknowns must be aligned to 16 bytes.
struct Solver {
  Method method;
  DType history_type, injection_type, r_type;
  int64_t n, size;
  int rows, row, window;           // row < 0: the last evaluation, judged only
  int64_t evaluation;              // 0 takes nothing from the state but `start`
  float rtol, divergence, ridge;
  bool affine;                     // residuals are relative to |g_0|, not to |f|
  float *z, *value;                // (n, size). value other than z: history is one row, and value keeps the best iterate
  const float *start;              // (n, size) or null for zero
  const void *injection;           // (n, size); null where there is no r
  void *r;                         // (n, size): z + injection for the next evaluation
  void *history;                   // (n, rows, size), f32 or bf16
  float *gram, *p, *q;             // (n, rows, rows)
  float *step, *total, *best;      // (n, rows)
  float *norms;                    // (n, 3): |g|^2, |f|^2, |g_0|
  float *residual, *trace;         // (n): best so far; this evaluation's
  const float *previous;           // (n): the trace of the evaluation before, null at the first
  int64_t *status, *iterations;    // (n)
  bool *improved;                  // (n)
  float *norm_partials;            // (n, parts, 2): sums of g^2 and f^2
  float *gram_partials;            // (n, splits(size), rows)
  int parts;
};

// f, as a sum of one to three arrays (n, size).
struct Sum {
  const void *addends[3];
  DType types[3];
  int count;
};

constexpr int MOST_ROWS = 64;

// Into how many parts the kernels split a sample: of its size alone, so that results do not depend on batch mates.
int splits(int64_t size);

// g = f - z: its history row, and parts = splits(size) partial sums of g^2 and f^2.
void residual(const Solver &, const Sum &f, Stream);
// Partial inner products of the newest row with those in the window.
void gram_row(const Solver &, Stream);
// Finishes the sums, judges the samples, chooses the step.
void rule(const Solver &, Stream);
// Moves the running samples, and forms r.
void combine(const Solver &, Stream);
// The best iterate of every sample, in value.
void finish(const Solver &, Stream);

// gram_row, rule and combine in one kernel, where the rows of the window fit the shared memory of a cluster and 8 divides
// the size. For compute capability 9.0.
bool fits_cluster(int64_t size, int rows, int window, DType history_type);
void cluster_step(const Solver &, Stream);

// How a GroupNorm chain over n samples of NHWC is cut: a block of `threads` threads takes `width` channels by `length`
// positions. whole: those are all positions of whole groups, and one launch does everything; else see `workspace`.
struct NormPlan {
  int64_t n;
  int channels, positions, groups;
  float eps;
  int width, length, threads;
  bool whole;
  int per_group, strips, slices;  // channels a group; strips of channels and slices of positions a sample

  NormPlan(int64_t n, int channels, int positions, int groups, float eps, int width, int length, int threads,
           bool whole)
      : n(n), channels(channels), positions(positions), groups(groups), eps(eps), width(width), length(length),
        threads(threads), whole(whole), per_group(channels / groups), strips((channels + width - 1) / width),
        slices((positions + length - 1) / length) {}

  int64_t sums() const { return whole ? 0 : 3 * n * slices * channels; }
  // Floats that a chain needs beside its arrays.
  int64_t workspace() const { return whole ? 0 : sums() + 2 * n * groups; }
};

// y, r, out and z are (n, positions, channels); y and r of the chain's type, z float32. Weights and biases are
// (channels), statistics (n, groups), all float32.
struct NormForward {
  const void *y, *r;               // r null: nothing is added
  const float *weight1, *bias1;
  const float *weight2, *bias2;    // null: there is no second norm
  float *mean1, *rstd1, *mean2, *rstd2;
  void *out;                       // of the chain's type (norm_relu) or float32; null: history and norms instead
  const float *z;
  void *history;                   // out - z in history_type, history_stride numbers from sample to sample; or null
  DType history_type;
  int64_t history_stride;
  float *norms;                    // (n, slices * strips, 2): sums of (out - z)^2 and out^2
  const float *partial;            // (n, parts, channels, 3): count, mean and M2 of y, from its convolution; or null
  int64_t parts;
  float *workspace;                // plan.workspace() floats
  const int64_t *status;           // (n) or null
};

void norm_relu(DType, const NormPlan &, const NormForward &, Stream);  // out = relu(gn1(y)); may be y
// u = gn1(y) + r, then gn2(relu(u)) where there is a second norm. out may be y where both are float32.
void norm_tail(DType, const NormPlan &, const NormForward &, Stream);

// grad is that of out, in out's type; the other arrays as above.
struct NormBackward {
  const void *grad, *y, *r;
  const float *weight1, *bias1, *weight2, *bias2;
  const float *mean1, *rstd1, *mean2, *rstd2;
  void *grad_y;                                                  // of the chain's type
  float *grad_r;                                                 // with a second norm; null only where the plan is whole
  float *grad_weight1, *grad_bias1, *grad_weight2, *grad_bias2;  // (n, channels), or all null
  float *workspace;
  const int64_t *status;
};

void norm_relu_vjp(DType, const NormPlan &, const NormBackward &, Stream);
void norm_tail_vjp(DType, const NormPlan &, const NormBackward &, Stream);

}  // namespace ifr::cuda
