// The products of tile.h.
#include "ppmoe/tile.h"

namespace ppmoe::PPMOE_ISA {
namespace {

// Steps that are summed in registers before they are added to what there is in memory.
constexpr int64_t kChainSteps = 128;

template <class S>
PPMOE_INLINE typename S::Vec multiply_add(typename S::Vec a, typename S::Vec b,
                                          typename S::Vec total) {
  if constexpr (S::kPair == 1) {
    return total + a * b;
  } else {
#if defined(__AVX512BF16__)
    return reinterpret_cast<VecF>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(total), (__m512bh)(a), (__m512bh)(b)));
#else
    return total;
#endif
  }
}

// One packed element, or pair, in every lane.
template <class S>
PPMOE_INLINE typename S::Vec broadcast(const void* at) {
  if constexpr (S::kPair == 1) {
    return load<typename S::Packed>(at) - typename S::Vec{};
  } else {
    return reinterpret_cast<VecF>(load<int32_t>(at) - VecI{});
  }
}

// Rows are reached from every third one, which takes few address registers.
template <class S, int Rows, int Vectors>
void tile(const Left<S>& a, const Right<S>& b, int64_t steps, wide_t<typename S::Packed>* c,
          int64_t ldc, bool add) {
  using V = typename S::Vec;
  constexpr int kBases = (Rows + 2) / 3;
  constexpr auto kSize = static_cast<int64_t>(sizeof(typename S::Packed));
  const int64_t row = a.row * kSize, step = a.step * kSize, right_step = b.step * kSize;
  const char* base[kBases];
#pragma GCC unroll 4
  for (int i = 0; i < kBases; ++i) base[i] = reinterpret_cast<const char*>(a.data) + 3 * i * row;
  const char* right = reinterpret_cast<const char*>(b.data);
  V total[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) total[i][j] = V{};
  }
  for (int64_t s = 0; s < steps; ++s) {
    V v[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) v[j] = load<V>(right + j * kBytes);
    right += right_step;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const V left = broadcast<S>(base[i / 3] + i % 3 * row);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) total[i][j] = multiply_add<S>(left, v[j], total[i][j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) base[i] += step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      auto* cell = c + i * ldc + j * kLanesOf<S>;
      store(cell, add ? load<V>(cell) + total[i][j] : total[i][j]);
    }
  }
}

template <class S, int Vectors, int Rows = kRows>
PPMOE_INLINE void tile_any(int64_t rows, const Left<S>& a, const Right<S>& b, int64_t steps,
                           wide_t<typename S::Packed>* c, int64_t ldc, bool add) {
  if (rows == Rows) return tile<S, Rows, Vectors>(a, b, steps, c, ldc, add);
  if constexpr (Rows > 1) tile_any<S, Vectors, Rows - 1>(rows, a, b, steps, c, ldc, add);
}

// c [rows, vectors] = or += a @ b, where the vectors are those of a whole panel or fewer. Rows are
// spread evenly over tiles, since a narrow tile leaves the multipliers idle.
template <class S, int Vectors>
void multiply_rows(const Left<S>& a, int64_t rows, const Right<S>& b, int64_t steps,
                   wide_t<typename S::Packed>* c, int64_t ldc, bool add) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int64_t here = (rows - row + tiles - t - 1) / (tiles - t);
    for (int64_t s = 0; s < steps || s == 0; s += kChainSteps) {
      const Left<S> left{a.data + row * a.row + s * a.step, a.row, a.step};
      const Right<S> right{b.data + s * b.step, b.step};
      tile_any<S, Vectors>(here, left, right, least(kChainSteps, steps - s), c + row * ldc, ldc,
                           add || s != 0);
    }
    row += here;
  }
}

}  // namespace

template <class S>
void multiply(const Left<S>& a, int64_t rows, const Right<S>& b, int64_t vectors, int64_t steps,
              wide_t<typename S::Packed>* c, int64_t ldc, bool add) {
  constexpr int64_t kVector = kLanesOf<S> * S::kPair;
  for (int64_t j = 0; j < vectors; j += 2) {
    const Right<S> right{b.data + j * kVector, b.step};
    auto* to = c + j * kLanesOf<S>;
    if (j + 1 < vectors) {
      multiply_rows<S, 2>(a, rows, right, steps, to, ldc, add);
    } else {
      multiply_rows<S, 1>(a, rows, right, steps, to, ldc, add);
    }
  }
}

#define PPMOE_INSTANTIATE(S)                                                         \
  template void multiply(const Left<S>&, int64_t, const Right<S>&, int64_t, int64_t, \
                         wide_t<typename S::Packed>*, int64_t, bool);
PPMOE_INSTANTIATE(Float)
PPMOE_INSTANTIATE(Double)
#if defined(__AVX512BF16__)
PPMOE_INSTANTIATE(Bf16Pair)
#endif

}  // namespace ppmoe::PPMOE_ISA
