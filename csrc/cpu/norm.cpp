// The GroupNorm chains of the residual block, forward and vjp. A reduction reads each operand once.
//
// A sample is a matrix (outer, inner): (positions, channels) in channels_last, else (channels, positions).
// It is cut along `outer` into slices whose number depends on the shape alone. A slice is summed at a time, and the
// sums are added in order, so results depend neither on the threads nor on the batch mates.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "norm.h"
#include "samples.h"
#include "scalar.h"

namespace ifr::IFR_ISA {
namespace {

constexpr int64_t SLICE = 1 << 16;  // elements

// Some of the samples, and the threads that work at them.
struct Samples {
  const int64_t *list;
  int64_t count;
  int threads;
};

template <bool NHWC, typename T>
struct Chain {
  using W = wide_t<T>;
  const NormShape &shape;
  const int64_t inner, outer, size, slices, rows;
  const std::vector<int64_t> list;
  std::vector<double> sums;  // (n, slices, 2, channels)

  explicit Chain(const NormShape &s)
      : shape(s),
        inner(NHWC ? s.channels : s.positions),
        outer(NHWC ? s.positions : s.channels),
        size(s.channels * s.positions),
        slices(std::max<int64_t>(1, std::min(outer, (size + SLICE / 2) / SLICE))),
        rows((outer + slices - 1) / slices),
        list(running_samples(s.n, s.status)),
        sums(s.n * slices * 2 * s.channels) {}

  // Runs body(samples), the sweeps of a kernel, over all samples. A sample of one slice stays in L2 from a sweep to the
  // next: it goes through all of them before the next sample does.
  template <typename Body>
  void each(Body body) const {
    const int64_t count = list.size();
    if (slices > 1) return body(Samples{list.data(), count, shape.threads});
#pragma omp parallel for schedule(static) num_threads(team(count, shape.threads))
    for (int64_t s = 0; s < count; ++s) body(Samples{list.data() + s, 1, 1});
  }

  // body(sample, element of the sample, channel) for every element
  template <typename Body>
  void map(const Samples &samples, Body body) const {
#pragma omp parallel for schedule(static) num_threads(samples.threads)
    for (int64_t item = 0; item < samples.count * slices; ++item) {
      const int64_t n = samples.list[item / slices], begin = item % slices * rows, end = std::min(outer, begin + rows);
      for (int64_t o = begin; o < end; ++o) {
#pragma omp simd
        for (int64_t i = 0; i < inner; ++i) body(n, o * inner + i, NHWC ? i : o);
      }
    }
  }

  // Sums for each channel of a and b, which body(sample, element, channel, &a, &b) yields; without PRODUCT: of a, a * a.
  // They are in double, since a variance is a small difference of large sums. The values go through a small buffer:
  // the compiler would not vectorise them beside sums in double.
  template <bool PRODUCT, typename Body>
  void reduce(const Samples &samples, Body body) {
    constexpr int64_t TILE = 256;
#pragma omp parallel for schedule(static) num_threads(samples.threads)
    for (int64_t item = 0; item < samples.count * slices; ++item) {
      const int64_t n = samples.list[item / slices], begin = item % slices * rows, end = std::min(outer, begin + rows);
      double *first = sums.data() + (n * slices + item % slices) * 2 * shape.channels, *second = first + shape.channels;
      std::fill(first, first + 2 * shape.channels, 0.0);
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t start = 0; start < inner; start += TILE) {
          const int64_t count = std::min(TILE, inner - start);
          W a[TILE], b[TILE];
#pragma omp simd
          for (int64_t i = 0; i < count; ++i)
            body(n, o * inner + start + i, NHWC ? start + i : o, a[i], b[i]);
          if (NHWC) {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) first[start + i] += double(a[i]);
#pragma omp simd
            for (int64_t i = 0; i < count; ++i)
              second[start + i] += PRODUCT ? double(b[i]) : double(a[i]) * double(a[i]);
          } else {
            double total_a = 0, total_b = 0;
#pragma omp simd reduction(+ : total_a, total_b)
            for (int64_t i = 0; i < count; ++i) {
              total_a += double(a[i]);
              total_b += PRODUCT ? double(b[i]) : double(a[i]) * double(a[i]);
            }
            first[o] += total_a;
            second[o] += total_b;
          }
        }
      }
    }
  }

  // The sums of one sample over its slices, left in the first slice.
  double *total(int64_t n) {
    double *first = sums.data() + n * slices * 2 * shape.channels;
    for (int64_t s = 1; s < slices; ++s)
      for (int64_t c = 0; c < 2 * shape.channels; ++c) first[c] += first[s * 2 * shape.channels + c];
    return first;
  }
};

// One GroupNorm: its statistics, and what they are per channel: x_hat = (x - center) * inverse and
// gn(x) = (x - center) * scale + bias. Of a group of equal values x_hat is exactly zero.
template <typename W>
struct Norm {
  const NormShape &shape;
  const W *weight, *bias;
  W *mean, *rstd;
  std::vector<W> center, inverse, scale;         // (n, channels)
  std::vector<W> weighted, constant, slope;      // vjp: grad_x = g * weighted - constant - x_hat * slope

  Norm(const NormShape &s, const void *weight, const void *bias, void *mean, void *rstd)
      : shape(s),
        weight(static_cast<const W *>(weight)),
        bias(static_cast<const W *>(bias)),
        mean(static_cast<W *>(mean)),
        rstd(static_cast<W *>(rstd)) {
    const int64_t entries = weight ? s.n * s.channels : 0;
    for (auto *table : {&center, &inverse, &scale, &weighted, &constant, &slope}) table->resize(entries);
  }

  int64_t per_group() const { return shape.channels / shape.groups; }

  // The statistics of what value(sample, element, channel) gives. value may overwrite what it reads; again() gives the
  // same numbers after that.
  template <typename C, typename Value, typename Again>
  void measure(C &chain, const Samples &samples, Value value, Again again) {
    const int64_t channels = shape.channels;
    std::vector<char> inexact(samples.count * shape.groups);
    chain.template reduce<false>(samples, [=](int64_t n, int64_t e, int64_t c, W &s, W &) { s = value(n, e, c); });
    from_sums(chain, samples, inexact, false);
    from_statistics(samples);
    if (std::find(inexact.begin(), inexact.end(), true) == inexact.end()) return;
    const W *near = center.data();
    chain.template reduce<false>(samples, [=](int64_t n, int64_t e, int64_t c, W &s, W &) {
      s = again(n, e, c) - near[n * channels + c];
    });
    from_sums(chain, samples, inexact, true);
    from_statistics(samples);
  }

  // Statistics from the sums of x and x^2 for each channel. A variance far below the mean's square is lost in their
  // difference: such groups are marked as inexact. again: only those groups, from the sums of x - mean and its square.
  template <typename C>
  void from_sums(C &chain, const Samples &samples, std::vector<char> &inexact, bool again) {
    const int64_t width = per_group();
    const double count = double(width * shape.positions);
    for (int64_t i = 0; i < samples.count; ++i) {
      const int64_t n = samples.list[i];
      const double *sum = chain.total(n), *square = sum + shape.channels;
      for (int64_t g = 0; g < shape.groups; ++g) {
        char &is_inexact = inexact[i * shape.groups + g];
        if (again && !is_inexact) continue;
        const int64_t at = n * shape.groups + g;
        const Moments found(sum + g * width, square + g * width, width, count, shape.eps);
        is_inexact = found.mean * found.mean > 1e4 * found.variance;
        mean[at] = again ? W(mean[at] + found.mean) : W(found.mean);
        rstd[at] = W(1.0 / std::sqrt(found.variance));
      }
    }
  }

  void from_statistics(const Samples &samples) {
    const int64_t channels = shape.channels, width = per_group();
    for (int64_t i = 0; i < samples.count; ++i)
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t n = samples.list[i], g = n * shape.groups + c / width, at = n * channels + c;
        center[at] = mean[g];
        inverse[at] = rstd[g];
        scale[at] = rstd[g] * weight[c];
      }
  }

  // sums: per channel sum(g), sum(g * x_hat) of the output's gradient g
  template <typename C>
  void vjp_from_sums(C &chain, const Samples &samples, double *grad_weight, double *grad_bias) {
    const int64_t channels = shape.channels, width = per_group();
    const double count = double(width * shape.positions);
    for (int64_t i = 0; i < samples.count; ++i) {
      const int64_t n = samples.list[i];
      const double *sum = chain.total(n), *product = sum + channels;
      if (grad_bias) std::copy(sum, sum + channels, grad_bias + n * channels);
      if (grad_weight) std::copy(product, product + channels, grad_weight + n * channels);
      for (int64_t g = 0; g < shape.groups; ++g) {
        double a = 0, b = 0;
        for (int64_t c = g * width; c < (g + 1) * width; ++c) a += weight[c] * sum[c], b += weight[c] * product[c];
        const W r = rstd[n * shape.groups + g];
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          weighted[n * channels + c] = r * weight[c];
          constant[n * channels + c] = W(a / count) * r;
          slope[n * channels + c] = W(b / count) * r;
        }
      }
    }
  }

  // The coefficients (n, 5, channels) by which a convolution computes grad_x while it reads g and x.
  void write_coefficients(const Samples &samples, float *out) const {
    const int64_t channels = shape.channels;
    for (int64_t i = 0; i < samples.count; ++i) {
      const int64_t n = samples.list[i];
      float *row = out + n * 5 * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = n * channels + c;
        row[c] = center[at];
        row[channels + c] = scale[at];
        row[2 * channels + c] = weighted[at];
        row[3 * channels + c] = constant[at];
        row[4 * channels + c] = inverse[at] * slope[at];
      }
    }
  }
};

template <bool NHWC, typename T>
struct Kernels {
  using W = wide_t<T>;
  using C = Chain<NHWC, T>;

  template <typename Arguments>
  static Norm<W> first_norm(const NormShape &shape, const Arguments &a) {
    return {shape, a.first_weight, a.first_bias, a.first_mean, a.first_rstd};
  }
  template <typename Arguments>
  static Norm<W> second_norm(const NormShape &shape, const Arguments &a) {
    return {shape, a.second_weight, a.second_bias, a.second_mean, a.second_rstd};
  }

  static void relu_forward(const NormShape &shape, const NormForward &a) {
    C chain(shape);
    Norm<W> norm = first_norm(shape, a);
    const T *y = static_cast<const T *>(a.y);
    T *out = static_cast<T *>(a.out);
    const int64_t size = chain.size, channels = shape.channels;
    const W *center = norm.center.data(), *scale = norm.scale.data(), *bias = norm.bias;
    auto value = [=](int64_t n, int64_t e, int64_t) { return load(y[n * size + e]); };
    chain.each([&](const Samples &samples) {
      norm.measure(chain, samples, value, value);
      chain.map(samples, [=](int64_t n, int64_t e, int64_t c) {
        const int64_t t = n * channels + c;
        out[n * size + e] = store<T>(relu((load(y[n * size + e]) - center[t]) * scale[t] + bias[c]));
      });
    });
  }

  static void relu_vjp(const NormShape &shape, const NormBackward &a) {
    C chain(shape);
    Norm<W> norm = first_norm(shape, a);
    const T *y = static_cast<const T *>(a.y), *grad = static_cast<const T *>(a.grad);
    T *grad_y = static_cast<T *>(a.grad_y);
    const int64_t size = chain.size, channels = shape.channels;
    const W *center = norm.center.data(), *scale = norm.scale.data(), *bias = norm.bias;
    const W *inverse = norm.inverse.data();
    const W *weighted = norm.weighted.data(), *constant = norm.constant.data(), *slope = norm.slope.data();
    chain.each([&](const Samples &samples) {
      norm.from_statistics(samples);
      chain.template reduce<true>(samples, [=](int64_t n, int64_t e, int64_t c, W &s, W &q) {
        const int64_t t = n * channels + c;
        const W v = load(y[n * size + e]) - center[t], g = load(grad[n * size + e]);
        s = v * scale[t] + bias[c] > W(0) ? g : W(0);
        q = s * (v * inverse[t]);
      });
      norm.vjp_from_sums(chain, samples, a.first_grad_weight, a.first_grad_bias);
      if (a.coefficients) return norm.write_coefficients(samples, a.coefficients);
      chain.map(samples, [=](int64_t n, int64_t e, int64_t c) {
        const int64_t t = n * channels + c;
        const W v = load(y[n * size + e]) - center[t], g = load(grad[n * size + e]);
        const W s = v * scale[t] + bias[c] > W(0) ? g : W(0);
        grad_y[n * size + e] = store<T>(s * weighted[t] - constant[t] - v * inverse[t] * slope[t]);
      });
    });
  }

  template <bool SHORTCUT, bool TWO>
  static void tail_forward(const NormShape &shape, const NormForward &a) {
    C chain(shape);
    Norm<W> first = first_norm(shape, a), second = second_norm(shape, a);
    const T *y = static_cast<const T *>(a.y), *shortcut = static_cast<const T *>(a.shortcut);
    W *out = static_cast<W *>(a.out);
    const int64_t size = chain.size, channels = shape.channels;
    const W *center = first.center.data(), *scale = first.scale.data(), *bias = first.bias;
    const W *second_center = second.center.data(), *second_scale = second.scale.data(), *second_bias = second.bias;
    auto value = [=](int64_t n, int64_t e, int64_t) { return load(y[n * size + e]); };
    auto sum = [=](int64_t n, int64_t e, int64_t c) {
      const int64_t t = n * channels + c;
      const W v = (load(y[n * size + e]) - center[t]) * scale[t] + bias[c];
      return SHORTCUT ? v + load(shortcut[n * size + e]) : v;
    };
    chain.each([&](const Samples &samples) {
      first.measure(chain, samples, value, value);
      if (!TWO) {
        chain.map(samples, [=](int64_t n, int64_t e, int64_t c) { out[n * size + e] = sum(n, e, c); });
        return;
      }
      second.measure(
          chain, samples, [=](int64_t n, int64_t e, int64_t c) { return out[n * size + e] = relu(sum(n, e, c)); },
          [=](int64_t n, int64_t e, int64_t) { return out[n * size + e]; });
      chain.map(samples, [=](int64_t n, int64_t e, int64_t c) {
        const int64_t t = n * channels + c;
        out[n * size + e] = (out[n * size + e] - second_center[t]) * second_scale[t] + second_bias[c];
      });
    });
  }

  template <bool SHORTCUT, bool TWO>
  static void tail_vjp(const NormShape &shape, const NormBackward &a) {
    C chain(shape);
    Norm<W> first = first_norm(shape, a), second = second_norm(shape, a);
    const T *y = static_cast<const T *>(a.y), *shortcut = static_cast<const T *>(a.shortcut);
    const W *grad = static_cast<const W *>(a.grad);
    W *grad_shortcut = static_cast<W *>(a.grad_shortcut);
    T *grad_y = static_cast<T *>(a.grad_y);
    const int64_t size = chain.size, channels = shape.channels;
    const W *center = first.center.data(), *inverse = first.inverse.data();
    const W *scale = first.scale.data(), *bias = first.bias;
    const W *weighted = first.weighted.data(), *constant = first.constant.data(), *slope = first.slope.data();
    const W *second_center = second.center.data(), *second_inverse = second.inverse.data();
    const W *second_weighted = second.weighted.data(), *second_constant = second.constant.data();
    const W *second_slope = second.slope.data();
    const W *gradient = TWO ? grad_shortcut : grad;
    auto sum = [=](int64_t n, int64_t e, int64_t c) {
      const int64_t t = n * channels + c;
      const W v = (load(y[n * size + e]) - center[t]) * scale[t] + bias[c];
      return SHORTCUT ? v + load(shortcut[n * size + e]) : v;
    };
    chain.each([&](const Samples &samples) {
      first.from_statistics(samples);
      if (TWO) {
        second.from_statistics(samples);
        chain.template reduce<true>(samples, [=](int64_t n, int64_t e, int64_t c, W &s, W &q) {
          const int64_t t = n * channels + c;
          s = grad[n * size + e];
          q = s * ((relu(sum(n, e, c)) - second_center[t]) * second_inverse[t]);
        });
        second.vjp_from_sums(chain, samples, a.second_grad_weight, a.second_grad_bias);
        chain.template reduce<true>(samples, [=](int64_t n, int64_t e, int64_t c, W &s, W &q) {
          const int64_t t = n * channels + c;
          const W u = sum(n, e, c), u_hat = (relu(u) - second_center[t]) * second_inverse[t];
          const W g = grad[n * size + e] * second_weighted[t] - second_constant[t] - u_hat * second_slope[t];
          s = u > W(0) ? g : W(0);
          q = s * ((load(y[n * size + e]) - center[t]) * inverse[t]);
          grad_shortcut[n * size + e] = s;
        });
      } else {
        chain.template reduce<true>(samples, [=](int64_t n, int64_t e, int64_t c, W &s, W &q) {
          const int64_t t = n * channels + c;
          s = grad[n * size + e];
          q = s * ((load(y[n * size + e]) - center[t]) * inverse[t]);
        });
      }
      first.vjp_from_sums(chain, samples, a.first_grad_weight, a.first_grad_bias);
      if (a.coefficients) return first.write_coefficients(samples, a.coefficients);
      chain.map(samples, [=](int64_t n, int64_t e, int64_t c) {
        const int64_t t = n * channels + c;
        const W y_hat = (load(y[n * size + e]) - center[t]) * inverse[t];
        grad_y[n * size + e] = store<T>(gradient[n * size + e] * weighted[t] - constant[t] - y_hat * slope[t]);
      });
    });
  }

  static void tail_forward_any(const NormShape &shape, const NormForward &a) {
    if (a.second_weight)
      a.shortcut ? tail_forward<true, true>(shape, a) : tail_forward<false, true>(shape, a);
    else
      a.shortcut ? tail_forward<true, false>(shape, a) : tail_forward<false, false>(shape, a);
  }

  static void tail_vjp_any(const NormShape &shape, const NormBackward &a) {
    if (a.second_weight)
      a.shortcut ? tail_vjp<true, true>(shape, a) : tail_vjp<false, true>(shape, a);
    else
      tail_vjp<false, false>(shape, a);
  }
};

template <bool NHWC, typename Run>
void dispatch_type(DType type, Run run) {
  switch (type) {
    case DType::f32: return run(Kernels<NHWC, float>());
    case DType::f64: return run(Kernels<NHWC, double>());
    case DType::bf16: return run(Kernels<NHWC, bf16>());
    default: throw std::invalid_argument("a type of activations that the CPU kernels do not take");
  }
}

template <typename Run>
void dispatch(DType type, const NormShape &shape, Run run) {
  shape.channels_last ? dispatch_type<true>(type, run) : dispatch_type<false>(type, run);
}

void check(DType type, const NormBackward &a) {
  if (a.coefficients && type != DType::f32) throw std::invalid_argument("coefficients are of float activations only");
}

}  // namespace

void norm_relu(DType type, const NormShape &shape, const NormForward &a) {
  dispatch(type, shape, [&](auto k) { k.relu_forward(shape, a); });
}
void norm_relu_vjp(DType type, const NormShape &shape, const NormBackward &a) {
  check(type, a);
  dispatch(type, shape, [&](auto k) { k.relu_vjp(shape, a); });
}
void norm_tail(DType type, const NormShape &shape, const NormForward &a) {
  dispatch(type, shape, [&](auto k) { k.tail_forward_any(shape, a); });
}
void norm_tail_vjp(DType type, const NormShape &shape, const NormBackward &a) {
  check(type, a);
  dispatch(type, shape, [&](auto k) { k.tail_vjp_any(shape, a); });
}

void norm_sums(const NormShape &shape, const NormSums &a) {
  const SampleNorm norm{shape.channels, shape.positions, shape.groups, shape.eps, a.weight};
  const int64_t size = shape.channels * shape.positions;
  const std::vector<int64_t> list = running_samples(shape.n, shape.status);
  const int64_t count = list.size();
#pragma omp parallel for schedule(static) num_threads(team(count, shape.threads))
  for (int64_t s = 0; s < count; ++s) {
    const int64_t n = list[s], row = n * 2 * shape.channels;
    norm.measure(a.y + n * size, a.sums + row * a.parts, a.parts, a.coefficients + row);
  }
}

}  // namespace ifr::IFR_ISA
