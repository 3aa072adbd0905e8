// The small solve of Anderson's method: the weights of the last differences, for one sample.
// Its counterpart in PyTorch is ppmoe_ops/ops/equilibrium/mixing.py.
#pragma once

#include <cstdint>

namespace ppmoe::equilibrium {

inline constexpr int kMostHistory = 16;

// gamma = argmin |g - sum_j gamma_j dg_j|^2, from gram = dg dg^T [n, n] at `pitch` doubles a row
// and projection = dg g [n]. Columns are scaled to unit norm before `ridge` is added to the
// diagonal, so that no result depends on the scale of the problem. A column whose norm is zero or
// not finite is left out; where no finite solution is left, every weight is zero: a plain step.
inline void mixing_weights(const double* gram, int64_t pitch, const double* projection, int n,
                           double ridge, double* gamma) {
  double scale[kMostHistory], factor[kMostHistory][kMostHistory], y[kMostHistory];
  for (int i = 0; i < n; ++i) {
    const double square = gram[i * pitch + i];
    const bool usable = square > 0 && square < __builtin_inf();
    scale[i] = usable ? 1 / __builtin_sqrt(square) : 0;
  }
  bool finite = true;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      // A column that is left out becomes a row of the identity.
      double s = i == j ? 1 + ridge : 0;
      if (i != j && scale[i] != 0 && scale[j] != 0) s = gram[i * pitch + j] * scale[i] * scale[j];
      for (int k = 0; k < j; ++k) s -= factor[i][k] * factor[j][k];
      if (i == j) {
        finite = finite && s > 0;
        factor[i][i] = __builtin_sqrt(s);
      } else {
        factor[i][j] = s / factor[j][j];
      }
    }
    y[i] = scale[i] != 0 ? projection[i] * scale[i] : 0;
    for (int k = 0; k < i; ++k) y[i] -= factor[i][k] * y[k];
    y[i] /= factor[i][i];
  }
  for (int i = n - 1; i >= 0; --i) {
    for (int k = i + 1; k < n; ++k) y[i] -= factor[k][i] * y[k];
    y[i] /= factor[i][i];
    gamma[i] = y[i] * scale[i];
    finite = finite && __builtin_isfinite(gamma[i]);
  }
  for (int i = 0; i < n && !finite; ++i) gamma[i] = 0;
}

}  // namespace ppmoe::equilibrium
