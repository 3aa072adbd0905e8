// The kernels of one instruction set, for the sources that define them and the table.
#pragma once

#include "cpu/expert_slice/kernels.h"
#include "ppmoe/gemm.h"

namespace ppmoe::expert_slice::PPMOE_ISA {

using namespace ppmoe::PPMOE_ISA;

int64_t route_scratch(const Route&);
void route(const Route&, int64_t begin, int64_t end, void* scratch);
void route_f64(const Route&, int64_t begin, int64_t end, double* scratch);
void route_backward(const RouteBackward&, int64_t begin, int64_t end);
void losses(const Losses&, int64_t begin, int64_t end, void* mass, double* z);
void losses_backward(const LossesBackward&, int64_t begin, int64_t end);
void count(const Index&, int64_t begin, int64_t end, int32_t* counts);
void place(const Index&, int64_t begin, int64_t end, Stream* streams, Line* lines);
void slice(const Slice&, int64_t begin, int64_t end);
void slice_clear(const Slice&, int64_t begin, int64_t end);
void merge(const Merge&, int64_t begin, int64_t end);
void merge_backward(const MergeBackward&, int64_t begin, int64_t end);
int64_t ffn_panel_bytes(DType, int64_t rows, int64_t depth, int64_t parts);
int64_t ffn_in_scratch(const FfnIn&, const FfnBlock&);
void ffn_in(const FfnIn&, const FfnBlock&, int64_t column, int64_t columns, void* scratch);
int64_t ffn_in_backward_scratch(const FfnInBackward&, const FfnBlock&);
void ffn_in_backward(const FfnInBackward&, const FfnBlock&, int64_t column, int64_t columns,
                     void* scratch);
int64_t ffn_out_scratch(const FfnOut&, const FfnOutTask&);
void ffn_out(const FfnOut&, const FfnOutTask&, void* scratch);
void ffn_weights_backward(const FfnWeightsBackward&, const FfnBlock&);

}  // namespace ppmoe::expert_slice::PPMOE_ISA
