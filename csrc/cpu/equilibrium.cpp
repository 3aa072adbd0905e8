// Registers the CPU kernels of the equilibrium family; the schemas are in
// ppmoe_ops/ops/equilibrium.
#include <torch/csrc/stable/library.h>

#include "cpu/equilibrium/mix_ops.h"

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CPU, m) {
  m.impl("anderson_mix", TORCH_BOX(&ppmoe::mix::anderson_mix));
}
