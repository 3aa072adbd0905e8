// What the CPU operators share: tensors in and out, strings, threads.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "ppmoe/check.h"
#include "ppmoe/string_argument.h"
#include "ppmoe/types.h"

namespace ppmoe {

inline void check_shim(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(concat("ppmoe_ops: ", what, " failed"));
}

// Pages of 2 MB for a large fresh result: touching it for the first time then costs one fault per
// 2 MB, not one per 4 kB, which would take longer than the operator itself.
inline void advise_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < (int64_t{8} << 20)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[4] = {1, 1, 1, 1};
  int64_t elements = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = elements;
    elements *= sizes.begin()[axis] > 0 ? sizes.begin()[axis] : 1;
  }
  AtenTensorHandle handle = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  check_shim(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                      code, aoti_torch_device_type_cpu(), 0, &handle),
             "allocation");
  Tensor tensor(handle);
  advise_huge_pages(tensor.mutable_data_ptr(), elements * tensor.element_size());
  return tensor;
}

// The tensor itself if it is contiguous, else a copy.
inline Tensor closed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The tensor itself if its rows lie closed in memory (at any distance), else a copy.
inline Tensor with_closed_rows(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline DType kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return DType::kBf16;
    case ScalarType::Half: return DType::kF16;
    case ScalarType::Double: return DType::kF64;
    default: return DType::kF32;
  }
}

inline ScalarType wide_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::unique_ptr<char, decltype(&std::free)> aligned_bytes(int64_t bytes) {
  const size_t rounded = (static_cast<size_t>(bytes) + 63) / 64 * 64 + 64;
  void* memory = std::aligned_alloc(64, rounded);
  if (memory == nullptr) throw std::bad_alloc();
  advise_huge_pages(memory, bytes);
  return {static_cast<char*>(memory), &std::free};
}

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  if (end - begin <= grain) {
    if (end > begin) body(begin, end);
    return;
  }
  torch::stable::parallel_for(begin, end, grain, body);
}

// Runs body(task, scratch) for every task, each thread taking the next one when it is done. What a
// task computes must depend on its number alone.
template <class F>
void parallel_tasks(int64_t tasks, int64_t scratch_bytes, const F& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads =
      std::max<int64_t>(1, std::min<int64_t>(tasks, torch::stable::get_num_threads()));
  // Allocated here, as an exception inside the parallel region would lose its type.
  const int64_t each = (scratch_bytes + 4095) / 4096 * 4096;
  auto scratch = aligned_bytes(threads * each);
  const auto work = [&](int64_t worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      body(task, scratch.get() + worker * each);
    }
  };
  if (threads == 1) return work(0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin < end) work(begin);
  });
}

using Bytes = std::unique_ptr<char, decltype(&std::free)>;

// Fewer multiply-adds than this take less time than waking the other threads.
constexpr int64_t kParallelProducts = 1 << 18;
// Weight gradients larger than this are written past the caches.
constexpr int64_t kWeightStreamBytes = int64_t{16} << 20;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As parallel_tasks, but on this thread alone where `products` multiply-adds are too few to share.
template <class F>
void run_tasks(int64_t tasks, int64_t products, int64_t scratch_bytes, const F& body) {
  if (products >= kParallelProducts) return parallel_tasks(tasks, scratch_bytes, body);
  Bytes scratch = aligned_bytes(scratch_bytes);
  for (int64_t task = 0; task < tasks; ++task) body(task, scratch.get());
}

}  // namespace ppmoe
