// What the attention kernels share: rows of a map in wide elements, and turned ones.
#pragma once

#include "cpu/ladder_attention/attention_kernels.h"
#include "ppmoe/tile.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {

using namespace ppmoe::PPMOE_ISA;

int64_t attention_scratch(const Attention&);
void attention(const Attention&, int64_t begin, int64_t end, void* scratch);
int64_t attention_backward_scratch(const AttentionBackward&);
void attention_backward(const AttentionBackward&, int64_t head, int64_t begin, int64_t end,
                        void* table, void* scratch);
int64_t branch_in_scratch(const BranchIn&);
void branch_in(const BranchIn&, int64_t begin, int64_t end, void* scratch);
int64_t branch_out_scratch(const BranchOut&);
void branch_out(const BranchOut&, int64_t begin, int64_t end, void* scratch);
int64_t branch_in_backward_scratch(const BranchInBackward&);
void branch_in_backward(const BranchInBackward&, int64_t begin, int64_t end, void* scratch);
int64_t weight_gradient_scratch(const WeightGradient&);
void weight_gradient(const WeightGradient&, int64_t begin, int64_t end, void* scratch);
DType packed_dtype(DType);
int64_t packed_stride(DType, int64_t n);
int64_t weight_bytes(DType, int64_t outputs, int64_t depth);
int64_t weight_panels(DType, int64_t outputs);
void pack_weights(DType, const void* w, int64_t row, int64_t column, int64_t outputs, int64_t depth,
                  int64_t begin, int64_t end, void* to);
void narrow_elements(DType, const void* from, int64_t n, void* to);
void widen_elements(DType, const void* from, int64_t stride, int64_t n, void* to);

namespace {

// The first n of a vector's elements, n being at most as many as a vector has; the others are zero.
template <class T>
PPMOE_INLINE WideVec<T> load_part(const T* from, int64_t n) {
  constexpr int lanes = kWideLanes<T>;
  T part[lanes] = {};
  if (n == lanes / 2) {
    __builtin_memcpy(static_cast<void*>(part), from, lanes / 2 * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) part[i] = from[i];
  }
  return load_wide(part);
}

template <class T>
PPMOE_INLINE void store_part(T* to, WideVec<T> v, int64_t n) {
  constexpr int lanes = kWideLanes<T>;
  T part[lanes];
  store_wide(part, v);
  if (n == lanes / 2) {
    __builtin_memcpy(static_cast<void*>(to), part, lanes / 2 * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = part[i];
  }
}

template <class T>
PPMOE_INLINE void widen_row(const T* from, int64_t stride, int64_t n, wide_t<T>* to) {
  constexpr int lanes = kWideLanes<T>;
  if (stride != 1) {
    for (int64_t j = 0; j < n; ++j) to[j] = to_float(from[j * stride]);
    return;
  }
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) store(to + j, load_wide(from + j));
  if (j < n) store(to + j, load_part(from + j, n - j));  // rows of scratch hold whole vectors
}

template <class T>
PPMOE_INLINE void narrow_row(const wide_t<T>* from, int64_t n, T* to, int64_t stride) {
  constexpr int lanes = kWideLanes<T>;
  if (stride != 1) {
    for (int64_t j = 0; j < n; ++j) to[j * stride] = narrow<T>(from[j]);
    return;
  }
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) store_wide(to + j, load<WideVec<T>>(from + j));
  if (j < n) store_part(to + j, load<WideVec<T>>(from + j), n - j);
}

// A vector of which only the first n lanes are kept.
PPMOE_INLINE VecF first_lanes(VecF v, int64_t n) {
  return lane_numbers() < static_cast<int32_t>(n) ? v : VecF{};
}
PPMOE_INLINE VecD first_lanes(VecD v, int64_t n) {
  for (int i = 0; i < kBytes / 8; ++i) v[i] = i < n ? v[i] : 0.;
  return v;
}

// to [columns, rows] = from [rows, columns] turned. Both hold whole vectors in either direction.
PPMOE_INLINE void turn(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                       float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      VecI block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) block[r] = load<VecI>(from + (i + r) * from_stride + j);
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(to + (j + r) * to_stride + i, block[r]);
    }
  }
}
PPMOE_INLINE void turn(const double* from, int64_t from_stride, int64_t rows, int64_t columns,
                       double* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

template <class W>
constexpr int kWideVector = static_cast<int>(kBytes / sizeof(W));

PPMOE_INLINE VecF exponential_below(VecF x) { return exp(x); }
PPMOE_INLINE VecD exponential_below(VecD x) {
  for (int i = 0; i < kBytes / 8; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// One window of one image.
struct Window {
  int64_t image, top, height, left, width;

  Window(const Attention& a, int64_t number) {
    const int64_t inside = number % a.windows();
    image = number / a.windows();
    const int64_t row = inside / a.columns.count, column = inside % a.columns.count;
    top = a.rows.begin(row);
    height = a.rows.end(row) - top;
    left = a.columns.begin(column);
    width = a.columns.end(column) - left;
  }
  int64_t tokens() const { return height * width; }

  // body(index, first element of the head) for every token of the map.
  template <class T, class F>
  PPMOE_INLINE_MEMBER void each(const Map& map, int64_t channel, const F& body) const {
    T* const base = static_cast<T*>(map.data) + image * map.image + channel * map.channel;
    for (int64_t r = 0, i = 0; r < height; ++r) {
      T* at = base + (top + r) * map.row + left * map.column;
      for (int64_t c = 0; c < width; ++c, ++i, at += map.column) body(i, at);
    }
  }
};

// bias [keys, queries]: a run of the table for every row of queries.
template <class W>
PPMOE_INLINE void spread_bias(const Attention& a, const Window& w, const W* table, W* bias,
                              int64_t stride) {
  using V = WideVec<W>;
  const int64_t across = 2 * a.columns.window - 1;
  for (int64_t kr = 0; kr < w.height; ++kr) {
    for (int64_t kc = 0; kc < w.width; ++kc, bias += stride) {
      const W* from = table + (a.rows.window - 1 - kr) * across + a.columns.window - 1 - kc;
      W* to = bias;
      for (int64_t r = 0; r < w.height; ++r, from += across, to += w.width) {
        // A run's last vector may go on into the next run, which is written after it.
        for (int64_t j = 0; j < w.width; j += kWideVector<W>) store(to + j, load<V>(from + j));
      }
    }
  }
}

// weights [keys, queries] = exp(scale * scores + bias - largest), in place; and one over their sum.
template <class W>
PPMOE_INLINE void soften(const Attention& a, int64_t tokens, int64_t vectors, int64_t stride,
                         const W* bias, W* scores, W* inverse) {
  using V = WideVec<W>;
  constexpr int lanes = kWideVector<W>;
  const V scale = static_cast<W>(a.scale) - V{};
  for (int64_t j = 0; j < vectors * lanes; j += lanes) {
    V largest = V{} - static_cast<W>(__builtin_inf());
    for (int64_t i = 0; i < tokens; ++i) {
      V s = load<V>(scores + i * stride + j) * scale;
      if (bias != nullptr) s += load<V>(bias + i * stride + j);
      store(scores + i * stride + j, s);
      largest = s > largest ? s : largest;
    }
    V total = V{};
    for (int64_t i = 0; i < tokens; ++i) {
      const V e = exponential_below(load<V>(scores + i * stride + j) - largest);
      store(scores + i * stride + j, e);
      total += e;
    }
    store(inverse + j, W{1} / total);
  }
}

}  // namespace
}  // namespace ppmoe::ladder_attention::PPMOE_ISA
