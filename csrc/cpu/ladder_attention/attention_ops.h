// window_attention and ladder_attention, as ladder_attention.cpp registers them.
#pragma once

#include "cpu/ladder_attention/ops.h"

namespace ppmoe::ladder_attention {

Tensor window_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias_table,
                        int64_t num_heads, Pair window, Pair shift, std::optional<double> scale);
std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias_table, int64_t num_heads,
    Pair window, Pair shift, std::optional<double> scale, bool need_bias);
Tensor ladder_attention(Tensor x, std::optional<Tensor> v, Tensor ln_w, Tensor ln_b, Tensor w_in,
                        Tensor b_in, Tensor bias_table, Tensor w_out, Tensor b_out,
                        std::optional<Tensor> row_scale, int64_t num_heads, Pair window, Pair shift,
                        double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
ladder_attention_backward(Tensor grad, Tensor x, std::optional<Tensor> v, Tensor ln_w, Tensor ln_b,
                          Tensor w_in, Tensor b_in, Tensor bias_table, Tensor w_out,
                          std::optional<Tensor> row_scale, int64_t num_heads, Pair window,
                          Pair shift, double eps, bool need_maps, bool need_parameters);

// A bias table as the kernels take it: [heads, R] in wide elements.
Bytes turned_table(const Tensor& table, ScalarType first);

// Runs the units of an attention over the threads.
void run_attention(const Attention& attention, int64_t images);

// The derivative of the attention; the bias table's gradient, if wanted, in the dtype of `table`.
void run_attention_backward(const AttentionBackward& backward, int64_t images, const Tensor* table);

}  // namespace ppmoe::ladder_attention
