// The two sweeps over the stored residuals: gram_row (inner products) and combine (the step).
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "scalar.h"

namespace ifr::IFR_ISA {
namespace {

// A piece of a sample that stays in L1 while the history streams past it. Sums are formed per piece and
// added in order, so a sample's result depends neither on the threads nor on its batch mates.
constexpr int64_t PIECE = 4096;

// Sums are in the iterate's type over a run of elements, and in double beyond.
constexpr int64_t RUN = 512;

template <typename S, typename H>
double dot(const S *g, const H *row, int64_t count) {
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += RUN) {
    const int64_t end = std::min(count, begin + RUN);
    S run = 0;
#pragma omp simd reduction(+ : run)
    for (int64_t e = begin; e < end; ++e) run += g[e] * load(row[e]);
    sum += run;
  }
  return sum;
}

// Four rows at a time: as many loads in flight, and g is read once.
template <typename S, typename H>
void four_dots(const S *g, const H *row, int64_t stride, int64_t count, double *sums) {
  const H *row1 = row + stride, *row2 = row1 + stride, *row3 = row2 + stride;
  double sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
  for (int64_t begin = 0; begin < count; begin += RUN) {
    const int64_t end = std::min(count, begin + RUN);
    S run0 = 0, run1 = 0, run2 = 0, run3 = 0;
#pragma omp simd reduction(+ : run0, run1, run2, run3)
    for (int64_t e = begin; e < end; ++e) {
      run0 += g[e] * load(row[e]);
      run1 += g[e] * load(row1[e]);
      run2 += g[e] * load(row2[e]);
      run3 += g[e] * load(row3[e]);
    }
    sum0 += run0, sum1 += run1, sum2 += run2, sum3 += run3;
  }
  sums[0] = sum0, sums[1] = sum1, sums[2] = sum2, sums[3] = sum3;
}

template <typename S, typename H>
void gram_row_(const GramRow &a) {
  const int64_t pieces = (a.size + PIECE - 1) / PIECE, width = a.row < 0 ? 0 : a.row - a.first + 1;
  std::vector<double> partial(a.n * pieces * (width + 2));
  auto *history = static_cast<H *>(a.history);
#pragma omp parallel for schedule(static) num_threads(a.threads)
  for (int64_t item = 0; item < a.n * pieces; ++item) {
    const int64_t i = item / pieces, begin = item % pieces * PIECE, count = std::min(PIECE, a.size - begin);
    if (a.status[i] != MAX_ITER) continue;
    double *sums = partial.data() + item * (width + 2);
    const S *f = static_cast<const S *>(a.f) + i * a.size + begin;
    const S *z = static_cast<const S *>(a.z) + i * a.size + begin;
    H *rows = history + i * a.rows * a.size + begin;
    S g[PIECE], gg = 0, ff = 0;
    if (a.row < 0) {
#pragma omp simd reduction(+ : gg, ff)
      for (int64_t e = 0; e < count; ++e) gg += (f[e] - z[e]) * (f[e] - z[e]), ff += f[e] * f[e];
      sums[0] = gg, sums[1] = ff;
      continue;
    }
    H *own = rows + a.row * a.size;
#pragma omp simd reduction(+ : gg, ff)
    for (int64_t e = 0; e < count; ++e) {
      const S r = f[e] - z[e];
      gg += r * r;
      ff += f[e] * f[e];
      own[e] = store<H>(r);
      g[e] = load(own[e]);  // products are of what is stored, so that they are exact for the step
    }
    sums[width] = gg;
    sums[width + 1] = ff;
    int64_t j = a.first;
    for (; j + 4 <= a.row + 1; j += 4) four_dots(g, rows + j * a.size, a.size, count, sums + j - a.first);
    for (; j <= a.row; ++j) sums[j - a.first] = dot(g, rows + j * a.size, count);
  }
  for (int64_t i = 0; i < a.n; ++i) {
    if (a.status[i] != MAX_ITER) continue;
    double *gram = a.gram + i * a.rows * a.rows, *norms = a.norms + i * 3;
    const double *sums = partial.data() + i * pieces * (width + 2);
    for (int64_t t = 0; t < width + 2; ++t) {
      double total = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece * (width + 2) + t];
      if (t < width)
        gram[a.row * a.rows + a.first + t] = gram[(a.first + t) * a.rows + a.row] = total;
      else
        norms[t - width] = total;
    }
  }
}

template <typename S, typename H>
void combine_(const Combine &a) {
  const int64_t pieces = (a.size + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(a.threads)
  for (int64_t item = 0; item < a.n * pieces; ++item) {
    const int64_t i = item / pieces, begin = item % pieces * PIECE, count = std::min(PIECE, a.size - begin);
    S *z = static_cast<S *>(a.z) + i * a.size + begin;
    if (a.improved[i]) std::copy(z, z + count, static_cast<S *>(a.value) + i * a.size + begin);
    if (!a.advance || a.status[i] != MAX_ITER) continue;
    const H *rows = static_cast<const H *>(a.history) + i * a.rows * a.size + begin;
    const double *step = a.step + i * a.rows;
    int64_t j = 0;
    for (; j + 4 <= a.count; j += 4) {
      const H *r0 = rows + j * a.size, *r1 = r0 + a.size, *r2 = r1 + a.size, *r3 = r2 + a.size;
      const S d0 = S(step[j]), d1 = S(step[j + 1]), d2 = S(step[j + 2]), d3 = S(step[j + 3]);
#pragma omp simd
      for (int64_t e = 0; e < count; ++e)
        z[e] += (d0 * load(r0[e]) + d1 * load(r1[e])) + (d2 * load(r2[e]) + d3 * load(r3[e]));
    }
    for (; j < a.count; ++j) {
      const H *row = rows + j * a.size;
      const S d = S(step[j]);
#pragma omp simd
      for (int64_t e = 0; e < count; ++e) z[e] += d * load(row[e]);
    }
  }
}

template <typename Args>
void dispatch(DType state, DType history, const Args &a, void (*f32)(const Args &), void (*f64)(const Args &),
              void (*f32_bf16)(const Args &), void (*f64_bf16)(const Args &)) {
  if (history == DType::bf16)
    (state == DType::f64 ? f64_bf16 : f32_bf16)(a);
  else
    (state == DType::f64 ? f64 : f32)(a);
}

}  // namespace

void gram_row(DType state, DType history, const GramRow &a) {
  dispatch(state, history, a, gram_row_<float, float>, gram_row_<double, double>, gram_row_<float, bf16>,
           gram_row_<double, bf16>);
}

void combine(DType state, DType history, const Combine &a) {
  dispatch(state, history, a, combine_<float, float>, combine_<double, double>, combine_<float, bf16>,
           combine_<double, bf16>);
}

}  // namespace ifr::IFR_ISA
