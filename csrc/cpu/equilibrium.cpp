// Registers the CPU kernels of the equilibrium family; the schemas are in
// ppmoe_ops/ops/equilibrium.
#include <torch/csrc/stable/library.h>

#include "cpu/equilibrium/cell_ops.h"

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CPU, m) {
  m.impl("equilibrium_cell", TORCH_BOX(&ppmoe::cell::equilibrium_cell));
  m.impl("equilibrium_cell_backward", TORCH_BOX(&ppmoe::cell::equilibrium_cell_backward));
}
