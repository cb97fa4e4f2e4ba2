// One step of the solver after an evaluation of F: inner products with the history, the K x K algebra of the method,
// and the step, sample by sample.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "scalar.h"

namespace ifr::IFR_ISA {
namespace {

// A piece of a sample that stays in L1 while the history streams past it. Sums are formed per piece and
// added in order, so a sample's result depends neither on the threads nor on its batch mates.
constexpr int64_t PIECE = 1024;

// Inner products are summed in double: Broyden's method takes differences of them.
template <typename S, typename H>
double dot(const S *g, const H *row, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < count; ++e) sum += double(g[e]) * double(load(row[e]));
  return sum;
}

// Asks for a piece of the four rows after these four: rows are far apart, and the processor's own prefetching would
// start anew in each.
template <typename H>
void fetch(const H *row, int64_t stride, int64_t count) {
  constexpr int64_t LINE = 64 / sizeof(H);
  const uintptr_t address = reinterpret_cast<uintptr_t>(row);  // may lie past the end: no pointer arithmetic
  for (int r = 0; r < 4; ++r)
    for (int64_t e = 0; e < count; e += LINE)
      __builtin_prefetch(reinterpret_cast<const void *>(address + ((4 + r) * stride + e) * sizeof(H)));
}

// Four rows at a time: as many loads in flight, and g is read once.
template <typename S, typename H>
void four_dots(const S *g, const H *row, int64_t stride, int64_t count, double *sums) {
  const H *row1 = row + stride, *row2 = row1 + stride, *row3 = row2 + stride;
  double sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
  fetch(row, stride, count);
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
  for (int64_t e = 0; e < count; ++e) {
    const double v = double(g[e]);
    sum0 += v * double(load(row[e]));
    sum1 += v * double(load(row1[e]));
    sum2 += v * double(load(row2[e]));
    sum3 += v * double(load(row3[e]));
  }
  sums[0] = sum0, sums[1] = sum1, sums[2] = sum2, sums[3] = sum3;
}

// Did no square of a piece overflow in float, and none that counts underflow?
bool is_safe(double sum) { return sum > 1e-25 && sum < 1e30; }

// |f - z|^2 and |f|^2, where they are too small or too large to be summed in float.
template <typename S>
void squares_in_double(const S *f, const S *z, int64_t count, double *sums) {
  sums[0] = sums[1] = 0;
  for (int64_t e = 0; e < count; ++e) {
    const double g = double(f[e] - z[e]), v = double(f[e]);
    sums[0] += g * g, sums[1] += v * v;
  }
}

double inner(const double *a, const double *b, int64_t n) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

void subtract(double *y, double scale, const double *x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) y[j] -= scale * x[j];
}

// As broyden_coefficients in kernels/gram.py, for one sample. Row k is the newest residual. The pairs s < k - 1 are in
// p and q. d is the step that led here, and becomes the next one.
void broyden_sample(const double *gram, double *p, double *q, double *d, int64_t rows, int64_t k) {
  const int64_t count = k + 1;
  const double *column = gram + k * rows;  // gram is symmetric
  if (k > 0) {
    std::vector<double> buffer(2 * count);
    double *gram_d = buffer.data(), *gram_y = gram_d + count;
    for (int64_t j = 0; j < count; ++j) {
      gram_d[j] = inner(gram + j * rows, d, k);
      gram_y[j] = column[j] - gram[(k - 1) * rows + j];
    }
    double *p_new = p + (k - 1) * rows, *q_new = q + (k - 1) * rows;
    for (int64_t j = 0; j < count; ++j) {
      const double step = j < k ? d[j] : 0.0;
      q_new[j] = -step;
      p_new[j] = step + (j == k ? 1.0 : j == k - 1 ? -1.0 : 0.0);
    }
    for (int64_t s = 0; s < k - 1; ++s) {
      subtract(q_new, -inner(p + s * rows, gram_d, count), q + s * rows, count);
      subtract(p_new, inner(q + s * rows, gram_y, count), p + s * rows, count);
    }
    const double scale = 1.0 / inner(q_new, gram_y, count);
    bool finite = true;
    for (int64_t j = 0; j < count; ++j) {
      p_new[j] *= scale;
      finite = finite && std::isfinite(p_new[j]) && std::isfinite(q_new[j]);
    }
    if (!finite) std::fill(p_new, p_new + count, 0.0), std::fill(q_new, q_new + count, 0.0);
  }
  for (int64_t j = 0; j < count; ++j) d[j] = j == k ? 1.0 : 0.0;
  for (int64_t s = 0; s < k; ++s) subtract(d, inner(q + s * rows, column, count), p + s * rows, count);
}

// As anderson_coefficients in kernels/gram.py, for one sample. Row i of `steps` is the past step d_i; the window's
// differences are g_{i+1} - g_i for i in [first, k). d as above.
void anderson_sample(const double *gram, double *steps, double *d, int64_t rows, int64_t k, int64_t window,
                     double ridge) {
  const int64_t first = std::max<int64_t>(0, k - window + 1), m = k - first;
  if (k > 0) std::copy(d, d + k, steps + (k - 1) * rows);
  for (int64_t j = 0; j <= k; ++j) d[j] = j == k ? 1.0 : 0.0;
  std::vector<double> a(m * m), gamma(m);
  auto difference = [&](int64_t i, int64_t j) { return gram[(i + 1) * rows + j] - gram[i * rows + j]; };
  double trace = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < m; ++j)
      a[i * m + j] = difference(first + i, first + j + 1) - difference(first + i, first + j);
    trace += a[i * m + i];
    gamma[i] = difference(first + i, k);
  }
  for (int64_t i = 0; i < m; ++i) a[i * m + i] += ridge * trace;
  // Cholesky, then the two triangular solves.
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t s = 0; s < j; ++s) a[j * m + j] -= a[j * m + s] * a[j * m + s];
    a[j * m + j] = std::sqrt(a[j * m + j]);
    for (int64_t i = j + 1; i < m; ++i) {
      for (int64_t s = 0; s < j; ++s) a[i * m + j] -= a[i * m + s] * a[j * m + s];
      a[i * m + j] /= a[j * m + j];
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t s = 0; s < i; ++s) gamma[i] -= a[i * m + s] * gamma[s];
    gamma[i] /= a[i * m + i];
  }
  bool finite = true;
  for (int64_t i = m - 1; i >= 0; --i) {
    for (int64_t s = i + 1; s < m; ++s) gamma[i] -= a[s * m + i] * gamma[s];
    gamma[i] /= a[i * m + i];
    finite = finite && std::isfinite(gamma[i]);
  }
  if (!finite) return;  // a plain step
  for (int64_t i = 0; i < m; ++i) {
    const int64_t at = first + i;
    subtract(d, gamma[i], steps + at * rows, at + 1);
    d[at + 1] -= gamma[i];
    d[at] += gamma[i];
  }
}

template <typename S, typename H>
struct Solver {
  const Step &a;
  const int64_t pieces, first, width;  // products are taken with the rows first .. first + width - 1
  std::vector<double> sums;            // (n, pieces, width + 2)

  explicit Solver(const Step &step)
      : a(step),
        pieces((a.size + PIECE - 1) / PIECE),
        first(std::max<int64_t>(0, a.row - a.window + 1)),
        width(a.row < 0 ? 0 : a.row - first + 1),
        sums(a.n * pieces * (width + 2)) {}

  bool running(int64_t i) const { return a.status[i] == MAX_ITER; }
  double *sums_of(int64_t i, int64_t piece) { return sums.data() + (i * pieces + piece) * (width + 2); }
  H *rows_of(int64_t i, int64_t begin) const { return static_cast<H *>(a.history) + i * a.rows * a.size + begin; }

  // gram_row, a piece: stores g = f - z and sums its products with the history.
  void multiply(int64_t i, int64_t piece) {
    const int64_t begin = piece * PIECE, count = std::min(PIECE, a.size - begin);
    double *out = sums_of(i, piece);
    const S *f = static_cast<const S *>(a.f) + i * a.size + begin;
    const S *z = static_cast<const S *>(a.z) + i * a.size + begin;
    S g[PIECE], gg = 0, ff = 0;
    if (a.row < 0) {
#pragma omp simd reduction(+ : gg, ff)
      for (int64_t e = 0; e < count; ++e) gg += (f[e] - z[e]) * (f[e] - z[e]), ff += f[e] * f[e];
    } else {
      H *rows = rows_of(i, begin), *own = rows + a.row * a.size;
#pragma omp simd reduction(+ : gg, ff)
      for (int64_t e = 0; e < count; ++e) {
        const S r = f[e] - z[e];
        gg += r * r;
        ff += f[e] * f[e];
        own[e] = store<H>(r);
        g[e] = load(own[e]);  // products are of what is stored, so that they are exact for the step
      }
      int64_t j = 0;
      for (; j + 4 <= width; j += 4) four_dots(g, rows + (first + j) * a.size, a.size, count, out + j);
      for (; j < width; ++j) out[j] = dot(g, rows + (first + j) * a.size, count);
    }
    out[width] = gg;
    out[width + 1] = ff;
    if (std::is_same_v<S, float> && !(is_safe(gg) && is_safe(ff))) squares_in_double(f, z, count, out + width);
  }

  // gram_row, the whole sample: the sums of its pieces.
  void collect(int64_t i) {
    double *gram = a.gram + i * a.rows * a.rows;
    for (int64_t t = 0; t < width + 2; ++t) {
      double total = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) total += sums_of(i, piece)[t];
      if (t < width)
        gram[a.row * a.rows + first + t] = gram[(first + t) * a.rows + a.row] = total;
      else
        a.norms[i * 3 + t - width] = total;
    }
  }

  // Does the sample go on?
  bool assess(int64_t i) {
    S *residual = static_cast<S *>(a.residual) + i, *trace = static_cast<S *>(a.trace) + i;
    double *norms = a.norms + i * 3;
    const double g = std::sqrt(norms[0]);
    if (a.evaluation == 0) norms[2] = g;
    const double scale = a.affine ? norms[2] : std::sqrt(norms[1]);
    a.iterations[i] = a.evaluation;
    if (!std::isfinite(g) || !std::isfinite(scale)) {
      *trace = std::numeric_limits<S>::quiet_NaN();
      a.status[i] = NONFINITE;
      return false;
    }
    constexpr double LARGEST = std::numeric_limits<S>::max();
    const S relative = g > 0 ? S(std::min(g / scale, LARGEST)) : S(0);
    *trace = relative;
    a.improved[i] = relative < *residual;
    if (a.improved[i]) *residual = relative;
    if (relative <= S(a.rtol))
      a.status[i] = CONVERGED;
    else if (g > a.divergence * norms[2])
      a.status[i] = DIVERGED;
    return running(i);
  }

  void choose(int64_t i) {
    const int64_t square = i * a.rows * a.rows;
    double *step = a.step + i * a.rows;
    if (a.method == Method::broyden)
      broyden_sample(a.gram + square, a.p + square, a.q + square, step, a.rows, a.row);
    else if (a.method == Method::anderson)
      anderson_sample(a.gram + square, a.p + square, step, a.rows, a.row, a.window, a.ridge);
    else
      step[a.row] = 1.0;
  }

  // Everything between the products and the step. What is left to do is combine()'s.
  bool judge(int64_t i) {
    a.improved[i] = false;
    if (!running(i)) {
      static_cast<S *>(a.trace)[i] = static_cast<const S *>(a.previous)[i];
      return false;
    }
    collect(i);
    if (!assess(i)) return false;
    if (a.row >= 0) choose(i);
    return true;
  }

  // combine, a piece: keeps z where it is the best, then z += sum_j step_j g_j.
  void combine(int64_t i, int64_t piece) {
    const int64_t begin = piece * PIECE, count = std::min(PIECE, a.size - begin);
    S *z = static_cast<S *>(a.z) + i * a.size + begin;
    if (a.improved[i]) std::copy(z, z + count, static_cast<S *>(a.value) + i * a.size + begin);
    if (a.row < 0 || !running(i)) return;
    const H *rows = rows_of(i, begin);
    const double *step = a.step + i * a.rows;
    int64_t j = 0;
    for (; j + 4 <= a.row + 1; j += 4) {
      const H *r0 = rows + j * a.size, *r1 = r0 + a.size, *r2 = r1 + a.size, *r3 = r2 + a.size;
      const S d0 = S(step[j]), d1 = S(step[j + 1]), d2 = S(step[j + 2]), d3 = S(step[j + 3]);
      fetch(r0, a.size, count);
#pragma omp simd
      for (int64_t e = 0; e < count; ++e)
        z[e] += (d0 * load(r0[e]) + d1 * load(r1[e])) + (d2 * load(r2[e]) + d3 * load(r3[e]));
    }
    for (; j <= a.row; ++j) {
      const H *row = rows + j * a.size;
      const S d = S(step[j]);
#pragma omp simd
      for (int64_t e = 0; e < count; ++e) z[e] += d * load(row[e]);
    }
  }

  int64_t run() {
    int64_t running_samples = 0;
    if (a.n >= a.threads) {  // a sample's history is still in cache when combine sweeps it again
#pragma omp parallel for schedule(static) num_threads(a.threads) reduction(+ : running_samples)
      for (int64_t i = 0; i < a.n; ++i) {
        for (int64_t piece = 0; running(i) && piece < pieces; ++piece) multiply(i, piece);
        running_samples += judge(i);
        for (int64_t piece = 0; piece < pieces; ++piece) combine(i, piece);
      }
      return running_samples;
    }
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t item = 0; item < a.n * pieces; ++item)
      if (running(item / pieces)) multiply(item / pieces, item % pieces);
    for (int64_t i = 0; i < a.n; ++i) running_samples += judge(i);
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t item = 0; item < a.n * pieces; ++item) combine(item / pieces, item % pieces);
    return running_samples;
  }
};

}  // namespace

int64_t step(const Step &a) {
  const bool narrow = a.history_type == DType::bf16;
  if (a.type == DType::f64) return narrow ? Solver<double, bf16>(a).run() : Solver<double, double>(a).run();
  return narrow ? Solver<float, bf16>(a).run() : Solver<float, float>(a).run();
}

}  // namespace ifr::IFR_ISA
