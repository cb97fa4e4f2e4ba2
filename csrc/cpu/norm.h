// What norm.cpp and solver.cpp share of GroupNorm.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace ifr::IFR_ISA {

// Not `x > 0 ? x : 0`: a NaN must stay visible.
template <typename W>
inline W relu(W x) {
  return x < W(0) ? W(0) : x;
}

// A group's mean, and its variance plus eps, from its channels' sums of x and of x^2.
struct Moments {
  double mean, variance;

  Moments(const double *sum, const double *square, int64_t channels, double count, double eps) {
    double a = 0, b = 0;
    for (int64_t c = 0; c < channels; ++c) a += sum[c], b += square[c];
    mean = a / count;
    variance = std::max(b / count - mean * mean, 0.0) + eps;
  }
};

// The GroupNorm of one sample of floats in channels_last.
struct SampleNorm {
  int64_t channels, positions, groups;
  double eps;
  const float *weight;

  // gn(x) = (x - center) * scale + bias: writes center and scale (2, channels). sums (parts, 2, channels): of x, and
  // of x * x, formed in float over a few values at a time.
  void measure(const float *x, const double *sums, int64_t parts, float *center) const {
    // A variance far below the mean's square is lost in their difference: such a group is summed anew from x - mean.
    // With this bound the roundings of float weigh at most 17 times in the variance. They may also have overflowed.
    constexpr double BOUND = 16;
    const int64_t width = channels / groups;
    const double count = double(width * positions);
    std::vector<double> total(sums, sums + 2 * channels);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t c = 0; c < 2 * channels; ++c) total[c] += sums[part * 2 * channels + c];
    std::vector<int64_t> inexact;
    for (int64_t g = 0; g < groups; ++g) {
      const Moments found(&total[g * width], &total[channels + g * width], width, count, eps);
      if (!(found.mean * found.mean <= BOUND * found.variance && std::isfinite(found.variance))) inexact.push_back(g);
      write(center, g, float(found.mean), found.variance);
    }
    if (inexact.empty()) return;
    sum_centred(x, center, total.data());
    for (const int64_t g : inexact) {
      const Moments found(&total[g * width], &total[channels + g * width], width, count, eps);
      write(center, g, float(center[g * width] + found.mean), found.variance);
    }
  }

 private:
  void write(float *center, int64_t g, float mean, double variance) const {
    const float rstd = float(1.0 / std::sqrt(variance));
    for (int64_t c = g * channels / groups; c < (g + 1) * channels / groups; ++c)
      center[c] = mean, center[channels + c] = rstd * weight[c];
  }

  void sum_centred(const float *x, const float *center, double *sums) const {
    std::fill(sums, sums + 2 * channels, 0.0);
    for (int64_t o = 0; o < positions; ++o) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const double d = double(x[o * channels + c] - center[c]);
        sums[c] += d;
        sums[channels + c] += d * d;
      }
    }
  }
};

}  // namespace ifr::IFR_ISA
