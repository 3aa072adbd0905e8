// One block of a matrix product: packed panels and a register-blocked micro-kernel.
//
// All of a is packed once, b a slab of kSlab columns and kDepth rows at a time; the micro-kernel
// keeps a tile of c in registers for a chain of steps and then adds it to what there was, so that
// rounding errors grow with short sums. The order in which a sum over k is taken depends on the
// block's own sizes alone.
#include "cpu/expert_slice/pack.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 12, kRowStep = 4;  // 24 of 32 registers hold the tile
#elif defined(__AVX2__)
constexpr int kRows = 6, kRowStep = 2;  // 12 of 16
#else
constexpr int kRows = 4, kRowStep = 4;  // 8 of 16
#endif
// Panels of a are kRowStep lines wide, or a multiple up to kRows; those of b are kVectors vectors.
constexpr int kVectors = 2;
constexpr int64_t kDepth = 512;       // elements of a slab's panels
constexpr int64_t kSlab = 192;        // columns of b that are packed and multiplied together
constexpr int64_t kStepsPerLine = 8;  // of the micro-kernel, for one cache line brought in
constexpr int64_t kThin = 4;  // up to so many rows, packing b would cost more than the product

template <class S>
constexpr int kLanesOf = static_cast<int>(kBytes / sizeof(typename S::Vec{}[0]));
// Steps that are summed in registers. A result in bfloat16 has room for longer sums; for a few
// rows, whose time goes into packing, short ones cost nothing.
template <class S>
PPMOE_INLINE int64_t chain_steps(int64_t rows) {
  if (S::kPair == 2) return 256;
  return rows <= 8 ? 16 : 64;
}
template <class S>
constexpr int kColumns = kVectors * kLanesOf<S>;

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

template <class T>
void store_row(const wide_t<T>* from, const T* bias, int64_t n, T* to) {
  constexpr int lanes = kWideLanes<T>;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    WideVec<T> v = load_wide(from + j);
    if (bias != nullptr) v += load_wide(bias + j);
    store_wide(to + j, v);
  }
  for (; j < n; ++j) {
    to[j] = narrow<T>(bias != nullptr ? from[j] + wide_t<T>(to_float(bias[j])) : from[j]);
  }
}

// How many rows of the `left` ones the next panel takes: kRows, and the last ones in two parts of
// about the same size, since a narrow tile leaves the multipliers idle.
PPMOE_INLINE int64_t panel_rows(int64_t left) {
  if (left >= 2 * kRows) return kRows;
  if (left > kRows) return round_up((left + 1) / 2, kRowStep);
  return round_up(left, kRowStep);
}

template <class S, class T, int Rows = kRows>
void pack_a_panel(const T* from, const Matrix& a, int64_t rows, int64_t lines, int64_t depth,
                  typename S::Packed* to) {
  if (rows == Rows) return pack_panel<S, Rows>(from, a.row_stride, a.col_stride, lines, depth, to);
  if constexpr (Rows > kRowStep) {
    pack_a_panel<S, T, Rows - kRowStep>(from, a, rows, lines, depth, to);
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

template <class S>
struct Buffers {
  int64_t rows, slab, tile, a, b;  // padded rows and slab columns; bytes of the three parts

  explicit Buffers(const Gemm& g) {
    constexpr int64_t element = sizeof(typename S::Packed);
    rows = round_up(g.m, kRowStep);
    slab = round_up(least(g.n, kSlab), kColumns<S>);
    tile = rows * slab * static_cast<int64_t>(sizeof(typename S::Vec{}[0]));
    const int64_t slabs = (g.k + kDepth - 1) / kDepth;
    a = round_up(rows * (g.k + slabs * (S::kPair - 1)) * element, 64);
    b = slab * round_up(least(g.k, kDepth), S::kPair) * element;
  }
};

// The part of b that is packed for the slab at column `first` and this depth.
template <class T>
Prefetcher<T> part_at(const Gemm& g, int64_t first, int64_t depth) {
  if (first >= g.n || g.k == 0) return {};
  const T* b = static_cast<const T*>(g.b.data) + first * g.b.col_stride + depth * g.b.row_stride;
  return {b, g.b.col_stride, g.b.row_stride, least(kSlab, g.n - first), least(kDepth, g.k - depth)};
}

template <class T>
void run_packed(const Gemm& g, char* scratch) {
  using S = typename Scheme<T>::type;
  using P = typename S::Packed;
  using V = typename S::Vec;
  const Buffers<S> size(g);
  V* tile = reinterpret_cast<V*>(scratch);
  P* b_panels = reinterpret_cast<P*>(scratch + size.tile);
  P* a_panels = reinterpret_cast<P*>(scratch + size.tile + size.b);
  const int64_t ldt = size.slab / kLanesOf<S>;
  const int64_t chain = chain_steps<S>(g.m);
  const T* a = static_cast<const T*>(g.a.data);
  const T* b = static_cast<const T*>(g.b.data);

  // Panel (row, depth) of a lies at depth * size.rows + row * (padded depth of its slab).
  const auto whole = [](int64_t deep) { return round_up(deep, S::kPair); };
  for (int64_t row = 0; row < g.m;) {
    const int64_t width = panel_rows(g.m - row);
    for (int64_t depth = 0; depth < g.k; depth += kDepth) {
      const int64_t deep = least(kDepth, g.k - depth);
      pack_a_panel<S>(a + row * g.a.row_stride + depth * g.a.col_stride, g.a, width,
                      least(width, g.m - row), deep,
                      a_panels + depth * size.rows + row * whole(deep));
    }
    row += width;
  }
  for (int64_t first = 0; first < g.n; first += kSlab) {
    const int64_t columns = least(kSlab, g.n - first);
    if (g.k == 0) __builtin_memset(scratch, 0, static_cast<size_t>(size.tile));
    const P* a_slab = a_panels;
    for (int64_t depth = 0; depth < g.k; depth += kDepth) {
      const int64_t deep = least(kDepth, g.k - depth);
      const int64_t padded = round_up(deep, S::kPair);
      for (int64_t col = 0; col < columns; col += kColumns<S>) {
        pack_panel<S, kColumns<S>>(b + (first + col) * g.b.col_stride + depth * g.b.row_stride,
                                   g.b.col_stride, g.b.row_stride, columns - col, deep,
                                   b_panels + col * padded);
      }
      const bool last = depth + kDepth >= g.k;
      Prefetcher<T> next = part_at<T>(g, last ? first + kSlab : first, last ? 0 : depth + kDepth);
      for (int64_t col = 0; col < columns; col += kColumns<S>) {
        const P* left = a_slab;
        for (int64_t row = 0; row < g.m;) {
          const int64_t width = panel_rows(g.m - row);
          const P* right = b_panels + col * padded;
          for (int64_t step = 0; step < padded / S::kPair; step += chain) {
            const int64_t steps = least(chain, padded / S::kPair - step);
            micro_any<S, T>(width, left, right, steps, tile + row * ldt + col / kLanesOf<S>, ldt,
                            depth != 0 || step != 0, next);
            left += width * steps * S::kPair;
            right += kColumns<S> * steps * S::kPair;
          }
          row += width;
        }
      }
      a_slab += size.rows * padded;
    }
    const T* bias = g.bias != nullptr ? static_cast<const T*>(g.bias) + first : nullptr;
    for (int64_t i = 0; i < g.m; ++i) {
      store_row(reinterpret_cast<const wide_t<T>*>(tile) + i * size.slab, bias, columns,
                static_cast<T*>(g.c) + i * g.ldc + first);
    }
  }
}

template <class T>
bool is_thin(const Gemm& g) {
  return g.m <= kThin && g.a.col_stride == 1 && g.b.row_stride == 1;
}

// A few rows against columns that are contiguous along k: dot products straight from memory.
template <class T, int Rows>
void run_thin(const Gemm& g) {
  using S = typename Scheme<T>::type;
  constexpr int lanes = kWideLanes<T>;
  constexpr int step = lanes * S::kPair;
  constexpr int kAtOnce = 4;
  const auto vector = [](const T* from) __attribute__((always_inline)) {
    if constexpr (S::kPair == 2) {
      return load<typename S::Vec>(from);
    } else {
      return load_wide(from);
    }
  };
  const T* a = static_cast<const T*>(g.a.data);
  for (int64_t n = 0; n < g.n; n += kAtOnce) {
    const int64_t here = least(kAtOnce, g.n - n);
    const T* column[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) {
      column[j] = static_cast<const T*>(g.b.data) + (n + (j < here ? j : 0)) * g.b.col_stride;
    }
    typename S::Vec total[Rows][kAtOnce] = {};
    int64_t d = 0;
    for (; d + step <= g.k; d += step) {
#pragma GCC unroll 4
      for (int j = 0; j < kAtOnce; ++j) {
        __builtin_prefetch(column[j] + d + 8 * step);
        const auto right = vector(column[j] + d);
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) {
          multiply_add<S>(vector(a + i * g.a.row_stride + d), right, total[i][j]);
        }
      }
    }
    for (int i = 0; i < Rows; ++i) {
      for (int64_t j = 0; j < here; ++j) {
        wide_t<T> value = sum(total[i][j]);
        for (int64_t rest = d; rest < g.k; ++rest) {
          value += wide_t<T>(to_float(a[i * g.a.row_stride + rest])) * to_float(column[j][rest]);
        }
        if (g.bias != nullptr) value += to_float(static_cast<const T*>(g.bias)[n + j]);
        static_cast<T*>(g.c)[i * g.ldc + n + j] = narrow<T>(value);
      }
    }
  }
}

template <class T>
void run(const Gemm& g, char* scratch) {
  if (!is_thin<T>(g)) return run_packed<T>(g, scratch);
  if (g.m == 1) return run_thin<T, 1>(g);
  if (g.m == 2) return run_thin<T, 2>(g);
  if (g.m == 3) return run_thin<T, 3>(g);
  if (g.m == 4) return run_thin<T, 4>(g);
}

template <class T>
int64_t scratch_bytes(const Gemm& g) {
  if (is_thin<T>(g)) return 0;
  const Buffers<typename Scheme<T>::type> size(g);
  return size.tile + size.a + size.b;
}

// Columns are summed in strips; kStrip rows in one go, and then the sums of those.
template <class T>
void sum_columns(const Matrix& x, int64_t m, int64_t n, T* out) {
  constexpr int64_t kWidth = 256, kStrip = 64;
  constexpr int lanes = kWideLanes<T>;
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t wide = least(kWidth, n - j);
    wide_t<T> total[kWidth] = {};
    for (int64_t first = 0; first < m; first += kStrip) {
      wide_t<T> part[kWidth] = {};
      for (int64_t i = first; i < least(first + kStrip, m); ++i) {
        const T* row = static_cast<const T*>(x.data) + i * x.row_stride + j * x.col_stride;
        if (x.col_stride == 1 && wide == kWidth) {
          for (int64_t c = 0; c < kWidth; c += lanes) {
            store_wide(part + c, load_wide(part + c) + load_wide(row + c));
          }
          continue;
        }
        for (int64_t c = 0; c < wide; ++c) part[c] += to_float(row[c * x.col_stride]);
      }
      for (int64_t c = 0; c < wide; ++c) total[c] += part[c];
    }
    store_row<T>(total, nullptr, wide, out + j);
  }
}

}  // namespace

int64_t gemm_scratch(const Gemm& g) {
  switch (g.dtype) {
    case DType::kF32: return scratch_bytes<float>(g);
    case DType::kBf16: return scratch_bytes<Bf16>(g);
    case DType::kF16: return scratch_bytes<F16>(g);
    case DType::kF64: return scratch_bytes<double>(g);
  }
  return 0;
}

void gemm(const Gemm& g, void* scratch) {
  char* bytes = static_cast<char*>(scratch);
  switch (g.dtype) {
    case DType::kF32: return run<float>(g, bytes);
    case DType::kBf16: return run<Bf16>(g, bytes);
    case DType::kF16: return run<F16>(g, bytes);
    case DType::kF64: return run<double>(g, bytes);
  }
}

void column_sums(const Matrix& x, DType dtype, int64_t m, int64_t n, void* out) {
  switch (dtype) {
    case DType::kF32: return sum_columns<float>(x, m, n, static_cast<float*>(out));
    case DType::kBf16: return sum_columns<Bf16>(x, m, n, static_cast<Bf16*>(out));
    case DType::kF16: return sum_columns<F16>(x, m, n, static_cast<F16*>(out));
    case DType::kF64: return sum_columns<double>(x, m, n, static_cast<double*>(out));
  }
}

}  // namespace ppmoe::expert_slice::PPMOE_ISA
