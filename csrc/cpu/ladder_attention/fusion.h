// What the kernels of pixel_adaptive_fusion share: packed parameters, and rows of packed elements.
#pragma once

#include "cpu/ladder_attention/fusion_kernels.h"
#include "ppmoe/activation.h"
#include "ppmoe/tile.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {

using namespace ppmoe::PPMOE_ISA;

int64_t fusion_backward_scratch(const FusionBackward&, int64_t rows);
void fusion_backward(const FusionBackward&, int64_t row, int64_t rows, void* scratch);
void fusion_sums(DType, const void* x, int64_t stride, int64_t rows, int64_t columns, void* out);
int64_t fusion_gradient_scratch(const FusionGradient&);
void fusion_gradient(const FusionGradient&, void* scratch);

namespace {

// The packed parameters one after another: three matrices, their biases in whole panels of wide
// elements, and for the backward the matrices turned.
template <class T>
struct Parameters {
  int64_t channels, width;
  char* base;

  static constexpr int64_t kWide = sizeof(wide_t<T>);

  int64_t matrix(int64_t i) const {  // bytes; w1, w2, wp, and the same turned
    const int64_t c = channels, d = width;
    const int64_t outputs[6] = {d, c, c, c, d, c}, depths[6] = {c, d, c, d, c, c};
    return round_up(Weights<T>::bytes(outputs[i], depths[i]), 64);
  }
  int64_t biases() const {
    return round_up((padded_columns<T>(width) + 2 * padded_columns<T>(channels)) * kWide, 64);
  }
  int64_t bytes(bool backward) const {
    const int64_t forward = matrix(0) + matrix(1) + matrix(2) + biases();
    return backward ? forward + matrix(3) + matrix(4) + matrix(5) : forward;
  }
  Weights<T> at(int64_t offset, int64_t outputs, int64_t depth) const {
    return {reinterpret_cast<Packed<T>*>(base + offset), outputs, depth};
  }
  Weights<T> w1() const { return at(biases(), width, channels); }
  Weights<T> w2() const { return at(biases() + matrix(0), channels, width); }
  Weights<T> wp() const { return at(biases() + matrix(0) + matrix(1), channels, channels); }
  Weights<T> w1_turned() const { return at(bytes(false), channels, width); }
  Weights<T> w2_turned() const { return at(bytes(false) + matrix(3), width, channels); }
  Weights<T> wp_turned() const {
    return at(bytes(false) + matrix(3) + matrix(4), channels, channels);
  }
  wide_t<T>* b1() const { return reinterpret_cast<wide_t<T>*>(base); }
  wide_t<T>* b2() const { return b1() + padded_columns<T>(width); }
  wide_t<T>* bp() const { return b2() + padded_columns<T>(channels); }
};

template <class T>
Parameters<T> parameters(int64_t channels, int64_t width, const void* base) {
  return {channels, width, static_cast<char*>(const_cast<void*>(base))};
}

// The first n elements of a vector, the others being zero.
template <class P>
PPMOE_INLINE WideVec<P> load_first(const P* from, int64_t n) {
  constexpr int64_t lanes = kWideLanes<P>;
  if (n >= lanes) return load_wide(from);
  P part[lanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = from[i];
  return load_wide(part);
}
template <class P>
PPMOE_INLINE void store_first(P* to, WideVec<P> v, int64_t n) {
  constexpr int64_t lanes = kWideLanes<P>;
  if (n >= lanes) return store_wide(to, v);
  P part[lanes];
  store_wide(part, v);
  for (int64_t i = 0; i < n; ++i) to[i] = part[i];
}

// Rows of packed elements that products read and epilogues fill. `pitch` holds whole panels; what
// is written past the columns is cut off by `end`.
template <class T>
struct Rows {
  Packed<T>* data;
  int64_t pitch;

  Packed<T>* at(int64_t i) const { return data + i * pitch; }
  // Zeros behind the last of `columns`, which a product of pairs reads.
  void end(int64_t rows, int64_t columns) const {
    if (packed_depth<T>(columns) == columns) return;
    for (int64_t i = 0; i < rows; ++i) at(i)[columns] = Packed<T>{};
  }
};

// Rows of dtype as packed rows: where they lie if they are that already, else copies.
template <class T>
PPMOE_INLINE Rows<T> packed_rows(const T* from, int64_t stride, int64_t rows, int64_t columns,
                                 Packed<T>* scratch) {
  if constexpr (sizeof(T) == sizeof(Packed<T>)) {
    if (packed_depth<T>(columns) == columns) return {const_cast<T*>(from), stride};
  }
  const Rows<T> copies{scratch, padded_columns<T>(columns)};
  for (int64_t i = 0; i < rows; ++i) pack_row<T>(from + i * stride, 1, columns, copies.at(i));
  return copies;
}

// c [rows, a panel's outputs] = a @ one panel of w.
template <class T>
PPMOE_INLINE void panel_product(const Rows<T>& a, int64_t rows, const Weights<T>& w, int64_t panel,
                                wide_t<T>* c) {
  using S = typename Scheme<T>::type;
  multiply(Left<S>{a.data, a.pitch, S::kPair}, rows,
           Right<S>{w.panel(panel), kColumns<S> * S::kPair}, kVectors,
           packed_depth<T>(w.depth) / S::kPair, c, kColumns<S>, false);
}

// A product of rows with w, panel by panel while a panel's results are in the first-level cache:
// body(row, first column, columns left, values).
template <class T, class F>
PPMOE_INLINE void by_panels(const Rows<T>& a, int64_t rows, const Weights<T>& w, wide_t<T>* tile,
                            const F& body) {
  constexpr int64_t columns = kColumns<typename Scheme<T>::type>;
  for (int64_t panel = 0; panel < w.panels(); ++panel) {
    panel_product<T>(a, rows, w, panel, tile);
    for (int64_t i = 0; i < rows; ++i) {
      const wide_t<T>* from = tile + i * columns;
      for (int64_t j = panel * columns; j < least(w.outputs, (panel + 1) * columns);
           j += kWideLanes<T>, from += kWideLanes<T>) {
        body(i, j, w.outputs - j, load<WideVec<T>>(from));
      }
    }
  }
}

// Bytes of scratch for rows of packed elements, and for a panel's results.
template <class T>
constexpr int64_t rows_bytes(int64_t rows, int64_t columns) {
  return round_up(rows * padded_columns<T>(columns) * static_cast<int64_t>(sizeof(Packed<T>)), 64);
}
template <class T>
constexpr int64_t tile_bytes(int64_t rows) {
  return rows * kColumns<typename Scheme<T>::type> * static_cast<int64_t>(sizeof(wide_t<T>));
}

// What a product reads, so that it may be rounded as the products' own instruction does: a
// subnormal bfloat16 is zero.
template <class V, class P>
PPMOE_INLINE void store_packed(P* to, V v) {
  store_wide(to, v);
}
#if defined(__AVX512BF16__)
PPMOE_INLINE void store_packed(Bf16* to, VecF v) {
  store(to, (VecH)_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
}
#endif

// As torch: a NaN stays.
template <class V>
PPMOE_INLINE V relu(V x) {
  return x <= 0 ? V{} : x;
}

}  // namespace
}  // namespace ppmoe::ladder_attention::PPMOE_ISA
