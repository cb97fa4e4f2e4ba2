// 3x3 convolutions with padding 1 by Winograd's algorithm (Lavin & Gray, 2016), of float in channels_last.
//
// A tile of 4x4 outputs takes 6x6 inputs. Both are transformed, and a convolution becomes 36 products of matrices,
// (tiles, channels) x (channels, out_channels), one for each point: 4 times fewer multiplications than directly. The
// points 0, +-3/4, +-3/2 and infinity lose the least accuracy of those tried. Where 1 or 2 rows (columns) of a map are
// left over, tiles are only 2 high (wide): their 4 points are the first 4 of the 6, so the weights serve both.
//
// Tiles are handled in blocks, each from its inputs to its outputs, so that what lies between stays near. Threads share
// the blocks or, where there are too few, the output channels. Each number is computed by the same operations in the
// same order however tiles are shared out, so results depend neither on the threads nor on the batch mates.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "samples.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace ifr::IFR_ISA {
namespace {

#define IFR_INLINE inline __attribute__((always_inline))

// Floats in a register, and the most rows of a product that the registers hold beside its two columns of registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, MOST_ROWS = 14;
#elif defined(__AVX2__)
constexpr int LANES = 8, MOST_ROWS = 6;
#else
constexpr int LANES = 4, MOST_ROWS = 6;
#endif
constexpr int64_t PANEL = 2 * LANES;  // output channels of a product
constexpr int64_t BLOCK_TILES = 64;        // about so many tiles make a block, if there are enough for all threads
constexpr int64_t GROUP_CHANNELS = 256;  // output channels of a block that are held at a time
constexpr int64_t SKEW = 80;             // floats between points: addresses a power of two apart share cache sets
constexpr int POINTS = 6;                // of a row or column of a tile

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef double Half __attribute__((vector_size(LANES * sizeof(float))));
typedef float HalfFloats __attribute__((vector_size(LANES * sizeof(float) / 2)));

IFR_INLINE Vector load(const float *p) { return *reinterpret_cast<const Unaligned *>(p); }
IFR_INLINE void store(float *p, Vector v) { *reinterpret_cast<Unaligned *>(p) = v; }
IFR_INLINE Vector broadcast(float v) { return v - Vector{}; }

// The points: 0, A, -A, infinity, B, -B. The scale of each interpolation is in the transform of the data.
constexpr double A = 0.75, B = 1.5, AA = A * A, BB = B * B;

// Bᵀd of F(4, 3) or, of its first four points, of F(2, 3).
template <bool FOUR>
IFR_INLINE void transform_data(const Vector *d, Vector *out) {
  if (FOUR) {
    constexpr double na = 2 * AA * (AA - BB), nb = 2 * BB * (BB - AA);
    constexpr float c02 = -(AA + BB) / (AA * BB), c04 = 1 / (AA * BB), c31 = AA * BB, c33 = -(AA + BB);
    constexpr float a1 = -A * BB / na, a2 = -BB / na, a3 = A / na, a4 = 1 / na;
    constexpr float b1 = -B * AA / nb, b2 = -AA / nb, b3 = B / nb, b4 = 1 / nb;
    const Vector even_a = a4 * d[4] + a2 * d[2], odd_a = a3 * d[3] + a1 * d[1];
    const Vector even_b = b4 * d[4] + b2 * d[2], odd_b = b3 * d[3] + b1 * d[1];
    out[0] = d[0] + c02 * d[2] + c04 * d[4];
    out[1] = even_a + odd_a, out[2] = even_a - odd_a;
    out[3] = d[5] + c33 * d[3] + c31 * d[1];
    out[4] = even_b + odd_b, out[5] = even_b - odd_b;
  } else {
    constexpr float c02 = -1 / AA, c2 = 1 / (2 * AA), c1 = A / (2 * AA), c31 = -AA;
    const Vector even = c2 * d[2], odd = c1 * d[1];
    out[0] = d[0] + c02 * d[2];
    out[1] = even + odd, out[2] = even - odd;
    out[3] = d[3] + c31 * d[1];
  }
}

// Aᵀm, the outputs.
template <bool FOUR>
IFR_INLINE void transform_output(const Vector *m, Vector *y) {
  const Vector even_a = m[1] + m[2], odd_a = m[1] - m[2];
  if (FOUR) {
    constexpr float a1 = A, a2 = AA, a3 = A * AA, b1 = B, b2 = BB, b3 = B * BB;
    const Vector even_b = m[4] + m[5], odd_b = m[4] - m[5];
    y[0] = m[0] + even_a + even_b;
    y[1] = a1 * odd_a + b1 * odd_b;
    y[2] = a2 * even_a + b2 * even_b;
    y[3] = m[3] + a3 * odd_a + b3 * odd_b;
  } else {
    constexpr float a1 = A;
    y[0] = m[0] + even_a;
    y[1] = m[3] + a1 * odd_a;
  }
}

// How a map is cut into tiles: rows of tiles, the last of which may be 2 high; so for columns.
struct Map {
  int64_t rows, tall, columns, wide;  // tall and wide: how many are 4 high and 4 wide
  explicit Map(const Convolution &c)
      : rows((c.height + 3) / 4), tall(rows - short_end(c.height)), columns((c.width + 3) / 4),
        wide(columns - short_end(c.width)) {}
  static bool short_end(int64_t size) { return size % 4 == 1 || size % 4 == 2; }
  int64_t tiles() const { return rows * columns; }
};

// A run of tile rows, which may belong to several samples. Its tiles are numbered so that those which have a point are
// side by side: tall narrow ones, tall wide, short wide, short narrow.
struct Block {
  int64_t first, last;  // tile rows, counted over the running samples
  int64_t narrow, tall, shorts, tiles;  // numbers of: tall narrow tiles, all tall tiles, those and short wide tiles, all

  Block(const Map &map, int64_t first, int64_t last) : first(first), last(last) {
    int64_t tall_rows = 0;
    for (int64_t row = first; row < last; ++row) tall_rows += row % map.rows < map.tall;
    const int64_t short_rows = last - first - tall_rows;
    narrow = tall_rows * (map.columns - map.wide);
    tall = tall_rows * map.columns;
    shorts = tall + short_rows * map.wide;
    tiles = (last - first) * map.columns;
  }
};

// Where the tiles of a row are: wide tiles from `wide` on, then the narrow one.
struct Places {
  int64_t tall_rows = 0, short_rows = 0, wide = 0, narrow = 0;
  void next(const Map &map, const Block &block, bool tall) {
    const int64_t ends = map.columns - map.wide;
    if (tall) {
      wide = block.narrow + tall_rows * map.wide, narrow = tall_rows * ends, ++tall_rows;
    } else {
      wide = block.tall + short_rows * map.wide, narrow = block.shorts + short_rows * ends, ++short_rows;
    }
  }
};

// Reads what is convolved, for one sample and LANES channels.
template <Read READ>
struct Reader {
  const float *x, *other;
  Vector a, b, bias, weighted, constant, slope;

  Reader(const Convolution &c, int64_t sample, int64_t channel) {
    const int64_t start = sample * c.height * c.width * c.channels + channel;
    x = c.x + start, other = READ == Read::plain || READ == Read::norm_relu ? nullptr : c.other + start;
    if (READ == Read::plain || READ == Read::sum) return;
    const float *k = c.coefficients + sample * (READ == Read::norm_relu ? 2 : 5) * c.channels + channel;
    a = load(k), b = load(k + c.channels);
    if (READ != Read::norm_vjp) bias = load(c.bias + channel);
    if (READ == Read::norm_relu) return;
    weighted = load(k + 2 * c.channels), constant = load(k + 3 * c.channels), slope = load(k + 4 * c.channels);
  }

  IFR_INLINE Vector operator()(int64_t offset) const {
    const Vector v = load(x + offset);
    if (READ == Read::plain) return v;
    if (READ == Read::sum) return v + load(other + offset);
    if (READ == Read::norm_relu) {
      const Vector u = (v - a) * b + bias;
      return u < Vector{} ? Vector{} : u;
    }
    const Vector centred = load(other + offset) - a;
    const Vector grad = READ == Read::norm_vjp || centred * b + bias > Vector{} ? v : Vector{};
    return grad * weighted - (constant + centred * slope);
  }
};

// The transformed inputs of a block: for each point (channels / LANES, tiles, LANES). Tiles without a point have no
// data there.
struct Inputs {
  float *data;
  int64_t tiles, point;  // point: floats from one point to the next
  Inputs(float *data, const Convolution &c, const Block &b)
      : data(data), tiles(b.tiles), point(b.tiles * c.channels + SKEW) {}
};

// Row buffers of one tile row: its vertical transform, with a column of padding on the left.
IFR_INLINE int64_t buffer_width(const Map &map) { return 4 * map.wide + 2 * (map.columns - map.wide) + 2; }

// The vertical transform of a tile row: buffer (points, buffer width, LANES). next: where the horizontal transform will
// write its wide tiles. They are asked for here, in quarters of a tile, since so many stores apart would stall.
template <bool TALL, Read READ>
void vertical(const Convolution &c, const Map &map, const Reader<READ> &read, int64_t row, float *buffer,
              const float *next, int64_t point) {
  constexpr int SIZE = TALL ? 6 : 4, QUARTER = POINTS * POINTS / 4;
  const int64_t width = buffer_width(map), top = row * 4 - 1, line = c.width * c.channels;
  for (int64_t at = 0; at < width; ++at) {
    const int64_t column = at - 1;
    if (at < 4 * map.wide)
      for (int p = 0; p < QUARTER; ++p)
        __builtin_prefetch(next + at / 4 * LANES + (at % 4 * QUARTER + p) * point, 1, 3);
    Vector d[SIZE], out[SIZE];
    if (column < 0 || column >= c.width) {
#pragma GCC unroll 6
      for (int r = 0; r < SIZE; ++r) store(buffer + (r * width + at) * LANES, Vector{});
      continue;
    }
    if (top >= 0 && top + SIZE <= c.height) {
#pragma GCC unroll 6
      for (int r = 0; r < SIZE; ++r) d[r] = read((top + r) * line + column * c.channels);
    } else {
#pragma GCC unroll 6
      for (int r = 0; r < SIZE; ++r)
        d[r] = top + r < 0 || top + r >= c.height ? Vector{} : read((top + r) * line + column * c.channels);
    }
    transform_data<TALL>(d, out);
#pragma GCC unroll 6
    for (int r = 0; r < SIZE; ++r) store(buffer + (r * width + at) * LANES, out[r]);
  }
}

// The horizontal transform of one tile: from its first column in the buffer to its place at the first point.
template <bool TALL, bool WIDE>
IFR_INLINE void horizontal(const float *buffer, int64_t width, float *out, int64_t point) {
  constexpr int HIGH = TALL ? 6 : 4, LONG = WIDE ? 6 : 4;
#pragma GCC unroll 6
  for (int r = 0; r < HIGH; ++r) {
    Vector d[LONG], o[LONG];
#pragma GCC unroll 6
    for (int j = 0; j < LONG; ++j) d[j] = load(buffer + (r * width + j) * LANES);
    transform_data<WIDE>(d, o);
#pragma GCC unroll 6
    for (int j = 0; j < LONG; ++j) store(out + (r * POINTS + j) * point, o[j]);
  }
}

template <bool TALL, Read READ>
void transform_row(const Convolution &c, const Map &map, const Reader<READ> &read, int64_t row, const Places &places,
                   float *buffer, float *out, int64_t point) {
  vertical<TALL, READ>(c, map, read, row, buffer, out + places.wide * LANES, point);
  const int64_t width = buffer_width(map);
  for (int64_t j = 0; j < map.wide; ++j)
    horizontal<TALL, true>(buffer + j * 4 * LANES, width, out + (places.wide + j) * LANES, point);
  if (map.wide < map.columns)
    horizontal<TALL, false>(buffer + map.wide * 4 * LANES, width, out + places.narrow * LANES, point);
}

// Transforms a block's inputs, of the channels [begin, end).
template <Read READ>
void transform_inputs(const Convolution &c, const Map &map, const std::vector<int64_t> &samples, const Block &b,
                      const Inputs &v, int64_t begin, int64_t end, float *buffer) {
  Places places;
  for (int64_t row = b.first; row < b.last; ++row) {
    const int64_t in_map = row % map.rows;
    const bool tall = in_map < map.tall;
    places.next(map, b, tall);
    for (int64_t channel = begin; channel < end; channel += LANES) {
      const Reader<READ> read(c, samples[row / map.rows], channel);
      float *out = v.data + channel * v.tiles;
      if (tall)
        transform_row<true, READ>(c, map, read, in_map, places, buffer, out, v.point);
      else
        transform_row<false, READ>(c, map, read, in_map, places, buffer, out, v.point);
    }
  }
}

// out (2, tiles, LANES) = data (channels / LANES, tiles, LANES) x weights (channels, PANEL), for ROWS tiles. ahead: what
// the next product reads; `lines` cache lines of it are asked for in every LANES channels.
template <int ROWS>
void multiply(const float *data, const float *weights, float *out, int64_t tiles, int64_t channels,
              const float *ahead, int lines) {
  Vector sums[ROWS][2];
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i) sums[i][0] = sums[i][1] = Vector{};
  for (int64_t c = 0; c < channels; c += LANES, data += tiles * LANES) {
    for (int i = 0; i < ROWS; ++i) __builtin_prefetch(data + (tiles + i) * LANES, 0, 3);
    for (int quarter = 0; quarter < LANES; quarter += LANES / 4) {
      for (int l = 0; l < lines; ++l, ahead += 16) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 4
      for (int k = quarter; k < quarter + LANES / 4; ++k, weights += PANEL) {
        const Vector left = load(weights), right = load(weights + LANES);
#pragma GCC unroll 14
        for (int i = 0; i < ROWS; ++i) {
          const Vector value = broadcast(data[i * LANES + k]);
          sums[i][0] += value * left;
          sums[i][1] += value * right;
        }
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i) {
    store(out + i * LANES, sums[i][0]);
    store(out + (tiles + i) * LANES, sums[i][1]);
  }
}

using Multiply = void (*)(const float *, const float *, float *, int64_t, int64_t, const float *, int);
constexpr Multiply MULTIPLY[] = {
    nullptr, multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>,
#if defined(__AVX512F__)
    multiply<7>, multiply<8>, multiply<9>, multiply<10>, multiply<11>, multiply<12>, multiply<13>, multiply<14>,
#endif
};

// The same for any number of rows, shared out evenly. Prefetches the panel of weights that follows this one.
void multiply_rows(const float *data, const float *weights, float *out, int64_t tiles, int64_t channels, int64_t rows) {
  const int64_t parts = (rows + MOST_ROWS - 1) / MOST_ROWS;
  const int lines = int(parts ? std::max<int64_t>(1, PANEL * LANES / 64 / parts) : 0);
  const float *ahead = weights + channels * PANEL;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    MULTIPLY[end - begin](data + begin * LANES, weights, out + begin * LANES, tiles, channels, ahead, lines);
    ahead += 4 * lines * 16 * (channels / LANES);
  }
}

// The products of a block, for the panels of output channels [begin, end).
struct Outputs {
  float *data;
  int64_t tiles, point, begin, end;  // for each point (panels, 2, tiles, LANES)
  Outputs(float *data, const Block &b, int64_t begin, int64_t end)
      : data(data), tiles(b.tiles), point(b.tiles * (end - begin) * PANEL + SKEW), begin(begin), end(end) {}
};

void multiply_points(const Convolution &c, const Block &b, const Inputs &v, const Outputs &m) {
  const int64_t panels = c.out_channels / PANEL;
  for (int p = 0; p < POINTS * POINTS; ++p) {
    const bool tall = p / POINTS >= 4, wide = p % POINTS >= 4;  // points that short, or narrow, tiles have not
    const int64_t first = wide ? b.narrow : 0, last = tall ? b.tall : wide ? b.shorts : b.tiles;
    for (int64_t q = m.begin; q < m.end; ++q)
      multiply_rows(v.data + p * v.point + first * LANES, c.weights + (p * panels + q) * c.channels * PANEL,
                    m.data + p * m.point + ((q - m.begin) * 2 * m.tiles + first) * LANES, m.tiles, c.channels,
                    last - first);
  }
}

// Sums of y and of y * y over a tile row, in double.
struct Sums {
  Half low{}, high{}, low_squares{}, high_squares{};
  static Half half(Vector v, bool upper) {
    HalfFloats part;
    std::memcpy(&part, reinterpret_cast<const char *>(&v) + (upper ? sizeof(part) : 0), sizeof(part));
    return __builtin_convertvector(part, Half);
  }
  IFR_INLINE void add(Vector sum, Vector squares) {
    low += half(sum, false), high += half(sum, true);
    low_squares += half(squares, false), high_squares += half(squares, true);
  }
  void write(double *sum, double *squares) const {
    std::memcpy(sum, &low, sizeof low), std::memcpy(sum + LANES / 2, &high, sizeof high);
    std::memcpy(squares, &low_squares, sizeof low), std::memcpy(squares + LANES / 2, &high_squares, sizeof high);
  }
};

// The outputs of one tile, of which height x width exist. m: its products at the first point.
template <bool TALL, bool WIDE>
IFR_INLINE void transform_tile(const float *m, int64_t point, float *y, int64_t line, int64_t pixel, int height,
                               int width, Sums *sums) {
  constexpr int HIGH = TALL ? 6 : 4, LONG = WIDE ? 6 : 4, ROWS = TALL ? 4 : 2, COLUMNS = WIDE ? 4 : 2;
  Vector half[ROWS][LONG];
#pragma GCC unroll 6
  for (int j = 0; j < LONG; ++j) {
    Vector d[HIGH], o[ROWS];
#pragma GCC unroll 6
    for (int r = 0; r < HIGH; ++r) {
      d[r] = load(m + (r * POINTS + j) * point);
      __builtin_prefetch(m + (r * POINTS + j) * point + LANES, 0, 3);  // of the next tile
    }
    transform_output<TALL>(d, o);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) half[r][j] = o[r];
  }
  Vector sum = {}, squares = {};
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    Vector o[COLUMNS];
    transform_output<WIDE>(half[r], o);
    if (r < height)
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j)
        if (j < width) {
          store(y + r * line + j * pixel, o[j]);
          __builtin_prefetch(y + r * line + j * pixel + LANES, 1, 3);  // of the next channels
          sum += o[j], squares += o[j] * o[j];
        }
  }
  if (sums != nullptr) sums->add(sum, squares);
}

template <bool TALL>
void transform_outputs_row(const Convolution &c, const Map &map, const float *m, int64_t point, const Places &places,
                           float *y, int height, Sums *sums) {
  constexpr int ROWS = TALL ? 4 : 2;
  const int64_t line = c.width * c.out_channels, pixel = c.out_channels;
  for (int64_t j = 0; j < map.wide; ++j) {
    const int width = int(std::min<int64_t>(4, c.width - 4 * j));
    const float *tile = m + (places.wide + j) * LANES;
    if (height == ROWS && width == 4)
      transform_tile<TALL, true>(tile, point, y + 4 * j * pixel, line, pixel, ROWS, 4, sums);
    else
      transform_tile<TALL, true>(tile, point, y + 4 * j * pixel, line, pixel, height, width, sums);
  }
  if (map.wide < map.columns) {
    const int width = int(c.width - 4 * map.wide);
    transform_tile<TALL, false>(m + places.narrow * LANES, point, y + 4 * map.wide * pixel, line, pixel, height, width,
                                sums);
  }
}

void transform_outputs(const Convolution &c, const Map &map, const std::vector<int64_t> &samples, const Block &b,
                       const Outputs &m) {
  for (int64_t channel = m.begin * PANEL; channel < m.end * PANEL; channel += LANES) {
    const float *data = m.data + (channel - m.begin * PANEL) * m.tiles;
    Places places;
    for (int64_t row = b.first; row < b.last; ++row) {
      const int64_t sample = samples[row / map.rows], in_map = row % map.rows, top = in_map * 4;
      const bool tall = in_map < map.tall;
      places.next(map, b, tall);
      float *y = c.y + (sample * c.height + top) * c.width * c.out_channels + channel;
      const int height = int(std::min<int64_t>(4, c.height - top));
      Sums sums;
      Sums *wanted = c.sums ? &sums : nullptr;
      if (tall)
        transform_outputs_row<true>(c, map, data, m.point, places, y, height, wanted);
      else
        transform_outputs_row<false>(c, map, data, m.point, places, y, height, wanted);
      if (c.sums) {
        double *to = c.sums + (sample * map.rows + in_map) * 2 * c.out_channels + channel;
        sums.write(to, to + c.out_channels);
      }
    }
  }
}

// How a convolution is shared out.
struct Plan {
  int64_t blocks, units, unit;  // unit: tile rows that stay together
  bool split;                   // whether threads share the output channels of every block, not the blocks
  int64_t lanes, most_tiles, group, inputs, outputs, buffer;  // the last three: floats of workspace

  Plan(const Convolution &c, const Map &map, int64_t running) {
    const int64_t panels = c.out_channels / PANEL, threads = std::max(1, c.threads);
    unit = map.tiles() <= BLOCK_TILES ? map.rows : 1;  // whole samples where they fit
    units = running * map.rows / unit;
    const int64_t of_unit = unit * map.columns, most = std::max<int64_t>(1, (BLOCK_TILES + of_unit / 2) / of_unit);
    split = units < std::min(threads, panels);
    lanes = split ? std::min(threads, panels) : std::min(threads, std::max<int64_t>(1, units));
    blocks = (units + most - 1) / most;
    if (!split) blocks = std::min(units, (blocks + lanes - 1) / lanes * lanes);  // the same number for each thread
    most_tiles = blocks ? (units + blocks - 1) / blocks * of_unit : 0;
    group = std::max<int64_t>(1, std::min(GROUP_CHANNELS / PANEL, split ? (panels + lanes - 1) / lanes : panels));
    inputs = POINTS * POINTS * (most_tiles * c.channels + SKEW);
    outputs = POINTS * POINTS * (most_tiles * group * PANEL + SKEW);
    buffer = POINTS * buffer_width(map) * LANES;
  }
  int64_t floats() const { return split ? inputs + lanes * (outputs + buffer) : lanes * (inputs + outputs + buffer); }
};

template <Read READ>
void convolve(const Convolution &c) {
  const Map map(c);
  const std::vector<int64_t> samples = running_samples(c.n, c.status);
  const Plan plan(c, map, int64_t(samples.size()));
  if (plan.blocks == 0) return;
  const int64_t panels = c.out_channels / PANEL;
  auto block = [&](int64_t k) {
    return Block(map, plan.units * k / plan.blocks * plan.unit, plan.units * (k + 1) / plan.blocks * plan.unit);
  };
  auto finish = [&](const Block &b, const Inputs &v, float *outputs, int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; q += plan.group) {
      const Outputs m(outputs, b, q, std::min(end, q + plan.group));
      multiply_points(c, b, v, m);
      transform_outputs(c, map, samples, b, m);
    }
  };
  // Some threads may be left without work.
#pragma omp parallel num_threads(team(plan.lanes, c.threads))
  {
    int64_t thread = 0, threads = 1;
#ifdef _OPENMP
    thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
    const int64_t lanes = std::min(threads, plan.lanes), lane = std::min(thread, lanes);
    auto from = [=](int64_t count) { return count * lane / lanes; };
    auto to = [=](int64_t count) { return lane == lanes ? count : count * (lane + 1) / lanes; };
    if (plan.split) {
      float *outputs = c.workspace + plan.inputs + lane * (plan.outputs + plan.buffer);
      const int64_t chunks = c.channels / LANES;
      for (int64_t k = 0; k < plan.blocks; ++k) {
        const Block b = block(k);
        const Inputs v(c.workspace, c, b);
        transform_inputs<READ>(c, map, samples, b, v, from(chunks) * LANES, to(chunks) * LANES, outputs + plan.outputs);
#pragma omp barrier
        finish(b, v, outputs, from(panels), to(panels));
#pragma omp barrier
      }
    } else {
      float *inputs = c.workspace + lane * (plan.inputs + plan.outputs + plan.buffer), *outputs = inputs + plan.inputs;
      for (int64_t k = from(plan.blocks); k < to(plan.blocks); ++k) {
        const Block b = block(k);
        const Inputs v(inputs, c, b);
        transform_inputs<READ>(c, map, samples, b, v, 0, c.channels, outputs + plan.outputs);
        finish(b, v, outputs, 0, panels);
      }
    }
  }
}

// G g of one column of a kernel: its six values.
template <typename T>
IFR_INLINE void transform_weight(const T *g, T *out) {
  const T even_a = g[0] + AA * g[2], odd_a = A * g[1], even_b = g[0] + BB * g[2], odd_b = B * g[1];
  out[0] = g[0], out[1] = even_a + odd_a, out[2] = even_a - odd_a;
  out[3] = g[2], out[4] = even_b + odd_b, out[5] = even_b - odd_b;
}

}  // namespace

// transformed: (36, out_channels / PANEL, channels, PANEL). In double, rounded once.
void winograd_weights(const WinogradWeights &w) {
  constexpr int HALF = LANES / 2;
  typedef HalfFloats UnalignedHalf __attribute__((aligned(sizeof(float))));
  const int64_t panels = w.out_channels / PANEL;
#pragma omp parallel for schedule(static) num_threads(w.threads)
  for (int64_t item = 0; item < panels * w.channels; ++item) {
    const int64_t panel = item / w.channels, channel = item % w.channels;
    for (int64_t k = 0; k < PANEL; k += HALF) {
      Half vertical[3][POINTS];
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        Half g[3];
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) {
          const float *from = w.weight + ((r * 3 + s) * w.channels + channel) * w.out_channels + panel * PANEL + k;
          g[r] = __builtin_convertvector(HalfFloats(*reinterpret_cast<const UnalignedHalf *>(from)), Half);
        }
        transform_weight(g, vertical[s]);
      }
#pragma GCC unroll 6
      for (int i = 0; i < POINTS; ++i) {
        const Half g[3] = {vertical[0][i], vertical[1][i], vertical[2][i]};
        Half out[POINTS];
        transform_weight(g, out);
#pragma GCC unroll 6
        for (int j = 0; j < POINTS; ++j) {
          float *to = w.transformed + (((i * POINTS + j) * panels + panel) * w.channels + channel) * PANEL + k;
          *reinterpret_cast<UnalignedHalf *>(to) = __builtin_convertvector(out[j], HalfFloats);
        }
      }
    }
  }
}

// Enough for any number of running samples: few of them are shared out in another way than many.
int64_t winograd_workspace(const Convolution &c) {
  int64_t most = 0;
  for (int64_t running = 0; running <= c.n; ++running) most = std::max(most, Plan(c, Map(c), running).floats());
  return most;
}

void winograd(const Convolution &c) {
  switch (c.read) {
    case Read::plain: return convolve<Read::plain>(c);
    case Read::sum: return convolve<Read::sum>(c);
    case Read::norm_relu: return convolve<Read::norm_relu>(c);
    case Read::norm_vjp: return convolve<Read::norm_vjp>(c);
    case Read::norm_relu_vjp: return convolve<Read::norm_relu_vjp>(c);
  }
}

}  // namespace ifr::IFR_ISA
