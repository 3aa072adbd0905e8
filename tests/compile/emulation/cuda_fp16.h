#pragma once

#include <cuda_runtime_api.h>
#include <torch/headeronly/util/Half.h>

using __half = torch::headeronly::Half;

inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return __half(x); }
