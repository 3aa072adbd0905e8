// Activations and their derivatives, on vectors of float or double.
#pragma once

#include "ppmoe/vec.h"

namespace ppmoe::PPMOE_ISA {
namespace {

PPMOE_INLINE VecF exponential(VecF x) { return exp(x); }
PPMOE_INLINE VecD exponential(VecD x) {
  for (int i = 0; i < kBytes / 8; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

PPMOE_INLINE VecF magnitude(VecF x) { return x < 0.f ? -x : x; }
PPMOE_INLINE VecD magnitude(VecD x) { return x < 0. ? -x : x; }

// s = 1 / (1 + e^-x), and s (1 - s) without the cancellation near s = 1. The exponential is of a
// negative number whatever the sign, so it cannot overflow.
template <class V>
PPMOE_INLINE V logistic(V x, V& slope) {
  const V z = exponential(-magnitude(x));
  const V one = z - z + 1;
  const V near = one / (one + z);  // the one of s and 1 - s that is at least a half
  slope = z * near * near;
  return x < 0 ? z * near : near;
}

// The normal distribution function, and e^(-x^2 / 2). The polynomial is a least-maximum fit of
// erfc(z) e^(z^2) / t with t = 1 / (1 + 0.4 z) for z up to 9.5, relative error 6e-8.
PPMOE_INLINE VecF normal(VecF x, VecF& bell) {
  const VecF z = magnitude(x) * 0.70710678118654752f;
  bell = exp(x * x * -0.5f);
  const VecF t = 1.f / (1.f + 0.4f * z);
  VecF p = splat(4.026746046e-02f);
  p = p * t - 1.354709123e-01f;
  p = p * t + 7.384177701e-02f;
  p = p * t + 9.972999534e-02f;
  p = p * t + 7.150802956e-02f;
  p = p * t + 1.969631402e-01f;
  p = p * t + 2.009585558e-01f;
  p = p * t + 2.265757135e-01f;
  p = p * t + 2.256262980e-01f;
  const VecF tail = 0.5f * p * t * bell;
  return x < 0.f ? tail : 1.f - tail;
}
PPMOE_INLINE VecD normal(VecD x, VecD& bell) {
  VecD result;
  for (int i = 0; i < kBytes / 8; ++i) {
    result[i] = 0.5 * __builtin_erfc(x[i] * -0.70710678118654752440);
    bell[i] = __builtin_exp(x[i] * x[i] * -0.5);
  }
  return result;
}

// tanh within 3e-7 of its value and never beyond 1. x p(x^2) / q(x^2) is a least-maximum fit of the
// relative error up to 9.02, where tanh rounds to 1: 2e-8.
PPMOE_INLINE VecF hyperbolic_tangent(VecF x) {
  const VecF most = splat(9.02f), one = splat(1.f);
  const VecF low = x > most ? most : x;
  const VecF t = low < -most ? -most : low;
  const VecF s = t * t;
  VecF p = splat(1.332029622e-08f);
  p = p * s + 2.058445523e-05f;
  p = p * s + 3.494097810e-03f;
  p = p * s + 1.337977264e-01f;
  p = p * s + 9.999999794e-01f;
  VecF q = splat(7.762547036e-07f);
  q = q * s + 3.283193383e-04f;
  q = q * s + 2.587131822e-02f;
  q = q * s + 4.671308798e-01f;
  q = q * s + 1.f;
  const VecF y = t * p / q;
  const VecF high = y > one ? one : y;
  return high < -one ? -one : high;
}
PPMOE_INLINE VecD hyperbolic_tangent(VecD x) {
  for (int i = 0; i < kBytes / 8; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// act(x) and act'(x); what the caller does not use costs nothing.
template <Activation kActivation, class V>
PPMOE_INLINE V activate(V x, V& slope) {
  using scalar = decltype(V{}[0] + V{}[0]);
  if constexpr (kActivation == Activation::kRelu) {
    slope = x <= 0 ? V{} : V{} + scalar(1);
    return x <= 0 ? V{} : x;
  } else if constexpr (kActivation == Activation::kSilu) {
    V s_slope;
    const V s = logistic(x, s_slope);
    slope = s + x * s_slope;
    return x * s;
  } else if constexpr (kActivation == Activation::kGelu) {
    V bell;
    const V share = normal(x, bell);
    slope = share + x * bell * scalar(0.39894228040143267794);  // 1 / sqrt(2 pi)
    return x * share;
  } else if constexpr (kActivation == Activation::kTanh) {
    const V t = hyperbolic_tangent(x);
    slope = scalar(1) - t * t;
    return t;
  } else if constexpr (kActivation == Activation::kSigmoid) {
    return logistic(x, slope);
  } else if constexpr (kActivation == Activation::kLeakyRelu) {
    constexpr scalar kBelow = scalar(0.01);
    slope = x <= 0 ? V{} + kBelow : V{} + scalar(1);
    return x <= 0 ? x * kBelow : x;
  } else {
    // 0.5 (1 + tanh u) is the logistic function of 2 u.
    constexpr scalar kTwice = scalar(1.59576912160573071176);  // 2 sqrt(2 / pi)
    constexpr scalar kCubic = scalar(0.044715);
    const V square = x * x;
    V s_slope;
    const V s = logistic(kTwice * (x + kCubic * x * square), s_slope);
    slope = s + x * s_slope * (kTwice * (scalar(1) + 3 * (kCubic * x) * x));
    return x * s;
  }
}

}  // namespace
}  // namespace ppmoe::PPMOE_ISA
