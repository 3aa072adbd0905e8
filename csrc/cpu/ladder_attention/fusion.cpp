// pixel_adaptive_fusion: packing of its parameters, and its three products for a block of rows.
#include "cpu/ladder_attention/fusion.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

template <class T>
Lines<T> lines_of(const Matrix& m) {
  return {static_cast<const T*>(m.data), {m.row_stride}, {m.col_stride}};
}
template <class T>
Lines<T> turned_lines_of(const Matrix& m) {
  return {static_cast<const T*>(m.data), {m.col_stride}, {m.row_stride}};
}

template <class T>
void widen_bias(const void* from, int64_t n, wide_t<T>* to) {
  if (from == nullptr) return;
  for (int64_t j = 0; j < padded_columns<T>(n); ++j) {
    to[j] = j < n ? to_float(static_cast<const T*>(from)[j]) : wide_t<T>{};
  }
}

// Unit 0 is the biases; every panel of every matrix is one more.
template <class T>
int64_t units(const FusionLayer& f) {
  const Parameters<T> p = parameters<T>(f.channels, f.width, nullptr);
  int64_t n = 1 + p.w1().panels() + p.w2().panels() + p.wp().panels();
  if (f.backward) n += p.w1_turned().panels() + p.w2_turned().panels() + p.wp_turned().panels();
  return n;
}

template <class T>
void pack(const FusionLayer& f, int64_t unit, void* to) {
  const Parameters<T> p = parameters<T>(f.channels, f.width, to);
  if (unit-- == 0) {
    widen_bias<T>(f.b1, f.width, p.b1());
    widen_bias<T>(f.b2, f.channels, p.b2());
    widen_bias<T>(f.bp, f.channels, p.bp());
    return;
  }
  const auto own = [&](const Weights<T>& w, const Lines<T>& lines) {
    if (unit >= 0 && unit < w.panels()) w.pack(unit, lines);
    unit -= w.panels();
  };
  own(p.w1(), lines_of<T>(f.w1));
  own(p.w2(), lines_of<T>(f.w2));
  own(p.wp(), lines_of<T>(f.wp));
  if (!f.backward) return;
  own(p.w1_turned(), turned_lines_of<T>(f.w1));
  own(p.w2_turned(), turned_lines_of<T>(f.w2));
  own(p.wp_turned(), turned_lines_of<T>(f.wp));
}

template <class T>
void run(const Fusion& f, int64_t row, int64_t rows, char* scratch) {
  using V = WideVec<T>;
  const int64_t c = f.channels, d = f.width;
  const Parameters<T> p = parameters<T>(c, d, f.weights);
  wide_t<T>* const tile = reinterpret_cast<wide_t<T>*>(scratch);
  scratch += tile_bytes<T>(rows);
  const Rows<T> hidden{reinterpret_cast<Packed<T>*>(scratch), padded_columns<T>(d)};
  scratch += rows_bytes<T>(rows, d);
  const Rows<T> gated{reinterpret_cast<Packed<T>*>(scratch), padded_columns<T>(c)};
  scratch += rows_bytes<T>(rows, c);
  const Rows<T> x = packed_rows<T>(static_cast<const T*>(f.x) + row * f.x_row, f.x_row, rows, c,
                                   reinterpret_cast<Packed<T>*>(scratch));
  by_panels<T>(x, rows, p.w1(), tile,
               [&](int64_t i, int64_t j, int64_t, V v) __attribute__((always_inline)) {
                 store_packed(hidden.at(i) + j, relu(v + load<V>(p.b1() + j)));
               });
  hidden.end(rows, d);
  by_panels<T>(hidden, rows, p.w2(), tile,
               [&](int64_t i, int64_t j, int64_t left, V v) __attribute__((always_inline)) {
                 V slope;
                 const V gate = logistic(v + load<V>(p.b2() + j), slope);
                 store_packed(gated.at(i) + j, load_first(x.at(i) + j, left) * gate);
               });
  gated.end(rows, c);
  T* const out = static_cast<T*>(f.out) + row * f.out_row;
  by_panels<T>(gated, rows, p.wp(), tile,
               [&](int64_t i, int64_t j, int64_t left, V v) __attribute__((always_inline)) {
                 const V whole = v + load<V>(p.bp() + j) + load_wide(gated.at(i) + j);
                 store_first(out + i * f.out_row + j, whole, left);
               });
}

int64_t fusion_bytes(const FusionLayer& f) {
  return with_type(f.dtype, [&](auto tag) {
    return parameters<decltype(untag(tag))>(f.channels, f.width, nullptr).bytes(f.backward);
  });
}

int64_t fusion_units(const FusionLayer& f) {
  return with_type(f.dtype, [&](auto tag) { return units<decltype(untag(tag))>(f); });
}

void fusion_pack(const FusionLayer& f, int64_t unit, void* to) {
  with_type(f.dtype, [&](auto tag) {
    pack<decltype(untag(tag))>(f, unit, to);
    return 0;
  });
}

int64_t fusion_scratch(const Fusion& f, int64_t rows) {
  return with_type(f.dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    return tile_bytes<T>(rows) + rows_bytes<T>(rows, f.width) + 2 * rows_bytes<T>(rows, f.channels);
  });
}

void fusion(const Fusion& f, int64_t row, int64_t rows, void* scratch) {
  with_type(f.dtype, [&](auto tag) {
    run<decltype(untag(tag))>(f, row, rows, static_cast<char*>(scratch));
    return 0;
  });
}

int64_t fusion_pitch(DType dtype, int64_t columns) {
  return with_type(dtype, [&](auto tag) { return padded_columns<decltype(untag(tag))>(columns); });
}

}  // namespace

extern const FusionKernels kFusionKernels;
const FusionKernels kFusionKernels = {
    fusion_bytes,
    fusion_units,
    fusion_pack,
    fusion_scratch,
    fusion,
    fusion_pitch,
    fusion_backward_scratch,
    fusion_backward,
    fusion_sums,
    fusion_gradient_scratch,
    fusion_gradient,
};

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
