// route and router_losses: argument checks, results and threads around the row kernels.
#include <cmath>
#include <vector>

#include "cpu/expert_slice/ops.h"

namespace ppmoe::expert_slice {
namespace {

constexpr int64_t kRouteGrain = 64;  // rows a thread takes at least
constexpr int64_t kLossBlock = 64;   // rows of one partial sum, whatever the number of threads

bool is_softmax(const char* op, const std::string& score) {
  if (score == "softmax") return true;
  if (score == "sigmoid") return false;
  bad_value(op, ": score is '", score, "'; allowed: softmax, sigmoid");
}

int64_t grain_for(int64_t columns) {
  const int64_t rows = 16384 / (columns > 0 ? columns : 1);
  return rows > kRouteGrain ? rows : kRouteGrain;
}

void check_like(const char* op, const char* argument, const Tensor& tensor, const Tensor& weights) {
  check_size(op, argument, "T", tensor.size(0), weights.size(0), "as weights");
  check_size(op, argument, "K", tensor.size(1), weights.size(1), "as weights");
}

}  // namespace

std::tuple<Tensor, Tensor> route(Tensor logits, int64_t top_k, StringHandle score_handle,
                                 bool renormalize, std::optional<Tensor> selection_bias,
                                 int64_t groups, int64_t top_groups, double scale) {
  const char* op = "route";
  const String score(score_handle);
  check_dim(op, "logits", logits, "T, E");
  check_dtype(op, "logits", logits, kFloats);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const bool softmax = is_softmax(op, score.text());
  check_between(op, "groups", groups, 1, experts, "E experts in equal groups");
  if (experts % groups != 0) {
    bad_value(op, ": groups is ", groups, "; allowed: divisors of E = ", experts);
  }
  check_between(op, "top_groups", top_groups, 1, groups, "at most groups");
  check_between(op, "top_k", top_k, 1, top_groups * (experts / groups),
                "experts that may be chosen");
  const ScalarType wide = wide_dtype(logits.scalar_type());
  Tensor bias;
  if (selection_bias.has_value()) {
    check_dim(op, "selection_bias", *selection_bias, "E");
    check_dtype(op, "selection_bias", *selection_bias, kFloats);
    check_size(op, "selection_bias", "E", selection_bias->size(0), experts, "as logits");
    bias = closed(torch::stable::to(*selection_bias, wide));
  }
  logits = with_closed_rows(logits);
  Tensor weights = new_tensor({tokens, top_k}, wide);
  Tensor ids = new_tensor({tokens, top_k}, ScalarType::Int);
  const Route task{logits.const_data_ptr(),
                   logits.stride(0),
                   kernel_dtype(logits.scalar_type()),
                   experts,
                   top_k,
                   softmax,
                   renormalize,
                   selection_bias.has_value() ? bias.const_data_ptr() : nullptr,
                   groups,
                   top_groups,
                   scale,
                   weights.mutable_data_ptr(),
                   data<int32_t>(ids)};
  const int64_t scratch_bytes = kernels().route_scratch(task);
  parallel_for(0, tokens, grain_for(experts), [&](int64_t begin, int64_t end) {
    auto scratch = aligned_bytes(scratch_bytes);
    kernels().route(task, begin, end, scratch.get());
  });
  return {weights, ids};
}

Tensor route_backward(Tensor grad_weights, Tensor weights, Tensor experts,
                      std::optional<Tensor> logits, int64_t num_experts, ScalarType dtype,
                      StringHandle score_handle, bool renormalize, double scale) {
  const char* op = "route_backward";
  const String score(score_handle);
  const bool softmax = is_softmax(op, score.text());
  check_dim(op, "weights", weights, "T, K");
  check_dtype(op, "weights", weights, {ScalarType::Float, ScalarType::Double});
  check_dim(op, "experts", experts, "T, K");
  check_dtype(op, "experts", experts, {ScalarType::Int});
  check_dim(op, "grad_weights", grad_weights, "T, K");
  check_dtype(op, "grad_weights", grad_weights, {weights.scalar_type()}, "as weights");
  check_like(op, "grad_weights", grad_weights, weights);
  check_like(op, "experts", experts, weights);
  check_between(op, "num_experts", num_experts, 1, INT32_MAX);
  if (weights.scalar_type() == ScalarType::Double) {
    check_dtype(op, "the result", dtype, {ScalarType::Double}, "for these weights");
  } else {
    check_dtype(op, "the result", dtype,
                {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, "for these weights");
  }
  const bool needs_logits = !softmax || !renormalize;
  if (needs_logits) {
    if (!logits.has_value()) {
      bad_value(op, ": logits is None; expected a tensor (for this score)");
    }
    check_dim(op, "logits", *logits, "T, E");
    check_dtype(op, "logits", *logits, {dtype}, "as dtype");
    check_size(op, "logits", "T", logits->size(0), weights.size(0), "as weights");
    check_size(op, "logits", "E", logits->size(1), num_experts, "num_experts");
    logits = with_closed_rows(*logits);
  }
  grad_weights = closed(grad_weights);
  weights = closed(weights);
  experts = closed(experts);
  const int32_t* ids = data<int32_t>(experts);
  for (int64_t i = 0; i < experts.numel(); ++i) {
    if (ids[i] < 0 || ids[i] >= num_experts) {
      bad_index(op, ": experts holds ", ids[i], "; allowed: 0 to ", num_experts - 1);
    }
  }
  Tensor out = new_tensor({weights.size(0), num_experts}, dtype);
  const RouteBackward task{grad_weights.const_data_ptr(),
                           weights.const_data_ptr(),
                           ids,
                           needs_logits ? logits->const_data_ptr() : nullptr,
                           needs_logits ? logits->stride(0) : 0,
                           kernel_dtype(dtype),
                           num_experts,
                           weights.size(1),
                           softmax,
                           renormalize,
                           scale,
                           out.mutable_data_ptr()};
  parallel_for(0, weights.size(0), grain_for(num_experts),
               [&](int64_t begin, int64_t end) { kernels().route_backward(task, begin, end); });
  return out;
}

namespace {

// Partial sums of blocks of rows, added up in the order of the blocks.
template <class W>
void finish_losses(const Losses& task, const Tensor& experts, int64_t tokens, Tensor& balance,
                   Tensor& z, Tensor& shares) {
  const int64_t count = task.experts;
  const int64_t blocks = (tokens + kLossBlock - 1) / kLossBlock;
  const int64_t top_k = experts.size(1);
  const bool wide_ids = experts.scalar_type() == ScalarType::Long;
  std::vector<W> mass(static_cast<size_t>(blocks * count), W(0));
  std::vector<double> squares(static_cast<size_t>(blocks), 0.0);
  std::vector<int32_t> counts(static_cast<size_t>(blocks * 4 * count), 0);
  const Index ids{experts.const_data_ptr(), wide_ids, 0, count, nullptr};
  parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kLossBlock;
      const int64_t last = first + kLossBlock < tokens ? first + kLossBlock : tokens;
      kernels().losses(task, first, last, mass.data() + block * count, &squares[block]);
      kernels().count(ids, first * top_k, last * top_k, counts.data() + block * 4 * count);
    }
  });
  std::vector<double> total(static_cast<size_t>(count), 0.0);
  std::vector<int64_t> valid(static_cast<size_t>(count), 0);
  double square = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    square += squares[static_cast<size_t>(block)];
    for (int64_t e = 0; e < count; ++e) total[e] += mass[block * count + e];
    for (int64_t part = 0; part < 4; ++part) {
      const int32_t* table = counts.data() + (block * 4 + part) * count;
      for (int64_t e = 0; e < count; ++e) valid[e] += table[e];
    }
  }
  int64_t all = 0;
  for (int64_t e = 0; e < count; ++e) all += valid[e];
  const double denominator = static_cast<double>(all > 0 ? all : 1);
  const double rows = static_cast<double>(tokens > 0 ? tokens : 1);
  double sum = 0;
  for (int64_t e = 0; e < count; ++e) {
    const double share = static_cast<double>(valid[e]) / denominator;
    data<W>(shares)[e] = static_cast<W>(share);
    sum += share * (total[e] / rows);
  }
  *data<W>(balance) = static_cast<W>(static_cast<double>(count) * sum);
  *data<W>(z) = static_cast<W>(square / rows);
}

double scalar(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? *data<double>(tensor) : *data<float>(tensor);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> router_losses_forward(Tensor logits, Tensor experts) {
  const char* op = "router_losses";
  check_dim(op, "logits", logits, "T, E");
  check_dtype(op, "logits", logits, kFloats);
  check_between(op, "E", logits.size(1), 1, INT32_MAX, "axis 1 of logits");
  check_dim(op, "experts", experts, "T, K");
  check_dtype(op, "experts", experts, kIds);
  check_size(op, "experts", "T", experts.size(0), logits.size(0), "as logits");
  logits = with_closed_rows(logits);
  experts = closed(experts);
  const int64_t tokens = logits.size(0);
  const ScalarType wide = wide_dtype(logits.scalar_type());
  Tensor balance = new_tensor({}, wide), z = new_tensor({}, wide);
  Tensor shares = new_tensor({logits.size(1)}, wide), lse = new_tensor({tokens}, wide);
  const Losses task{logits.const_data_ptr(), logits.stride(0), kernel_dtype(logits.scalar_type()),
                    logits.size(1), lse.mutable_data_ptr()};
  if (wide == ScalarType::Double) {
    finish_losses<double>(task, experts, tokens, balance, z, shares);
  } else {
    finish_losses<float>(task, experts, tokens, balance, z, shares);
  }
  return {balance, z, shares, lse};
}

Tensor router_losses_backward(Tensor grad_balance, Tensor grad_z, Tensor logits, Tensor shares,
                              Tensor lse) {
  const char* op = "router_losses_backward";
  check_dim(op, "logits", logits, "T, E");
  check_dtype(op, "logits", logits, kFloats);
  check_dim(op, "shares", shares, "E");
  check_size(op, "shares", "E", shares.size(0), logits.size(1), "as logits");
  check_dim(op, "lse", lse, "T");
  check_size(op, "lse", "T", lse.size(0), logits.size(0), "as logits");
  const ScalarType wide = wide_dtype(logits.scalar_type());
  check_size(op, "grad_balance", "elements", grad_balance.numel(), 1, "a scalar");
  check_dtype(op, "grad_balance", grad_balance, {wide}, "as the losses");
  check_size(op, "grad_z", "elements", grad_z.numel(), 1, "a scalar");
  check_dtype(op, "grad_z", grad_z, {wide}, "as the losses");
  check_dtype(op, "shares", shares, {wide}, "as the losses");
  check_dtype(op, "lse", lse, {wide}, "as the losses");
  logits = with_closed_rows(logits);
  shares = closed(shares);
  lse = closed(lse);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  Tensor out = new_tensor({tokens, experts}, logits.scalar_type());
  const double rows = tokens > 0 ? static_cast<double>(tokens) : 1.0;
  const LossesBackward task{logits.const_data_ptr(),
                            logits.stride(0),
                            kernel_dtype(logits.scalar_type()),
                            experts,
                            scalar(grad_balance) * static_cast<double>(experts) / rows,
                            scalar(grad_z) * 2 / rows,
                            shares.const_data_ptr(),
                            lse.const_data_ptr(),
                            out.mutable_data_ptr()};
  parallel_for(0, tokens, grain_for(experts),
               [&](int64_t begin, int64_t end) { kernels().losses_backward(task, begin, end); });
  return out;
}

}  // namespace ppmoe::expert_slice
