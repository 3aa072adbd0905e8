// Products of one block of rows of a with slabs of b: packed panels and a register-blocked
// micro-kernel, and dot products straight from memory where a has few rows.
//
// The micro-kernel keeps a tile of c in registers for a chain of steps and then adds it to what
// there was, so that rounding errors grow with short sums. The order in which a sum over k is taken
// depends on k, on the number of rows that the caller calls a group, and for few of them on whether
// both matrices are contiguous along k; neither on how rows are cut into blocks nor on how columns
// are cut into slabs.
#pragma once

#include "ppmoe/pack.h"
#include "ppmoe/product.h"

namespace ppmoe::PPMOE_ISA {

#if defined(__AVX512F__)
constexpr int kRows = 12, kRowStep = 4;  // 24 of 32 registers hold the tile
#elif defined(__AVX2__)
constexpr int kRows = 6, kRowStep = 2;  // 12 of 16
#else
constexpr int kRows = 4, kRowStep = 4;  // 8 of 16
#endif
// Panels of a are kRowStep lines wide, or a multiple up to kRows; those of b are kVectors vectors.
constexpr int kVectors = 2;
constexpr int64_t kDepth = 384;  // elements of a slab's panels

template <class T>
using Packed = typename Scheme<T>::type::Packed;
template <class S>
constexpr int kLanesOf = static_cast<int>(kBytes / sizeof(typename S::Vec{}[0]));
template <class S>
constexpr int kColumns = kVectors * kLanesOf<S>;

static_assert(kBlockRows % kRows == 0 && kPanelRows % kRows == 0);
static_assert(kSlabColumns / 2 % kColumns<Float> == 0);

// How many rows of the `left` ones the next panel takes: kRows, and the last ones in two parts of
// about the same size, since a narrow tile leaves the multipliers idle.
PPMOE_INLINE int64_t panel_rows(int64_t left) {
  if (left >= 2 * kRows) return kRows;
  if (left > kRows) return round_up((left + 1) / 2, kRowStep);
  return round_up(left, kRowStep);
}

// Where the panels of a block of `rows` rows and `depth` columns lie. The columns are cut at
// multiples of kDepth; the parts of all panels for one such range lie together.
template <class T>
struct Panels {
  using S = typename Scheme<T>::type;
  Packed<T>* data;
  int64_t rows;  // padded
  int64_t depth;

  Panels(void* at, int64_t count, int64_t deep)
      : data(static_cast<Packed<T>*>(at)), rows(round_up(count, kRowStep)), depth(deep) {}

  static int64_t bytes(int64_t rows, int64_t depth) {
    const int64_t elements = round_up(rows, kRowStep) * round_up(depth, S::kPair);
    return round_up(elements * static_cast<int64_t>(sizeof(Packed<T>)), 64);
  }
  // The panel that begins at `row` for columns d to d + range(d), d being a multiple of kDepth.
  Packed<T>* at(int64_t row, int64_t d) const { return data + d * rows + row * padded(d); }
  int64_t range(int64_t d) const { return least(kDepth, depth - d); }
  int64_t padded(int64_t d) const { return round_up(range(d), S::kPair); }

  // Packs columns first to first + columns of a panel, from lines that begin with these columns.
  // `first` is even, and so is `columns` unless they are the last ones.
  void pack(int64_t row, int64_t width, const Lines<T>& lines, int64_t count, int64_t first,
            int64_t columns) const;
};

// Columns of b: up to two runs of as many, `part` elements apart.
template <class T>
struct Slab {
  Lines<T> b;  // lines are columns
  int64_t columns, parts, part;

  Lines<T> run(int64_t i) const {
    Lines<T> shifted = b;
    shifted.data += i * part;
    return shifted;
  }
  void ask(Prefetcher<T>& next, int64_t depth, int64_t deep) const {
    for (int64_t i = 0; i < parts; ++i) next.add(run(i).from(0, depth), columns, deep);
  }
};

// The tile of a slab: every run of columns begins at a multiple of the panel's width.
template <class T>
struct Tile {
  using S = typename Scheme<T>::type;
  wide_t<T>* data;
  int64_t run, stride;  // elements

  Tile(void* at, int64_t columns, int64_t parts)
      : data(static_cast<wide_t<T>*>(at)),
        run(round_up(columns, kColumns<S>)),
        stride(run * parts) {}
  static int64_t bytes(int64_t rows, int64_t columns, int64_t parts) {
    return round_up(rows, kRowStep) * round_up(columns, kColumns<S>) * parts *
           static_cast<int64_t>(sizeof(wide_t<T>));
  }
  wide_t<T>* row(int64_t i, int64_t part = 0) const { return data + i * stride + part * run; }
};

template <class T>
int64_t slab_bytes(int64_t columns, int64_t parts, int64_t depth) {
  using S = typename Scheme<T>::type;
  return round_up(columns, kColumns<S>) * parts * round_up(least(depth, kDepth), S::kPair) *
         static_cast<int64_t>(sizeof(Packed<T>));
}

// tile [m] = or += panels @ slab. While it is busy, the slab's own next range, or else `next`, is
// brought nearer.
template <class T>
void multiply_slab(const Panels<T>& a, int64_t m, int64_t group, const Slab<T>& slab, bool add,
                   void* b_scratch, const Tile<T>& tile, const Slab<T>* next);

// tile [m] = rows @ slab for a few rows, m being at most kThinRows. `next` may be null.
template <class T>
void multiply_thin(const Lines<T>& a, int64_t m, int64_t k, const Slab<T>& slab,
                   const Tile<T>& tile, const Slab<T>* next);

PPMOE_INLINE bool is_thin(int64_t group, const Axis& a_depth, const Axis& b_depth) {
  return group <= kThinRows && a_depth.closed() && b_depth.closed();
}

template <class T>
PPMOE_INLINE void store_row(const wide_t<T>* from, const T* bias, int64_t n, T* to) {
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

// One block of a product, and sums of columns; they do not depend on how a product is cut.
int64_t gemm_scratch(const Gemm&);
void gemm(const Gemm&, void* scratch);
void column_sums(const Matrix&, const void* weights, DType, int64_t m, int64_t n, void* out);

}  // namespace ppmoe::PPMOE_ISA
