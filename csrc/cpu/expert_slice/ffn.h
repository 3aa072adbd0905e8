// What the kernels of expert_ffn share.
#pragma once

#include "cpu/expert_slice/activation.h"
#include "cpu/expert_slice/gemm.h"

namespace ppmoe::expert_slice::PPMOE_ISA {
namespace {

template <class T>
T untag(Tag<T>);

// Calls body with a Tag of the storage type.
template <class F>
PPMOE_INLINE auto with_type(DType dtype, const F& body) {
  switch (dtype) {
    case DType::kBf16: return body(Tag<Bf16>{});
    case DType::kF16: return body(Tag<F16>{});
    case DType::kF64: return body(Tag<double>{});
    case DType::kF32: break;
  }
  return body(Tag<float>{});
}

}  // namespace
}  // namespace ppmoe::expert_slice::PPMOE_ISA
