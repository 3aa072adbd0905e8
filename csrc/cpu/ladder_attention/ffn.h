// What the forward and backward kernels of ladder_ffn share: rows of a unit, vectors of channels,
// and the depth-wise convolution.
#pragma once

#include "cpu/ladder_attention/ffn_kernels.h"
#include "cpu/ladder_attention/rows.h"
#include "ppmoe/activation.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

// Elements from row to row of what lies between phases.
template <class T>
PPMOE_INLINE int64_t row_stride(int64_t channels) {
  return round_up(channels, kWideLanes<T>);
}

enum Vector : int {
  kLnW,
  kLnB,
  kB1,
  kB2,
  kCentre,  // of the three batch norms: (value - centre) * scale + shift
  kScale = kCentre + 3,
  kShift = kScale + 3,
  kTaps = kShift + 3,   // times the first norm's scale
  kStart = kTaps + 9,   // what the convolution starts from, by which neighbours are there
  kRoom = kStart + 16,  // while norms are folded
  kVectorCount = kRoom + 10,
};

// The packed weights and the vectors that `prepare` leaves.
template <class T>
struct Prepared {
  using W = wide_t<T>;
  int64_t channels, pitch;
  Weights<T> w1, w2;
  W* vectors;

  Prepared(char* at, int64_t g)
      : channels(g),
        pitch(padded_columns<T>(g)),
        w1{reinterpret_cast<Packed<T>*>(at), g, g},
        w2{reinterpret_cast<Packed<T>*>(at + weight_bytes(g)), g, g},
        vectors(reinterpret_cast<W*>(at + 2 * weight_bytes(g))) {}

  static int64_t weight_bytes(int64_t g) { return round_up(Weights<T>::bytes(g, g), 64); }
  static int64_t bytes(int64_t g) {
    return 2 * weight_bytes(g) +
           kVectorCount * padded_columns<T>(g) * static_cast<int64_t>(sizeof(W));
  }
  W* vector(int which, int64_t index = 0) const { return vectors + (which + index) * pitch; }
};

// Some pixels, and where the first one is in its image.
struct Unit {
  int64_t begin, count, image, row, column;

  Unit(const Ffn& f, int64_t first, int64_t past)
      : begin(first),
        count(past - first),
        image(first / (f.height * f.width)),
        row(first / f.width % f.height),
        column(first % f.width) {}
  Unit(const Ffn& f, int64_t number)
      : Unit(f, ffn_begin(f.pixels(), number), ffn_begin(f.pixels(), number + 1)) {}

  // body(index, image, row, column) for every pixel.
  template <class F>
  PPMOE_INLINE_MEMBER void each(const Ffn& f, const F& body) const {
    int64_t b = image, r = row, c = column;
    for (int64_t i = 0; i < count; ++i) {
      body(i, b, r, c);
      if (++c < f.width) continue;
      c = 0;
      if (++r < f.height) continue;
      r = 0;
      ++b;
    }
  }
};

template <class T>
PPMOE_INLINE T* at(const Map& map, int64_t image, int64_t row, int64_t column) {
  return static_cast<T*>(map.data) + image * map.image + row * map.row + column * map.column;
}

// to[i] = from[i], wide, and zeros from `count` up to `padded`.
template <class W, class T>
PPMOE_INLINE void widen_into(const T* from, int64_t count, int64_t padded, W* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<W>(to_float(from[i]));
  for (int64_t i = count; i < padded; ++i) to[i] = W{};
}
template <class W>
PPMOE_INLINE void widen_into(const FfnParameter& from, int64_t first, int64_t count, int64_t padded,
                             W* to) {
  with_type(from.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    widen_into(static_cast<const T*>(from.data) + first, count, padded, to);
    return 0;
  });
}

// The taps of [g, 3, 3] as vectors [9].
template <class W>
PPMOE_INLINE void widen_taps(const FfnParameter& from, int64_t g, int64_t pitch, W* to) {
  with_type(from.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    const T* const taps = static_cast<const T*>(from.data);
    for (int64_t c = 0; c < pitch; ++c) {
      for (int k = 0; k < 9; ++k) {
        to[k * pitch + c] = c < g ? static_cast<W>(to_float(taps[c * 9 + k])) : W{};
      }
    }
    return 0;
  });
}

// start [16] = bias + the sum of what taps inside the map add: bits 0 and 1 of an index say that
// there is no column before or after, bits 2 and 3 that there is no row.
template <class W>
void sum_starts(const W* bias, const W* added, int64_t pitch, W* start) {
  using V = WideVec<W>;
  for (int which = 0; which < 16; ++which) {
    for (int64_t j = 0; j < pitch; j += kWideVector<W>) {
      V total = load<V>(bias + j);
      for (int k = 0; k < 9; ++k) {
        const int row = k / 3, column = k % 3;
        const bool outside = (column == 0 && (which & 1)) || (column == 2 && (which & 2)) ||
                             (row == 0 && (which & 4)) || (row == 2 && (which & 8));
        if (!outside) total += load<V>(added + k * pitch + j);
      }
      store(start + which * pitch + j, total);
    }
  }
}

// Walks over the unit for one vector of channels: body(index of the pixel, index into `sum_starts`,
// columns), columns[c][r] being value - centre one column before, at and after the pixel (c), one
// row before, at and after it (r), and zero outside the map. `map` points to these channels of the
// first pixel of all.
template <class P, class V, class F>
PPMOE_INLINE void walk(const Ffn& f, const Unit& unit, const P* map, int64_t stride, V centre,
                       const F& body) {
  alignas(64) const P none[sizeof(V) / sizeof(V{}[0])] = {};
  int64_t row = unit.row, column = unit.column;
  for (int64_t i = 0; i < unit.count;) {
    const int64_t run = least(unit.count - i, f.width - column);
    const bool first = row == 0, last = row + 1 == f.height;
    const P* const here = map + (unit.begin + i) * stride;
    const P* const line[3] = {first ? none : here - f.width * stride, here,
                              last ? none : here + f.width * stride};
    const int64_t step[3] = {first ? 0 : stride, stride, last ? 0 : stride};
    const V off[3] = {first ? V{} : centre, centre, last ? V{} : centre};
    V columns[3][3];
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) {
      columns[0][r] = column > 0 ? load_wide(line[r] - step[r]) - off[r] : V{};
      columns[1][r] = load_wide(line[r]) - off[r];
    }
    for (int64_t c = 0; c < run; ++c) {
      const bool ends = column + c + 1 == f.width;
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        columns[2][r] = ends ? V{} : load_wide(line[r] + (c + 1) * step[r]) - off[r];
      }
      body(i + c, (column + c == 0 ? 1 : 0) + (ends ? 2 : 0) + (first ? 4 : 0) + (last ? 8 : 0),
           columns);
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        columns[0][r] = columns[1][r];
        columns[1][r] = columns[2][r];
      }
    }
    i += run;
    column = 0;
    if (++row == f.height) row = 0;
  }
}

// The sum of nine products, tap[3 * row + column].
template <class V>
PPMOE_INLINE V sum_taps(const V (&columns)[3][3], const V (&tap)[9], V start) {
  V part[3] = {start, V{}, V{}};
#pragma GCC unroll 3
  for (int r = 0; r < 3; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < 3; ++c) part[r] += columns[c][r] * tap[3 * r + c];
  }
  return part[0] + part[1] + part[2];
}

template <class V, class W>
PPMOE_INLINE void load_taps(const W* taps, int64_t pitch, V (&tap)[9]) {
#pragma GCC unroll 9
  for (int k = 0; k < 9; ++k) tap[k] = load<V>(taps + k * pitch);
}

// A whole vector of channels, or the part of one at the end of a row.
struct Whole {
  template <class T>
  PPMOE_INLINE_MEMBER WideVec<T> read(const T* from) const {
    return load_wide(from);
  }
  template <class T>
  PPMOE_INLINE_MEMBER void write(T* to, WideVec<T> v) const {
    put(to, v);
  }
  template <class V>
  PPMOE_INLINE_MEMBER V cut(V v) const {
    return v;
  }
};
struct Part {
  int64_t count;

  template <class T>
  PPMOE_INLINE_MEMBER WideVec<T> read(const T* from) const {
    return load_part(from, count);
  }
  template <class T>
  PPMOE_INLINE_MEMBER void write(T* to, WideVec<T> v) const {
    store_part(to, v, count);
  }
  template <class V>
  PPMOE_INLINE_MEMBER V cut(V v) const {
    return first_lanes(v, count);
  }
};

// body(first channel, Whole or Part) for the vectors of a row.
template <class T, class F>
PPMOE_INLINE void each_vector(int64_t channels, const F& body) {
  int64_t j = 0;
  for (; j + kWideLanes<T> <= channels; j += kWideLanes<T>) body(j, Whole{});
  if (j < channels) body(j, Part{channels - j});
}

// Rows for one product, its result, and rows of a map.
template <class T>
struct Scratch {
  Packed<T>* rows;
  wide_t<T>* tile;
  T* copies;

  static int64_t packed_bytes(int64_t g) {
    return kFfnUnit * row_stride<T>(g) * static_cast<int64_t>(sizeof(Packed<T>));
  }
  static int64_t tile_bytes(int64_t g) {
    return kFfnUnit * padded_columns<T>(g) * static_cast<int64_t>(sizeof(wide_t<T>));
  }
  static int64_t copy_bytes(int64_t g) {
    return kFfnUnit * row_stride<T>(g) * static_cast<int64_t>(sizeof(T));
  }
  static int64_t bytes(int64_t g) {
    return round_up(packed_bytes(g) + tile_bytes(g) + copy_bytes(g), 64);
  }
  Scratch(void* at, int64_t g)
      : rows(static_cast<Packed<T>*>(at)),
        tile(reinterpret_cast<wide_t<T>*>(static_cast<char*>(at) + packed_bytes(g))),
        copies(reinterpret_cast<T*>(reinterpret_cast<char*>(tile) + tile_bytes(g))) {}
};

// The rows of a map that belong to a unit; copies of them where their channels do not lie together.
template <class T>
struct MapRows {
  const T* row[kFfnUnit];

  MapRows(const Ffn& f, const Map& map, const Unit& unit, T* copies) {
    unit.each(f, [&](int64_t i, int64_t b, int64_t r, int64_t c) {
      row[i] = at<const T>(map, b, r, c);
      if (map.channel == 1) return;
      T* const copy = copies + i * row_stride<T>(f.channels);
      for (int64_t j = 0; j < f.channels; ++j) copy[j] = row[i][j * map.channel];
      row[i] = copy;
    });
  }
};

// The factors of the unit's pixels: those of their images.
template <class T>
struct Factors {
  wide_t<T> of[kFfnUnit];

  Factors(const Ffn& f, const Unit& unit) {
    wide_t<T> factor{1};
    unit.each(f, [&](int64_t i, int64_t image, int64_t r, int64_t c) {
      const bool next = i == 0 || (r == 0 && c == 0);
      if (next && f.row_scale.data != nullptr) widen_into(f.row_scale, image, 1, 1, &factor);
      of[i] = factor;
    });
  }
};

// The layer norm of a unit's rows, (x - mean) * inverse. Four rows are measured at a time, as each
// step of a sum over a row waits for the one before.
template <class T>
struct RowNorms {
  static constexpr int kTogether = 4;
  wide_t<T> mean[kFfnUnit + kTogether], inverse[kFfnUnit + kTogether];

  RowNorms(const MapRows<T>& x, int64_t count, int64_t channels, double eps) {
    using W = wide_t<T>;
    using V = WideVec<T>;
    for (int64_t first = 0; first < count; first += kTogether) {
      const T* row[kTogether];
      V total[kTogether] = {}, square[kTogether] = {};
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) row[i] = x.row[least(first + i, count - 1)];
      each_vector<T>(channels, [&](int64_t j, auto part) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) total[i] += part.read(row[i] + j);
      });
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        mean[first + i] = sum(total[i]) / static_cast<W>(channels);
        total[i] = mean[first + i] - V{};
      }
      each_vector<T>(channels, [&](int64_t j, auto part) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          const V centred = part.cut(part.read(row[i] + j) - total[i]);
          square[i] += centred * centred;
        }
      });
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        const W var = sum(square[i]) / static_cast<W>(channels);
        inverse[first + i] = W{1} / static_cast<W>(__builtin_sqrt(var + static_cast<W>(eps)));
      }
    }
  }

  PPMOE_INLINE_MEMBER WideVec<T> operator()(int64_t i, WideVec<T> value) const {
    return (value - mean[i]) * inverse[i];
  }
};

// s.rows = x, normalised over channels, times ln_w plus ln_b.
template <class T>
void norm_rows(const Ffn& f, const Prepared<T>& p, const Unit& unit, const Scratch<T>& s,
               int64_t stride) {
  using V = WideVec<T>;
  const MapRows<T> x(f, f.x, unit, s.copies);
  const RowNorms<T> norm(x, unit.count, f.channels, f.eps);
  const wide_t<T>*const scale = p.vector(kLnW), *const shift = p.vector(kLnB);
  for (int64_t i = 0; i < unit.count; ++i) {
    each_vector<T>(f.channels, [&](int64_t j, auto part) __attribute__((always_inline)) {
      const V n = part.cut(norm(i, part.read(x.row[i] + j)));
      put(s.rows + i * stride + j, n * load<V>(scale + j) + load<V>(shift + j));
    });
  }
}

// value -> (value - centre) * scale + shift, for some channels.
template <class T>
struct Norm {
  WideVec<T> centre, scale, shift;

  PPMOE_INLINE_MEMBER Norm(const Prepared<T>& p, int index, int64_t j)
      : centre(load<WideVec<T>>(p.vector(kCentre, index) + j)),
        scale(load<WideVec<T>>(p.vector(kScale, index) + j)),
        shift(load<WideVec<T>>(p.vector(kShift, index) + j)) {}
  PPMOE_INLINE_MEMBER WideVec<T> operator()(WideVec<T> value) const {
    return (value - centre) * scale + shift;
  }
};

// The tile of w2 times the second norm of a2.
template <class T>
void multiply_second(const Prepared<T>& p, const Unit& unit, const Packed<T>* a2, int64_t stride,
                     const Scratch<T>& s) {
  for (int64_t i = 0; i < unit.count; ++i) {
    for (int64_t j = 0; j < stride; j += kWideLanes<T>) {
      put(s.rows + i * stride + j, Norm<T>(p, 1, j)(load_wide(a2 + i * stride + j)));
    }
  }
  linear(s.rows, stride, unit.count, p.w2, s.tile, p.pitch);
}

}  // namespace

void ffn_prepare(const Ffn&);

// Of the backward.
int64_t ffn_backward_bytes(DType, int64_t channels);
int64_t ffn_backward_scratch(const FfnBackward&);
void ffn_backward_prepare(const FfnBackward&);
void ffn_backward(const FfnBackward&, FfnPhase, int64_t group, void* scratch);
void ffn_backward_settle(const FfnBackward&, FfnPhase);
void ffn_weight_gradient(const FfnBackward&, bool second, int64_t first, int64_t rows);

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
