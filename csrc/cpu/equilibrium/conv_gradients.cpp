// equilibrium_conv_cell: the gradients at the adjoint's solution, from a band of rows.
#include "cpu/equilibrium/conv.h"

namespace ppmoe::conv_cell::PPMOE_ISA {

int64_t gradients_scratch(const Sizes& s, int64_t rows);
void gradients(const Gradients& g, int64_t first, int64_t past, void* scratch, double* sums);

namespace {

constexpr int64_t kRowsAtOnce = 4;  // of one block of maps: they stay in the first cache

// A map's row, and how far the next one is.
template <class S>
struct Map {
  const S* data;
  int64_t row;
};

// sums[k][i] += the products of rows of left[k] and right[i], lane by lane.
template <class V, int K, int I>
__attribute__((noinline)) void outer_block(const Map<scalar_t<V>>* left,
                                           const Map<scalar_t<V>>* right, int64_t y, int64_t rows,
                                           int64_t width, V* sums, int64_t pitch) {
  using S = scalar_t<V>;
  V acc[K][I] = {};
  for (int64_t row = y; row < y + rows; ++row) {
    const S *a[K], *b[I];
    for (int k = 0; k < K; ++k) a[k] = left[k].data + row * left[k].row;
    for (int i = 0; i < I; ++i) b[i] = right[i].data + row * right[i].row;
    for (int64_t x = 0; x < width; x += kLanesOf<V>) {
      V v[I];
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) v[i] = load<V>(b[i] + x);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const V w = load<V>(a[k] + x);
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) acc[k][i] += w * v[i];
      }
    }
  }
  for (int k = 0; k < K; ++k) {
    for (int i = 0; i < I; ++i) sums[k * pitch + i] += acc[k][i];
  }
}

template <class V, int K>
void outer_rows(const Map<scalar_t<V>>* left, const Map<scalar_t<V>>* right, int64_t count,
                int64_t y, int64_t rows, int64_t width, V* sums) {
  int64_t i = 0;
  for (; i + 3 <= count; i += 3) {
    outer_block<V, K, 3>(left, right + i, y, rows, width, sums + i, count);
  }
  for (; i < count; ++i) {
    outer_block<V, K, 1>(left, right + i, y, rows, width, sums + i, count);
  }
}

// sums [left, right] += products over `rows` rows.
template <class V>
void outer(const Map<scalar_t<V>>* left, int64_t lefts, const Map<scalar_t<V>>* right,
           int64_t rights, int64_t rows, int64_t width, V* sums) {
  for (int64_t y = 0; y < rows; y += kRowsAtOnce) {
    const int64_t n = rows - y < kRowsAtOnce ? rows - y : kRowsAtOnce;
    int64_t k = 0;
    for (; k + kBlock <= lefts; k += kBlock) {
      outer_rows<V, kBlock>(left + k, right, rights, y, n, width, sums + k * rights);
    }
    for (; k + 2 <= lefts; k += 2) {
      outer_rows<V, 2>(left + k, right, rights, y, n, width, sums + k * rights);
    }
    for (; k < lefts; ++k) {
      outer_rows<V, 1>(left + k, right, rights, y, n, width, sums + k * rights);
    }
  }
}

// Scratch: t2 are gradients of what the second activation is taken of, padded, with a row above and
// one below; t1 those of the first.
template <class V>
struct Buffers {
  using S = scalar_t<V>;
  S *t2, *t1, *ones;
  V* sums;
  const S** rows;
  Map<S>*left, *right;
  int64_t size = 0;

  Buffers(const Sizes& s, int64_t band, char* from) {
    t2 = take<S>(from, s.hidden * (band + 2) * padded_pitch(s.width));
    t1 = take<S>(from, s.hidden * band * s.pitch());
    ones = take<S>(from, s.pitch());
    sums = take<V>(from, sums_of(s));
    rows = take<const S*>(from, 9 * s.hidden + s.channels);
    left = take<Map<S>>(from, s.hidden + s.channels);
    right = take<Map<S>>(from, 9 * s.hidden + s.inputs + s.channels + 1);
  }

 private:
  template <class T>
  T* take(char* from, int64_t n) {
    T* const here = from == nullptr ? nullptr : reinterpret_cast<T*>(from + size);
    size += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return here;
  }
};

template <class V>
void run_gradients(const Gradients& g, int64_t first, int64_t past, char* scratch, double* sums) {
  using S = scalar_t<V>;
  constexpr int64_t lanes = kLanesOf<V>;
  const Sizes& s = g.sizes;
  const int64_t band = past - first, pitch = s.pitch(), padded = padded_pitch(s.width);
  const Buffers<V> to(s, band, scratch);
  const auto slope = [&](const void* map, S* values, int64_t apart, int64_t y) {
    for (int64_t k = 0; k < s.hidden; ++k, values += apart) {
      const S* const by = at<S>(map, k * s.plane() + y * pitch);
      for (int64_t x = 0; x < s.width; x += lanes) {
        const V v = load<V>(values + x) * load<V>(by + x);
        store(values + x, first_lanes(v, s.width - x));
      }
    }
  };

  // t2 of the rows of the band and of one on either side.
  clear_ends(to.t2, s.hidden * (band + 2), s.width);
  for (int64_t y = first - 1; y <= past; ++y) {
    S* const row = to.t2 + (y - first + 1) * padded + kPad;
    const int64_t apart = (band + 2) * padded;
    if (y < 0 || y >= s.height) {
      for (int64_t k = 0; k < s.hidden; ++k) {
        for (int64_t x = 0; x < s.width; ++x) row[k * apart + x] = 0;
      }
      continue;
    }
    for (int64_t c = 0; c < s.channels; ++c) to.rows[c] = at<S>(g.v, c * s.plane() + y * pitch);
    by_columns<V>(s.width, [&](int64_t x, auto count) __attribute__((always_inline)) {
      product<V, count.value>(to.rows, s.channels, x, g.in, s.hidden, row + x, apart);
    });
    slope(g.second_slope, row, apart, y);
  }

  // t1, and the gradient of u.
  for (int64_t y = first; y < past; ++y) {
    neighbours(s, y, to.rows, [&](int64_t k, int64_t near) {
      return to.t2 + (k * (band + 2) + near - first + 1) * padded;
    });
    S* const row = to.t1 + (y - first) * pitch;
    by_columns<V>(s.width, [&](int64_t x, auto count) __attribute__((always_inline)) {
      product<V, count.value>(to.rows, 9 * s.hidden, x, g.middle, s.hidden, row + x, band * pitch);
    });
    slope(g.first_slope, row, band * pitch, y);
    for (int64_t k = 0; k < s.hidden; ++k) to.rows[k] = row + k * band * pitch;
    S* const grad = static_cast<S*>(g.grad_u) + y * pitch;
    by_columns<V>(s.width, [&](int64_t x, auto count) __attribute__((always_inline)) {
      product<V, count.value>(to.rows, s.hidden, x, g.out, s.inputs, grad + x, s.plane());
    });
  }

  const int64_t total = sums_of(s);
  for (int64_t i = 0; i < total; ++i) to.sums[i] = V{};
  for (int64_t x = 0; x < pitch; ++x) to.ones[x] = 1;
  const Map<S> ones{to.ones, 0};
  V* own = to.sums;

  for (int64_t k = 0; k < s.hidden; ++k) to.left[k] = {to.t1 + k * band * pitch, pitch};
  Map<S>* right = to.right;
  for (int64_t i = 0; i < s.inputs; ++i) {
    *right++ = {at<S>(g.u, i * s.plane() + first * pitch), pitch};
  }
  for (int64_t c = 0; c < s.channels; ++c) {
    *right++ = {at<S>(g.z, c * s.plane() + first * pitch), pitch};
  }
  *right = ones;
  outer<V>(to.left, s.hidden, to.right, s.inputs + s.channels + 1, band, s.width, own);
  own += s.hidden * (s.inputs + s.channels + 1);

  for (int64_t k = 0; k < s.hidden; ++k) {
    to.left[k] = {to.t2 + (k * (band + 2) + 1) * padded + kPad, padded};
  }
  right = to.right;
  for (int64_t k = 0; k < s.hidden; ++k) {
    for (int64_t dy = 0; dy < 3; ++dy) {
      const S* const row = at<S>(g.first, (k * (s.height + 2) + first + dy) * padded + kPad);
      for (int64_t dx = -1; dx <= 1; ++dx) *right++ = {row + dx, padded};
    }
  }
  *right = ones;
  outer<V>(to.left, s.hidden, to.right, 9 * s.hidden + 1, band, s.width, own);
  own += s.hidden * (9 * s.hidden + 1);

  for (int64_t c = 0; c < s.channels; ++c) {
    to.left[c] = {at<S>(g.v, c * s.plane() + first * pitch), pitch};
  }
  right = to.right;
  for (int64_t k = 0; k < s.hidden; ++k) {
    *right++ = {at<S>(g.second, k * s.plane() + first * pitch), pitch};
  }
  *right = ones;
  outer<V>(to.left, s.channels, to.right, s.hidden + 1, band, s.width, own);

  for (int64_t i = 0; i < total; ++i) sums[i] = static_cast<double>(sum(to.sums[i]));
}

}  // namespace

int64_t gradients_scratch(const Sizes& s, int64_t rows) {
  if (s.wide) return Buffers<VecD>(s, rows, nullptr).size;
  return Buffers<VecF>(s, rows, nullptr).size;
}

void gradients(const Gradients& g, int64_t first, int64_t past, void* scratch, double* sums) {
  char* const bytes = static_cast<char*>(scratch);
  if (g.sizes.wide) return run_gradients<VecD>(g, first, past, bytes, sums);
  run_gradients<VecF>(g, first, past, bytes, sums);
}

}  // namespace ppmoe::conv_cell::PPMOE_ISA
