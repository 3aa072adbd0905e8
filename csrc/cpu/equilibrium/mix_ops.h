// anderson_mix on tensors.
#pragma once

#include <optional>

#include "ppmoe/op.h"

namespace ppmoe::mix {

Tensor anderson_mix(Tensor f, Tensor z, Tensor z_next, Tensor best_z, Tensor best_f, Tensor dg,
                    Tensor df, Tensor gram, Tensor values, Tensor counters,
                    std::optional<Tensor> rows, double atol, double rtol, double damping,
                    bool last);

}  // namespace ppmoe::mix
