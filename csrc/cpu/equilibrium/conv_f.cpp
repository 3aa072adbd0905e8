// equilibrium_conv_cell: f on a band of rows, and its derivatives at the solution.
#include "cpu/equilibrium/conv.h"

namespace ppmoe::conv_cell::PPMOE_ISA {
namespace {

template <Activation A>
struct Activated {
  static constexpr bool kEnds = false;
  template <class V>
  PPMOE_INLINE_MEMBER V first(V x, int64_t, bool) const {
    V slope;
    return activate<A>(x, slope);
  }
  template <class V>
  PPMOE_INLINE_MEMBER V second(V x, int64_t) const {
    V slope;
    return activate<A>(x, slope);
  }
  template <class S>
  PPMOE_INLINE_MEMBER void row(const S*, int64_t, int64_t) const {}
};

// Keeps what the gradients need, of rows that belong to the band.
template <Activation A, class S>
struct Kept {
  static constexpr bool kEnds = true;
  const Slopes& to;

  template <class V>
  PPMOE_INLINE_MEMBER V first(V x, int64_t offset, bool own) const {
    V slope;
    const V value = activate<A>(x, slope);
    if (own) store(static_cast<S*>(to.first_slope) + offset, slope);
    return value;
  }
  template <class V>
  PPMOE_INLINE_MEMBER V second(V x, int64_t offset) const {
    V slope;
    const V value = activate<A>(x, slope);
    store(static_cast<S*>(to.second_slope) + offset, slope);
    store(static_cast<S*>(to.second) + offset, value);
    return value;
  }
  void row(const S* from, int64_t apart, int64_t y) const {
    const Sizes& s = to.pass.sizes;
    const int64_t pitch = padded_pitch(s.width);
    for (int64_t k = 0; k < s.hidden; ++k) {
      S* const here = static_cast<S*>(to.first) + (k * (s.height + 2) + y + 1) * pitch;
      __builtin_memcpy(here, from + k * apart, static_cast<size_t>(pitch) * sizeof(S));
      for (int64_t x = 0; x < pitch && y == 0; ++x) here[x - pitch] = 0;
      for (int64_t x = 0; x < pitch && y == s.height - 1; ++x) here[x + pitch] = 0;
    }
  }
};

template <class F>
PPMOE_INLINE void with_activation(Activation activation, const F& body) {
  switch (activation) {
    case Activation::kTanh: return body(Tag<Activated<Activation::kTanh>>{});
    case Activation::kRelu: return body(Tag<Activated<Activation::kRelu>>{});
    case Activation::kSilu: return body(Tag<Activated<Activation::kSilu>>{});
    case Activation::kSigmoid: return body(Tag<Activated<Activation::kSigmoid>>{});
    case Activation::kLeakyRelu: return body(Tag<Activated<Activation::kLeakyRelu>>{});
    default: return body(Tag<Activated<Activation::kGelu>>{});
  }
}

template <Activation A>
constexpr Activation activation_of(Tag<Activated<A>>) {
  return A;
}

}  // namespace

void evaluate(const Pass& p, int64_t first, int64_t past, void* scratch, double* dots);
void evaluate(const Pass& p, int64_t first, int64_t past, void* scratch, double* dots) {
  clear_dots(dots);
  with_activation(p.activation, [&](auto tag) {
    const decltype(untag(tag)) stage{};
    char* const bytes = static_cast<char*>(scratch);
    if (p.sizes.wide) return run_band<VecD>(p, stage, first, past, bytes, dots);
    run_band<VecF>(p, stage, first, past, bytes, dots);
  });
}

void slopes(const Slopes& to, int64_t first, int64_t past, void* scratch);
void slopes(const Slopes& to, int64_t first, int64_t past, void* scratch) {
  with_activation(to.pass.activation, [&](auto tag) {
    constexpr Activation kActivation = activation_of(decltype(tag){});
    char* const bytes = static_cast<char*>(scratch);
    if (to.pass.sizes.wide) {
      return run_band<VecD>(to.pass, Kept<kActivation, double>{to}, first, past, bytes, nullptr);
    }
    run_band<VecF>(to.pass, Kept<kActivation, float>{to}, first, past, bytes, nullptr);
  });
}

}  // namespace ppmoe::conv_cell::PPMOE_ISA
