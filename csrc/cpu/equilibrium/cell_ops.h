// equilibrium_cell on tensors.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/equilibrium/cell_kernels.h"
#include "ppmoe/op.h"

namespace ppmoe::cell {

std::tuple<Tensor, Tensor, Tensor> equilibrium_cell(Tensor a, Tensor c, std::optional<Tensor> x0,
                                                    StringHandle activation, StringHandle solver,
                                                    double atol, double rtol, int64_t max_iter);
std::tuple<Tensor, Tensor> equilibrium_cell_backward(Tensor grad_x, Tensor a, Tensor c, Tensor x,
                                                     Tensor residual, StringHandle activation);

}  // namespace ppmoe::cell
