// One system of equations to a lane, solved by LU with partial pivoting.
#pragma once

#include "cpu/equilibrium/cell.h"

namespace ppmoe::cell::PPMOE_ISA {
namespace {

// Rows i > k of the lanes whose diagonal is less than half of the largest element below it are
// exchanged with that one's. Multipliers are then 2 at most, and most lanes need no exchange.
template <class V>
PPMOE_INLINE void exchange(V* m, V* right, int64_t r, int64_t k) {
  using S = Scalar<V>;
  const V diagonal = magnitude(m[k * r + k]);
  V most = diagonal;
  for (int64_t i = k + 1; i < r; ++i) {
    const V each = magnitude(m[i * r + k]);
    most = each > most ? each : most;
  }
  const Mask<V> small = diagonal < most * S(0.5);
  if (!some(small)) return;
  const uint32_t bits = bits_of(small);
  for (int lane = 0; lane < kCount<V>; ++lane) {
    if (!has(bits, lane)) continue;
    S* const at = reinterpret_cast<S*>(m) + lane;
    int64_t chosen = k;
    S best = 0;
    for (int64_t i = k; i < r; ++i) {
      const S each = at[(i * r + k) * kCount<V>], size = each < 0 ? -each : each;
      if (size > best) best = size, chosen = i;
    }
    const auto swap = [&](S* one, S* other) {
      const S kept = *one;
      *one = *other, *other = kept;
    };
    for (int64_t j = k; j < r; ++j) {
      swap(at + (k * r + j) * kCount<V>, at + (chosen * r + j) * kCount<V>);
    }
    S* const to = reinterpret_cast<S*>(right) + lane;
    swap(to + k * kCount<V>, to + chosen * kCount<V>);
  }
}

// to -= factors[0] from[0] - ... for a tile of a row.
template <int kWidth, class V>
PPMOE_INLINE void eliminate(const V* from, V* m, int64_t r, int64_t k, int64_t j,
                            const V* factors) {
  V pivot_row[kWidth];
#pragma GCC unroll 8
  for (int b = 0; b < kWidth; ++b) pivot_row[b] = from[b];
  for (int64_t i = k + 1; i < r; ++i) {
    V* const to = m + i * r + j;
    const V factor = factors[i];
#pragma GCC unroll 8
    for (int b = 0; b < kWidth; ++b) to[b] -= factor * pivot_row[b];
  }
}

// right becomes the solution of m x = right; m [r, r] is used up, as are `factors` [r].
template <class V>
void lu_solve(V* m, V* right, int64_t r, V* factors) {
  for (int64_t k = 0; k < r; ++k) {
    exchange(m, right, r, k);
    const V inverse = (V{} + 1) / m[k * r + k];
    m[k * r + k] = inverse;
    for (int64_t i = k + 1; i < r; ++i) {
      factors[i] = m[i * r + k] * inverse;
      right[i] -= factors[i] * right[k];
    }
    int64_t j = k + 1;
    for (; j + 8 <= r; j += 8) eliminate<8>(m + k * r + j, m, r, k, j, factors);
    if (j + 4 <= r) eliminate<4>(m + k * r + j, m, r, k, j, factors), j += 4;
    if (j + 2 <= r) eliminate<2>(m + k * r + j, m, r, k, j, factors), j += 2;
    if (j < r) eliminate<1>(m + k * r + j, m, r, k, j, factors);
  }
  for (int64_t i = r - 1; i >= 0; --i) {
    V s = right[i];
    for (int64_t j = i + 1; j < r; ++j) s -= m[i * r + j] * right[j];
    right[i] = s * m[i * r + i];
  }
}

// m = I - diag(turn) a.
template <class V>
void newton_matrix(const Scalar<V>* a, int64_t r, const V* turn, V* m) {
  by_groups(r, [&](int64_t i, auto width) __attribute__((always_inline)) {
    constexpr int kWidth = width_of(decltype(width){});
    const Scalar<V>* from = a + i * r;
    for (int64_t k = 0; k < r; ++k, from += kWidth) {
#pragma GCC unroll 8
      for (int b = 0; b < kWidth; ++b) {
        const V each = turn[i + b] * from[b];
        m[(i + b) * r + k] = i + b == k ? V{} + 1 - each : -each;
      }
    }
  });
}

}  // namespace
}  // namespace ppmoe::cell::PPMOE_ISA
