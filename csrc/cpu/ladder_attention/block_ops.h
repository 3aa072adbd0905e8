// ladder_block on tensors.
#pragma once

#include "cpu/ladder_attention/ops.h"

namespace ppmoe::ladder_attention {

Tensor ladder_block(Tensor x, std::vector<Tensor> params, int64_t num_heads, Pair window,
                    Pair shift);

}  // namespace ppmoe::ladder_attention
