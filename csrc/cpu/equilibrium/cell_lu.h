// One system of equations to a lane, solved by LU with partial pivoting.
#pragma once

#include "cpu/equilibrium/cell.h"

namespace ppmoe::cell::PPMOE_ISA {
namespace {

template <class V>
PPMOE_INLINE void swap_lane(V* one, V* other, int lane) {
  using S = Scalar<V>;
  S* const a = reinterpret_cast<S*>(one) + lane;
  S* const b = reinterpret_cast<S*>(other) + lane;
  const S kept = *a;
  *a = *b, *b = kept;
}

// What row k was exchanged with, for the lanes in which it was.
template <class V>
struct Pivot {
  uint32_t lanes;
  int16_t row[kCount<V>];
};

// Rows of the lanes whose diagonal is less than half of the largest element below it are exchanged
// with that one's. Multipliers are then 2 at most, and most lanes need no exchange.
template <class V>
PPMOE_INLINE void exchange(V* m, int64_t r, int64_t k, Pivot<V>& pivot) {
  using S = Scalar<V>;
  const V diagonal = magnitude(m[k * r + k]);
  V most = diagonal;
  for (int64_t i = k + 1; i < r; ++i) {
    const V each = magnitude(m[i * r + k]);
    most = each > most ? each : most;
  }
  pivot.lanes = bits_of(diagonal < most * S(0.5));
  for (int lane = 0; pivot.lanes >> lane != 0; ++lane) {
    if (!has(pivot.lanes, lane)) continue;
    const S* const at = reinterpret_cast<const S*>(m) + lane;
    int64_t chosen = k;
    S best = 0;
    for (int64_t i = k; i < r; ++i) {
      const S each = at[(i * r + k) * kCount<V>], size = each < 0 ? -each : each;
      if (size > best) best = size, chosen = i;
    }
    pivot.row[lane] = static_cast<int16_t>(chosen);
    for (int64_t j = 0; j < r; ++j) swap_lane(m + k * r + j, m + chosen * r + j, lane);
  }
}

// A tile of the rows below k, less row k times their multipliers.
template <int kWidth, class V>
PPMOE_INLINE void eliminate(V* m, int64_t r, int64_t k, int64_t j) {
  V pivot_row[kWidth];
#pragma GCC unroll 8
  for (int b = 0; b < kWidth; ++b) pivot_row[b] = m[k * r + j + b];
  for (int64_t i = k + 1; i < r; ++i) {
    V* const to = m + i * r + j;
    const V factor = m[i * r + k];
#pragma GCC unroll 8
    for (int b = 0; b < kWidth; ++b) to[b] -= factor * pivot_row[b];
  }
}

// m [r, r] becomes its factors; the diagonal holds inverses.
template <class V>
void factor(V* m, int64_t r, Pivot<V>* pivots) {
  for (int64_t k = 0; k < r; ++k) {
    exchange(m, r, k, pivots[k]);
    const V inverse = (V{} + 1) / m[k * r + k];
    m[k * r + k] = inverse;
    for (int64_t i = k + 1; i < r; ++i) m[i * r + k] *= inverse;
    int64_t j = k + 1;
    for (; j + 8 <= r; j += 8) eliminate<8>(m, r, k, j);
    if (j + 4 <= r) eliminate<4>(m, r, k, j), j += 4;
    if (j + 2 <= r) eliminate<2>(m, r, k, j), j += 2;
    if (j < r) eliminate<1>(m, r, k, j);
  }
}

// right becomes the solution of m x = right, m as `factor` left it.
template <class V>
void substitute(const V* m, int64_t r, const Pivot<V>* pivots, V* right) {
  for (int64_t k = 0; k < r; ++k) {
    for (int lane = 0; pivots[k].lanes >> lane != 0; ++lane) {
      if (has(pivots[k].lanes, lane)) swap_lane(right + k, right + pivots[k].row[lane], lane);
    }
  }
  for (int64_t i = 1; i < r; ++i) {
    V s{};
    for (int64_t j = 0; j < i; ++j) s += m[i * r + j] * right[j];
    right[i] -= s;
  }
  for (int64_t i = r - 1; i >= 0; --i) {
    V s = right[i];
    for (int64_t j = i + 1; j < r; ++j) s -= m[i * r + j] * right[j];
    right[i] = s * m[i * r + i];
  }
}

template <class V>
constexpr int64_t pivot_bytes(int64_t r) {
  return (r * static_cast<int64_t>(sizeof(Pivot<V>)) + kBytes - 1) / kBytes * kBytes;
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
