// The solver of equilibrium_conv_cell for one image: what is evaluated next, and when to stop.
#pragma once

#include "cpu/equilibrium/conv_kernels.h"

namespace ppmoe::conv_cell {

struct Options {
  bool anderson;
  double atol, rtol, ridge;
  int64_t max_iter;
};

// States are numbered; each is a value of f and its residual. State 0 begins as z0.
class Solve {
 public:
  // The last values, the best one, and one to write to.
  static int states(const Options& o) {
    const int64_t most = o.anderson ? kHistory + 3 : 3;
    return static_cast<int>(o.max_iter < most ? o.max_iter + 1 : most);
  }

  // `start` is |z0|.
  void begin(const Options& options, double start);

  // The next evaluation: `value_of(state)` and `residual_of(state)` say where a state lies.
  template <class F, class G>
  void prepare(Pass& p, const F& value_of, const G& residual_of) const {
    p.mixed = count_;
    p.differences = differences();
    for (int j = 0; j <= count_; ++j) p.values[j] = value_of(order_[j]);
    for (int j = 0; j < count_; ++j) p.weights[j] = weights_[j];
    for (int j = 0; j < p.differences; ++j) p.residuals[j] = residual_of(order_[j]);
    p.value = value_of(target_);
    p.residual = options_.anderson ? residual_of(target_) : nullptr;
  }

  // Takes the dots of that evaluation; false when the solve has ended.
  bool advance(const double* dots);

  int best() const { return best_; }
  int64_t steps() const { return steps_; }
  double residual() const { return residual_; }

 private:
  int differences() const;
  void choose_target();

  Options options_;
  int order_[kHistory + 1];  // states, the newest first
  int known_, count_, target_, best_;
  int64_t steps_;
  double start_, limit_, before_, least_, residual_;
  double gram_[kHistory][kHistory], weights_[kHistory];
};

}  // namespace ppmoe::conv_cell
