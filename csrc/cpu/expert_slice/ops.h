// The CPU operators of expert slicing, as expert_slice.cpp registers them.
#pragma once

#include <tuple>

#include "cpu/expert_slice/kernels.h"
#include "ppmoe/capability.h"
#include "ppmoe/op.h"

namespace ppmoe::expert_slice {

// The kernels of the instruction set in use.
const Kernels& kernels();

std::tuple<Tensor, Tensor> route(Tensor logits, int64_t top_k, StringHandle score, bool renormalize,
                                 std::optional<Tensor> selection_bias, int64_t groups,
                                 int64_t top_groups, double scale);
Tensor route_backward(Tensor grad_weights, Tensor weights, Tensor experts,
                      std::optional<Tensor> logits, int64_t num_experts, ScalarType dtype,
                      StringHandle score, bool renormalize, double scale);
std::tuple<Tensor, Tensor, Tensor, Tensor> router_losses_forward(Tensor logits, Tensor experts);
Tensor router_losses_backward(Tensor grad_balance, Tensor grad_z, Tensor logits, Tensor shares,
                              Tensor lse);
std::tuple<Tensor, Tensor> expert_index(Tensor experts, int64_t first_expert, int64_t num_local);
Tensor slice_rows(Tensor x, Tensor slots, int64_t top_k);
Tensor slice_rows_backward(Tensor grad, Tensor slots, int64_t top_k);
Tensor merge_rows(Tensor rows, Tensor slots, Tensor weights);
std::tuple<Tensor, Tensor> merge_rows_backward(Tensor grad, Tensor rows, Tensor slots,
                                               Tensor weights);
Tensor grouped_linear(Tensor rows, Tensor offsets, Tensor weight, std::optional<Tensor> bias);
std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(Tensor grad, Tensor rows, Tensor offsets,
                                                           Tensor weight, bool need_rows,
                                                           bool need_weight, bool need_bias);
std::tuple<Tensor, Tensor> expert_ffn_forward(Tensor x, Tensor slots, Tensor offsets,
                                              Tensor weights, Tensor w_in,
                                              std::optional<Tensor> b_in, Tensor w_out,
                                              std::optional<Tensor> b_out, StringHandle activation,
                                              bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_ffn_backward(
    Tensor grad, Tensor x, Tensor slots, Tensor offsets, Tensor weights, Tensor w_in, Tensor w_out,
    std::optional<Tensor> b_out, Tensor pre, StringHandle activation, bool need_x,
    bool need_weights, bool need_w_in, bool need_b_in, bool need_w_out, bool need_b_out);

}  // namespace ppmoe::expert_slice
