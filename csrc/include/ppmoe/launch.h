// Host side of a CUDA operator: device, stream, allocation, launch check, argument checks.
//
// Everything here goes through libtorch's stable C shims, so that one library loads on every torch
// from 2.11 on, with CUDA or without.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ppmoe/check.h"

// A torch without CUDA does not have this shim; weak, it is null there and the library still loads.
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace ppmoe {

inline void check_cuda(const char* op, const char* what, cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(concat(op, ": ", what, " failed: ", cudaGetErrorName(status), ", ",
                                    cudaGetErrorString(status)));
  }
}

inline void check_launch(const char* op, const char* kernel) {
  check_cuda(op, kernel, cudaGetLastError());
}

using StreamGetter = AOTITorchError (*)(int32_t, void**);

inline StreamGetter find_stream_getter() {
  StreamGetter linked = aoti_torch_get_current_cuda_stream;
  if (linked != nullptr) return linked;
  // A weak symbol is bound within the libraries that this one names. Where libtorch_cuda is loaded
  // but not among them, it is asked by name; NOLOAD never brings in a library of its own.
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch_cuda == nullptr) return nullptr;
  return reinterpret_cast<StreamGetter>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
}

// Makes the device of `tensor` current for its lifetime and knows torch's current stream there.
class LaunchScope {
 public:
  LaunchScope(const char* op, const Tensor& tensor) : guard_(tensor.get_device_index()) {
    const int32_t device = tensor.get_device_index();
    // The static runtime in this library may keep a current device of its own.
    int current = -1;
    check_cuda(op, "cudaGetDevice", cudaGetDevice(&current));
    if (current != device) check_cuda(op, "cudaSetDevice", cudaSetDevice(device));
    static const StreamGetter getter = find_stream_getter();
    void* stream = nullptr;
    if (getter == nullptr || getter(device, &stream) != TORCH_SUCCESS) {
      throw std::runtime_error(concat(op, ": this torch gives no current CUDA stream"));
    }
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// An uninitialised contiguous tensor on the device of `like`.
template <size_t N>
Tensor empty_like_device(const Tensor& like, const std::array<int64_t, N>& sizes,
                         ScalarType dtype) {
  std::array<int64_t, N> strides{};
  int64_t step = 1;
  for (size_t axis = N; axis-- > 0;) {
    strides[axis] = step;
    step *= std::max<int64_t>(sizes[axis], 1);
  }
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(N), sizes.data(), strides.data(), shim_dtype,
                               aoti_torch_device_type_cuda(), like.get_device_index(), &handle));
  return Tensor(handle);
}

// `tensor` itself where its last axis is contiguous, else a contiguous copy.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.stride(last) == 1 || tensor.size(last) <= 1) return tensor;
  return torch::stable::contiguous(tensor);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_device(const char* op, const char* argument, const Tensor& tensor,
                         const Tensor& like) {
  if (!tensor.is_cuda() || tensor.get_device_index() != like.get_device_index()) {
    bad_value(op, ": ", argument, " is on another device; expected cuda:", like.get_device_index());
  }
}

// PPMOE_OPS_CHECK=1 reads index tensors back and raises; it synchronises, so it is off by default.
inline bool checks_indices() {
  static const bool on = [] {
    const char* value = std::getenv("PPMOE_OPS_CHECK");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return on;
}

// Raises for a slot outside [-1, T*K) and, where `once`, for a slot that is listed twice.
inline void check_slots(const char* op, const Tensor& slots, bool once, cudaStream_t stream) {
  if (!checks_indices()) return;
  std::vector<int32_t> host(static_cast<size_t>(slots.numel()));
  check_cuda(op, "reading slots",
             cudaMemcpyAsync(host.data(), slots.const_data_ptr(), host.size() * sizeof(int32_t),
                             cudaMemcpyDeviceToHost, stream));
  check_cuda(op, "reading slots", cudaStreamSynchronize(stream));
  const auto count = static_cast<int64_t>(host.size());
  std::vector<bool> listed(host.size());
  for (const int32_t slot : host) {
    if (slot < -1 || slot >= count) {
      bad_index(op, ": slots holds ", slot, "; allowed: -1 to ", count - 1);
    }
  }
  for (const int32_t slot : host) {
    if (slot < 0 || !once) continue;
    if (listed[static_cast<size_t>(slot)]) {
      bad_value(op, ": slots holds ", slot, " twice; allowed: each slot once");
    }
    listed[static_cast<size_t>(slot)] = true;
  }
}

}  // namespace ppmoe
