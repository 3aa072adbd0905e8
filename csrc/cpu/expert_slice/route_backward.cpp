// The gradient of route's weights to the logits, a row at a time.
#include "cpu/expert_slice/declare.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

constexpr double kSigmoidSumFloor = 1e-20;

PPMOE_INLINE float exponential(float x) { return exp(splat(x))[0]; }
PPMOE_INLINE double exponential(double x) { return __builtin_exp(x); }

template <class T>
PPMOE_INLINE WideVec<T> exp_vector(WideVec<T> x) {
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < kWideLanes<T>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
  } else {
    return exp(x);
  }
}

// out := -(mean / sum of e^(x - top)) * e^(x - top); returns the factor on e^(x - top) and top.
template <class T>
struct Softmax {
  using W = wide_t<T>;
  W top, inverse;

  Softmax(const T* x, int64_t n) {
    constexpr int lanes = kWideLanes<T>;
    top = to_float(x[0]);
    for (int64_t i = 1; i < n; ++i) {
      const W value = to_float(x[i]);
      top = value > top ? value : top;
    }
    WideVec<T> total{};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) total += exp_vector<T>(load_wide(x + i) - top);
    W rest = sum(total);
    for (; i < n; ++i) rest += exponential(W(to_float(x[i])) - top);
    inverse = 1 / rest;
  }

  // out := factor * softmax.
  void scaled(const T* x, int64_t n, W factor, T* out) const {
    constexpr int lanes = kWideLanes<T>;
    const W scale = factor * inverse;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      store_wide(out + i, exp_vector<T>(load_wide(x + i) - top) * scale);
    }
    for (; i < n; ++i) out[i] = narrow<T>(exponential(W(to_float(x[i])) - top) * scale);
  }
};

template <class T>
void backward_rows(const RouteBackward& a, int64_t begin, int64_t end) {
  using W = wide_t<T>;
  const W scale = static_cast<W>(a.scale);
  const W unscale = a.scale != 0 ? static_cast<W>(1 / a.scale) : W(0);
  const int64_t top_k = a.top_k;
  for (int64_t t = begin; t < end; ++t) {
    const W* grad = static_cast<const W*>(a.grad) + t * top_k;
    const W* weights = static_cast<const W*>(a.weights) + t * top_k;
    const int32_t* ids = a.ids + t * top_k;
    const T* logits = static_cast<const T*>(a.logits) + t * a.stride;
    T* out = static_cast<T*>(a.out) + t * a.experts;

    if (a.softmax && !a.renormalize) {
      W mean = 0;
      for (int64_t k = 0; k < top_k; ++k) mean += grad[k] * weights[k];
      const Softmax<T> softmax(logits, a.experts);
      softmax.scaled(logits, a.experts, -mean, out);
      for (int64_t k = 0; k < top_k; ++k) {
        const W share = exponential(W(to_float(logits[ids[k]])) - softmax.top) * softmax.inverse;
        out[ids[k]] = narrow<T>(share * (grad[k] * scale - mean));
      }
      continue;
    }
    __builtin_memset(out, 0, static_cast<size_t>(a.experts) * sizeof(T));
    if (a.softmax) {
      W mean = 0;
      for (int64_t k = 0; k < top_k; ++k) mean += grad[k] * weights[k];
      mean *= unscale;
      for (int64_t k = 0; k < top_k; ++k) out[ids[k]] = narrow<T>(weights[k] * (grad[k] - mean));
    } else if (!a.renormalize) {
      for (int64_t k = 0; k < top_k; ++k) {
        const W score = weights[k] * unscale;
        out[ids[k]] = narrow<T>(grad[k] * scale * score * (1 - score));
      }
    } else {
      W total = static_cast<W>(kSigmoidSumFloor), mean = 0;
      for (int64_t k = 0; k < top_k; ++k) {
        const W score = 1 / (1 + exponential(-W(to_float(logits[ids[k]]))));
        total += score;
        mean += grad[k] * score;
      }
      mean /= total;
      for (int64_t k = 0; k < top_k; ++k) {
        const W score = 1 / (1 + exponential(-W(to_float(logits[ids[k]]))));
        out[ids[k]] = narrow<T>((grad[k] - mean) * (scale / total) * score * (1 - score));
      }
    }
  }
}

}  // namespace

void route_backward(const RouteBackward& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kF32: return backward_rows<float>(a, begin, end);
    case DType::kBf16: return backward_rows<Bf16>(a, begin, end);
    case DType::kF16: return backward_rows<F16>(a, begin, end);
    case DType::kF64: return backward_rows<double>(a, begin, end);
  }
}

}  // namespace ppmoe::expert_slice::PPMOE_ISA
