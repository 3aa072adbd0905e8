// equilibrium_conv_cell: checks, weights, and the phases of a forward solve.
#include "cpu/equilibrium/conv_ops.h"

#include <cmath>
#include <cstring>

namespace ppmoe::conv_cell {
namespace {

constexpr int64_t kBandProducts = 3 << 20, kLeastRows = 8;

struct Named {
  const char* name;
  Activation value;
};
constexpr Named kActivations[] = {
    {"tanh", Activation::kTanh},       {"relu", Activation::kRelu},
    {"gelu", Activation::kGelu},       {"silu", Activation::kSilu},
    {"sigmoid", Activation::kSigmoid}, {"leaky_relu", Activation::kLeakyRelu},
};

struct Expected {
  int64_t size;
  const char* why;
};

void check_tensor(const char* op, const char* name, Tensor& tensor, const char* axes,
                  const Tensor& u, const Sizes& s) {
  check_dim(op, name, tensor, axes);
  check_dtype(op, name, tensor, {u.scalar_type()}, "as u");
  const char* letter = axes;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis, letter += 3) {
    const char text[2] = {*letter, 0};
    Expected e{3, "a 3x3 convolution"};
    switch (*letter) {
      case 'B': e = {u.size(0), "as u"}; break;
      case 'U': e = {s.inputs, "as u"}; break;
      case 'H': e = {s.height, "as u"}; break;
      case 'W': e = {s.width, "as u"}; break;
      case 'r': e = {s.hidden, "as w1"}; break;
      case 'C': e = {s.channels, "as w1"}; break;
      default: break;
    }
    check_size(op, name, text, tensor.size(axis), e.size, e.why);
  }
}

void check_tolerance(const char* op, const char* name, double came) {
  if (came >= 0 && came < INFINITY) return;
  const std::string text = std::isnan(came) ? "nan" : concat(came);
  bad_value(op, ": ", name, " is ", text, "; allowed: 0 or more, finite");
}

}  // namespace

Sizes check_cell(const char* op, Tensor& u, Parameters& p) {
  check_dim(op, "u", u, "B, U, H, W");
  check_dtype(op, "u", u, kFloats);
  check_dim(op, "w1", p.w1, "r, C");
  const Sizes s{u.scalar_type() == ScalarType::Double,
                p.w1.size(1),
                u.size(1),
                p.w1.size(0),
                u.size(2),
                u.size(3)};
  check_between(op, "r", s.hidden, 1, kMostHidden);
  if (s.channels < 1) bad_value(op, ": C is ", s.channels, "; allowed: at least 1");
  if (s.inputs < 1) bad_value(op, ": U is ", s.inputs, "; allowed: at least 1");
  check_tensor(op, "w_u", p.w_u, "r, U", u, s);
  check_tensor(op, "w1", p.w1, "r, C", u, s);
  check_tensor(op, "b1", p.b1, "r", u, s);
  check_tensor(op, "w2", p.w2, "r, r, 3, 3", u, s);
  check_tensor(op, "b2", p.b2, "r", u, s);
  check_tensor(op, "w3", p.w3, "C, r", u, s);
  if (p.b3) check_tensor(op, "b3", *p.b3, "C", u, s);
  return s;
}

void check_map(const char* op, const char* name, Tensor& map, const Tensor& u, const Sizes& s) {
  check_tensor(op, name, map, "B, C, H, W", u, s);
}

Activation check_solver(const char* op, const String& activation, const String& solver, double atol,
                        double rtol, int64_t max_iter) {
  const Named* chosen = nullptr;
  for (const Named& each : kActivations) {
    if (activation.text() == each.name) chosen = &each;
  }
  if (chosen == nullptr) {
    bad_value(op, ": activation is '", activation.text(),
              "'; allowed: tanh, relu, gelu, silu, sigmoid, leaky_relu");
  }
  if (solver.text() != "fixed_point" && solver.text() != "anderson") {
    bad_value(op, ": solver is '", solver.text(), "'; allowed: fixed_point, anderson");
  }
  check_tolerance(op, "atol", atol);
  check_tolerance(op, "rtol", rtol);
  if (max_iter < 1) bad_value(op, ": max_iter is ", max_iter, "; allowed: at least 1");
  return chosen->value;
}

Bands::Bands(const Sizes& s) : height(s.height) {
  const int64_t row = std::max<int64_t>(1, products_of(s) / std::max<int64_t>(1, s.height));
  const int64_t most = std::max(kLeastRows, kBandProducts / row);
  count = std::max<int64_t>(1, ceil_div(height, most));
  rows = std::max<int64_t>(1, ceil_div(height, count));
  count = std::max<int64_t>(1, ceil_div(height, rows));
}

Weights::Weights(const Sizes& s, const Parameters& p, DType dtype, bool backward)
    : injects_(s.inputs > kDirectInputs) {
  if (s.wide) {
    build<double>(s, p, dtype, backward);
  } else {
    build<float>(s, p, dtype, backward);
  }
}

// Packs weight(output, input); no bias means zeros.
template <class S, class F>
Linear Weights::linear(int64_t outputs, int64_t inputs, const S* bias, const F& weight) {
  const int64_t size = sizeof(S);
  Bytes matrix = aligned_bytes(outputs * inputs * size);
  S* const dense = reinterpret_cast<S*>(matrix.get());
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t i = 0; i < inputs; ++i) dense[o * inputs + i] = weight(o, i);
  }
  Bytes packed = aligned_bytes((inputs + 1) * outputs * size);
  char* const end = packed.get() + inputs * outputs * size;
  kernels().pack(size == 8, dense, outputs, inputs, packed.get());
  if (bias != nullptr) {
    std::memcpy(end, bias, static_cast<size_t>(outputs * size));
  } else {
    std::memset(end, 0, static_cast<size_t>(outputs * size));
  }
  const Linear result{packed.get(), end};
  kept_.push_back(std::move(packed));
  return result;
}

template <class S>
void Weights::build(const Sizes& s, const Parameters& p, DType dtype, bool backward) {
  const auto wide = [&](const Tensor& tensor) {
    const Tensor flat = closed(tensor);
    Bytes bytes = aligned_bytes(flat.numel() * static_cast<int64_t>(sizeof(S)));
    kernels().widen(dtype, flat.const_data_ptr(), flat.numel(), bytes.get());
    kept_.push_back(std::move(bytes));
    return reinterpret_cast<const S*>(kept_.back().get());
  };
  const int64_t r = s.hidden, c = s.channels, u = s.inputs;
  const S *w_u = wide(p.w_u), *w1 = wide(p.w1), *b1 = wide(p.b1), *w2 = wide(p.w2),
          *b2 = wide(p.b2), *w3 = wide(p.w3), *b3 = p.b3 ? wide(*p.b3) : nullptr;
  in_ = linear<S>(r, injects_ ? c : c + u, injects_ ? nullptr : b1,
                  [&](int64_t o, int64_t i) { return i < c ? w1[o * c + i] : w_u[o * u + i - c]; });
  if (injects_) {
    inject_ = linear<S>(r, u, b1, [&](int64_t o, int64_t i) { return w_u[o * u + i]; });
  }
  middle_ = linear<S>(r, 9 * r, b2, [&](int64_t o, int64_t i) { return w2[o * 9 * r + i]; });
  out_ = linear<S>(c, r, b3, [&](int64_t o, int64_t i) { return w3[o * r + i]; });
  if (!backward) return;
  const S* const none = nullptr;
  adjoint_in_ = linear<S>(r, c, none, [&](int64_t o, int64_t i) { return w3[i * r + o]; });
  // The taps of a transposed convolution are turned about the middle one.
  adjoint_middle_ = linear<S>(
      r, 9 * r, none, [&](int64_t o, int64_t i) { return w2[(i / 9 * r + o) * 9 + 8 - i % 9]; });
  adjoint_out_ = linear<S>(c, r, none, [&](int64_t o, int64_t i) { return w1[i * c + o]; });
  grad_u_ = linear<S>(u, r, none, [&](int64_t o, int64_t i) { return w_u[i * u + o]; });
}

void Weights::forward(Pass& p) const {
  p.in = in_, p.middle = middle_, p.out = out_;
  if (injects_) p.sizes.inputs = 0;
}

void Weights::injection(Pass& p) const { p.in = inject_; }

void Weights::adjoint(Pass& p) const {
  p.in = adjoint_in_, p.middle = adjoint_middle_, p.out = adjoint_out_;
  p.sizes.inputs = 0;
}

namespace {

enum class Phase { kLoad, kInject, kIterate, kStore };

struct Image {
  int64_t index;
  char* memory;
  Phase phase;
  Solve solve;
  Pass pass;
};

class Forward {
 public:
  Forward(const Sizes& s, const Weights& weights, const Options& options, Activation activation,
          const Tensor& u, const Tensor* z0, const Tensor& z, const Tensor& steps,
          const Tensor& residual)
      : s_(s),
        bands_(s),
        weights_(weights),
        options_(options),
        activation_(activation),
        u_(u),
        z0_(z0),
        z_(z),
        steps_(steps),
        residual_(residual),
        dtype_(kernel_dtype(u.scalar_type())) {
    const int64_t plane = s.plane() * s.element();
    for (int state = 0; state < Solve::states(options); ++state) {
      values_.push_back(layout_.take(s.channels * plane));
      residuals_.push_back(options.anderson ? layout_.take(s.channels * plane) : 0);
    }
    inputs_ = layout_.take(s.inputs * plane);
    injected_ = weights.injects() ? layout_.take(s.hidden * plane) : 0;
    dots_ = layout_.take(bands_.count * kMostDots * 8);
  }

  const Bands& bands() const { return bands_; }
  int64_t bytes() const { return layout_.size(); }

  Image begin(int64_t index, char* memory) const {
    Image image{};
    image.index = index;
    image.memory = memory;
    image.phase = Phase::kLoad;
    return image;
  }

  void work(const Image& image, int64_t band, char* scratch) const {
    const Kernels& k = kernels();
    const int64_t first = bands_.first(band), past = bands_.past(band);
    double* const dots = dots_of(image) + band * kMostDots;
    switch (image.phase) {
      case Phase::kLoad:
        k.load({dtype_, s_.inputs, s_.height, s_.width, image_of(u_, image.index),
                image.memory + inputs_},
               first, past);
        dots[0] = k.load(
            {dtype_, s_.channels, s_.height, s_.width,
             z0_ != nullptr ? image_of(*z0_, image.index) : nullptr, image.memory + values_[0]},
            first, past);
        return;
      case Phase::kInject:
        return k.inject(image.pass, image.memory + injected_, first, past, scratch);
      case Phase::kIterate: return k.evaluate(image.pass, first, past, scratch, dots);
      case Phase::kStore:
        k.store({dtype_, s_.channels, s_.height, s_.width,
                 image.memory + values_[static_cast<size_t>(image.solve.best())],
                 result_of(z_, image.index)},
                first, past);
    }
  }

  bool next(Image& image) const {
    double sums[kMostDots] = {};
    for (int64_t band = 0; band < bands_.count; ++band) {
      for (int i = 0; i < kMostDots; ++i) sums[i] += dots_of(image)[band * kMostDots + i];
    }
    switch (image.phase) {
      case Phase::kLoad:
        image.solve.begin(options_, std::sqrt(sums[0]));
        image.pass.sizes = s_;
        image.pass.activation = activation_;
        image.pass.u = image.memory + inputs_;
        if (weights_.injects()) {
          weights_.injection(image.pass);
          image.phase = Phase::kInject;
          return true;
        }
        break;
      case Phase::kInject: image.pass.injected = image.memory + injected_; break;
      case Phase::kIterate:
        if (!image.solve.advance(sums)) {
          data<int32_t>(steps_)[image.index] = static_cast<int32_t>(image.solve.steps());
          if (s_.wide) {
            data<double>(residual_)[image.index] = image.solve.residual();
          } else {
            data<float>(residual_)[image.index] = static_cast<float>(image.solve.residual());
          }
          image.phase = Phase::kStore;
          return true;
        }
        break;
      case Phase::kStore: return false;
    }
    if (image.phase != Phase::kIterate) weights_.forward(image.pass);
    image.phase = Phase::kIterate;
    const auto lies = [&](const std::vector<int64_t>& offsets) {
      return [&](int state) { return image.memory + offsets[static_cast<size_t>(state)]; };
    };
    image.solve.prepare(image.pass, lies(values_), lies(residuals_));
    return true;
  }

 private:
  double* dots_of(const Image& image) const {
    return reinterpret_cast<double*>(image.memory + dots_);
  }

  const Sizes s_;
  const Bands bands_;
  const Weights& weights_;
  const Options options_;
  const Activation activation_;
  const Tensor& u_;
  const Tensor* const z0_;
  const Tensor &z_, &steps_, &residual_;
  const DType dtype_;
  Layout layout_;
  std::vector<int64_t> values_, residuals_;
  int64_t inputs_, injected_, dots_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> equilibrium_conv_cell(Tensor u, Tensor w_u, Tensor w1, Tensor b1,
                                                         Tensor w2, Tensor b2, Tensor w3, Tensor b3,
                                                         std::optional<Tensor> z0,
                                                         StringHandle activation_name,
                                                         StringHandle solver_name, double atol,
                                                         double rtol, int64_t max_iter) {
  const char* op = "equilibrium_conv_cell";
  const String activation(activation_name), solver(solver_name);
  Parameters p{w_u, w1, b1, w2, b2, w3, b3};
  const Sizes s = check_cell(op, u, p);
  if (z0) check_map(op, "z0", *z0, u, s);
  const Activation chosen = check_solver(op, activation, solver, atol, rtol, max_iter);
  const int64_t images = u.size(0);
  Tensor z = new_tensor({images, s.channels, s.height, s.width}, u.scalar_type());
  Tensor steps = new_tensor({images}, ScalarType::Int);
  Tensor residual = new_tensor({images}, wide_dtype(u.scalar_type()));
  if (z.numel() == 0) {
    // A map without pixels is its own fixed point, as one evaluation shows.
    std::fill_n(data<int32_t>(steps), images, 1);
    std::fill_n(data<char>(residual), images * residual.element_size(), 0);
    return {z, steps, residual};
  }
  u = closed(u);
  if (z0) z0 = closed(*z0);
  const Weights weights(s, p, kernel_dtype(u.scalar_type()), false);
  const Options options{solver.text() == "anderson", atol, rtol, s.wide ? 1e-12 : 1e-8, max_iter};
  Forward job(s, weights, options, chosen, u, z0 ? &*z0 : nullptr, z, steps, residual);
  run_images(job, images, 1, job.bands(), products_of(s), kernels().scratch(s));
  return {z, steps, residual};
}

}  // namespace ppmoe::conv_cell
