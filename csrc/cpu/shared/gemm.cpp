// One block of a matrix product, and sums of columns.
#include "ppmoe/gemm.h"

#include "ppmoe/stream.h"

namespace ppmoe::PPMOE_ISA {
namespace {

template <class T>
Lines<T> rows_of(const Matrix& a) {
  return {static_cast<const T*>(a.data), {a.row_stride, a.row_index}, {a.col_stride, a.col_index}};
}
template <class T>
Lines<T> columns_of(const Matrix& b) {
  return {static_cast<const T*>(b.data), {b.col_stride, b.col_index}, {b.row_stride, b.row_index}};
}

template <class T>
bool is_thin(const Gemm& g) {
  return is_thin(g.group, rows_of<T>(g.a).depth, columns_of<T>(g.b).depth);
}

struct Parts {
  int64_t tile, b, a;  // bytes
};
template <class T>
Parts scratch_of(const Gemm& g) {
  const int64_t columns = least(g.n, kSlabColumns);
  const int64_t tile = Tile<T>::bytes(g.m, columns, 1);
  if (is_thin<T>(g)) return {tile, 0, 0};
  return {tile, round_up(slab_bytes<T>(columns, 1, g.k), 64), Panels<T>::bytes(g.m, g.k)};
}

// One row without a bias, maybe past the caches.
template <class T>
void put_products(const wide_t<T>* from, int64_t n, T* to, bool stream) {
  constexpr int step = kBytes / static_cast<int>(sizeof(T));
  int64_t j = 0;
  for (; j + step <= n; j += step) {
    WideVec<T> v[sizeof(wide_t<T>) / sizeof(T)];
    __builtin_memcpy(v, from + j, sizeof(v));
    const VecI bits = narrow_products(v, Tag<T>{});
    stream ? stream_vector(reinterpret_cast<char*>(to + j), bits) : store(to + j, bits);
  }
  for (; j < n; ++j) to[j] = narrow<T>(from[j]);
}

template <class T>
PPMOE_INLINE void put_row(const Gemm& g, const wide_t<T>* from, const T* bias, int64_t n, T* to) {
  if (bias != nullptr) return store_row(from, bias, n, to);
  put_products<T>(from, n, to, g.stream && aligned(to));
}

template <class T>
void run(const Gemm& g, char* scratch) {
  const Parts bytes = scratch_of<T>(g);
  const Lines<T> a = rows_of<T>(g.a), b = columns_of<T>(g.b);
  const bool thin = is_thin<T>(g);
  const Panels<T> panels(scratch + bytes.tile + bytes.b, g.m, g.k);
  for (int64_t row = 0; row < g.m && !thin;) {
    const int64_t width = panel_rows(g.m - row);
    panels.pack(row, width, a.from(row, 0), least(width, g.m - row), 0, g.k);
    row += width;
  }
  const auto slab_at = [&](int64_t first) {
    return Slab<T>{b.from(first, 0), least(kSlabColumns, g.n - first), 1, 0};
  };
  for (int64_t first = 0; first < g.n; first += kSlabColumns) {
    const Slab<T> slab = slab_at(first);
    const Tile<T> tile(scratch, slab.columns, 1);
    const Slab<T> next = slab_at(first + kSlabColumns);
    if (thin) {
      multiply_thin(a, g.m, g.k, slab, tile, next.columns > 0 ? &next : nullptr);
    } else {
      multiply_slab(panels, g.m, g.group, slab, false, scratch + bytes.tile, tile, &next);
    }
    const T* bias = g.bias != nullptr ? static_cast<const T*>(g.bias) + first : nullptr;
    for (int64_t i = 0; i < g.m; ++i) {
      put_row<T>(g, tile.row(i), bias, slab.columns, static_cast<T*>(g.c) + i * g.ldc + first);
    }
  }
  if (g.stream) stream_fence();
}

template <class T>
int64_t scratch_bytes(const Gemm& g) {
  const Parts bytes = scratch_of<T>(g);
  return bytes.tile + bytes.b + bytes.a;
}

// Columns are summed in strips; kStrip rows in one go, and then the sums of those.
template <class T>
void sum_columns(const Matrix& x, const wide_t<T>* weights, int64_t m, int64_t n, T* out) {
  constexpr int64_t kWidth = 256, kStrip = 64;
  constexpr int lanes = kWideLanes<T>;
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t wide = least(kWidth, n - j);
    wide_t<T> total[kWidth] = {};
    for (int64_t first = 0; first < m; first += kStrip) {
      wide_t<T> part[kWidth] = {};
      for (int64_t i = first; i < least(first + kStrip, m); ++i) {
        const Axis rows{x.row_stride, x.row_index};
        const T* row = static_cast<const T*>(x.data) + rows.at(i) + j * x.col_stride;
        const wide_t<T> weight = weights != nullptr ? weights[i] : wide_t<T>{1};
        if (x.col_stride == 1 && wide == kWidth) {
          for (int64_t c = 0; c < kWidth; c += lanes) {
            store_wide(part + c, load_wide(part + c) + weight * load_wide(row + c));
          }
          continue;
        }
        for (int64_t c = 0; c < wide; ++c) part[c] += weight * to_float(row[c * x.col_stride]);
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

void column_sums(const Matrix& x, const void* weights, DType dtype, int64_t m, int64_t n,
                 void* out) {
  switch (dtype) {
    case DType::kF32:
      return sum_columns<float>(x, static_cast<const float*>(weights), m, n,
                                static_cast<float*>(out));
    case DType::kBf16:
      return sum_columns<Bf16>(x, static_cast<const float*>(weights), m, n,
                               static_cast<Bf16*>(out));
    case DType::kF16:
      return sum_columns<F16>(x, static_cast<const float*>(weights), m, n, static_cast<F16*>(out));
    case DType::kF64:
      return sum_columns<double>(x, static_cast<const double*>(weights), m, n,
                                 static_cast<double*>(out));
  }
}

}  // namespace ppmoe::PPMOE_ISA
