// Backward of pixel_adaptive_fusion up to what the gradients of its weights are products of.
#include "cpu/ladder_attention/fusion.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

// Rows that products here read packed, and the weights' gradients later in dtype: one and the same
// where packed elements are of dtype.
template <class T>
struct Kept {
  static constexpr bool kOne = sizeof(T) == sizeof(Packed<T>);
  Rows<T> rows;
  T* out;
  int64_t pitch;

  Kept(void* kept, int64_t row, int64_t columns, void* scratch)
      : pitch(padded_columns<T>(columns)) {
    out = static_cast<T*>(kept) + row * pitch;
    if constexpr (kOne) {
      rows = {out, pitch};
    } else {
      rows = {static_cast<Packed<T>*>(scratch), pitch};
    }
  }
  PPMOE_INLINE_MEMBER void put(int64_t i, int64_t j, WideVec<T> v) const {
    store_packed(out + i * pitch + j, v);
    if constexpr (!kOne) store_packed(rows.at(i) + j, v);
  }
  static int64_t bytes(int64_t rows, int64_t columns) {
    return kOne ? 0 : rows_bytes<T>(rows, columns);
  }
};

template <class T>
int64_t scratch_bytes(const FusionBackward& f, int64_t rows) {
  const int64_t c = f.channels, d = f.width;
  const int64_t wide = rows * padded_columns<T>(c) * static_cast<int64_t>(sizeof(wide_t<T>));
  return 2 * tile_bytes<T>(rows) + wide + 2 * Kept<T>::bytes(rows, d) + Kept<T>::bytes(rows, c) +
         2 * rows_bytes<T>(rows, c);
}

template <class T>
void run(const FusionBackward& f, int64_t row, int64_t rows, char* scratch) {
  using V = WideVec<T>;
  constexpr int64_t columns = kColumns<typename Scheme<T>::type>;
  const int64_t c = f.channels, d = f.width, wide_pitch = padded_columns<T>(c);
  const Parameters<T> p = parameters<T>(c, d, f.weights);
  const auto take = [&](int64_t bytes) {
    char* const at = scratch;
    scratch += bytes;
    return at;
  };
  wide_t<T>* const tile = reinterpret_cast<wide_t<T>*>(take(tile_bytes<T>(rows)));
  wide_t<T>* const second = reinterpret_cast<wide_t<T>*>(take(tile_bytes<T>(rows)));
  wide_t<T>* const direct = reinterpret_cast<wide_t<T>*>(
      take(rows * wide_pitch * static_cast<int64_t>(sizeof(wide_t<T>))));
  const Kept<T> hidden(f.hidden, row, d, take(Kept<T>::bytes(rows, d)));
  const Kept<T> grad_hidden(f.grad_hidden, row, d, take(Kept<T>::bytes(rows, d)));
  const Kept<T> grad_gate(f.grad_gate, row, c, take(Kept<T>::bytes(rows, c)));
  T* const gated = static_cast<T*>(f.gated) + row * wide_pitch;
  const T* const from_x = static_cast<const T*>(f.x) + row * f.x_row;
  const T* const from_grad = static_cast<const T*>(f.grad) + row * f.grad_row;
  const auto packed = [&](const T* from, int64_t stride) {
    char* const at = take(rows_bytes<T>(rows, c));
    return packed_rows<T>(from, stride, rows, c, reinterpret_cast<Packed<T>*>(at));
  };
  const Rows<T> x = packed(from_x, f.x_row), grad = packed(from_grad, f.grad_row);

  by_panels<T>(x, rows, p.w1(), tile,
               [&](int64_t i, int64_t j, int64_t, V v) __attribute__((always_inline)) {
                 hidden.put(i, j, relu(v + load<V>(p.b1() + j)));
               });
  hidden.rows.end(rows, d);
  const Weights<T> w2 = p.w2(), wp = p.wp_turned();
  for (int64_t panel = 0; panel < w2.panels(); ++panel) {
    panel_product<T>(hidden.rows, rows, w2, panel, tile);
    panel_product<T>(grad, rows, wp, panel, second);
    for (int64_t i = 0; i < rows; ++i) {
      const wide_t<T>* from = tile + i * columns;
      const wide_t<T>* other = second + i * columns;
      for (int64_t j = panel * columns; j < least(c, (panel + 1) * columns);
           j += kWideLanes<T>, from += kWideLanes<T>, other += kWideLanes<T>) {
        V slope;
        const V gate = logistic(load<V>(from) + load<V>(p.b2() + j), slope);
        const V pixel = load_first(x.at(i) + j, c - j);
        const V grad_t = load<V>(other) + load_first(grad.at(i) + j, c - j);
        store_packed(gated + i * wide_pitch + j, pixel * gate);
        grad_gate.put(i, j, grad_t * pixel * slope);
        store(direct + i * wide_pitch + j, grad_t * gate);
      }
    }
  }
  grad_gate.rows.end(rows, c);
  by_panels<T>(grad_gate.rows, rows, p.w2_turned(), tile,
               [&](int64_t i, int64_t j, int64_t, V v) __attribute__((always_inline)) {
                 grad_hidden.put(i, j, load_wide(hidden.rows.at(i) + j) <= 0 ? V{} : v);
               });
  grad_hidden.rows.end(rows, d);
  T* const grad_x = static_cast<T*>(f.grad_x) + row * f.grad_x_row;
  by_panels<T>(grad_hidden.rows, rows, p.w1_turned(), tile,
               [&](int64_t i, int64_t j, int64_t left, V v) __attribute__((always_inline)) {
                 store_first(grad_x + i * f.grad_x_row + j,
                             v + load<V>(direct + i * wide_pitch + j), left);
               });
}

}  // namespace

int64_t fusion_backward_scratch(const FusionBackward& f, int64_t rows) {
  return with_type(f.dtype, [&](auto tag) { return scratch_bytes<decltype(untag(tag))>(f, rows); });
}

void fusion_backward(const FusionBackward& f, int64_t row, int64_t rows, void* scratch) {
  with_type(f.dtype, [&](auto tag) {
    run<decltype(untag(tag))>(f, row, rows, static_cast<char*>(scratch));
    return 0;
  });
}

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
