// ladder_ffn: its operators, and what they share.
#pragma once

#include "cpu/ladder_attention/ops.h"

namespace ppmoe::ladder_attention {

// Checked arguments; after `close`, small ones are contiguous.
struct FfnArguments {
  const char* op;
  Tensor x, ln_w, ln_b, w1, b1, dw_w, dw_b, w2, b2, bn_w, bn_b;
  std::optional<Tensor> row_scale;
  bool training;

  FfnArguments(const char* op, Tensor x, Tensor ln_w, Tensor ln_b, Tensor w1, Tensor b1,
               Tensor dw_w, Tensor dw_b, Tensor w2, Tensor b2, Tensor bn_w, Tensor bn_b,
               std::optional<Tensor> row_scale, bool training);

  void close();

  ScalarType dtype() const { return x.scalar_type(); }
  int64_t channels() const { return x.size(3); }
  int64_t pixels() const { return x.size(0) * x.size(1) * x.size(2); }

  // A tensor [3, g] of what the norms' parameters may be, or with `wide` of sums alone.
  void check_statistics(const char* name, const Tensor& tensor, bool wide) const;

  // Without results, rows between phases and prepared memory.
  Ffn describe(double eps, const Tensor& mean, const Tensor& var) const;
};

std::tuple<Tensor, Tensor, Tensor> ladder_ffn(
    Tensor x, Tensor ln_w, Tensor ln_b, Tensor w1, Tensor b1, Tensor dw_w, Tensor dw_b, Tensor w2,
    Tensor b2, Tensor bn_w, Tensor bn_b, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> row_scale, bool training, double eps);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
ladder_ffn_backward(Tensor grad, Tensor x, Tensor ln_w, Tensor ln_b, Tensor w1, Tensor b1,
                    Tensor dw_w, Tensor dw_b, Tensor w2, Tensor b2, Tensor bn_w, Tensor bn_b,
                    Tensor mean, Tensor var, std::optional<Tensor> row_scale, bool training,
                    double eps);

}  // namespace ppmoe::ladder_attention
