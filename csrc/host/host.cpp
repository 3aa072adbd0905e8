// ppmoe_ops._host: what the package knows about its machine and its build, with no tensors in it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "ppmoe/capability.h"

namespace {

std::vector<std::string> built_isas() {
  return {
      "baseline",
#ifdef PPMOE_HAS_AVX2
      "avx2",
#endif
#ifdef PPMOE_HAS_AVX512
      "avx512",
#endif
#ifdef PPMOE_HAS_AVX512_BF16
      "avx512_bf16",
#endif
  };
}

std::string isa_name(ppmoe::Isa isa) { return ppmoe::kIsaNames[static_cast<int>(isa)]; }

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts and CPU capability of ppmoe_ops.";
  m.def("built_isas", &built_isas, "Instruction sets that the CPU kernels were compiled for.");
  m.def(
      "cpu_capability", [] { return isa_name(ppmoe::detected_isa()); },
      "The best instruction set of this CPU.");
  m.def(
      "selected_isa", [] { return isa_name(ppmoe::selected_isa()); },
      "The instruction set that the CPU kernels use; PPMOE_OPS_CPU_CAPABILITY can lower it.");
  m.def(
      "compiler", [] { return std::string(__VERSION__); },
      "Version string of the compiler that built this module.");
}
