// The gradients of ladder_ffn's parameters: what the groups of a pass have left becomes one.
#include "cpu/ladder_attention/ffn_backward.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {
namespace {

template <class T>
struct Gradients : BackwardRows<T> {
  using Base = BackwardRows<T>;
  using Base::add;
  using Base::b;
  using Base::f;
  using Base::kStep;
  using Base::p;
  using Base::stride;
  using Base::sums;
  using Base::vector;
  using Base::weight_sums;
  using typename Base::P;
  using typename Base::V;
  using typename Base::W;

  // The groups' sums become one, two neighbours at a time.
  void merge(int count) const {
    const int64_t groups = ffn_groups(f.pixels());
    for (int64_t step = 1; step < groups; step *= 2) {
      for (int64_t i = 0; i + step < groups; i += 2 * step) {
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
      case FfnPhase::kIn:
      case FfnPhase::kActivateBackward: return;
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
      case FfnPhase::kConvolveBackward:
        merge(kFfnGradientSums);
        write(b.dw_b, sums(0, 2));
        for (int k = 0; k < 9; ++k) write(b.dw_w, sums(0, 3 + k), k, 9);
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

  void weight_gradient(bool second, int64_t first, int64_t count) const {
    const FfnResult& result = second ? b.w2 : b.w1;
    char* const data = second ? b.w2_sums : b.w1_sums;
    const int64_t groups = ffn_groups(f.pixels());
    for (int64_t o = first; o < first + count; ++o) {
      W* const row = weight_sums(data, 0) + o * p.pitch;
      const V total = p.vector(kSumG3)[o] - V{};
      for (int64_t j = 0; j < stride; j += kStep) {
        V sum = load<V>(row + j);
        for (int64_t i = 1; i < groups; ++i) {
          sum += load<V>(weight_sums(data, i) + o * p.pitch + j);
        }
        if (second) {
          // The layer takes the norm of a2. With training its shift drops out, as above.
          const V centred = sum - total * vector(kCentre + 1, j);
          const V shifted = b.training ? V{} : total * vector(kShift + 1, j);
          sum = centred * vector(kScale + 1, j) + shifted;
        }
        store(row + j, sum);
      }
      narrow_row(row, f.channels, static_cast<T*>(result.data) + o * f.channels, 1);
    }
  }
};

template <class F>
PPMOE_INLINE void with_gradients(const FfnBackward& b, const F& body) {
  with_type(b.forward.dtype, [&](auto tag) {
    body(Gradients<decltype(untag(tag))>{{b}});
    return 0;
  });
}

}  // namespace

int64_t ffn_backward_bytes(DType dtype, int64_t channels) {
  return with_type(
      dtype, [&](auto tag) { return PreparedBackward<decltype(untag(tag))>::bytes(channels); });
}

void ffn_backward_prepare(const FfnBackward& b) {
  with_gradients(b, [&](const auto& gradients) { gradients.prepare(); });
}

void ffn_backward_settle(const FfnBackward& b, FfnPhase phase) {
  with_gradients(b, [&](const auto& gradients) { gradients.settle(phase); });
}

void ffn_weight_gradient(const FfnBackward& b, bool second, int64_t first, int64_t rows) {
  with_gradients(b, [&](const auto& gradients) { gradients.weight_gradient(second, first, rows); });
}

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
