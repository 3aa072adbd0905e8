// equilibrium_conv_cell: g + J^T v on a band of rows, and copies between planes and tensors.
#include "cpu/equilibrium/conv.h"

namespace ppmoe::conv_cell::PPMOE_ISA {

void evaluate(const Pass& p, int64_t first, int64_t past, void* scratch, double* dots);
void slopes(const Slopes& to, int64_t first, int64_t past, void* scratch);
int64_t gradients_scratch(const Sizes& s, int64_t rows);
void gradients(const Gradients& g, int64_t first, int64_t past, void* scratch, double* sums);

namespace {

// Transposed, the last activation comes first: slopes are maps here.
template <class S>
struct Scaled {
  static constexpr bool kEnds = false;
  const S *slope_first, *slope_second;

  template <class V>
  PPMOE_INLINE_MEMBER V first(V x, int64_t offset, bool) const {
    return x * load<V>(slope_first + offset);
  }
  template <class V>
  PPMOE_INLINE_MEMBER V second(V x, int64_t offset) const {
    return x * load<V>(slope_second + offset);
  }
  void row(const S*, int64_t, int64_t) const {}
};

template <class V>
void run_adjoint(const Pass& p, int64_t first, int64_t past, char* scratch, double* dots) {
  using S = scalar_t<V>;
  const Scaled<S> stage{static_cast<const S*>(p.second_slope),
                        static_cast<const S*>(p.first_slope)};
  run_band<V>(p, stage, first, past, scratch, dots);
}

void adjoint(const Pass& p, int64_t first, int64_t past, void* scratch, double* dots) {
  clear_dots(dots);
  char* const bytes = static_cast<char*>(scratch);
  if (p.sizes.wide) return run_adjoint<VecD>(p, first, past, bytes, dots);
  run_adjoint<VecF>(p, first, past, bytes, dots);
}

// The injection of u alone: p.in is of [r, U].
template <class V>
void run_inject(const Pass& p, scalar_t<V>* to, int64_t first, int64_t past, char* scratch) {
  using S = scalar_t<V>;
  const Sizes& s = p.sizes;
  const S** const rows = Rows<S>(s, scratch).in;
  for (int64_t y = first; y < past; ++y) {
    for (int64_t i = 0; i < s.inputs; ++i) rows[i] = at<S>(p.u, i * s.plane() + y * s.pitch());
    by_columns<V>(s.width, [&](int64_t x, auto count) __attribute__((always_inline)) {
      product<V, count.value>(rows, s.inputs, x, p.in, s.hidden, to + y * s.pitch() + x, s.plane());
    });
  }
}

void inject(const Pass& p, void* to, int64_t first, int64_t past, void* scratch) {
  char* const bytes = static_cast<char*>(scratch);
  if (p.sizes.wide) return run_inject<VecD>(p, static_cast<double*>(to), first, past, bytes);
  run_inject<VecF>(p, static_cast<float*>(to), first, past, bytes);
}

template <class S>
void pack_blocks(const S* matrix, int64_t outputs, int64_t inputs, S* to) {
  for (int64_t o = 0; o < outputs;) {
    const int64_t most = outputs - o < kBlock ? outputs - o : kBlock;
    for (int64_t i = 0; i < inputs; ++i) {
      for (int64_t k = 0; k < most; ++k) *to++ = matrix[(o + k) * inputs + i];
    }
    o += most;
  }
}

void pack(bool wide, const void* matrix, int64_t outputs, int64_t inputs, void* to) {
  if (wide) {
    return pack_blocks(static_cast<const double*>(matrix), outputs, inputs,
                       static_cast<double*>(to));
  }
  pack_blocks(static_cast<const float*>(matrix), outputs, inputs, static_cast<float*>(to));
}

void widen(DType dtype, const void* from, int64_t n, void* to) {
  with_type(dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    for (int64_t i = 0; i < n; ++i) {
      static_cast<wide_t<T>*>(to)[i] = to_float(static_cast<const T*>(from)[i]);
    }
    return 0;
  });
}

template <class T>
double load_planes(const Copy& c, int64_t first, int64_t past) {
  using V = WideVec<T>;
  using W = wide_t<T>;
  constexpr int64_t lanes = kWideLanes<T>;
  const int64_t pitch = row_pitch(c.width);
  double total = 0;
  for (int64_t plane = 0; plane < c.planes; ++plane) {
    for (int64_t y = first; y < past; ++y) {
      W* const to = static_cast<W*>(c.to) + (plane * c.height + y) * pitch;
      int64_t x = 0;
      V squares{};
      if (c.from != nullptr) {
        const T* const from = static_cast<const T*>(c.from) + (plane * c.height + y) * c.width;
        for (; x + lanes <= c.width; x += lanes) {
          const V v = load_wide(from + x);
          store_wide(to + x, v);
          squares += v * v;
        }
        for (; x < c.width; ++x) {
          to[x] = to_float(from[x]);
          total += static_cast<double>(to[x]) * static_cast<double>(to[x]);
        }
      }
      for (; x < pitch; ++x) to[x] = 0;
      total += static_cast<double>(sum(squares));
    }
  }
  return total;
}

double load_rows(const Copy& c, int64_t first, int64_t past) {
  return with_type(c.dtype,
                   [&](auto tag) { return load_planes<decltype(untag(tag))>(c, first, past); });
}

template <class T>
void store_planes(const Copy& c, int64_t first, int64_t past) {
  using W = wide_t<T>;
  constexpr int64_t lanes = kWideLanes<T>;
  const int64_t pitch = row_pitch(c.width);
  for (int64_t plane = 0; plane < c.planes; ++plane) {
    for (int64_t y = first; y < past; ++y) {
      const W* const from = static_cast<const W*>(c.from) + (plane * c.height + y) * pitch;
      T* const to = static_cast<T*>(c.to) + (plane * c.height + y) * c.width;
      int64_t x = 0;
      for (; x + lanes <= c.width; x += lanes) store_wide(to + x, load<WideVec<T>>(from + x));
      for (; x < c.width; ++x) to[x] = narrow<T>(from[x]);
    }
  }
}

void store_rows(const Copy& c, int64_t first, int64_t past) {
  with_type(c.dtype, [&](auto tag) {
    store_planes<decltype(untag(tag))>(c, first, past);
    return 0;
  });
}

int64_t scratch_bytes(const Sizes& s) {
  return s.wide ? Rows<double>(s, nullptr).size : Rows<float>(s, nullptr).size;
}

}  // namespace

const Kernels kKernels = {
    pack,    widen,  load_rows, store_rows,        scratch_bytes, evaluate,
    adjoint, inject, slopes,    gradients_scratch, gradients,
};

}  // namespace ppmoe::conv_cell::PPMOE_ISA
