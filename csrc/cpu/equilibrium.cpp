// Registers the CPU kernels of the equilibrium family; the schemas are in ppmoe_ops/ops/equilibrium.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CPU, m) { static_cast<void>(m); }
