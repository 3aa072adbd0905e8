// The forward kernels of ladder_ffn.
#include "cpu/ladder_attention/ffn.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

// One phase on one unit.
template <class T>
struct Forward {
  using P = Packed<T>;
  using W = wide_t<T>;
  using V = WideVec<T>;
  static constexpr int kStep = kWideLanes<T>;
  const Ffn& f;
  Prepared<T> p{f.prepared, f.channels};
  int64_t stride = row_stride<T>(f.channels);

  P* rows(char* data, const Unit& unit) const {
    return reinterpret_cast<P*>(data) + unit.begin * stride;
  }

  // Leaves the mean of each channel over the unit's rows, and the squares of what differs from it.
  void gather(const P* from, const Unit& unit, int64_t number) const {
    W* const mean = reinterpret_cast<W*>(f.sums) + number * kFfnStatistics * p.pitch;
    W* const square = mean + p.pitch;
    const V share = W{1} / static_cast<W>(unit.count) - V{};
    for (int64_t j = 0; j < stride; j += kStep) {
      // Taken from the first one on, the mean of equal values is exact.
      const V first = load_wide(from + j);
      V total = V{}, squares = V{};
      for (int64_t i = 1; i < unit.count; ++i) total += load_wide(from + i * stride + j) - first;
      const V centre = first + total * share;
      for (int64_t i = 0; i < unit.count; ++i) {
        const V centred = load_wide(from + i * stride + j) - centre;
        squares += centred * centred;
      }
      store(mean + j, centre);
      store(square + j, squares);
    }
  }

  void in(int64_t number, void* scratch) const {
    const Unit unit(f, number);
    const Scratch<T> s(scratch, f.channels);
    norm_rows(f, p, unit, s, stride);
    linear(s.rows, stride, unit.count, p.w1, s.tile, p.pitch);
    P* const to = rows(f.a1, unit);
    const W* const bias = p.vector(kB1);
    for (int64_t i = 0; i < unit.count; ++i) {
      for (int64_t j = 0; j < stride; j += kStep) {
        V slope;
        const V h = load<V>(s.tile + i * p.pitch + j) + load<V>(bias + j);
        put(to + i * stride + j, activate<Activation::kGelu>(h, slope));
      }
    }
    if (f.training) gather(to, unit, number);
  }

  // Rows of gelu(convolution), and of the norm of that.
  template <bool kNorm>
  void convolve(const Unit& unit, P* to, const Scratch<T>& s) const {
    for (int64_t j = 0; j < stride; j += kStep) {
      V tap[9];
      load_taps(p.vector(kTaps) + j, p.pitch, tap);
      const W* const start = p.vector(kStart) + j;
      const auto body = [&](int64_t i, int which, const V(&columns)[3][3])
                            __attribute__((always_inline)) {
                              const V from = load<V>(start + which * p.pitch);
                              store(s.tile + i * p.pitch + j, sum_taps(columns, tap, from));
                            };
      walk(f, unit, reinterpret_cast<const P*>(f.a1) + j, stride, load<V>(p.vector(kCentre) + j),
           body);
    }
    for (int64_t i = 0; i < unit.count; ++i) {
      for (int64_t j = 0; j < stride; j += kStep) {
        V slope;
        const V a = activate<Activation::kGelu>(load<V>(s.tile + i * p.pitch + j), slope);
        put(to + i * stride + j, kNorm ? Norm<T>(p, 1, j)(a) : a);
      }
    }
  }

  void convolve(int64_t number, void* scratch) const {
    const Unit unit(f, number);
    P* const to = rows(f.a2, unit);
    convolve<false>(unit, to, Scratch<T>(scratch, f.channels));
    gather(to, unit, number);
  }

  // y = x + row_scale BN_2(h), h being rows of either kind.
  template <class H>
  void finish(const Unit& unit, const H* h, int64_t h_stride, const Scratch<T>& s) const {
    const MapRows<T> x(f, f.x, unit, s.copies);
    const Factors<T> factor(f, unit);
    unit.each(f, [&](int64_t i, int64_t b, int64_t r, int64_t c) {
      T* const y = at<T>(f.y, b, r, c);
      each_vector<T>(f.channels, [&](int64_t j, auto part) __attribute__((always_inline)) {
        const V value = Norm<T>(p, 2, j)(load_wide(h + i * h_stride + j));
        part.write(y + j, part.read(x.row[i] + j) + factor.of[i] * value);
      });
    });
  }

  void out(int64_t number, void* scratch) const {
    const Unit unit(f, number);
    const Scratch<T> s(scratch, f.channels);
    convolve<true>(unit, s.rows, s);
    linear(s.rows, stride, unit.count, p.w2, s.tile, p.pitch);
    finish(unit, s.tile, p.pitch, s);
  }

  void project(int64_t number, void* scratch) const {
    const Unit unit(f, number);
    const Scratch<T> s(scratch, f.channels);
    multiply_second(p, unit, rows(f.a2, unit), stride, s);
    P* const to = rows(f.h3, unit);
    const W* const bias = p.vector(kB2);
    for (int64_t i = 0; i < unit.count; ++i) {
      for (int64_t j = 0; j < stride; j += kStep) {
        put(to + i * stride + j, load<V>(s.tile + i * p.pitch + j) + load<V>(bias + j));
      }
    }
    gather(to, unit, number);
  }

  void finish(int64_t number, void* scratch) const {
    const Unit unit(f, number);
    finish(unit, rows(f.h3, unit), stride, Scratch<T>(scratch, f.channels));
  }

  // The units' means and squares become one, two neighbours at a time.
  void merge() const {
    const int64_t units = ffn_units(f.pixels()), pixels = f.pixels();
    for (int64_t step = 1; step < units; step *= 2) {
      for (int64_t i = 0; i + step < units; i += 2 * step) {
        const int64_t begin = ffn_begin(pixels, i), middle = ffn_begin(pixels, i + step);
        const int64_t end = ffn_begin(pixels, least(i + 2 * step, units));
        const W part = static_cast<W>(end - middle) / static_cast<W>(end - begin);
        const W both = part * static_cast<W>(middle - begin);
        W* const a = reinterpret_cast<W*>(f.sums) + i * kFfnStatistics * p.pitch;
        const W* const b = a + step * kFfnStatistics * p.pitch;
        for (int64_t j = 0; j < stride; j += kStep) {
          const V apart = load<V>(b + j) - load<V>(a + j);
          store(a + j, load<V>(a + j) + apart * part);
          store(a + p.pitch + j,
                load<V>(a + p.pitch + j) + load<V>(b + p.pitch + j) + apart * apart * both);
        }
      }
    }
  }

  void settle(int norm) const {
    merge();
    const W* const mean = reinterpret_cast<const W*>(f.sums);
    const W share = W{1} / static_cast<W>(f.pixels());
    for (int64_t c = 0; c < f.channels; ++c) {
      static_cast<W*>(f.mean)[norm * f.channels + c] = mean[c];
      static_cast<W*>(f.var)[norm * f.channels + c] = mean[p.pitch + c] * share;
    }
    fold(norm);
  }

  // Reads a norm's vectors; those that leave a value alone where there is no norm.
  void fold(int norm) const {
    const int64_t g = f.channels;
    W* const centre = p.vector(kCentre, norm);
    W* const scale = p.vector(kScale, norm);
    W* const shift = p.vector(kShift, norm);
    for (int64_t c = 0; c < p.pitch; ++c) {
      centre[c] = shift[c] = W{};
      scale[c] = f.bn_w.data == nullptr && c < g ? W{1} : W{};
    }
    if (f.bn_w.data != nullptr) {
      widen_into(f.bn_w, norm * g, g, g, scale);
      widen_into(f.bn_b, norm * g, g, g, shift);
      for (int64_t c = 0; c < g; ++c) {
        centre[c] = static_cast<const W*>(f.mean)[norm * g + c];
        const W var = static_cast<const W*>(f.var)[norm * g + c];
        scale[c] /= static_cast<W>(__builtin_sqrt(var + static_cast<W>(f.eps)));
      }
    }
    if (norm == 0) fold_taps(scale, shift);
    if (norm == 2 && !f.training) {
      // The bias of the product before it, which is added nowhere else then.
      for (int64_t c = 0; c < g; ++c) centre[c] -= p.vector(kB2)[c];
    }
  }

  void fold_taps(const W* scale, const W* shift) const {
    W* const taps = p.vector(kTaps);
    W* const added = p.vector(kRoom);
    W* const bias = p.vector(kRoom, 9);
    widen_into(f.dw_b, 0, f.channels, p.pitch, bias);
    widen_taps(f.dw_w, f.channels, p.pitch, taps);
    if (f.dw_off.data != nullptr) widen_taps(f.dw_off, f.channels, p.pitch, added);
    for (int64_t k = 0; k < 9; ++k) {
      for (int64_t c = 0; c < p.pitch; ++c) {
        if (f.dw_off.data == nullptr) added[k * p.pitch + c] = taps[k * p.pitch + c] * shift[c];
        taps[k * p.pitch + c] *= scale[c];
      }
    }
    sum_starts(bias, added, p.pitch, p.vector(kStart));
  }

  void prepare() const {
    const int64_t g = f.channels, pitch = p.pitch;
    const auto pack = [&](const Weights<T>& w, const FfnMatrix& from) {
      const Lines<T> lines{static_cast<const T*>(from.data), {from.row}, {from.col}};
      for (int64_t i = 0; i < w.panels(); ++i) w.pack(i, lines);
    };
    pack(p.w1, f.w1);
    pack(p.w2, f.w2);
    widen_into(f.ln_w, 0, g, pitch, p.vector(kLnW));
    widen_into(f.ln_b, 0, g, pitch, p.vector(kLnB));
    widen_into(f.b1, 0, g, pitch, p.vector(kB1));
    widen_into(f.b2, 0, g, pitch, p.vector(kB2));
    for (int norm = 0; norm < 3 && !f.training; ++norm) fold(norm);
  }
};

template <class F>
PPMOE_INLINE void with_forward(const Ffn& f, const F& body) {
  with_type(f.dtype, [&](auto tag) {
    body(Forward<decltype(untag(tag))>{f});
    return 0;
  });
}

FfnBytes bytes(DType dtype, int64_t channels) {
  return with_type(dtype, [&](auto tag) {
    using T = decltype(untag(tag));
    return FfnBytes{row_stride<T>(channels) * static_cast<int64_t>(sizeof(Packed<T>)),
                    Prepared<T>::bytes(channels), ffn_backward_bytes(dtype, channels),
                    padded_columns<T>(channels) * static_cast<int64_t>(sizeof(wide_t<T>)),
                    Scratch<T>::bytes(channels)};
  });
}

void widen(const FfnParameter& from, int64_t count, DType dtype, void* to) {
  if (dtype == DType::kF64) return widen_into(from, 0, count, count, static_cast<double*>(to));
  widen_into(from, 0, count, count, static_cast<float*>(to));
}

void in(const Ffn& f, int64_t unit, void* scratch) {
  with_forward(f, [&](const auto& forward) { forward.in(unit, scratch); });
}
void out(const Ffn& f, int64_t unit, void* scratch) {
  with_forward(f, [&](const auto& forward) { forward.out(unit, scratch); });
}
void settle(const Ffn& f, int norm) {
  with_forward(f, [&](const auto& forward) { forward.settle(norm); });
}
void convolve(const Ffn& f, int64_t unit, void* scratch) {
  with_forward(f, [&](const auto& forward) { forward.convolve(unit, scratch); });
}
void project(const Ffn& f, int64_t unit, void* scratch) {
  with_forward(f, [&](const auto& forward) { forward.project(unit, scratch); });
}
void finish(const Ffn& f, int64_t unit, void* scratch) {
  with_forward(f, [&](const auto& forward) { forward.finish(unit, scratch); });
}

}  // namespace

void ffn_prepare(const Ffn& f) {
  with_forward(f, [&](const auto& forward) { forward.prepare(); });
}

const FfnKernels kFfnKernels = {
    bytes,
    widen,
    ffn_prepare,
    in,
    out,
    settle,
    convolve,
    project,
    finish,
    ffn_backward_prepare,
    ffn_backward_scratch,
    ffn_backward,
    ffn_backward_settle,
    ffn_weight_gradient,
};

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
