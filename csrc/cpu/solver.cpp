// One step of the solver after an evaluation of F: inner products with the history, the K x K algebra of the method,
// and the step, sample by sample.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "norm.h"
#include "samples.h"
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

// Asks for the first lines of `number` rows. Rows are far apart, and the processor's own prefetching starts anew in each;
// asking for whole pieces costs more than it gains. Inlined, because GCC drops calls that do nothing but prefetch.
template <typename H>
[[gnu::always_inline]] inline void fetch(const H *row, int64_t stride, int64_t number, int64_t count) {
  constexpr int64_t LINE = 64 / sizeof(H);
  count = std::min(count, 4 * LINE);
  for (int64_t r = 0; r < number; ++r)
    for (int64_t e = 0; e < count; e += LINE) __builtin_prefetch(row + r * stride + e);
}

// Four rows at a time: as many loads in flight, and g is read once.
template <typename S, typename H>
void four_dots(const S *g, const H *row, int64_t stride, int64_t count, double *sums) {
  const H *row1 = row + stride, *row2 = row1 + stride, *row3 = row2 + stride;
  double sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
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

// Where a step finds f: each gives the elements [begin, begin + count) of a sample's f, in memory or computed into
// `buffer`. What has to be known of the whole sample is computed before, in slices: open(), every slice(), close().

// In memory.
template <typename S>
struct StoredValue {
  struct Work {};
  static constexpr int64_t slices = 0;
  const Step &a;

  Work new_work() const { return {}; }
  void open(int64_t, Work &) const {}
  void slice(int64_t, int64_t, Work &) const {}
  void close(int64_t, Work &) const {}
  const S *read(int64_t i, int64_t begin, int64_t, const Work &, S *) const {
    return static_cast<const S *>(a.f) + i * a.size + begin;
  }
};

// The sum of two or three tensors.
struct TotalValue : StoredValue<float> {
  const Total &total;

  TotalValue(const Step &step, const Total &total) : StoredValue<float>{step}, total(total) {}

  const float *read(int64_t i, int64_t begin, int64_t count, const Work &, float *buffer) const {
    const int64_t at = i * a.size + begin;
    const float *first = total.first + at, *second = total.second + at;
    if (total.third) {
      const float *third = total.third + at;
#pragma omp simd
      for (int64_t e = 0; e < count; ++e) buffer[e] = first[e] + second[e] + third[e];
    } else {
#pragma omp simd
      for (int64_t e = 0; e < count; ++e) buffer[e] = first[e] + second[e];
    }
    return buffer;
  }
};

// F's tail. Before a second norm, its input relu(u) is stored and summed.
struct TailValue {
  struct Work {
    std::vector<float> first, second;  // (2, channels): center and scale of each norm
    std::vector<double> sums;          // (slices, 2, channels): of relu(u) and its square
  };
  const Step &a;
  const Tail &tail;
  const int64_t channels, positions, rows, slices;  // rows: the positions of a slice

  TailValue(const Step &step, const Tail &tail)
      : a(step),
        tail(tail),
        channels(tail.channels),
        positions(step.size / channels),
        rows(std::max((positions + SLICES - 1) / SLICES, (SLICE + channels - 1) / channels)),
        slices(tail.second_weight ? (positions + rows - 1) / rows : 0) {}

  Work new_work() const {
    return {std::vector<float>(2 * channels), std::vector<float>(2 * channels),
            std::vector<double>(slices * 2 * channels)};
  }

  void open(int64_t i, Work &work) const {
    const double *sums = tail.sums + i * tail.parts * 2 * channels;
    norm(tail.first_weight).measure(tail.y + i * a.size, sums, tail.parts, work.first.data());
  }

  // Sums 16 values in float at most, then those sums in double.
  void slice(int64_t i, int64_t s, Work &work) const {
    constexpr int64_t BLOCK = 16;
    std::vector<float> block(2 * channels);
    float *sum = block.data(), *square = sum + channels;
    double *total = work.sums.data() + s * 2 * channels;
    std::fill(total, total + 2 * channels, 0.0);
    const int64_t end = std::min(positions, (s + 1) * rows);
    for (int64_t from = s * rows; from < end; from += BLOCK) {
      std::fill(sum, sum + 2 * channels, 0.0f);
      for (int64_t o = from; o < std::min(end, from + BLOCK); ++o) {
        float *out = tail.u + i * a.size + o * channels;
        add(i, o * channels, 0, channels, work, out);
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const float v = relu(out[c]);
          out[c] = v;
          sum[c] += v;
          square[c] += v * v;
        }
      }
#pragma omp simd
      for (int64_t c = 0; c < 2 * channels; ++c) total[c] += double(sum[c]);
    }
  }

  void close(int64_t i, Work &work) const {
    if (tail.second_weight)
      norm(tail.second_weight).measure(tail.u + i * a.size, work.sums.data(), slices, work.second.data());
  }

  const float *read(int64_t i, int64_t begin, int64_t count, const Work &work, float *buffer) const {
    const float *u = tail.u + i * a.size;
    const float *center = work.second.data(), *scale = center + channels, *bias = tail.second_bias;
    int64_t c = begin % channels;
    for (int64_t done = 0, run; done < count; done += run, c = 0) {
      run = std::min(channels - c, count - done);
      float *out = buffer + done;
      if (!tail.second_weight) {
        add(i, begin + done, c, run, work, out);
        continue;
      }
      const float *in = u + begin + done;
#pragma omp simd
      for (int64_t e = 0; e < run; ++e) out[e] = (in[e] - center[c + e]) * scale[c + e] + bias[c + e];
    }
    return buffer;
  }

 private:
  // Slices are of SLICE elements, but more where a sample would have more than SLICES of them.
  static constexpr int64_t SLICE = 1 << 14, SLICES = 64;

  SampleNorm norm(const float *weight) const { return {channels, positions, tail.groups, tail.eps, weight}; }

  // u of `count` elements of a position, from the channel c on.
  void add(int64_t i, int64_t begin, int64_t c, int64_t count, const Work &work, float *out) const {
    const float *y = tail.y + i * a.size + begin;
    const float *center = work.first.data() + c, *scale = center + channels, *bias = tail.first_bias + c;
    if (!tail.injection) {
#pragma omp simd
      for (int64_t e = 0; e < count; ++e) out[e] = (y[e] - center[e]) * scale[e] + bias[e];
      return;
    }
    const float *z = static_cast<const float *>(a.z) + i * a.size + begin, *x = tail.injection + i * a.size + begin;
#pragma omp simd
    for (int64_t e = 0; e < count; ++e) out[e] = (y[e] - center[e]) * scale[e] + bias[e] + (z[e] + x[e]);
  }
};

template <typename S, typename H, typename Value>
struct Solver {
  const Step &a;
  const Value &value;
  const int64_t pieces, first, width;  // products are taken with the rows first .. first + width - 1

  // What a thread needs for a sample.
  struct Work {
    std::vector<double> sums;  // (pieces, width + 2)
    typename Value::Work value;
  };

  Solver(const Step &step, const Value &value)
      : a(step),
        value(value),
        pieces((a.size + PIECE - 1) / PIECE),
        first(std::max<int64_t>(0, a.row - a.window + 1)),
        width(a.row < 0 ? 0 : a.row - first + 1) {}

  bool running(int64_t i) const { return a.status[i] == MAX_ITER; }
  Work new_work() const { return {std::vector<double>(pieces * (width + 2)), value.new_work()}; }
  H *rows_of(int64_t i, int64_t begin) const { return static_cast<H *>(a.history) + i * a.rows * a.size + begin; }

  // Asks for what a sweep reads after the rows j .. j + 3 of the piece at `begin`: up to four rows more or, if there are
  // none, the first of the piece at `next`.
  [[gnu::always_inline]] void fetch_after(const H *rows, int64_t j, int64_t end, int64_t begin, int64_t next) const {
    if (j + 4 < end)
      fetch(rows + (j + 4) * a.size, a.size, std::min<int64_t>(4, end - j - 4), std::min(PIECE, a.size - begin));
    else if (0 <= next && next < a.size)
      fetch(rows + (next - begin), a.size, std::min<int64_t>(4, end), std::min(PIECE, a.size - next));
  }

  // gram_row, a piece: stores g = f - z and sums its products with the history.
  void multiply(int64_t i, int64_t piece, Work &work) const {
    const int64_t begin = piece * PIECE, count = std::min(PIECE, a.size - begin);
    double *out = work.sums.data() + piece * (width + 2);
    S buffer[PIECE], g[PIECE], gg = 0, ff = 0;
    const S *f = value.read(i, begin, count, work.value, buffer);
    const S *z = static_cast<const S *>(a.z) + i * a.size + begin;
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
      for (int64_t j = 0; j < width; j += 4) {
        const H *row = rows + (first + j) * a.size;
        fetch_after(rows, first + j, first + width, begin, begin + PIECE);
        if (j + 4 <= width)
          four_dots(g, row, a.size, count, out + j);
        else
          for (int64_t r = j; r < width; ++r, row += a.size) out[r] = dot(g, row, count);
      }
    }
    out[width] = gg;
    out[width + 1] = ff;
    if (std::is_same_v<S, float> && !(is_safe(gg) && is_safe(ff))) squares_in_double(f, z, count, out + width);
  }

  // gram_row, the whole sample: the sums of its pieces.
  void collect(int64_t i, const Work &work) const {
    double *gram = a.gram + i * a.rows * a.rows;
    for (int64_t t = 0; t < width + 2; ++t) {
      double total = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) total += work.sums[piece * (width + 2) + t];
      if (t < width)
        gram[a.row * a.rows + first + t] = gram[(first + t) * a.rows + a.row] = total;
      else
        a.norms[i * 3 + t - width] = total;
    }
  }

  // Does the sample go on?
  bool assess(int64_t i) const {
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

  void choose(int64_t i) const {
    const int64_t square = i * a.rows * a.rows;
    double *step = a.step + i * a.rows;
    if (a.method == Method::broyden)
      broyden_sample(a.gram + square, a.p + square, a.q + square, step, a.rows, a.row);
    else if (a.method == Method::anderson)
      anderson_sample(a.gram + square, a.p + square, step, a.rows, a.row, a.window, a.ridge);
    else
      step[a.row] = 1.0;
  }

  // Everything between the products and the step. Does the sample go on?
  bool judge(int64_t i, const Work &work) const {
    a.improved[i] = false;
    collect(i, work);
    if (!assess(i)) return false;
    if (a.row >= 0) choose(i);
    return true;
  }

  // combine, a piece: keeps z where it is the best, then z += sum_j step_j g_j.
  void combine(int64_t i, int64_t piece) const {
    const int64_t begin = piece * PIECE, count = std::min(PIECE, a.size - begin);
    S *z = static_cast<S *>(a.z) + i * a.size + begin;
    if (a.improved[i]) std::copy(z, z + count, static_cast<S *>(a.value) + i * a.size + begin);
    if (a.row < 0 || !running(i)) return;
    const H *rows = rows_of(i, begin);
    const double *step = a.step + i * a.rows;
    for (int64_t j = 0; j <= a.row; j += 4) {
      fetch_after(rows, j, a.row + 1, begin, begin - PIECE);
      const H *r0 = rows + j * a.size, *r1 = r0 + a.size, *r2 = r1 + a.size, *r3 = r2 + a.size;
      if (j + 4 <= a.row + 1) {
        const S d0 = S(step[j]), d1 = S(step[j + 1]), d2 = S(step[j + 2]), d3 = S(step[j + 3]);
#pragma omp simd
        for (int64_t e = 0; e < count; ++e)
          z[e] += (d0 * load(r0[e]) + d1 * load(r1[e])) + (d2 * load(r2[e]) + d3 * load(r3[e]));
        continue;
      }
      for (int64_t r = j; r <= a.row; ++r, r0 += a.size) {
        const S d = S(step[r]);
#pragma omp simd
        for (int64_t e = 0; e < count; ++e) z[e] += d * load(r0[e]);
      }
    }
  }

  // What the state of a sample that has stopped needs.
  void note_stopped() const {
    for (int64_t i = 0; i < a.n; ++i) {
      if (running(i)) continue;
      a.improved[i] = false;
      static_cast<S *>(a.trace)[i] = static_cast<const S *>(a.previous)[i];
    }
  }

  // As many samples as can be shared out evenly go one at a time through all sweeps, by a thread each: a sample is still
  // in cache when the next sweep comes. The threads share each sweep over the samples that are left.
  int64_t run() const {
    note_stopped();
    const std::vector<int64_t> list = running_samples(a.n, a.status);
    const int64_t count = list.size(), whole = count / a.threads * a.threads;
    return by_sample(list.data(), whole) + by_sweep(list.data() + whole, count - whole);
  }

  int64_t by_sample(const int64_t *list, int64_t count) const {
    int64_t still_running = 0;
    if (count == 0) return still_running;
#pragma omp parallel num_threads(a.threads) reduction(+ : still_running)
    {
      Work work = new_work();
#pragma omp for schedule(static)
      for (int64_t s = 0; s < count; ++s) {
        const int64_t i = list[s];
        value.open(i, work.value);
        for (int64_t slice = 0; slice < value.slices; ++slice) value.slice(i, slice, work.value);
        value.close(i, work.value);
        for (int64_t piece = 0; piece < pieces; ++piece) multiply(i, piece, work);
        still_running += judge(i, work);
        for (int64_t piece = pieces; piece-- > 0;) combine(i, piece);  // the last pieces are still in cache
      }
    }
    return still_running;
  }

  int64_t by_sweep(const int64_t *list, int64_t count) const {
    int64_t still_running = 0;
    if (count == 0) return still_running;
    std::vector<Work> works;
    for (int64_t s = 0; s < count; ++s) works.push_back(new_work());
    for (int64_t s = 0; s < count; ++s) value.open(list[s], works[s].value);
    if (const int64_t slices = value.slices) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
      for (int64_t item = 0; item < count * slices; ++item)
        value.slice(list[item / slices], item % slices, works[item / slices].value);
    }
    for (int64_t s = 0; s < count; ++s) value.close(list[s], works[s].value);
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t item = 0; item < count * pieces; ++item)
      multiply(list[item / pieces], item % pieces, works[item / pieces]);
    for (int64_t s = 0; s < count; ++s) still_running += judge(list[s], works[s]);
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t item = 0; item < count * pieces; ++item) combine(list[item / pieces], item % pieces);
    return still_running;
  }
};

template <typename S, typename Value>
int64_t run(const Step &a, const Value &value) {
  return a.history_type == DType::bf16 ? Solver<S, bf16, Value>(a, value).run() : Solver<S, S, Value>(a, value).run();
}

}  // namespace

int64_t step(const Step &a) {
  if (a.type == DType::f64) return run<double>(a, StoredValue<double>{a});
  return run<float>(a, StoredValue<float>{a});
}
int64_t step_tail(const Step &a, const Tail &tail) { return run<float>(a, TailValue(a, tail)); }
int64_t step_total(const Step &a, const Total &total) { return run<float>(a, TotalValue(a, total)); }

}  // namespace ifr::IFR_ISA
