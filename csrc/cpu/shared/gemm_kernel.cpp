// The products of gemm.h: packing, the micro-kernel, and dot products for a few rows.
#include "ppmoe/gemm.h"

namespace ppmoe::PPMOE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kDotRows = 8;  // rows whose dot products are taken together
#else
constexpr int kDotRows = 4;
#endif
constexpr int64_t kThinChain = 256;   // steps whose products are summed in registers
constexpr int64_t kThinAhead = 4096;  // bytes of columns that are asked for before their turn
constexpr int64_t kStepsPerLine = 4;  // of the micro-kernel, for one cache line brought in

// Steps that are summed in registers. A result in bfloat16 has room for longer sums; for a few
// rows, whose time goes into packing, short ones cost nothing.
template <class S>
PPMOE_INLINE int64_t chain_steps(int64_t group) {
  if (S::kPair == 2) return 256;
  return group <= 8 ? 16 : 64;
}

template <class S>
PPMOE_INLINE void multiply_add(typename S::Vec a, typename S::Vec b, typename S::Vec& total) {
  if constexpr (S::kPair == 1) {
    total += a * b;
  } else {
#if defined(__AVX512BF16__)
    total = reinterpret_cast<VecF>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(total), (__m512bh)(a), (__m512bh)(b)));
#endif
  }
}

// One packed element, or pair, in every lane.
template <class S>
PPMOE_INLINE typename S::Vec broadcast(const typename S::Packed* a) {
  if constexpr (S::kPair == 1) {
    return *a - typename S::Vec{};
  } else {
    int32_t both;
    __builtin_memcpy(&both, a, 4);
    return reinterpret_cast<VecF>(both - VecI{});
  }
}

// tile [Rows, kColumns] (row stride ldt, in vectors) = or += a panel @ b panel. Every few steps a
// cache line of what comes next is asked for: in a burst, such requests would hold up the loads.
template <class S, int Rows, class T>
void micro(const typename S::Packed* a, const typename S::Packed* b, int64_t steps,
           typename S::Vec* tile, int64_t ldt, bool add, Prefetcher<T>& next) {
  using V = typename S::Vec;
  V total[Rows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) total[i][j] = V{};
  }
  for (int64_t first = 0; first < steps; first += kStepsPerLine) {
    next.advance();
    for (int64_t d = first; d < least(first + kStepsPerLine, steps); ++d) {
      V right[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) right[j] = load<V>(reinterpret_cast<const V*>(b) + j);
      b += kColumns<S> * S::kPair;
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const V left = broadcast<S>(a + i * S::kPair);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) multiply_add<S>(left, right[j], total[i][j]);
      }
      a += Rows * S::kPair;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      V& cell = tile[i * ldt + j];
      cell = add ? cell + total[i][j] : total[i][j];
    }
  }
}

template <class S, class T, int Rows = kRows>
PPMOE_INLINE void micro_any(int64_t rows, const typename S::Packed* a, const typename S::Packed* b,
                            int64_t steps, typename S::Vec* tile, int64_t ldt, bool add,
                            Prefetcher<T>& next) {
  if (rows == Rows) return micro<S, Rows>(a, b, steps, tile, ldt, add, next);
  if constexpr (Rows > kRowStep) {
    micro_any<S, T, Rows - kRowStep>(rows, a, b, steps, tile, ldt, add, next);
  }
}

template <class S, class T, int Rows = kRows>
void pack_rows(int64_t width, const Lines<T>& a, int64_t lines, int64_t depth,
               typename S::Packed* to) {
  if (width == Rows) return pack_panel<S, Rows>(a, lines, depth, to);
  if constexpr (Rows > kRowStep) pack_rows<S, T, Rows - kRowStep>(width, a, lines, depth, to);
}

// Dot products of Rows rows with one column, all contiguous along k. The column at `ahead` is asked
// for. The order of a sum must not depend on Rows: which rows come together is up to the cut.
template <class T, int Rows>
void dot(const T* const* rows, const T* column, int64_t k, const T* ahead, wide_t<T>* cell,
         int64_t stride) {
  using S = typename Scheme<T>::type;
  using V = typename S::Vec;
  constexpr int step = kWideLanes<T> * S::kPair;
  const auto vector = [](const T* from) __attribute__((always_inline)) {
    if constexpr (S::kPair == 2) {
      return load<V>(from);
    } else {
      return load_wide(from);
    }
  };
  V whole[Rows] = {};
  int64_t d = 0;
  while (d + step <= k) {
    // Chains of limited length, two by turns, as additions would else wait for each other.
    V total[2][Rows] = {};
    const int64_t end = least(k, d + kThinChain * step);
    for (; d + 2 * step <= end; d += 2 * step) {
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        if (ahead != nullptr) __builtin_prefetch(ahead + d + p * step);
        const auto right = vector(column + d + p * step);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
          multiply_add<S>(vector(rows[i] + d + p * step), right, total[p][i]);
        }
      }
    }
    if (d + step <= end) {
      const auto right = vector(column + d);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) multiply_add<S>(vector(rows[i] + d), right, total[0][i]);
      d += step;
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) whole[i] += total[0][i] + total[1][i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    wide_t<T> value = sum(whole[i]);
    for (int64_t rest = d; rest < k; ++rest) {
      value += wide_t<T>(to_float(rows[i][rest])) * to_float(column[rest]);
    }
    cell[i * stride] = value;
  }
}

template <class T, int Rows = kDotRows>
PPMOE_INLINE void dot_any(int64_t count, const T* const* rows, const T* column, int64_t k,
                          const T* ahead, wide_t<T>* cell, int64_t stride) {
  if (count == Rows) return dot<T, Rows>(rows, column, k, ahead, cell, stride);
  if constexpr (Rows > 1) dot_any<T, Rows - 1>(count, rows, column, k, ahead, cell, stride);
}

}  // namespace

template <class T>
void Panels<T>::pack(int64_t row, int64_t width, const Lines<T>& lines, int64_t count,
                     int64_t first, int64_t columns) const {
  for (int64_t d = first; d < first + columns;) {
    const int64_t low = d / kDepth * kDepth;
    const int64_t here = least(first + columns, low + kDepth) - d;
    pack_rows<S>(width, lines.from(0, d - first), count, here, at(row, low) + (d - low) * width);
    d += here;
  }
}

template <class T>
void multiply_slab(const Panels<T>& a, int64_t m, int64_t group, const Slab<T>& slab, bool add,
                   void* b_scratch, const Tile<T>& tile, const Slab<T>* next) {
  using S = typename Scheme<T>::type;
  using V = typename S::Vec;
  Packed<T>* const b_panels = static_cast<Packed<T>*>(b_scratch);
  V* const cells = reinterpret_cast<V*>(tile.data);
  const int64_t ldt = tile.stride / kLanesOf<S>;
  const int64_t chain = chain_steps<S>(group);
  const int64_t k = a.depth;
  if (k == 0 && !add) {
    __builtin_memset(static_cast<void*>(tile.data), 0,
                     static_cast<size_t>(m * tile.stride) * sizeof(wide_t<T>));
  }
  for (int64_t depth = 0; depth < k; depth += kDepth) {
    const int64_t deep = a.range(depth), padded = a.padded(depth);
    for (int64_t part = 0; part < slab.parts; ++part) {
      const Lines<T> b = slab.run(part).from(0, depth);
      for (int64_t col = 0; col < slab.columns; col += kColumns<S>) {
        pack_panel<S, kColumns<S>>(b.from(col, 0), slab.columns - col, deep,
                                   b_panels + (part * tile.run + col) * padded);
      }
    }
    Prefetcher<T> ahead;
    if (depth + kDepth < k) {
      slab.ask(ahead, depth + kDepth, least(kDepth, k - depth - kDepth));
    } else if (next != nullptr) {
      next->ask(ahead, 0, least(kDepth, k));
    }
    for (int64_t col = 0; col < tile.stride; col += kColumns<S>) {
      for (int64_t row = 0; row < m;) {
        const int64_t width = panel_rows(m - row);
        const Packed<T>* left = a.at(row, depth);
        const Packed<T>* right = b_panels + col * padded;
        for (int64_t step = 0; step < padded / S::kPair; step += chain) {
          const int64_t steps = least(chain, padded / S::kPair - step);
          micro_any<S, T>(width, left, right, steps, cells + row * ldt + col / kLanesOf<S>, ldt,
                          add || depth != 0 || step != 0, ahead);
          left += width * steps * S::kPair;
          right += kColumns<S> * steps * S::kPair;
        }
        row += width;
      }
    }
  }
}

// Columns come from memory once, for the first rows; the others find them in the first-level cache.
template <class T>
void multiply_thin(const Lines<T>& a, int64_t m, int64_t k, const Slab<T>& slab,
                   const Tile<T>& tile, const Slab<T>* next) {
  const T* rows[kThinRows];
  for (int64_t i = 0; i < m; ++i) rows[i] = a.data + a.line.at(i);
  const int64_t distance = kThinAhead / (k * static_cast<int64_t>(sizeof(T)) + 1) + 1;
  for (int64_t part = 0; part < slab.parts; ++part) {
    const Lines<T> b = slab.run(part);
    // What is asked for towards the end of this run.
    const Slab<T>* const follows = part + 1 < slab.parts ? &slab : next;
    const Lines<T> then = follows != nullptr ? follows->run((part + 1) % slab.parts) : b;
    for (int64_t n = 0; n < slab.columns; ++n) {
      const int64_t over = n + distance - slab.columns;
      const T* ahead = nullptr;
      if (over < 0) {
        ahead = b.data + b.line.at(n + distance);
      } else if (follows != nullptr && over < follows->columns) {
        ahead = then.data + then.line.at(over);
      }
      const T* const column = b.data + b.line.at(n);
      for (int64_t i = 0; i < m; i += kDotRows) {
        dot_any<T>(least(kDotRows, m - i), rows + i, column, k, i == 0 ? ahead : nullptr,
                   tile.row(i, part) + n, tile.stride);
      }
    }
  }
}

#define PPMOE_INSTANTIATE(T)                                                                     \
  template struct Panels<T>;                                                                     \
  template void multiply_slab(const Panels<T>&, int64_t, int64_t, const Slab<T>&, bool, void*,   \
                              const Tile<T>&, const Slab<T>*);                                   \
  template void multiply_thin(const Lines<T>&, int64_t, int64_t, const Slab<T>&, const Tile<T>&, \
                              const Slab<T>*);
PPMOE_INSTANTIATE(float)
PPMOE_INSTANTIATE(Bf16)
PPMOE_INSTANTIATE(F16)
PPMOE_INSTANTIATE(double)

}  // namespace ppmoe::PPMOE_ISA
