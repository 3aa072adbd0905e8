// The passes of ladder_ffn's backward: everything is computed again from x, then gone through
// backwards.
#include "cpu/ladder_attention/ffn_backward.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

template <class T>
struct Backward : BackwardRows<T> {
  using Base = BackwardRows<T>;
  using Base::add;
  using Base::b;
  using Base::clear;
  using Base::f;
  using Base::kStep;
  using Base::p;
  using Base::rows;
  using Base::stride;
  using Base::sums;
  using Base::vector;
  using Base::weight_sums;
  using typename Base::P;
  using typename Base::S;
  using typename Base::V;
  using typename Base::W;

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

  // sum [g, pitch] = or += left^T @ right, over the rows of a unit.
  void multiply_rows(const P* left, const P* right, int64_t count, bool more, W* sum,
                     [[maybe_unused]] const BackwardScratch<T>& s) const {
    const int64_t vectors = stride / kStep;
    if constexpr (S::kPair == 1) {
      multiply(Left<S>{left, 1, stride}, f.channels, Right<S>{right, stride}, vectors, count, sum,
               p.pitch, more);
    } else {
#if defined(__AVX512BF16__)
      zip_rows(left, stride, count, stride, s.left_pairs);
      zip_rows(right, stride, count, stride, s.right_pairs);
      multiply(Left<S>{s.left_pairs, 2, 2 * stride}, f.channels,
               Right<S>{s.right_pairs, 2 * stride}, vectors, (count + 1) / 2, sum, p.pitch, more);
#endif
    }
  }

  void in(const Unit& unit, const Scratch<T>& s) const {
    norm_rows(f, p, unit, s, stride);
    linear(s.rows, stride, unit.count, p.w1, s.tile, p.pitch);
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

  void convolve(const Unit& unit, int64_t group, const BackwardScratch<T>& s) const {
    P *const a2 = rows(b.a2, unit), *const d2 = rows(b.d2, unit);
    for (int64_t j = 0; j < stride; j += kStep) {
      V tap[9];
      load_taps(p.vector(kTaps) + j, p.pitch, tap);
      const W* const start = p.vector(kStart) + j;
      const auto body = [&](int64_t i, int which, const V(&columns)[3][3])
                            __attribute__((always_inline)) {
                              const V from = load<V>(start + which * p.pitch);
                              store(s.tile + i * p.pitch + j, sum_taps(columns, tap, from));
                            };
      walk(f, unit, reinterpret_cast<const P*>(b.a1) + j, stride, vector(kCentre, j), body);
    }
    for (int64_t i = 0; i < unit.count; ++i) {
      for (int64_t j = 0; j < stride; j += kStep) {
        V slope;
        const V a = activate<Activation::kGelu>(load<V>(s.tile + i * p.pitch + j), slope);
        put(a2 + i * stride + j, a);
        put(d2 + i * stride + j, slope);
      }
    }
    multiply_second<T>(p, unit, a2, stride, s);
    P* const h3 = rows(b.u2, unit);
    const MapRows<T> grad(f, b.grad, unit, s.grad_copies);
    const Factors<T> factor(f, unit);
    each_vector<T>(f.channels, [&](int64_t j, auto part) __attribute__((always_inline)) {
      const V bias = vector(kB2, j), centre = vector(kCentre + 2, j);
      V grads = V{}, products = V{};
      for (int64_t i = 0; i < unit.count; ++i) {
        P* const cell = h3 + i * stride + j;
        put(cell, load<V>(s.tile + i * p.pitch + j) + bias);
        const V out = part.read(grad.row[i] + j) * factor.of[i];
        grads += out;
        products += out * (load_wide(cell) - centre);
      }
      add(sums(group, 0) + j, grads);
      add(sums(group, 1) + j, products);
    });
  }

  // Leaves the gradient of h3 in g3, which takes part in a product.
  void project_backward(const Unit& unit, int64_t group, P* g3, const BackwardScratch<T>& s) const {
    const P* const a2 = rows(b.a2, unit);
    P* const u2 = rows(b.u2, unit);  // still h3
    const MapRows<T> grad(f, b.grad, unit, s.grad_copies);
    const Factors<T> factor(f, unit);
    each_vector<T>(f.channels, [&](int64_t j, auto part) __attribute__((always_inline)) {
      const NormBackward third = norm(2, j);
      V total = V{};
      for (int64_t i = 0; i < unit.count; ++i) {
        P* const cell = g3 + i * stride + j;
        const V out = part.read(grad.row[i] + j) * factor.of[i];
        put(cell, third(out, load_wide(u2 + i * stride + j)));
        total += load_wide(cell);
      }
      add(sums(group, 2) + j, total);
    });
    linear(g3, stride, unit.count, p.w2_turned, s.tile, p.pitch);
    for (int64_t j = 0; j < stride; j += kStep) {
      const V centre = vector(kCentre + 1, j);
      V grads = V{}, products = V{};
      for (int64_t i = 0; i < unit.count; ++i) {
        const V grad_u = load<V>(s.tile + i * p.pitch + j);
        put(u2 + i * stride + j, grad_u);
        grads += grad_u;
        products += grad_u * (load_wide(a2 + i * stride + j) - centre);
      }
      add(sums(group, 0) + j, grads);
      add(sums(group, 1) + j, products);
    }
  }

  // to [unit] = the gradient of h2.
  void activate_backward(const Unit& unit, P* to) const {
    const P *const u2 = rows(b.u2, unit), *const a2 = rows(b.a2, unit);
    const P* const d2 = rows(b.d2, unit);
    for (int64_t k = 0; k < unit.count * stride; k += stride) {
      for (int64_t j = 0; j < stride; j += kStep) {
        const V grad = norm(1, j)(load_wide(u2 + k + j), load_wide(a2 + k + j));
        put(to + k + j, grad * load_wide(d2 + k + j));
      }
    }
  }

  // `h2` is where the gradient of the first pixel of all would be.
  void convolve_backward(const Unit& unit, int64_t group, const P* h2) const {
    P* const u1 = rows(b.u1, unit);
    const P* const a1 = rows(b.a1, unit);
    for (int64_t j = 0; j < stride; j += kStep) {
      V tap[9], tap_grad[9] = {}, grads = V{}, products = V{}, total = V{};
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
                              put(u1 + i * stride + j, grad);
                              grads += grad;
                              products += grad * centred;
                              total += columns[1][1];
                            };
      walk(f, unit, h2 + j, stride, V{}, body);
      add(sums(group, 0) + j, grads);
      add(sums(group, 1) + j, products);
      add(sums(group, 2) + j, total);
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k) add(sums(group, 3 + k) + j, tap_grad[k]);
    }
  }

  // Leaves the gradient of h1 in g1, and the layer norm's result in ln.
  void in_backward(const Unit& unit, int64_t group, P* g1, P* ln,
                   const BackwardScratch<T>& s) const {
    const P *const u1 = rows(b.u1, unit), *const a1 = rows(b.a1, unit);
    const P* const d1 = rows(b.d1, unit);
    for (int64_t j = 0; j < stride; j += kStep) {
      const NormBackward first = norm(0, j);
      V total = V{};
      for (int64_t i = 0; i < unit.count; ++i) {
        const int64_t k = i * stride + j;
        const V grad = first(load_wide(u1 + k), load_wide(a1 + k)) * load_wide(d1 + k);
        put(g1 + k, grad);
        total += grad;
      }
      add(sums(group, 0) + j, total);
    }
    linear(g1, stride, unit.count, p.w1_turned, s.tile, p.pitch);
    const MapRows<T> x(f, f.x, unit, s.copies), grad(f, b.grad, unit, s.grad_copies);
    const RowNorms<T> n(x, unit.count, f.channels, f.eps);
    each_vector<T>(f.channels, [&](int64_t j, auto part) __attribute__((always_inline)) {
      const V scale = vector(kLnW, j), shift = vector(kLnB, j);
      V shifts = V{}, scales = V{};
      for (int64_t i = 0; i < unit.count; ++i) {
        W* const cell = s.tile + i * p.pitch + j;
        const V out = load<V>(cell), normal = part.cut(n(i, part.read(x.row[i] + j)));
        put(ln + i * stride + j, normal * scale + shift);
        store(cell, out * scale);
        shifts += out;
        scales += out * normal;
      }
      add(sums(group, 1) + j, shifts);
      add(sums(group, 2) + j, scales);
    });
    constexpr int kTogether = RowNorms<T>::kTogether;
    const W share = W{1} / static_cast<W>(f.channels);
    for (int64_t first = 0; first < unit.count; first += kTogether) {
      V total[kTogether] = {}, along[kTogether] = {};
      each_vector<T>(f.channels, [&](int64_t j, auto part) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int k = 0; k < kTogether; ++k) {
          const int64_t i = least(first + k, unit.count - 1);
          const V normal = part.cut(n(i, part.read(x.row[i] + j)));
          const V value = load<V>(s.tile + i * p.pitch + j);
          total[k] += value;
          along[k] += value * normal;
        }
      });
      const int64_t here = least(kTogether, unit.count - first);
      for (int64_t k = 0; k < here; ++k) {
        const int64_t i = first + k;
        const V mean = sum(total[k]) * share - V{}, product = sum(along[k]) * share - V{};
        T* const to = static_cast<T*>(b.grad_x) + (unit.begin + i) * f.channels;
        each_vector<T>(f.channels, [&](int64_t j, auto part) __attribute__((always_inline)) {
          const V normal = n(i, part.read(x.row[i] + j));
          const V through = load<V>(s.tile + i * p.pitch + j) - mean - normal * product;
          part.write(to + j, part.read(grad.row[i] + j) + through * n.inverse[i]);
        });
      }
    }
  }

  // The pixels whose gradients the convolution of a unit takes.
  Unit neighbours(int64_t begin, int64_t end) const {
    const int64_t reach = f.height > 1 ? f.width + 1 : 1;
    return Unit(f, begin > reach ? begin - reach : 0, least(end + reach, f.pixels()));
  }

  void run(FfnPhase phase, int64_t group, void* scratch) const {
    const BackwardScratch<T> s(scratch, f.channels);
    const int64_t first = ffn_group_unit(f.pixels(), group);
    const int64_t past = ffn_group_unit(f.pixels(), group + 1);
    const int64_t begin = ffn_begin(f.pixels(), first), end = ffn_begin(f.pixels(), past);
    clear(sums(group), kFfnGradientSums);
    const P* h2 = reinterpret_cast<const P*>(b.u2);
    if (phase == FfnPhase::kActivateBackward) {
      if (b.apart) activate_backward(Unit(f, begin, end), rows(b.u2, Unit(f, begin, end)));
      return;
    }
    if (phase == FfnPhase::kConvolveBackward && !b.apart) {
      const Unit all = neighbours(begin, end);
      activate_backward(all, s.group);
      h2 = s.group - all.begin * stride;
    }
    // Two units share a pass over a weight's sums.
    int64_t held = 0;
    bool more = false;
    const auto multiply_held = [&](const P* left, const P* right, int64_t count, char* data) {
      multiply_rows(left, right, count, more, weight_sums(data, group), s);
      more = true;
      held = 0;
    };
    for (int64_t number = first; number < past; ++number) {
      const Unit unit(f, number);
      const int64_t behind = held * stride;
      const bool last = held > 0 || number + 1 == past;
      switch (phase) {
        case FfnPhase::kIn: in(unit, s); break;
        case FfnPhase::kConvolve: convolve(unit, group, s); break;
        case FfnPhase::kProjectBackward:
          project_backward(unit, group, s.left + behind, s);
          held += unit.count;
          if (last) multiply_held(s.left, rows(b.a2, unit) - behind, held, b.w2_sums);
          break;
        case FfnPhase::kConvolveBackward: convolve_backward(unit, group, h2); break;
        case FfnPhase::kInBackward:
          in_backward(unit, group, s.left + behind, s.right + behind, s);
          held += unit.count;
          if (last) multiply_held(s.left, s.right, held, b.w1_sums);
          break;
        case FfnPhase::kActivateBackward: break;
      }
    }
  }

  int64_t scratch() const {
    int64_t most = 0;
    for (int64_t group = 0; group < ffn_groups(f.pixels()) && !b.apart; ++group) {
      const int64_t begin = ffn_begin(f.pixels(), ffn_group_unit(f.pixels(), group));
      const int64_t end = ffn_begin(f.pixels(), ffn_group_unit(f.pixels(), group + 1));
      const int64_t count = neighbours(begin, end).count;
      most = count > most ? count : most;
    }
    return BackwardScratch<T>::bytes(f.channels) + most * stride * static_cast<int64_t>(sizeof(P));
  }
};

template <class F>
PPMOE_INLINE void with_backward(const FfnBackward& b, const F& body) {
  with_type(b.forward.dtype, [&](auto tag) {
    body(Backward<decltype(untag(tag))>{{b}});
    return 0;
  });
}

}  // namespace

int64_t ffn_backward_scratch(const FfnBackward& b) {
  int64_t bytes = 0;
  with_backward(b, [&](const auto& backward) { bytes = backward.scratch(); });
  return bytes;
}

void ffn_backward(const FfnBackward& b, FfnPhase phase, int64_t group, void* scratch) {
  with_backward(b, [&](const auto& backward) { backward.run(phase, group, scratch); });
}

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
