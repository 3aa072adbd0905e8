// Rows of a map one after another, and their norms.
#pragma once

#include "cpu/ladder_attention/attention.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

// The first channel of the pixel that has this number among all pixels of all images.
template <class T>
PPMOE_INLINE T* pixel(const Map& map, int64_t height, int64_t width, int64_t number) {
  const int64_t inside = number % (height * width), image = number / (height * width);
  return static_cast<T*>(map.data) + image * map.image + inside / width * map.row +
         inside % width * map.column;
}

// (x - mean) / deviation of a row of n elements, in place; returns one over the deviation. What is
// past the row up to a whole vector comes out finite.
template <class W>
PPMOE_INLINE W standardise(W* row, int64_t n, double eps) {
  using V = WideVec<W>;
  constexpr int lanes = kWideVector<W>;
  V total = V{};
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) total += load<V>(row + j);
  if (j < n) total += first_lanes(load<V>(row + j), n - j);
  const V mean = sum(total) / static_cast<W>(n) - V{};
  V square = V{};
  for (j = 0; j < n; j += lanes) {
    V centred = load<V>(row + j) - mean;
    if (j + lanes > n) centred = first_lanes(centred, n - j);
    store(row + j, centred);
    square += centred * centred;
  }
  const W deviation =
      static_cast<W>(__builtin_sqrt(sum(square) / static_cast<W>(n) + static_cast<W>(eps)));
  const V inverse = W{1} / deviation - V{};
  for (j = 0; j < n; j += lanes) store(row + j, load<V>(row + j) * inverse);
  return W{1} / deviation;
}

// A row of packed elements from a wide one, with zeros up to packed_depth.
template <class T>
PPMOE_INLINE void put_packed(const wide_t<T>* from, int64_t n, Packed<T>* to) {
  narrow_row<Packed<T>>(from, n, to, 1);
  for (int64_t j = n; j < packed_depth<T>(n); ++j) to[j] = Packed<T>{};
}

// The factor of a pixel's image.
template <class W>
PPMOE_INLINE W scale_of(const void* row_scale, int64_t pixels, int64_t number) {
  return row_scale != nullptr ? static_cast<const W*>(row_scale)[number / pixels] : W{1};
}

}  // namespace
}  // namespace ppmoe::ladder_attention::PPMOE_ISA
