#include "cpu/expert_slice/declare.h"

namespace ppmoe::expert_slice::PPMOE_ISA {

const Kernels kKernels = {
    route_scratch, route,       route_backward, losses,         losses_backward, count, place,
    slice,         slice_clear, merge,          merge_backward, gemm_scratch,    gemm,  column_sums,
};

}  // namespace ppmoe::expert_slice::PPMOE_ISA
