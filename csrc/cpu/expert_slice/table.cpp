#include "cpu/expert_slice/declare.h"

namespace ppmoe::expert_slice::PPMOE_ISA {

const Kernels kKernels = {
    route_scratch,
    route,
    route_backward,
    losses,
    losses_backward,
    count,
    place,
    slice,
    slice_clear,
    merge,
    merge_backward,
    gemm_scratch,
    gemm,
    column_sums,
    ffn_panel_bytes,
    ffn_in_scratch,
    ffn_in,
    ffn_in_backward_scratch,
    ffn_in_backward,
    ffn_out_scratch,
    ffn_out,
    ffn_weights_backward,
};

}  // namespace ppmoe::expert_slice::PPMOE_ISA
