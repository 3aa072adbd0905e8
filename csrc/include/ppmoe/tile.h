// Products for rows that lie in memory as they are: no packing of a, and b packed once for many
// calls. For linear layers between the other passes of a fused operator, and for attention.
//
// Rows are in the packed dtype of gemm.h: bfloat16 where there is a dot product for it, double for
// double, else float. A step is one element of the sum, or a pair where elements come in pairs; an
// odd sum ends in a pair with a zero.
#pragma once

#include "ppmoe/gemm.h"

namespace ppmoe::PPMOE_ISA {

// Element (row, step) of the left side, in packed elements.
template <class S>
struct Left {
  const typename S::Packed* data;
  int64_t row, step;
};

// The vectors of a step lie together.
template <class S>
struct Right {
  const typename S::Packed* data;
  int64_t step;
};

// c [rows, vectors] = or += a @ b. Its bits depend on neither how rows nor how vectors are cut.
template <class S>
void multiply(const Left<S>& a, int64_t rows, const Right<S>& b, int64_t vectors, int64_t steps,
              wide_t<typename S::Packed>* c, int64_t ldc, bool add);

template <class T>
constexpr int64_t packed_depth(int64_t depth) {
  return round_up(depth, Scheme<T>::type::kPair);
}
template <class T>
constexpr int64_t padded_columns(int64_t columns) {
  return round_up(columns, kColumns<typename Scheme<T>::type>);
}

// The weights of a linear layer, out = a @ w^T, as panels of kColumns outputs.
template <class T>
struct Weights {
  using S = typename Scheme<T>::type;
  Packed<T>* data;
  int64_t outputs, depth;

  static int64_t bytes(int64_t outputs, int64_t depth) {
    return padded_columns<T>(outputs) * packed_depth<T>(depth) *
           static_cast<int64_t>(sizeof(Packed<T>));
  }
  int64_t panels() const { return (outputs + kColumns<S> - 1) / kColumns<S>; }
  Packed<T>* panel(int64_t i) const { return data + i * kColumns<S> * packed_depth<T>(depth); }
  // Line o of `w` is what output o takes of the depth.
  void pack(int64_t i, const Lines<T>& w) const {
    pack_panel<S, kColumns<S>>(w.from(i * kColumns<S>, 0), outputs - i * kColumns<S>, depth,
                               panel(i));
  }
};

// c [rows, padded_columns(outputs)] = or += a [rows, packed_depth(depth)] @ w^T.
template <class T>
void linear(const Packed<T>* a, int64_t lda, int64_t rows, const Weights<T>& w, wide_t<T>* c,
            int64_t ldc, bool add = false) {
  using S = typename Scheme<T>::type;
  const int64_t steps = packed_depth<T>(w.depth) / S::kPair;
  for (int64_t i = 0; i < w.panels(); ++i) {
    multiply(Left<S>{a, lda, S::kPair}, rows, Right<S>{w.panel(i), kColumns<S> * S::kPair},
             kVectors, steps, c + i * kColumns<S>, ldc, add);
  }
}

// A row in the packed dtype; what is past its end up to packed_depth is zero.
template <class T>
PPMOE_INLINE void pack_row(const T* from, int64_t stride, int64_t n, Packed<T>* to) {
  int64_t j = 0;
  if (stride == 1) {
    constexpr int lanes = kWideLanes<T>;
    for (; j + lanes <= n; j += lanes) store_wide(to + j, load_wide(from + j));
  }
  for (; j < n; ++j) to[j] = to_packed<typename Scheme<T>::type>(from[j * stride]);
  for (; j < packed_depth<T>(n); ++j) to[j] = Packed<T>{};
}

}  // namespace ppmoe::PPMOE_ISA
