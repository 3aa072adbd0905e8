// Registers the CPU kernels of the equilibrium family; schemas are in ppmoe_ops/ops/equilibrium.
#include <torch/csrc/stable/library.h>

#include "cpu/equilibrium/cell_ops.h"
#include "cpu/equilibrium/conv_ops.h"
#include "cpu/equilibrium/mix_ops.h"

namespace ppmoe::conv_cell {

const Kernels& kernels() {
  static const Kernels* const table = [] {
    const Kernels* const all[kIsaCount] = PPMOE_KERNEL_TABLES;
    return all[static_cast<int>(selected_isa())];
  }();
  return *table;
}

}  // namespace ppmoe::conv_cell

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CPU, m) {
  m.impl("equilibrium_cell", TORCH_BOX(&ppmoe::cell::equilibrium_cell));
  m.impl("equilibrium_cell_backward", TORCH_BOX(&ppmoe::cell::equilibrium_cell_backward));
  m.impl("equilibrium_conv_cell", TORCH_BOX(&ppmoe::conv_cell::equilibrium_conv_cell));
  m.impl("equilibrium_conv_cell_backward",
         TORCH_BOX(&ppmoe::conv_cell::equilibrium_conv_cell_backward));
  m.impl("anderson_mix", TORCH_BOX(&ppmoe::mix::anderson_mix));
}
