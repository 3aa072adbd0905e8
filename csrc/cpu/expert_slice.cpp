// Registers the CPU kernels of expert slicing; the schemas are in ppmoe_ops/ops/expert_slice.
#include <torch/csrc/stable/library.h>

#include "cpu/expert_slice/ops.h"

namespace ppmoe::expert_slice {

const Kernels& kernels() {
  static const Kernels* const table = [] {
    const Kernels* const all[kIsaCount] = PPMOE_KERNEL_TABLES;
    return all[static_cast<int>(selected_isa())];
  }();
  return *table;
}

}  // namespace ppmoe::expert_slice

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CPU, m) {
  using namespace ppmoe::expert_slice;
  m.impl("route", TORCH_BOX(&route));
  m.impl("route_backward", TORCH_BOX(&route_backward));
  m.impl("router_losses_forward", TORCH_BOX(&router_losses_forward));
  m.impl("router_losses_backward", TORCH_BOX(&router_losses_backward));
  m.impl("expert_index", TORCH_BOX(&expert_index));
  m.impl("slice_rows", TORCH_BOX(&slice_rows));
  m.impl("slice_rows_backward", TORCH_BOX(&slice_rows_backward));
  m.impl("merge_rows", TORCH_BOX(&merge_rows));
  m.impl("merge_rows_backward", TORCH_BOX(&merge_rows_backward));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("grouped_linear_backward", TORCH_BOX(&grouped_linear_backward));
  m.impl("expert_ffn_forward", TORCH_BOX(&expert_ffn_forward));
  m.impl("expert_ffn_backward", TORCH_BOX(&expert_ffn_backward));
}
