// router_losses: softmax mass per expert and log-sum-exp per token, and their gradient.
#include "cpu/expert_slice/declare.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

PPMOE_INLINE VecF exponential(VecF x) { return exp(x); }
PPMOE_INLINE VecD exponential(VecD x) {
  for (int i = 0; i < kWideLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// The last, partial vector of a row; lanes past its end are `rest`.
template <class T>
PPMOE_INLINE WideVec<T> load_part(const T* from, int64_t count, wide_t<T> rest) {
  WideVec<T> v = rest - WideVec<T>{};
  for (int64_t i = 0; i < count; ++i) v[i] = to_float(from[i]);
  return v;
}

template <class T>
bool has_nan(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (to_float(row[i]) != to_float(row[i])) return true;
  }
  return false;
}

template <class T>
void losses_rows(const Losses& a, int64_t begin, int64_t end, wide_t<T>* mass, double* z) {
  using W = wide_t<T>;
  using V = WideVec<T>;
  constexpr int lanes = kWideLanes<T>;
  constexpr W lowest = -static_cast<W>(__builtin_inf());
  const int64_t experts = a.experts;
  const int64_t whole = experts / lanes * lanes;
  double squares = 0;
  for (int64_t t = begin; t < end; ++t) {
    const T* row = static_cast<const T*>(a.logits) + t * a.stride;
    V high = lowest - V{};
    for (int64_t i = 0; i < whole; i += lanes) {
      const V x = load_wide(row + i);
      high = x > high ? x : high;
    }
    const V part = load_part(row + whole, experts - whole, lowest);
    high = part > high ? part : high;
    W top = high[0];
    for (int i = 1; i < lanes; ++i) top = high[i] > top ? high[i] : top;

    V total{};
    for (int64_t i = 0; i < whole; i += lanes) total += exponential(load_wide(row + i) - top);
    total += exponential(part - top);
    const W all = sum(total);
    W lse = top + static_cast<W>(__builtin_log(static_cast<double>(all)));
    // An infinite largest logit is the log-sum-exp itself, unless there is a NaN beside it.
    if (top - top != 0 && !has_nan(row, experts)) lse = top;
    static_cast<W*>(a.lse)[t] = lse;
    squares += static_cast<double>(lse) * static_cast<double>(lse);

    const W inverse = 1 / all;
    for (int64_t i = 0; i < whole; i += lanes) {
      const V p = exponential(load_wide(row + i) - top) * inverse;
      store(mass + i, load<V>(mass + i) + p);
    }
    const V p = exponential(part - top) * inverse;
    for (int64_t i = whole; i < experts; ++i) mass[i] += p[i - whole];
  }
  *z = squares;
}

template <class T>
void backward_rows(const LossesBackward& a, int64_t begin, int64_t end) {
  using W = wide_t<T>;
  using V = WideVec<T>;
  constexpr int lanes = kWideLanes<T>;
  const int64_t experts = a.experts;
  const int64_t whole = experts / lanes * lanes;
  const W* shares = static_cast<const W*>(a.shares);
  const V part_shares = load_part(shares + whole, experts - whole, W(0));
  const W balance = static_cast<W>(a.balance);
  for (int64_t t = begin; t < end; ++t) {
    const T* row = static_cast<const T*>(a.logits) + t * a.stride;
    T* out = static_cast<T*>(a.out) + t * experts;
    const W lse = static_cast<const W*>(a.lse)[t];
    const V part = exponential(load_part(row + whole, experts - whole, lse) - lse);
    V dot = part * part_shares;
    for (int64_t i = 0; i < whole; i += lanes) {
      dot += exponential(load_wide(row + i) - lse) * load<V>(shares + i);
    }
    // p * (balance * (share - mean share) + z * lse), the row's constants taken together.
    const W constant = static_cast<W>(a.z) * lse - balance * sum(dot);
    for (int64_t i = 0; i < whole; i += lanes) {
      const V p = exponential(load_wide(row + i) - lse);
      store_wide(out + i, p * (load<V>(shares + i) * balance + constant));
    }
    T last[lanes];
    store_wide(last, part * (part_shares * balance + constant));
    for (int64_t i = whole; i < experts; ++i) out[i] = last[i - whole];
  }
}

}  // namespace

void losses(const Losses& a, int64_t begin, int64_t end, void* mass, double* z) {
  float* floats = static_cast<float*>(mass);
  switch (a.dtype) {
    case DType::kF32: return losses_rows<float>(a, begin, end, floats, z);
    case DType::kBf16: return losses_rows<Bf16>(a, begin, end, floats, z);
    case DType::kF16: return losses_rows<F16>(a, begin, end, floats, z);
    case DType::kF64: return losses_rows<double>(a, begin, end, static_cast<double*>(mass), z);
  }
}

void losses_backward(const LossesBackward& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kF32: return backward_rows<float>(a, begin, end);
    case DType::kBf16: return backward_rows<Bf16>(a, begin, end);
    case DType::kF16: return backward_rows<F16>(a, begin, end);
    case DType::kF64: return backward_rows<double>(a, begin, end);
  }
}

}  // namespace ppmoe::expert_slice::PPMOE_ISA
