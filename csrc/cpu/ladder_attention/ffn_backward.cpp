// The backward kernels of ladder_ffn: everything is computed again from x, then gone through
// backwards.
#include "cpu/ladder_attention/ffn.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

// Pixels whose products are summed before they are added to a weight's gradient.
constexpr int64_t kWeightPixels = 96;

// Behind those of the forward, which are folded as in evaluation, but for the bias of w2.
enum BackwardVector : int {
  kInverse = kVectorCount,  // 1 / sqrt(var + eps) of the norms
  kPlainTaps = kInverse + 3,
  kMeanGrad = kPlainTaps + 9,    // of a norm's result, over pixels; zero in evaluation
  kMeanProduct = kMeanGrad + 3,  // of that times what is normalised, times kInverse squared; likewise
  kSumG3 = kMeanProduct + 3,
  kBackwardCount = kSumG3 + 1,
};

template <class T>
struct PreparedBackward : Prepared<T> {
  Weights<T> w1_turned, w2_turned;

  PreparedBackward(char* at, int64_t g)
      : Prepared<T>(at, g),
        w1_turned{reinterpret_cast<Packed<T>*>(at + front(g)), g, g},
        w2_turned{reinterpret_cast<Packed<T>*>(at + front(g) + Prepared<T>::weight_bytes(g)), g,
                  g} {}

  static int64_t front(int64_t g) {
    const int64_t more = (int{kBackwardCount} - int{kVectorCount}) * padded_columns<T>(g);
    return round_up(Prepared<T>::bytes(g) + more * static_cast<int64_t>(sizeof(wide_t<T>)), 64);
  }
  static int64_t bytes(int64_t g) { return front(g) + 2 * Prepared<T>::weight_bytes(g); }
};

#if defined(__AVX512BF16__)
// Rows 2 i and 2 i + 1 of `from` as pairs; the last row of an odd number is paired with zeros.
PPMOE_INLINE void zip_rows(const Bf16* from, int64_t stride, int64_t rows, int64_t columns,
                           Bf16* to) {
  for (int64_t i = 0; i < rows; i += 2, from += 2 * stride, to += 2 * columns) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const VecU low = widen(load<VecH>(from + j));
      const VecU high = i + 1 < rows ? widen(load<VecH>(from + stride + j)) : VecU{};
      store(to + 2 * j, low | high << 16);
    }
  }
}
#endif

template <class T>
struct Backward {
  using P = Packed<T>;
  using W = wide_t<T>;
  using V = WideVec<T>;
  using S = typename Scheme<T>::type;
  static constexpr int kStep = kWideLanes<T>;
  const FfnBackward& b;
  const Ffn& f{b.forward};
  PreparedBackward<T> p{f.prepared, f.channels};
  int64_t stride = row_stride<T>(f.channels);

  PPMOE_INLINE_MEMBER V vector(int which, int64_t j) const { return load<V>(p.vector(which) + j); }

  P* rows(char* data, const Unit& unit) const {
    return reinterpret_cast<P*>(data) + unit.begin * stride;
  }
  W* sums(int64_t unit, int which = 0) const {
    return reinterpret_cast<W*>(b.sums) + (unit * kFfnGradientSums + which) * p.pitch;
  }
  PPMOE_INLINE_MEMBER void clear(W* to, int count) const {
    for (int64_t j = 0; j < count * p.pitch; ++j) to[j] = W{};
  }
  PPMOE_INLINE_MEMBER static void add(W* to, V value) { store(to, load<V>(to) + value); }

  // The gradient of a norm's input, from that of its result.
  struct NormBackward {
    V centre, factor, mean, product;
    PPMOE_INLINE_MEMBER V operator()(V grad, V input) const {
      return factor * (grad - mean - (input - centre) * product);
    }
  };
  PPMOE_INLINE_MEMBER NormBackward norm(int index, int64_t j) const {
    return {vector(kCentre + index, j), vector(kScale + index, j), vector(kMeanGrad + index, j),
            vector(kMeanProduct + index, j)};
  }

  // The gradient of the network's result but for the factor that is returned, a row of it.
  PPMOE_INLINE_MEMBER V read_grad(int64_t image, int64_t r, int64_t c, W* row) const {
    widen_row(at<const T>(b.grad, image, r, c), b.grad.channel, f.channels, row);
    return scale_of_image<W>(f, image) - V{};
  }

  void in(const Unit& unit, const Scratch<T>& s) const {
    P* const ln = rows(b.ln, unit);
    norm_rows(f, p, unit, s.row, ln, stride);
    linear(ln, stride, unit.count, p.w1, s.tile, p.pitch);
    P *const a1 = rows(b.a1, unit), *const d1 = rows(b.d1, unit);
    for (int64_t i = 0; i < unit.count; ++i) {
      for (int64_t j = 0; j < stride; j += kStep) {
        V slope;
        const V h = load<V>(s.tile + i * p.pitch + j) + vector(kB1, j);
        put(a1 + i * stride + j, activate<Activation::kGelu>(h, slope));
        put(d1 + i * stride + j, slope);
      }
    }
  }

  void convolve(const Unit& unit, int64_t number, const Scratch<T>& s) const {
    P *const a2 = rows(b.a2, unit), *const d2 = rows(b.d2, unit);
    for (int64_t j = 0; j < stride; j += kStep) {
      V tap[9];
      load_taps(p.vector(kTaps) + j, p.pitch, tap);
      const W* const start = p.vector(kStart) + j;
      const auto body = [&](int64_t i, int which, const V(&columns)[3][3])
                            __attribute__((always_inline)) {
                              V slope;
                              const V h = sum_taps(columns, tap, load<V>(start + which * p.pitch));
                              put(a2 + i * stride + j, activate<Activation::kGelu>(h, slope));
                              put(d2 + i * stride + j, slope);
                            };
      walk(f, unit, reinterpret_cast<const P*>(b.a1) + j, stride, vector(kCentre, j), body);
    }
    multiply_second<T>(p, unit, a2, stride, s);
    P* const h3 = rows(b.g3, unit);
    W *const grads = sums(number, 0), *const products = sums(number, 1);
    clear(grads, 2);
    unit.each(f, [&](int64_t i, int64_t image, int64_t r, int64_t c) {
      const V factor = read_grad(image, r, c, s.row);
      for (int64_t j = 0; j < stride; j += kStep) {
        P* const cell = h3 + i * stride + j;
        put(cell, load<V>(s.tile + i * p.pitch + j) + vector(kB2, j));
        const V grad = load<V>(s.row + j) * factor;
        add(grads + j, grad);
        add(products + j, grad * (load_wide(cell) - vector(kCentre + 2, j)));
      }
    });
  }

  void project_backward(const Unit& unit, int64_t number, const Scratch<T>& s) const {
    P *const g3 = rows(b.g3, unit), *const g2 = rows(b.g2, unit);
    const P* const a2 = rows(b.a2, unit);
    W *const grads = sums(number, 0), *const products = sums(number, 1);
    W* const total = sums(number, 2);
    clear(grads, 3);
    unit.each(f, [&](int64_t i, int64_t image, int64_t r, int64_t c) {
      const V factor = read_grad(image, r, c, s.row);
      for (int64_t j = 0; j < stride; j += kStep) {
        P* const cell = g3 + i * stride + j;
        put(cell, norm(2, j)(load<V>(s.row + j) * factor, load_wide(cell)));
        add(total + j, load_wide(cell));
      }
    });
    linear(g3, stride, unit.count, p.w2_turned, s.tile, p.pitch);
    for (int64_t i = 0; i < unit.count; ++i) {
      for (int64_t j = 0; j < stride; j += kStep) {
        const V grad = load<V>(s.tile + i * p.pitch + j);
        put(g2 + i * stride + j, grad);
        add(grads + j, grad);
        add(products + j,
            grad * (load_wide(a2 + i * stride + j) - vector(kCentre + 1, j)));
      }
    }
  }

  void activate_backward(const Unit& unit, int64_t number) const {
    P* const g2 = rows(b.g2, unit);
    const P *const a2 = rows(b.a2, unit), *const d2 = rows(b.d2, unit);
    for (int64_t j = 0; j < stride; j += kStep) {
      const NormBackward second = norm(1, j);
      V total = V{};
      for (int64_t i = j, k = 0; k < unit.count; ++k, i += stride) {
        const V grad = second(load_wide(g2 + i), load_wide(a2 + i)) * load_wide(d2 + i);
        put(g2 + i, grad);
        total += grad;
      }
      store(sums(number) + j, total);
    }
  }

  void convolve_backward(const Unit& unit, int64_t number) const {
    P* const g1 = rows(b.g1, unit);
    const P* const a1 = rows(b.a1, unit);
    for (int64_t j = 0; j < stride; j += kStep) {
      V tap[9], tap_grad[9] = {}, grads = V{}, products = V{};
      load_taps(p.vector(kPlainTaps) + j, p.pitch, tap);
      const V centre = vector(kCentre, j), scale = vector(kScale, j), shift = vector(kShift, j);
      const auto body = [&](int64_t i, int, const V(&columns)[3][3])
                            __attribute__((always_inline)) {
                              const V centred = load_wide(a1 + i * stride + j) - centre;
                              const V u = centred * scale + shift;
                              V grad = V{};
#pragma GCC unroll 9
                              for (int k = 0; k < 9; ++k) {
                                // The pixel that a tap joins to this one lies on the other side.
                                const V& from = columns[2 - k % 3][2 - k / 3];
                                grad += from * tap[k];
                                tap_grad[k] += from * u;
                              }
                              put(g1 + i * stride + j, grad);
                              grads += grad;
                              products += grad * centred;
                            };
      walk(f, unit, reinterpret_cast<const P*>(b.g2) + j, stride, V{}, body);
      store(sums(number, 0) + j, grads);
      store(sums(number, 1) + j, products);
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k) store(sums(number, 2 + k) + j, tap_grad[k]);
    }
  }

  void in_backward(const Unit& unit, int64_t number, const Scratch<T>& s) const {
    P* const g1 = rows(b.g1, unit);
    const P *const a1 = rows(b.a1, unit), *const d1 = rows(b.d1, unit);
    for (int64_t j = 0; j < stride; j += kStep) {
      const NormBackward first = norm(0, j);
      V total = V{};
      for (int64_t i = j, k = 0; k < unit.count; ++k, i += stride) {
        const V grad = first(load_wide(g1 + i), load_wide(a1 + i)) * load_wide(d1 + i);
        put(g1 + i, grad);
        total += grad;
      }
      store(sums(number) + j, total);
    }
    linear(g1, stride, unit.count, p.w1_turned, s.tile, p.pitch);
    W *const shifts = sums(number, 1), *const scales = sums(number, 2);
    clear(shifts, 2);
    const W share = W{1} / static_cast<W>(f.channels);
    unit.each(f, [&](int64_t i, int64_t image, int64_t r, int64_t c) {
      W* const tile = s.tile + i * p.pitch;
      widen_row(at<const T>(f.x, image, r, c), f.x.channel, f.channels, s.row);
      const V inverse = standardise(s.row, f.channels, f.eps) - V{};
      V total = V{}, along = V{};
      for (int64_t j = 0; j < stride; j += kStep) {
        const V n = load<V>(s.row + j), out = load<V>(tile + j);
        const V grad = out * vector(kLnW, j);
        add(shifts + j, out);
        add(scales + j, out * n);
        total += grad;
        along += grad * n;
      }
      const V mean = sum(total) * share - V{}, product = sum(along) * share - V{};
      widen_row(at<const T>(b.grad, image, r, c), b.grad.channel, f.channels, s.second_row);
      for (int64_t j = 0; j < stride; j += kStep) {
        const V grad = load<V>(tile + j) * vector(kLnW, j);
        const V through = (grad - mean - load<V>(s.row + j) * product) * inverse;
        store(tile + j, load<V>(s.second_row + j) + through);
      }
      narrow_row(tile, f.channels, static_cast<T*>(b.grad_x) + (unit.begin + i) * f.channels, 1);
    });
  }

  void run(FfnPhase phase, int64_t number, void* scratch) const {
    const Unit unit(f, number);
    const Scratch<T> s(scratch, f.channels);
    switch (phase) {
      case FfnPhase::kIn: return in(unit, s);
      case FfnPhase::kConvolve: return convolve(unit, number, s);
      case FfnPhase::kProjectBackward: return project_backward(unit, number, s);
      case FfnPhase::kActivateBackward: return activate_backward(unit, number);
      case FfnPhase::kConvolveBackward: return convolve_backward(unit, number);
      case FfnPhase::kInBackward: return in_backward(unit, number, s);
    }
  }

  // The units' sums become one, two neighbours at a time.
  void merge(int count) const {
    const int64_t units = ffn_units(f.pixels());
    for (int64_t step = 1; step < units; step *= 2) {
      for (int64_t i = 0; i + step < units; i += 2 * step) {
        W* const to = sums(i);
        const W* const from = sums(i + step);
        for (int64_t j = 0; j < count * p.pitch; j += kStep) add(to + j, load<V>(from + j));
      }
    }
  }

  // `count` sums to elements first, first + step, ... of a result.
  void write(const FfnResult& result, const W* from, int64_t first = 0, int64_t step = 1) const {
    with_type(result.dtype, [&](auto tag) {
      using R = decltype(untag(tag));
      R* const to = static_cast<R*>(result.data) + first;
      for (int64_t c = 0; c < f.channels; ++c) {
        to[c * step] = narrow<R>(static_cast<wide_t<R>>(from[c]));
      }
      return 0;
    });
  }

  // A norm's own gradients; and what its input's gradient takes of them.
  void settle_norm(int norm, W* grads, W* products) const {
    const W share = W{1} / static_cast<W>(f.pixels());
    const W* const inverse = p.vector(kInverse, norm);
    for (int64_t c = 0; c < p.pitch; ++c) {
      products[c] *= inverse[c];
      p.vector(kMeanGrad, norm)[c] = b.training ? grads[c] * share : W{};
      p.vector(kMeanProduct, norm)[c] = b.training ? products[c] * inverse[c] * share : W{};
      // The last norm's mean takes the second one's shift away again.
      if (norm == 1 && b.training) grads[c] -= grads[c];
    }
    write(b.bn_b, grads, norm * f.channels);
    write(b.bn_w, products, norm * f.channels);
  }

  void settle(FfnPhase phase) const {
    switch (phase) {
      case FfnPhase::kIn: return;
      case FfnPhase::kConvolve: merge(2); return settle_norm(2, sums(0), sums(0, 1));
      case FfnPhase::kProjectBackward: {
        merge(3);
        settle_norm(1, sums(0), sums(0, 1));
        W* const total = sums(0, 2);
        for (int64_t c = 0; c < p.pitch; ++c) {
          p.vector(kSumG3)[c] = total[c];
          // That of b2, which the mean of training takes away.
          if (b.training) total[c] -= total[c];
        }
        return write(b.b2, total);
      }
      case FfnPhase::kActivateBackward: merge(1); return write(b.dw_b, sums(0));
      case FfnPhase::kConvolveBackward:
        merge(kFfnGradientSums);
        for (int k = 0; k < 9; ++k) write(b.dw_w, sums(0, 2 + k), k, 9);
        return settle_norm(0, sums(0), sums(0, 1));
      case FfnPhase::kInBackward:
        merge(3);
        write(b.b1, sums(0));
        write(b.ln_b, sums(0, 1));
        return write(b.ln_w, sums(0, 2));
    }
  }

  void prepare() const {
    ffn_prepare(f);
    const int64_t g = f.channels, pitch = p.pitch;
    const auto pack = [&](const Weights<T>& w, const FfnMatrix& from) {
      const Lines<T> lines{static_cast<const T*>(from.data), {from.col}, {from.row}};
      for (int64_t i = 0; i < w.panels(); ++i) w.pack(i, lines);
    };
    pack(p.w1_turned, f.w1);
    pack(p.w2_turned, f.w2);
    for (int norm = 0; norm < 3; ++norm) {
      W* const inverse = p.vector(kInverse, norm);
      for (int64_t c = 0; c < pitch; ++c) {
        const W var = c < g ? static_cast<const W*>(f.var)[norm * g + c] : W{1};
        inverse[c] = W{1} / static_cast<W>(__builtin_sqrt(var + static_cast<W>(f.eps)));
      }
    }
    widen_into(static_cast<const W*>(f.mean) + 2 * g, g, pitch, p.vector(kCentre, 2));
    widen_taps(f.dw_w, g, pitch, p.vector(kPlainTaps));
  }

  // tile [count, pitch] = sum over pixels of left [pixels, first to first + count] times right.
  void multiply_pixels(const P* left, const P* right, int64_t first, int64_t count, W* tile,
                       [[maybe_unused]] P* pairs) const {
    const int64_t pixels = f.pixels(), vectors = stride / kStep;
    for (int64_t begin = 0; begin < pixels; begin += kWeightPixels) {
      const int64_t here = least(kWeightPixels, pixels - begin);
      const P* const a = left + begin * stride + first;
      const P* const c = right + begin * stride;
      if constexpr (S::kPair == 1) {
        multiply(Left<S>{a, 1, stride}, count, Right<S>{c, stride}, vectors, here, tile, p.pitch,
                 begin != 0);
      } else {
#if defined(__AVX512BF16__)
        const int64_t wide = round_up(count, kLanes);
        P* const right_pairs = pairs + kWeightPixels * kFfnWeightRows;
        zip_rows(a, stride, here, wide, pairs);
        zip_rows(c, stride, here, stride, right_pairs);
        multiply(Left<S>{pairs, 2, 2 * wide}, count, Right<S>{right_pairs, 2 * stride}, vectors,
                 (here + 1) / 2, tile, p.pitch, begin != 0);
#endif
      }
    }
  }

  void weight_gradient(bool second, int64_t first, int64_t count, void* scratch) const {
    W* const tile = static_cast<W*>(scratch);
    P* const pairs = reinterpret_cast<P*>(tile + kFfnWeightRows * p.pitch);
    const P* const left = reinterpret_cast<const P*>(second ? b.g3 : b.g1);
    const P* const right = reinterpret_cast<const P*>(second ? b.a2 : b.ln);
    multiply_pixels(left, right, first, count, tile, pairs);
    const FfnResult& result = second ? b.w2 : b.w1;
    for (int64_t i = 0; i < count; ++i) {
      W* const row = tile + i * p.pitch;
      if (second) {
        // The layer takes the norm of a2. With training its shift drops out, as above.
        const V total = p.vector(kSumG3)[first + i] - V{};
        for (int64_t j = 0; j < stride; j += kStep) {
          const V centred = load<V>(row + j) - total * vector(kCentre + 1, j);
          const V shifted = b.training ? V{} : total * vector(kShift + 1, j);
          store(row + j, centred * vector(kScale + 1, j) + shifted);
        }
      }
      narrow_row(row, f.channels, static_cast<T*>(result.data) + (first + i) * f.channels, 1);
    }
  }

  static int64_t weights_scratch(int64_t g) {
    const int64_t tile = kFfnWeightRows * padded_columns<T>(g) * static_cast<int64_t>(sizeof(W));
    const int64_t pairs = kWeightPixels * (kFfnWeightRows + row_stride<T>(g)) *
                          static_cast<int64_t>(sizeof(P));
    return tile + (S::kPair == 2 ? pairs : 0);
  }
};

template <class F>
PPMOE_INLINE void with_backward(const FfnBackward& b, const F& body) {
  with_type(b.forward.dtype, [&](auto tag) {
    body(Backward<decltype(untag(tag))>{b});
    return 0;
  });
}

}  // namespace

int64_t ffn_backward_bytes(DType dtype, int64_t channels) {
  return with_type(dtype, [&](auto tag) {
    return PreparedBackward<decltype(untag(tag))>::bytes(channels);
  });
}

int64_t ffn_weights_scratch(DType dtype, int64_t channels) {
  return with_type(dtype, [&](auto tag) {
    return Backward<decltype(untag(tag))>::weights_scratch(channels);
  });
}

void ffn_backward_prepare(const FfnBackward& b) {
  with_backward(b, [&](const auto& backward) { backward.prepare(); });
}

void ffn_backward(const FfnBackward& b, FfnPhase phase, int64_t unit, void* scratch) {
  with_backward(b, [&](const auto& backward) { backward.run(phase, unit, scratch); });
}

void ffn_backward_settle(const FfnBackward& b, FfnPhase phase) {
  with_backward(b, [&](const auto& backward) { backward.settle(phase); });
}

void ffn_weight_gradient(const FfnBackward& b, bool second, int64_t first, int64_t rows,
                         void* scratch) {
  with_backward(b, [&](const auto& backward) {
    backward.weight_gradient(second, first, rows, scratch);
  });
}

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
