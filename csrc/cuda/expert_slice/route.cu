// route on CUDA: score, group limit, bias, top-k, normalisation and scale in one launch.

#include <torch/csrc/stable/library.h>

#include <climits>
#include <optional>
#include <tuple>

#include "route_any.cuh"
#include "route_row.cuh"
#include "routing.cuh"

namespace ppmoe {
namespace {

constexpr const char* kOp = "route";
constexpr int64_t kRowExperts = 512;  // that the registers of a warp hold
constexpr int64_t kRowChoices = 32;   // one a lane
constexpr int64_t kMostExperts = 1 << 30;
constexpr int64_t kAnyBlocks = 1 << 10;  // bounds the scratch of route_any_kernel

bool divides(int64_t address_or_size, int64_t bytes) { return address_or_size % bytes == 0; }

// Whether a lane's N elements can be loaded as vectors, whole or not at all.
bool vectors_fit(const void* data, int64_t row_bytes, int64_t experts, int n, int64_t size) {
  const int64_t piece = std::min<int64_t>(n * size, kVectorBytes);
  return divides(static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)), piece) &&
         divides(row_bytes, piece) && experts % n == 0;
}

template <int kLanes, int N>
void launch_row(RouteArgs a, cudaStream_t stream) {
  const int64_t size = a.type == LogitType::kFloat ? 4 : 2;
  a.vector_rows = vectors_fit(a.logits, a.stride * size, a.experts, N, size);
  a.vector_bias = vectors_fit(a.bias, 0, a.experts, N, sizeof(float));
  a.group_lanes = 1;
  while (2 * a.group_lanes * a.groups <= kLanes) a.group_lanes *= 2;
  constexpr int64_t kTokens = kRouteThreads / kLanes;
  const auto blocks = static_cast<unsigned>((a.tokens + kTokens - 1) / kTokens);
  if (a.by_logit && a.type != LogitType::kFloat) {
    route_packed_kernel<kLanes, N><<<blocks, kRouteThreads, 0, stream>>>(a);
  } else {
    const int64_t pitch = a.groups > 1 ? a.experts + 2 * a.groups : 0;
    const auto shared = static_cast<size_t>(kTokens * pitch) * sizeof(float);
    route_kernel<kLanes, N><<<blocks, kRouteThreads, shared, stream>>>(a);
  }
  check_launch(kOp, "route_kernel");
}

void launch_any(RouteArgs a, ScalarType dtype, const Tensor& like, cudaStream_t stream) {
  constexpr int64_t kWarps = kRouteAnyThreads / 32;
  const int64_t blocks = std::min((a.tokens + kWarps - 1) / kWarps, kAnyBlocks);
  Tensor scratch;
  if (a.groups > 1) {
    scratch =
        empty_like_device<1>(like, {blocks * kWarps * 2 * int64_t{a.groups}}, wide_dtype(dtype));
    a.scratch = scratch.mutable_data_ptr();
  }
  by_dtype(dtype, [&]<class T>() {
    route_any_kernel<T><<<static_cast<unsigned>(blocks), kRouteAnyThreads, 0, stream>>>(a);
  });
  check_launch(kOp, "route_any_kernel");
}

LogitType logit_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return LogitType::kBFloat16;
    case ScalarType::Half: return LogitType::kHalf;
    case ScalarType::Double: return LogitType::kDouble;
    default: return LogitType::kFloat;
  }
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t top_k, StringHandle score_handle,
                                 bool renormalize, std::optional<Tensor> selection_bias,
                                 int64_t groups, int64_t top_groups, double scale) {
  const String score(score_handle);
  check_dim(kOp, "logits", logits, "T, E");
  check_dtype(kOp, "logits", logits, kFloats);
  const int64_t tokens = logits.size(0);
  const int64_t experts = logits.size(1);
  const bool softmax = is_softmax(kOp, score.text());
  check_between(kOp, "groups", groups, 1, experts, "E experts in equal groups");
  if (experts % groups != 0) {
    bad_value(kOp, ": groups is ", groups, "; allowed: divisors of E = ", experts);
  }
  check_between(kOp, "top_groups", top_groups, 1, groups, "at most groups");
  check_between(kOp, "top_k", top_k, 1, top_groups * (experts / groups),
                "experts that may be chosen");
  check_between(kOp, "E", experts, 1, kMostExperts, "ids are int32");
  const ScalarType dtype = logits.scalar_type();
  const ScalarType wide = wide_dtype(dtype);
  if (selection_bias.has_value()) {
    check_dim(kOp, "selection_bias", *selection_bias, "E");
    check_dtype(kOp, "selection_bias", *selection_bias, kFloats);
    check_size(kOp, "selection_bias", "E", selection_bias->size(0), experts, "as logits");
    check_device(kOp, "selection_bias", *selection_bias, logits);
  }

  const Tensor weights = empty_like_device<2>(logits, {tokens, top_k}, wide);
  const Tensor ids = empty_like_device<2>(logits, {tokens, top_k}, ScalarType::Int);
  if (tokens == 0) return {weights, ids};
  const LaunchScope scope(kOp, logits);
  const Tensor rows = with_dense_rows(logits);
  Tensor bias;
  if (selection_bias.has_value()) {
    bias = as_contiguous(selection_bias->scalar_type() == wide
                             ? *selection_bias
                             : torch::stable::to(*selection_bias, wide));
  }
  RouteArgs a{};
  a.logits = rows.const_data_ptr();
  a.stride = rows.stride(0);
  a.type = logit_type(dtype);
  a.bias = selection_bias.has_value() ? bias.const_data_ptr() : nullptr;
  a.weights = weights.mutable_data_ptr();
  a.ids = static_cast<int*>(ids.mutable_data_ptr());
  a.tokens = tokens;
  a.experts = static_cast<int>(experts);
  a.top_k = static_cast<int>(top_k);
  a.groups = static_cast<int>(groups);
  a.top_groups = static_cast<int>(top_groups);
  a.group_size = static_cast<int>(experts / groups);
  a.scale = scale;
  a.softmax = softmax;
  a.renormalize = renormalize;
  a.by_logit = softmax && !selection_bias.has_value() && groups == 1;

  const cudaStream_t stream = scope.stream();
  if (dtype == ScalarType::Double || experts > kRowExperts || top_k > kRowChoices) {
    launch_any(a, dtype, rows, stream);
  } else if (experts <= 8) {
    launch_row<8, 1>(a, stream);
  } else if (experts <= 16) {
    launch_row<16, 1>(a, stream);
  } else if (experts <= 32) {
    launch_row<32, 1>(a, stream);
  } else if (experts <= 64) {
    launch_row<32, 2>(a, stream);
  } else if (experts <= 128) {
    launch_row<32, 4>(a, stream);
  } else if (experts <= 256) {
    launch_row<32, 8>(a, stream);
  } else {
    launch_row<32, 16>(a, stream);
  }
  return {weights, ids};
}

STABLE_TORCH_LIBRARY_IMPL(ppmoe_ops, CUDA, m) { m.impl("route", TORCH_BOX(&route)); }

}  // namespace
}  // namespace ppmoe
