// The per-sample K x K algebra: when a sample stops, and the coefficients of its next step.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "scalar.h"

namespace ifr::IFR_ISA {
namespace {

template <typename S>
int64_t assess_(const Assess &a) {
  int64_t running = 0;
  S *residual = static_cast<S *>(a.residual), *trace = static_cast<S *>(a.trace);
  for (int64_t i = 0; i < a.n; ++i) {
    a.improved[i] = false;
    if (a.status[i] != MAX_ITER) {
      trace[i] = static_cast<const S *>(a.previous)[i];
      continue;
    }
    double *norms = a.norms + i * 3;
    const double g = std::sqrt(norms[0]), f = std::sqrt(norms[1]);
    const double relative = g / std::max(f, 1e-30);
    if (a.evaluation == 0) norms[2] = g;
    trace[i] = S(relative);
    a.iterations[i] = a.evaluation;
    if (!std::isfinite(relative)) {
      a.status[i] = NONFINITE;
      continue;
    }
    if (S(relative) < residual[i]) {
      residual[i] = S(relative);
      a.improved[i] = true;
    }
    if (S(relative) <= S(a.rtol))
      a.status[i] = CONVERGED;
    else if (g > a.divergence * norms[2])
      a.status[i] = DIVERGED;
    else
      ++running;
  }
  return running;
}

double dot(const double *a, const double *b, int64_t n) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

void subtract(double *y, double scale, const double *x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) y[j] -= scale * x[j];
}

// Row k holds the newest residual; pairs s < k - 1 are stored in p and q; d is the step that led here.
void broyden_sample(const double *gram, double *p, double *q, double *d, int64_t rows, int64_t k) {
  const int64_t count = k + 1;
  const double *column = gram + k * rows;  // gram is symmetric
  if (k > 0) {
    std::vector<double> buffer(2 * count);
    double *gram_d = buffer.data(), *gram_y = gram_d + count;
    for (int64_t j = 0; j < count; ++j) {
      gram_d[j] = dot(gram + j * rows, d, k);
      gram_y[j] = column[j] - gram[(k - 1) * rows + j];
    }
    double *p_new = p + (k - 1) * rows, *q_new = q + (k - 1) * rows;
    for (int64_t j = 0; j < count; ++j) {
      const double step = j < k ? d[j] : 0.0;
      q_new[j] = -step;
      p_new[j] = step + (j == k ? 1.0 : j == k - 1 ? -1.0 : 0.0);
    }
    for (int64_t s = 0; s < k - 1; ++s) {
      subtract(q_new, -dot(p + s * rows, gram_d, count), q + s * rows, count);
      subtract(p_new, dot(q + s * rows, gram_y, count), p + s * rows, count);
    }
    const double scale = 1.0 / dot(q_new, gram_y, count);
    bool finite = true;
    for (int64_t j = 0; j < count; ++j) {
      p_new[j] *= scale;
      finite = finite && std::isfinite(p_new[j]) && std::isfinite(q_new[j]);
    }
    if (!finite) std::fill(p_new, p_new + count, 0.0), std::fill(q_new, q_new + count, 0.0);
  }
  for (int64_t j = 0; j < count; ++j) d[j] = j == k ? 1.0 : 0.0;
  for (int64_t s = 0; s < k; ++s) subtract(d, dot(q + s * rows, column, count), p + s * rows, count);
}

// steps: past steps d_i, row i; the window's differences are g_{i+1} - g_i for i in [first, k).
void anderson_sample(const double *gram, double *steps, double *d, int64_t rows, int64_t k, int64_t window,
                     double ridge) {
  const int64_t first = std::max<int64_t>(0, k - window + 1), m = k - first;
  if (k > 0) std::copy(d, d + k, steps + (k - 1) * rows);
  for (int64_t j = 0; j <= k; ++j) d[j] = j == k ? 1.0 : 0.0;
  std::vector<double> a(m * m), gamma(m);
  auto difference = [&](int64_t i, int64_t j) { return gram[(i + 1) * rows + j] - gram[i * rows + j]; };
  double trace = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < m; ++j) a[i * m + j] = difference(first + i, first + j + 1) - difference(first + i, first + j);
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

}  // namespace

int64_t assess(DType state, const Assess &a) {
  return state == DType::f64 ? assess_<double>(a) : assess_<float>(a);
}

void broyden(const Rule &a) {
  const int64_t square = a.rows * a.rows;
  for (int64_t i = 0; i < a.n; ++i)
    if (a.status[i] == MAX_ITER)
      broyden_sample(a.gram + i * square, a.p + i * square, a.q + i * square, a.step + i * a.rows, a.rows, a.row);
}

void anderson(const Rule &a) {
  const int64_t square = a.rows * a.rows;
  for (int64_t i = 0; i < a.n; ++i)
    if (a.status[i] == MAX_ITER)
      anderson_sample(a.gram + i * square, a.p + i * square, a.step + i * a.rows, a.rows, a.row, a.window, a.ridge);
}

}  // namespace ifr::IFR_ISA
