// pixel_adaptive_fusion on tensors, and what ladder_block takes of it.
#pragma once

#include <tuple>

#include "cpu/ladder_attention/fusion_kernels.h"
#include "ppmoe/op.h"

namespace ppmoe::ladder_attention {

Tensor pixel_adaptive_fusion(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor wp,
                             Tensor bp);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pixel_adaptive_fusion_backward(
    Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor wp);

// A matrix's data and strides.
Matrix matrix_of(const Tensor& tensor);

// How many of `rows` rows a task takes, at most kFusionRows: about the same for all, and a multiple
// of the threads where the rows are enough for that. No result depends on the cut.
int64_t rows_of_task(int64_t rows);

}  // namespace ppmoe::ladder_attention
