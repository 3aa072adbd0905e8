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

template <class T>
struct Softmax {
  using W = wide_t<T>;
  W top, total;

  Softmax(const T* x, int64_t n) {
    constexpr int lanes = kWideLanes<T>;
    top = to_float(x[0]);
    for (int64_t i = 1; i < n; ++i) {
      const W value = to_float(x[i]);
      top = value > top ? value : top;
    }
    WideVec<T> sums{};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) sums += exp_vector<T>(load_wide(x + i) - top);
    total = sum(sums);
    for (; i < n; ++i) total += exponential(W(to_float(x[i])) - top);
  }

  W share(T x) const { return exponential(W(to_float(x)) - top) / total; }

  // out := factor * softmax.
  void scaled(const T* x, int64_t n, W factor, T* out) const {
    constexpr int lanes = kWideLanes<T>;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      store_wide(out + i, exp_vector<T>(load_wide(x + i) - top) / total * factor);
    }
    for (; i < n; ++i) out[i] = narrow<T>(share(x[i]) * factor);
  }
};

// The logistic function of x and of -x, neither by a difference.
template <class W>
struct Sigmoid {
  W score, rest;

  explicit Sigmoid(W x) {
    const W e = exponential(x < 0 ? x : -x);
    const W larger = 1 / (1 + e), smaller = e / (1 + e);
    score = x < 0 ? smaller : larger;
    rest = x < 0 ? larger : smaller;
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
      // In double: where one share is near 1, a gradient and the mean nearly cancel.
      const Softmax<T> softmax(logits, a.experts);
      double mean = 0;
      for (int64_t k = 0; k < top_k; ++k) mean += double(grad[k]) * softmax.share(logits[ids[k]]);
      softmax.scaled(logits, a.experts, static_cast<W>(-mean * a.scale), out);
      for (int64_t k = 0; k < top_k; ++k) {
        const W difference = static_cast<W>((grad[k] - mean) * a.scale);
        out[ids[k]] = narrow<T>(softmax.share(logits[ids[k]]) * difference);
      }
      continue;
    }
    __builtin_memset(out, 0, static_cast<size_t>(a.experts) * sizeof(T));
    if (a.softmax) {
      W mean = 0;
      for (int64_t k = 0; k < top_k; ++k) mean += grad[k] * weights[k];
      mean *= unscale;
      for (int64_t k = 0; k < top_k; ++k) out[ids[k]] = narrow<T>(weights[k] * (grad[k] - mean));
    } else {
      W total = 1, mean = 0;
      if (a.renormalize) {
        total = static_cast<W>(kSigmoidSumFloor);
        for (int64_t k = 0; k < top_k; ++k) {
          const Sigmoid<W> sigmoid(to_float(logits[ids[k]]));
          total += sigmoid.score;
          mean += grad[k] * sigmoid.score;
        }
        mean /= total;
      }
      for (int64_t k = 0; k < top_k; ++k) {
        const Sigmoid<W> sigmoid(to_float(logits[ids[k]]));
        out[ids[k]] = narrow<T>((grad[k] - mean) / total * scale * sigmoid.score * sigmoid.rest);
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
