// Rows of equilibrium_conv_cell: products of maps with broadcast weights, the mixed iterate, dots,
// and a band of rows from the iterate to the next value.
#pragma once

#include "cpu/equilibrium/conv_kernels.h"
#include "ppmoe/activation.h"
#include "ppmoe/vec.h"

namespace ppmoe::conv_cell::PPMOE_ISA {
namespace {

using namespace ppmoe::PPMOE_ISA;

template <class V>
struct Of;
template <>
struct Of<VecF> {
  using scalar = float;
};
template <>
struct Of<VecD> {
  using scalar = double;
};
template <class V>
using scalar_t = typename Of<V>::scalar;
template <class V>
constexpr int64_t kLanesOf = kBytes / static_cast<int64_t>(sizeof(scalar_t<V>));

// Outputs that are summed at once; with two vectors of each they fill the registers.
#if PPMOE_VECTOR_BYTES == 64
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif

// Lanes from `count` on become zero.
template <class V>
PPMOE_INLINE V first_lanes(V v, int64_t count) {
  static const scalar_t<V> numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<V>(numbers) < static_cast<scalar_t<V>>(count) ? v : V{};
}

// out[k] = bias[k] + sum_i weights[i][k] rows[i], for K outputs and N vectors from column x on.
template <class V, int K, int N>
__attribute__((noinline)) void block(const scalar_t<V>* const* rows, int64_t n, int64_t x,
                                     const scalar_t<V>* weights, const scalar_t<V>* bias,
                                     scalar_t<V>* out, int64_t out_pitch) {
  constexpr int64_t lanes = kLanesOf<V>;
  V acc[K][N];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[k][j] = V{} + bias[k];
  }
  for (int64_t i = 0; i < n; ++i, weights += K) {
    const scalar_t<V>* const from = rows[i] + x;
    V v[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) v[j] = load<V>(from + j * lanes);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      const V w = V{} + weights[k];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[k][j] += w * v[j];
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(out + k * out_pitch + j * lanes, acc[k][j]);
  }
}

// All outputs, in blocks as `pack` cuts them.
template <class V, int N>
void product(const scalar_t<V>* const* rows, int64_t n, int64_t x, const Linear& l, int64_t outputs,
             scalar_t<V>* out, int64_t out_pitch) {
  using S = scalar_t<V>;
  const S* weights = static_cast<const S*>(l.weights);
  const S* bias = static_cast<const S*>(l.bias);
  for (; outputs >= kBlock; outputs -= kBlock) {
    block<V, kBlock, N>(rows, n, x, weights, bias, out, out_pitch);
    weights += n * kBlock, bias += kBlock, out += kBlock * out_pitch;
  }
  switch (outputs) {
    case 1: return block<V, 1, N>(rows, n, x, weights, bias, out, out_pitch);
    case 2: return block<V, 2, N>(rows, n, x, weights, bias, out, out_pitch);
    case 3: return block<V, 3, N>(rows, n, x, weights, bias, out, out_pitch);
#if PPMOE_VECTOR_BYTES == 64
    case 4: return block<V, 4, N>(rows, n, x, weights, bias, out, out_pitch);
    case 5: return block<V, 5, N>(rows, n, x, weights, bias, out, out_pitch);
    case 6: return block<V, 6, N>(rows, n, x, weights, bias, out, out_pitch);
    case 7: return block<V, 7, N>(rows, n, x, weights, bias, out, out_pitch);
#endif
    default: return;
  }
}

// Calls body(column, Count<vectors>) for a row of `width`, two vectors at a time.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class V, class F>
PPMOE_INLINE void by_columns(int64_t width, const F& body) {
  constexpr int64_t lanes = kLanesOf<V>;
  int64_t x = 0;
  for (; x + lanes < width; x += 2 * lanes) body(x, Count<2>{});
  if (x < width) body(x, Count<1>{});
}

template <class S>
PPMOE_INLINE const S* at(const void* planes, int64_t offset) {
  return static_cast<const S*>(planes) + offset;
}

// A row of the iterate.
template <class V, int M>
void mix_row(const Pass& p, int64_t offset, scalar_t<V>* to) {
  using S = scalar_t<V>;
  const S* rows[M + 1];
  V weights[M + 1];
  for (int j = 0; j <= M; ++j) rows[j] = at<S>(p.values[j], offset);
  for (int j = 0; j < M; ++j) weights[j] = V{} + static_cast<S>(p.weights[j]);
  for (int64_t x = 0; x < p.sizes.width; x += kLanesOf<V>) {
    V newer = load<V>(rows[0] + x), z = newer;
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) {
      const V older = load<V>(rows[j + 1] + x);
      z -= weights[j] * (newer - older);
      newer = older;
    }
    store(to + x, z);
  }
}

// What the evaluations of one row leave: its value and residual, and its share of the dots.
template <class V, int D>
void finish_row(const Pass& p, int64_t y, const scalar_t<V>* f, const scalar_t<V>* z,
                double* dots) {
  using S = scalar_t<V>;
  constexpr int64_t lanes = kLanesOf<V>;
  const Sizes& s = p.sizes;
  V acc[2 + 2 * D] = {};
  for (int64_t c = 0; c < s.channels; ++c) {
    const int64_t offset = c * s.plane() + y * s.pitch(), row = c * s.pitch();
    S* const value = static_cast<S*>(p.value) + offset;
    S* const residual = p.residual != nullptr ? static_cast<S*>(p.residual) + offset : nullptr;
    const S* const shift = p.shift != nullptr ? at<S>(p.shift, offset) : nullptr;
    const S* older[D + 1];
    for (int j = 0; j < D; ++j) older[j] = at<S>(p.residuals[j], offset);
    for (int64_t x = 0; x < s.width; x += lanes) {
      V whole = load<V>(f + row + x);
      if (shift != nullptr) whole += load<V>(shift + x);
      if (x + lanes > s.width) whole = first_lanes(whole, s.width - x);
      const V g = whole - load<V>(z + row + x);
      store(value + x, whole);
      if (residual != nullptr) store(residual + x, g);
      acc[0] += g * g;
      acc[1] += whole * whole;
      V before = g, first{};
#pragma GCC unroll 8
      for (int j = 0; j < D; ++j) {
        const V now = load<V>(older[j] + x), d = before - now;
        if (j == 0) first = d;
        acc[2 + j] += first * d;
        acc[2 + D + j] += d * g;
        before = now;
      }
    }
  }
  for (int i = 0; i < 2 + 2 * D; ++i) dots[i] += static_cast<double>(sum(acc[i]));
}

template <class V>
void mix(const Pass& p, int64_t offset, scalar_t<V>* to) {
  switch (p.mixed) {
    case 0: return mix_row<V, 0>(p, offset, to);
    case 1: return mix_row<V, 1>(p, offset, to);
    case 2: return mix_row<V, 2>(p, offset, to);
    case 3: return mix_row<V, 3>(p, offset, to);
    case 4: return mix_row<V, 4>(p, offset, to);
    case 5: return mix_row<V, 5>(p, offset, to);
    default: return mix_row<V, 6>(p, offset, to);
  }
}
template <class V>
void finish(const Pass& p, int64_t y, const scalar_t<V>* f, const scalar_t<V>* z, double* dots) {
  switch (p.differences) {
    case 0: return finish_row<V, 0>(p, y, f, z, dots);
    case 1: return finish_row<V, 1>(p, y, f, z, dots);
    case 2: return finish_row<V, 2>(p, y, f, z, dots);
    case 3: return finish_row<V, 3>(p, y, f, z, dots);
    case 4: return finish_row<V, 4>(p, y, f, z, dots);
    case 5: return finish_row<V, 5>(p, y, f, z, dots);
    default: return finish_row<V, 6>(p, y, f, z, dots);
  }
}

// Scratch of a thread: three padded rows of every hidden map, a row of zeros, two rows of the
// iterate, one of the value, and addresses.
template <class S>
struct Rows {
  S *hidden, *zeros, *z, *f;
  const S **in, **middle, **out;

  int64_t size = 0;

  Rows(const Sizes& s, char* from) {
    hidden = take<S>(from, 3 * s.hidden * padded_pitch(s.width));
    zeros = take<S>(from, padded_pitch(s.width));
    z = take<S>(from, 2 * s.channels * s.pitch());
    f = take<S>(from, s.channels * s.pitch());
    in = take<const S*>(from, s.channels + s.inputs);
    middle = take<const S*>(from, 9 * s.hidden);
    out = take<const S*>(from, s.hidden);
  }

 private:
  template <class T>
  T* take(char* from, int64_t n) {
    T* const here = from == nullptr ? nullptr : reinterpret_cast<T*>(from + size);
    size += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return here;
  }
};

// Zeros at both ends of padded rows.
template <class S>
void clear_ends(S* rows, int64_t count, int64_t width) {
  const int64_t pitch = padded_pitch(width);
  for (int64_t row = 0; row < count; ++row, rows += pitch) {
    for (int64_t x = 0; x < kPad; ++x) rows[x] = 0;
    for (int64_t x = kPad + width; x < pitch; ++x) rows[x] = 0;
  }
}

// Addresses of the nine inputs of each hidden map for row y: `row_of(map, y)` is a padded row, of
// zeros outside the map.
template <class S, class F>
void neighbours(const Sizes& s, int64_t y, const S** to, const F& row_of) {
  for (int64_t k = 0; k < s.hidden; ++k) {
    for (int64_t dy = -1; dy <= 1; ++dy) {
      const S* const row = row_of(k, y + dy);
      for (int64_t dx = -1; dx <= 1; ++dx) *to++ = row + kPad + dx;
    }
  }
}

// Rows first to past. `stage` says what becomes of hidden values: it has first and second of
// (values, offset in planes, whether the row belongs to the band), and kEnds where only they count.
template <class V, class Stage>
void run_band(const Pass& p, const Stage& stage, int64_t first, int64_t past, char* scratch,
              double* dots) {
  using S = scalar_t<V>;
  constexpr int64_t lanes = kLanesOf<V>;
  const Sizes& s = p.sizes;
  const int64_t padded = padded_pitch(s.width);
  const Rows<S> rows(s, scratch);
  clear_ends(rows.hidden, 3 * s.hidden, s.width);
  for (int64_t x = 0; x < padded; ++x) rows.zeros[x] = 0;
  const auto hidden = [&](int64_t k, int64_t y) {
    return rows.hidden + (k * 3 + (y + 3) % 3) * padded;
  };
  const auto iterate = [&](int64_t y) { return rows.z + y % 2 * s.channels * s.pitch(); };

  const auto begin_row = [&](int64_t y) {
    if (y < 0 || y >= s.height) return;
    S* const z = iterate(y);
    for (int64_t c = 0; c < s.channels; ++c) {
      mix<V>(p, c * s.plane() + y * s.pitch(), z + c * s.pitch());
      rows.in[c] = z + c * s.pitch();
    }
    for (int64_t i = 0; i < s.inputs; ++i) {
      rows.in[s.channels + i] = at<S>(p.u, i * s.plane() + y * s.pitch());
    }
    const bool own = y >= first && y < past;
    by_columns<V>(s.width, [&](int64_t x, auto count) __attribute__((always_inline)) {
      S* const to = hidden(0, y) + kPad + x;
      product<V, count.value>(rows.in, s.channels + s.inputs, x, p.in, s.hidden, to, 3 * padded);
      for (int64_t k = 0; k < s.hidden; ++k) {
        const int64_t offset = k * s.plane() + y * s.pitch() + x;
        for (int64_t j = 0; j < count.value * lanes; j += lanes) {
          V v = load<V>(to + 3 * k * padded + j);
          if (p.injected != nullptr) v += load<V>(at<S>(p.injected, offset + j));
          v = stage.first(v, offset + j, own);
          if (x + j + lanes > s.width) v = first_lanes(v, s.width - x - j);
          store(to + 3 * k * padded + j, v);
        }
      }
    });
    if (own) stage.row(hidden(0, y), 3 * padded, y);
  };

  begin_row(first - 1);
  begin_row(first);
  S buffer[kMostHidden * 2 * kLanesOf<V>];
  for (int64_t y = first; y < past; ++y) {
    begin_row(y + 1);
    neighbours(s, y, rows.middle, [&](int64_t k, int64_t near) -> const S* {
      return near < 0 || near >= s.height ? rows.zeros : hidden(k, near);
    });
    by_columns<V>(s.width, [&](int64_t x, auto count) __attribute__((always_inline)) {
      constexpr int64_t wide = count.value * lanes;
      product<V, count.value>(rows.middle, 9 * s.hidden, x, p.middle, s.hidden, buffer, wide);
      for (int64_t k = 0; k < s.hidden; ++k) {
        const int64_t offset = k * s.plane() + y * s.pitch() + x;
        for (int64_t j = 0; j < wide; j += lanes) {
          store(buffer + k * wide + j, stage.second(load<V>(buffer + k * wide + j), offset + j));
        }
        rows.out[k] = buffer + k * wide;
      }
      if constexpr (!Stage::kEnds) {
        product<V, count.value>(rows.out, s.hidden, 0, p.out, s.channels, rows.f + x, s.pitch());
      }
    });
    if constexpr (!Stage::kEnds) finish<V>(p, y, rows.f, iterate(y), dots);
  }
}

// Clears the dots of a pass before its rows are added.
inline void clear_dots(double* dots) {
  for (int i = 0; i < kMostDots; ++i) dots[i] = 0;
}

}  // namespace
}  // namespace ppmoe::conv_cell::PPMOE_ISA
