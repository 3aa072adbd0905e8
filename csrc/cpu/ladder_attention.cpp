// Registers the CPU kernels of ladder attention; the schemas are in ppmoe_ops/ops/ladder_attention.
#include <torch/csrc/stable/library.h>

#include "cpu/ladder_attention/attention_ops.h"
#include "cpu/ladder_attention/block_ops.h"
#include "cpu/ladder_attention/ffn_ops.h"
#include "cpu/ladder_attention/fusion_ops.h"

namespace ppmoe::ladder_attention {

const Kernels& kernels() {
  static const Kernels* const table = [] {
    const Kernels* const all[kIsaCount] = PPMOE_KERNEL_TABLES;
    return all[static_cast<int>(selected_isa())];
  }();
  return *table;
}

}  // namespace ppmoe::ladder_attention

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CPU, m) {
  using namespace ppmoe::ladder_attention;
  m.impl("window_attention", TORCH_BOX(&window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
  m.impl("ladder_attention", TORCH_BOX(&ladder_attention));
  m.impl("ladder_attention_backward", TORCH_BOX(&ladder_attention_backward));
  m.impl("ladder_ffn", TORCH_BOX(&ladder_ffn));
  m.impl("ladder_ffn_backward", TORCH_BOX(&ladder_ffn_backward));
  m.impl("ladder_block", TORCH_BOX(&ladder_block));
  m.impl("pixel_adaptive_fusion", TORCH_BOX(&pixel_adaptive_fusion));
  m.impl("pixel_adaptive_fusion_backward", TORCH_BOX(&pixel_adaptive_fusion_backward));
}
