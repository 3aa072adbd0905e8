// expert_index, slice_rows and merge_rows: checks, results and threads around the kernels.
#include <algorithm>
#include <vector>

#include "cpu/expert_slice/ops.h"

namespace ppmoe::expert_slice {
namespace {

constexpr int64_t kIndexGrain = 8192;  // slots a thread takes at least
// Results larger than this are written past the caches, which they would only empty.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

int64_t row_grain(int64_t row_bytes) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(row_bytes, 1));
}

void check_slots(const char* op, const Tensor& slots, int64_t expected, const char* why) {
  check_dim(op, "slots", slots, "T*K");
  check_dtype(op, "slots", slots, {ScalarType::Int});
  check_size(op, "slots", "T*K", slots.size(0), expected, why);
}

[[noreturn]] void bad_slot(const char* op, int32_t slot, int64_t count) {
  bad_index(op, ": slots holds ", slot, "; allowed: -1 to ", count - 1);
}

// The row of every slot, -1 where a slot is not listed.
std::vector<int32_t> invert(const char* op, const Tensor& slots) {
  const int64_t count = slots.numel();
  const int32_t* slot = data<int32_t>(slots);
  std::vector<int32_t> inverse(static_cast<size_t>(count), -1);
  for (int64_t i = 0; i < count; ++i) {
    if (slot[i] < -1 || slot[i] >= count) bad_slot(op, slot[i], count);
    if (slot[i] < 0) continue;
    int32_t& row = inverse[static_cast<size_t>(slot[i])];
    if (row >= 0) bad_value(op, ": slots holds ", slot[i], " twice; allowed: each slot once");
    row = static_cast<int32_t>(i);
  }
  return inverse;
}

Tensor merge_into(const Tensor& rows, const std::vector<int32_t>& inverse, const void* weights,
                  int64_t tokens, int64_t top_k) {
  const int64_t width = rows.size(1), bytes = width * rows.element_size();
  Tensor out = new_tensor({tokens, width}, rows.scalar_type());
  const Merge task{rows.const_data_ptr(),
                   rows.stride(0),
                   kernel_dtype(rows.scalar_type()),
                   width,
                   top_k,
                   inverse.data(),
                   weights,
                   out.mutable_data_ptr(),
                   tokens * bytes > kStreamBytes};
  parallel_for(0, tokens, row_grain(bytes * std::max<int64_t>(top_k, 1)),
               [&](int64_t begin, int64_t end) { kernels().merge(task, begin, end); });
  return out;
}

void check_merge(const char* op, const Tensor& rows, const Tensor& slots, const Tensor& weights) {
  check_dim(op, "rows", rows, "T*K, H");
  check_dtype(op, "rows", rows, kFloats);
  check_dim(op, "weights", weights, "T, K");
  check_dtype(op, "weights", weights, {wide_dtype(rows.scalar_type())}, "for these rows");
  check_slots(op, slots, rows.size(0), "as rows");
  check_size(op, "rows", "T*K", rows.size(0), weights.size(0) * weights.size(1),
             "T times K of weights");
}

}  // namespace

std::tuple<Tensor, Tensor> expert_index(Tensor experts, int64_t first_expert, int64_t num_local) {
  const char* op = "expert_index";
  check_dim(op, "experts", experts, "T, K");
  check_dtype(op, "experts", experts, kIds);
  check_between(op, "first_expert", first_expert, 0, INT32_MAX);
  check_between(op, "num_local", num_local, 0, INT32_MAX - 1);
  check_between(op, "T*K", experts.numel(), 0, INT32_MAX, "slots are int32");
  experts = closed(experts);
  const int64_t count = experts.numel();
  Tensor slots = new_tensor({count}, ScalarType::Int);
  Tensor offsets = new_tensor({num_local + 1}, ScalarType::Int);
  const Index task{experts.const_data_ptr(), experts.scalar_type() == ScalarType::Long,
                   first_expert, num_local, data<int32_t>(slots)};

  // Each chunk counts its ids; a chunk's slots of an expert then follow those of the chunks before
  // it. Where slots end up does not depend on the number of chunks.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunks = std::max<int64_t>(1, std::min(threads, count / kIndexGrain));
  const auto bound = [&](int64_t chunk) { return count * chunk / chunks; };
  // The chunks' tables lie in cache lines of their own: two threads write them at the same time.
  const auto whole_lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const int64_t lines_bytes = num_local * static_cast<int64_t>(sizeof(Line));
  const int64_t counts_bytes = whole_lines(4 * num_local * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t streams_bytes = whole_lines(num_local * static_cast<int64_t>(sizeof(Stream)));
  const int64_t chunk_bytes = lines_bytes + counts_bytes + streams_bytes;
  auto memory = aligned_bytes(chunks * chunk_bytes);
  const auto lines = [&](int64_t chunk) {
    return reinterpret_cast<Line*>(memory.get() + chunk * chunk_bytes);
  };
  const auto counts = [&](int64_t chunk) {
    return reinterpret_cast<int32_t*>(memory.get() + chunk * chunk_bytes + lines_bytes);
  };
  const auto streams = [&](int64_t chunk) {
    return reinterpret_cast<Stream*>(memory.get() + chunk * chunk_bytes + lines_bytes +
                                     counts_bytes);
  };
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::fill_n(counts(chunk), 4 * num_local, 0);
      kernels().count(task, bound(chunk), bound(chunk + 1), counts(chunk));
    }
  });
  int32_t* const first = data<int32_t>(slots);
  int32_t running = 0;
  for (int64_t e = 0; e < num_local; ++e) {
    data<int32_t>(offsets)[e] = running;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int32_t* table = counts(chunk) + e;
      streams(chunk)[e] = {first + running, first + running};
      running += table[0] + table[num_local] + table[2 * num_local] + table[3 * num_local];
    }
  }
  data<int32_t>(offsets)[num_local] = running;
  if (running > 0) {
    parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        kernels().place(task, bound(chunk), bound(chunk + 1), streams(chunk), lines(chunk));
      }
    });
  }
  std::fill(first + running, first + count, -1);
  return {slots, offsets};
}

Tensor slice_rows(Tensor x, Tensor slots, int64_t top_k) {
  const char* op = "slice_rows";
  check_dim(op, "x", x, "T, H");
  check_dtype(op, "x", x, kFloats);
  check_between(op, "top_k", top_k, 1, INT32_MAX);
  check_slots(op, slots, x.size(0) * top_k, "T of x times top_k");
  slots = closed(slots);
  const std::vector<int32_t> inverse = invert(op, slots);
  x = with_closed_rows(x);
  const int64_t count = slots.numel(), tokens = x.size(0);
  const int64_t element = x.element_size(), bytes = x.size(1) * element;
  Tensor out = new_tensor({count, x.size(1)}, x.scalar_type());
  const Slice task{x.const_data_ptr(),          x.stride(0),    bytes, element,
                   data<int32_t>(slots),        inverse.data(), top_k, out.mutable_data_ptr(),
                   count * bytes > kStreamBytes};
  parallel_for(0, tokens, row_grain(bytes * top_k),
               [&](int64_t begin, int64_t end) { kernels().slice(task, begin, end); });
  parallel_for(0, count, row_grain(bytes),
               [&](int64_t begin, int64_t end) { kernels().slice_clear(task, begin, end); });
  return out;
}

Tensor slice_rows_backward(Tensor grad, Tensor slots, int64_t top_k) {
  const char* op = "slice_rows_backward";
  check_dim(op, "grad", grad, "T*K, H");
  check_dtype(op, "grad", grad, kFloats);
  check_between(op, "top_k", top_k, 1, INT32_MAX);
  check_slots(op, slots, grad.size(0), "as grad");
  if (slots.size(0) % top_k != 0) {
    bad_value(op, ": slots has T*K = ", slots.size(0), "; expected a multiple of top_k = ", top_k);
  }
  slots = closed(slots);
  grad = with_closed_rows(grad);
  return merge_into(grad, invert(op, slots), nullptr, slots.size(0) / top_k, top_k);
}

Tensor merge_rows(Tensor rows, Tensor slots, Tensor weights) {
  const char* op = "merge_rows";
  check_merge(op, rows, slots, weights);
  slots = closed(slots);
  rows = with_closed_rows(rows);
  weights = closed(weights);
  return merge_into(rows, invert(op, slots), weights.const_data_ptr(), weights.size(0),
                    weights.size(1));
}

std::tuple<Tensor, Tensor> merge_rows_backward(Tensor grad, Tensor rows, Tensor slots,
                                               Tensor weights) {
  const char* op = "merge_rows_backward";
  check_merge(op, rows, slots, weights);
  check_dim(op, "grad", grad, "T, H");
  check_dtype(op, "grad", grad, {rows.scalar_type()}, "as rows");
  check_size(op, "grad", "T", grad.size(0), weights.size(0), "as weights");
  check_size(op, "grad", "H", grad.size(1), rows.size(1), "as rows");
  slots = closed(slots);
  invert(op, slots);
  grad = with_closed_rows(grad);
  rows = with_closed_rows(rows);
  weights = closed(weights);
  const int64_t count = slots.numel(), bytes = rows.size(1) * rows.element_size();
  Tensor grad_rows = new_tensor({count, rows.size(1)}, rows.scalar_type());
  Tensor grad_weights = new_tensor({weights.size(0), weights.size(1)}, weights.scalar_type());
  std::fill_n(data<char>(grad_weights), count * weights.element_size(), 0);
  const MergeBackward task{grad.const_data_ptr(),
                           grad.stride(0),
                           rows.const_data_ptr(),
                           rows.stride(0),
                           kernel_dtype(rows.scalar_type()),
                           rows.size(1),
                           weights.size(1),
                           data<int32_t>(slots),
                           weights.const_data_ptr(),
                           grad_rows.mutable_data_ptr(),
                           grad_weights.mutable_data_ptr(),
                           count * bytes > kStreamBytes};
  parallel_for(0, count, row_grain(bytes),
               [&](int64_t begin, int64_t end) { kernels().merge_backward(task, begin, end); });
  return {grad_rows, grad_weights};
}

}  // namespace ppmoe::expert_slice
