// What the attention kernels share: rows of a map in wide elements, and turned ones.
#pragma once

#include "cpu/ladder_attention/attention_kernels.h"
#include "ppmoe/tile.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {

using namespace ppmoe::PPMOE_ISA;

int64_t attention_scratch(const Attention&);
void attention(const Attention&, int64_t begin, int64_t end, int64_t head, int64_t heads,
               void* scratch);
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

// The first n of a vector's elements, n being less than a vector has; the others are zero. What
// lies behind them in memory is not touched.
template <class T>
PPMOE_INLINE WideVec<T> load_part(const T* from, int64_t n) {
  T part[kWideLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = from[i];
  return load_wide(part);
}

template <class T>
PPMOE_INLINE void store_part(T* to, WideVec<T> v, int64_t n) {
  T part[kWideLanes<T>];
  store_wide(part, v);
  for (int64_t i = 0; i < n; ++i) to[i] = part[i];
}

// To bfloat16 by the processor's own conversion where there is one; it takes subnormal numbers for
// zero, and so do its products.
PPMOE_INLINE VecH rounded(VecF v) {
#if defined(__AVX512BF16__)
  return (VecH)(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  return to_bf16(v);
#endif
}
template <class T>
PPMOE_INLINE void put(T* to, WideVec<T> v) {
  store_wide(to, v);
}
PPMOE_INLINE void put(Bf16* to, VecF v) { store(to, rounded(v)); }

// Through registers alone: a vector load has to wait long for smaller stores to the same place.
#if defined(__AVX512F__)
PPMOE_INLINE __mmask16 lanes_below(int64_t n) {
  return static_cast<__mmask16>((1u << static_cast<unsigned>(n)) - 1);
}
PPMOE_INLINE VecF load_part(const float* from, int64_t n) {
  return reinterpret_cast<VecF>(_mm512_maskz_loadu_ps(lanes_below(n), from));
}
PPMOE_INLINE VecF load_part(const Bf16* from, int64_t n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes_below(n), from);
  return reinterpret_cast<VecF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
PPMOE_INLINE VecF load_part(const F16* from, int64_t n) {
  return reinterpret_cast<VecF>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_below(n), from)));
}
PPMOE_INLINE void store_part(float* to, VecF v, int64_t n) {
  _mm512_mask_storeu_ps(to, lanes_below(n), reinterpret_cast<__m512>(v));
}
PPMOE_INLINE void store_part(Bf16* to, VecF v, int64_t n) {
  _mm256_mask_storeu_epi16(to, lanes_below(n), reinterpret_cast<__m256i>(rounded(v)));
}
PPMOE_INLINE void store_part(F16* to, VecF v, int64_t n) {
  const __m512 wide = reinterpret_cast<__m512>(v);
  _mm256_mask_storeu_epi16(to, lanes_below(n), _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// A row in wide elements; rows of scratch hold whole vectors, and zeros behind the last element.
template <class T>
PPMOE_INLINE void widen_row(const T* from, int64_t stride, int64_t n, wide_t<T>* to) {
  constexpr int lanes = kWideLanes<T>;
  if (stride != 1) {
    for (int64_t j = 0; j < n; ++j) to[j] = to_float(from[j * stride]);
    for (int64_t j = n; j < round_up(n, lanes); ++j) to[j] = 0;
    return;
  }
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) store(to + j, load_wide(from + j));
  if (j < n) store(to + j, load_part(from + j, n - j));
}

template <class T>
PPMOE_INLINE void narrow_row(const wide_t<T>* from, int64_t n, T* to, int64_t stride) {
  constexpr int lanes = kWideLanes<T>;
  if (stride != 1) {
    for (int64_t j = 0; j < n; ++j) to[j * stride] = narrow<T>(from[j]);
    return;
  }
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) put(to + j, load<WideVec<T>>(from + j));
  if (j < n) store_part(to + j, load<WideVec<T>>(from + j), n - j);
}

// A vector of which only the first n lanes are kept.
PPMOE_INLINE VecF first_lanes(VecF v, int64_t n, VecF rest = VecF{}) {
  return lane_numbers() < static_cast<int32_t>(n) ? v : rest;
}
PPMOE_INLINE VecD first_lanes(VecD v, int64_t n, VecD rest = VecD{}) {
  for (int i = 0; i < kBytes / 8; ++i) v[i] = i < n ? v[i] : rest[i];
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

// e^x for x <= 0, within 2 ulp of its largest value.
#if defined(__AVX512F__)
PPMOE_INLINE VecF exponential_below(VecF x) {
  // The larger of both, and NaN where x is NaN.
  const VecF clamped = reinterpret_cast<VecF>(
      _mm512_max_ps(reinterpret_cast<__m512>(splat(-104.f)), reinterpret_cast<__m512>(x)));
  const VecF magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF n = clamped * 1.44269504088896341f + magic - magic;
  const VecF r = (clamped - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  VecF q = splat(1.381459879e-03f);
  q = q * r + 8.368716575e-03f;
  q = q * r + 4.166838899e-02f;
  q = q * r + 1.666652113e-01f;
  q = q * r + 4.999999404e-01f;
  const VecF p = q * (r * r) + r + 1.f;
  return reinterpret_cast<VecF>(
      _mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
}
#else
PPMOE_INLINE VecF exponential_below(VecF x) { return exp(x); }
#endif
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
  bool same_size(const Window& other) const {
    return height == other.height && width == other.width;
  }

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

// Asks for the channels of one head in the tokens of a window, one token of one map a call.
struct Ahead {
  const char* at[3] = {};
  int64_t row[3], column[3], bytes = 0;
  int64_t width = 0, rows = 0, r = 0, c = 0;
  int map = 0;

  Ahead() = default;
  Ahead(const Attention& a, const Window& w, int64_t channel, int64_t size)
      : bytes(a.head_dim * size), width(w.width), rows(w.height) {
    const Map* const maps[] = {&a.q, &a.k, &a.v};
    for (int i = 0; i < 3; ++i) {
      const Map& m = *maps[i];
      row[i] = m.row * size;
      column[i] = m.column * size;
      at[i] = static_cast<const char*>(m.data) +
              (w.image * m.image + w.top * m.row + w.left * m.column + channel * m.channel) * size;
    }
  }
  PPMOE_INLINE_MEMBER void advance() {
    if (r == rows) return;
    const char* const from = at[map] + r * row[map] + c * column[map];
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b);
    if (++map < 3) return;
    map = 0;
    if (++c < width) return;
    c = 0;
    ++r;
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
// What comes next is asked for meanwhile.
template <class W>
PPMOE_INLINE void soften(const Attention& a, int64_t tokens, int64_t vectors, int64_t stride,
                         const W* bias, W* scores, W* inverse, Ahead& ahead) {
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
      ahead.advance();
      store(scores + i * stride + j, e);
      total += e;
    }
    store(inverse + j, W{1} / total);
  }
}

}  // namespace
}  // namespace ppmoe::ladder_attention::PPMOE_ISA
