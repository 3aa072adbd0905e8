#include "cpu/equilibrium/conv_solve.h"

#include <algorithm>
#include <cmath>

#include "cpu/equilibrium/mixing.h"

namespace ppmoe::conv_cell {
namespace {

constexpr double kDiverged = 1e4;  // as in ppmoe_ops/ops/equilibrium/mixing.py

}  // namespace

void Solve::begin(const Options& options, double start) {
  options_ = options;
  order_[0] = 0;
  known_ = 1;
  count_ = 0;
  best_ = -1;
  steps_ = 0;
  start_ = start;
  limit_ = before_ = least_ = residual_ = INFINITY;
  choose_target();
}

int Solve::differences() const {
  return options_.anderson && steps_ > 0 ? std::min(count_ + 1, kHistory) : 0;
}

// A state that neither the next evaluation reads nor the result may be.
void Solve::choose_target() {
  const int read = std::min(known_, std::max(count_ + 1, differences()));
  for (target_ = 0;; ++target_) {
    const bool used = std::find(order_, order_ + read, target_) != order_ + read;
    if (!used && target_ != best_) return;
  }
}

bool Solve::advance(const double* dots) {
  const double size = std::sqrt(dots[0]), total = std::sqrt(dots[1]);
  const int differences_now = differences();
  if (++steps_ == 1) limit_ = kDiverged * (start_ + total);
  if (!std::isfinite(size) || size > limit_) {
    residual_ = INFINITY;
    if (best_ < 0) best_ = target_;
    return false;
  }
  if (size < least_) {
    least_ = residual_ = size;
    best_ = target_;
  }
  if (size <= options_.atol + options_.rtol * total || steps_ == options_.max_iter) return false;

  if (!options_.anderson || (count_ > 0 && size > before_)) {
    count_ = 0;
  } else if (differences_now > 0) {
    for (int i = kHistory - 1; i > 0; --i) {
      for (int j = kHistory - 1; j > 0; --j) gram_[i][j] = gram_[i - 1][j - 1];
    }
    count_ = differences_now;
    for (int j = 0; j < count_; ++j) gram_[0][j] = gram_[j][0] = dots[2 + j];
    equilibrium::mixing_weights(gram_[0], kHistory, dots + 2 + count_, count_, options_.ridge,
                                weights_);
  }
  before_ = size;
  std::copy_backward(order_, order_ + kHistory, order_ + kHistory + 1);
  order_[0] = target_;
  known_ = std::min(known_ + 1, kHistory + 1);
  choose_target();
  return true;
}

}  // namespace ppmoe::conv_cell
