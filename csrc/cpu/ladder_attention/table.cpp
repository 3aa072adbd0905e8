#include "cpu/ladder_attention/attention.h"
#include "cpu/ladder_attention/kernels.h"

namespace ppmoe::ladder_attention::PPMOE_ISA {

extern const FfnKernels kFfnKernels;
extern const FusionKernels kFusionKernels;

const Kernels kKernels = {
    {
        packed_dtype,       packed_stride,
        weight_bytes,       weight_panels,
        pack_weights,       attention_scratch,
        attention,          attention_backward_scratch,
        attention_backward, branch_in_scratch,
        branch_in,          branch_out_scratch,
        branch_out,         branch_in_backward_scratch,
        branch_in_backward, weight_gradient_scratch,
        weight_gradient,    narrow_elements,
        widen_elements,
    },
    kFfnKernels,
    kFusionKernels,
    gemm_scratch,
    gemm,
    column_sums,
};

}  // namespace ppmoe::ladder_attention::PPMOE_ISA
