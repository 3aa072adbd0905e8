// ladder_ffn: checks, and the phases of the forward.
#include "cpu/ladder_attention/ffn_ops.h"

namespace ppmoe::ladder_attention {
namespace {

enum Axes { kG, kGG, kG33, k3G };

void check_parameter(const char* op, const char* name, const Tensor& tensor, Axes axes,
                     const Tensor& x, bool norm, bool wide_only = false) {
  static const char* const kNames[] = {"g", "g, g", "g, 3, 3", "3, g"};
  static const char* const kShown[] = {"[g]", "[g, g]", "[g, 3, 3]", "[3, g]"};
  static const char* const kAxis[] = {"axis 0", "axis 1", "axis 2"};
  const ScalarType own = x.scalar_type(), wide = wide_dtype(own);
  check_dim(op, name, tensor, kNames[axes]);
  if (wide_only) {
    check_dtype(op, name, tensor, {wide}, "for this x");
  } else if (norm && own != wide) {
    check_dtype(op, name, tensor, {own, wide}, "for this x");
  } else {
    check_dtype(op, name, tensor, {own}, "for this x");
  }
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    const bool fixed = axes == kG33 ? axis > 0 : axes == k3G && axis == 0;
    check_size(op, name, kAxis[axis], tensor.size(axis), fixed ? 3 : x.size(3),
               fixed ? kShown[axes] : "as x");
  }
}

FfnParameter parameter(const Tensor& tensor) {
  return {tensor.const_data_ptr(), kernel_dtype(tensor.scalar_type())};
}

FfnMatrix matrix(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// Images that go through both phases at once, so that what lies between stays in a cache: enough
// for whole units, few enough to share, or none. No result depends on it.
int64_t images_together(const Ffn& f, const FfnBytes& bytes) {
  constexpr int64_t kMostBytes = 512 << 10, kEnough = 8 * kFfnUnit;
  const int64_t pixels = f.height * f.width;
  if (pixels * bytes.row > kMostBytes) return 0;
  const int64_t share = f.batch / (2 * int64_t{torch::stable::get_num_threads()});
  return std::min({share, ceil_div(kEnough, pixels), f.batch});
}

// Images first to past of a map.
Map images_of(Map map, int64_t first, int64_t element) {
  map.data = static_cast<char*>(map.data) + first * map.image * element;
  return map;
}

void evaluate(const Ffn& whole, const FfnBytes& bytes, int64_t element) {
  const FfnKernels& kernel = kernels().ffn;
  const int64_t products = whole.pixels() * whole.channels * whole.channels;
  const int64_t together = images_together(whole, bytes);
  if (together > 0) {
    const int64_t rows = together * whole.height * whole.width * bytes.row;
    const auto body = [&](int64_t task, char* scratch) {
      const int64_t first = task * together;
      Ffn f = whole;
      f.batch = std::min(together, whole.batch - first);
      f.x = images_of(f.x, first, element);
      f.y = images_of(f.y, first, element);
      if (f.row_scale.data != nullptr) {
        const int64_t size = f.row_scale.dtype == f.dtype ? element : 4;
        f.row_scale.data = static_cast<const char*>(f.row_scale.data) + first * size;
      }
      f.a1 = scratch + bytes.scratch;
      const int64_t units = ffn_units(f.pixels());
      for (int64_t unit = 0; unit < units; ++unit) kernel.in(f, unit, scratch);
      for (int64_t unit = 0; unit < units; ++unit) kernel.out(f, unit, scratch);
    };
    return run_tasks(ceil_div(whole.batch, together), products, bytes.scratch + rows, body);
  }
  Ffn f = whole;
  const Bytes between = aligned_bytes(bytes.row * f.pixels());
  f.a1 = between.get();
  const int64_t units = ffn_units(f.pixels());
  const auto phase = [&](auto kernel_of_phase) {
    run_tasks(units, products, bytes.scratch,
              [&](int64_t unit, char* scratch) { kernel_of_phase(f, unit, scratch); });
  };
  phase(kernel.in);
  phase(kernel.out);
}

void train(Ffn f, const FfnBytes& bytes) {
  const FfnKernels& kernel = kernels().ffn;
  const int64_t units = ffn_units(f.pixels()), rows = bytes.row * f.pixels();
  const Bytes memory = aligned_bytes(2 * rows + units * kFfnStatistics * bytes.sums);
  f.a1 = f.h3 = memory.get();
  f.a2 = f.a1 + rows;
  f.sums = f.a2 + rows;
  // Every other phase goes backwards: what was written last is still in a cache.
  bool forward = true;
  const auto phase = [&](auto kernel_of_phase) {
    run_tasks(units, f.pixels() * f.channels * f.channels, bytes.scratch,
              [&](int64_t task, char* scratch) {
                kernel_of_phase(f, forward ? task : units - 1 - task, scratch);
              });
    forward = !forward;
  };
  phase(kernel.in);
  kernel.settle(f, 0);
  phase(kernel.convolve);
  kernel.settle(f, 1);
  phase(kernel.project);
  kernel.settle(f, 2);
  phase(kernel.finish);
}

}  // namespace

FfnArguments::FfnArguments(const char* op_, Tensor x_, Tensor ln_w_, Tensor ln_b_, Tensor w1_,
                           Tensor b1_, Tensor dw_w_, Tensor dw_b_, Tensor w2_, Tensor b2_,
                           Tensor bn_w_, Tensor bn_b_, std::optional<Tensor> row_scale_,
                           bool training_)
    : op(op_),
      x(x_),
      ln_w(ln_w_),
      ln_b(ln_b_),
      w1(w1_),
      b1(b1_),
      dw_w(dw_w_),
      dw_b(dw_b_),
      w2(w2_),
      b2(b2_),
      bn_w(bn_w_),
      bn_b(bn_b_),
      row_scale(row_scale_),
      training(training_) {
  check_dim(op, "x", x, "B, H, W, g");
  check_dtype(op, "x", x, kFloats);
  const struct {
    const char* name;
    Tensor* tensor;
    Axes axes;
    bool norm;
  } parameters[] = {{"ln_w", &ln_w, kG, true},    {"ln_b", &ln_b, kG, true},
                    {"w1", &w1, kGG, false},      {"b1", &b1, kG, false},
                    {"dw_w", &dw_w, kG33, false}, {"dw_b", &dw_b, kG, false},
                    {"w2", &w2, kGG, false},      {"b2", &b2, kG, false},
                    {"bn_w", &bn_w, k3G, true},   {"bn_b", &bn_b, k3G, true}};
  for (const auto& each : parameters) {
    check_parameter(op, each.name, *each.tensor, each.axes, x, each.norm);
  }
  if (row_scale.has_value()) {
    check_dim(op, "row_scale", *row_scale, "B");
    const ScalarType wide = wide_dtype(dtype());
    if (dtype() == wide) {
      check_dtype(op, "row_scale", *row_scale, {wide}, "for this x");
    } else {
      check_dtype(op, "row_scale", *row_scale, {dtype(), wide}, "for this x");
    }
    check_size(op, "row_scale", "B", row_scale->size(0), x.size(0), "as x");
  }
  if (training && pixels() < 2) {
    bad_value(op, ": x has B * H * W = ", pixels(), "; allowed in training: 2 or more");
  }
}

void FfnArguments::close() {
  for (Tensor* each : {&ln_w, &ln_b, &b1, &dw_w, &dw_b, &b2, &bn_w, &bn_b}) *each = closed(*each);
  if (row_scale.has_value()) row_scale = closed(*row_scale);
}

void FfnArguments::check_statistics(const char* name, const Tensor& tensor, bool wide) const {
  check_parameter(op, name, tensor, k3G, x, true, wide);
}

Ffn FfnArguments::describe(double eps, const Tensor& mean, const Tensor& var) const {
  Ffn f{};
  f.dtype = kernel_dtype(dtype());
  f.batch = x.size(0);
  f.height = x.size(1);
  f.width = x.size(2);
  f.channels = channels();
  f.eps = eps;
  f.training = training;
  f.x = map_of(x);
  f.ln_w = parameter(ln_w);
  f.ln_b = parameter(ln_b);
  f.w1 = matrix(w1);
  f.w2 = matrix(w2);
  f.b1 = parameter(b1);
  f.dw_w = parameter(dw_w);
  f.dw_b = parameter(dw_b);
  f.b2 = parameter(b2);
  f.bn_w = parameter(bn_w);
  f.bn_b = parameter(bn_b);
  f.mean = mean.mutable_data_ptr();
  f.var = var.mutable_data_ptr();
  if (row_scale.has_value()) f.row_scale = parameter(*row_scale);
  return f;
}

std::tuple<Tensor, Tensor, Tensor> ladder_ffn(
    Tensor x, Tensor ln_w, Tensor ln_b, Tensor w1, Tensor b1, Tensor dw_w, Tensor dw_b, Tensor w2,
    Tensor b2, Tensor bn_w, Tensor bn_b, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> row_scale, bool training, double eps) {
  const char* op = "ladder_ffn";
  FfnArguments a(op, x, ln_w, ln_b, w1, b1, dw_w, dw_b, w2, b2, bn_w, bn_b, row_scale, training);
  for (const auto& [name, given] :
       {std::pair{"running_mean", &running_mean}, {"running_var", &running_var}}) {
    if (given->has_value()) {
      a.check_statistics(name, **given, false);
    } else if (!training) {
      bad_value(op, ": ", name, " is None; allowed only with training");
    }
  }
  a.close();
  const ScalarType wide = wide_dtype(a.dtype());
  const FfnKernels& kernel = kernels().ffn;
  const int64_t g = a.channels(), pixels = a.pixels();
  Tensor y = new_tensor({x.size(0), x.size(1), x.size(2), g}, a.dtype());
  Tensor mean = new_tensor({3, g}, wide), var = new_tensor({3, g}, wide);
  for (const auto& [given, result] : {std::pair{&running_mean, &mean}, {&running_var, &var}}) {
    if (training) break;
    const Tensor from = closed(**given);
    kernel.widen(parameter(from), 3 * g, kernel_dtype(wide), data<char>(*result));
  }
  if (pixels == 0) return {y, mean, var};

  Ffn f = a.describe(eps, mean, var);
  f.y = map_of(y);
  const FfnBytes bytes = kernel.bytes(f.dtype, g);
  const Bytes prepared = aligned_bytes(bytes.prepared);
  f.prepared = prepared.get();
  kernel.prepare(f);
  training ? train(f, bytes) : evaluate(f, bytes, a.x.element_size());
  return {y, mean, var};
}

}  // namespace ppmoe::ladder_attention
