// equilibrium_conv_cell_backward: the phases of an image, and the sums over images.
#include <cmath>

#include "cpu/equilibrium/conv_ops.h"

namespace ppmoe::conv_cell {
namespace {

// Small images are summed in so many groups, whatever the number of threads.
constexpr int64_t kGroups = 64;

enum class Phase { kLoad, kInject, kSlopes, kAdjoint, kGradients, kStore };

struct Image {
  int64_t index;
  char* memory;
  Phase phase;
  Solve solve;
  Pass pass;
};

class Backward {
 public:
  Backward(const Sizes& s, const Weights& weights, const Options& options, Activation activation,
           const Tensor& grad, const Tensor& u, const Tensor& z, const Tensor& residual,
           const Tensor& grad_u)
      : s_(s),
        bands_(s),
        weights_(weights),
        options_(options),
        activation_(activation),
        grad_(grad),
        u_(u),
        z_(z),
        residual_(residual),
        grad_u_(grad_u),
        dtype_(kernel_dtype(u.scalar_type())) {
    const int64_t plane = s.plane() * s.element();
    for (int state = 0; state < Solve::states(options); ++state) {
      values_.push_back(layout_.take(s.channels * plane));
      residuals_.push_back(options.anderson ? layout_.take(s.channels * plane) : 0);
    }
    const int64_t padded = (s.height + 2) * padded_pitch(s.width) * s.element();
    shift_ = layout_.take(s.channels * plane);
    solution_ = layout_.take(s.channels * plane);
    inputs_ = layout_.take(s.inputs * plane);
    grad_inputs_ = layout_.take(s.inputs * plane);
    injected_ = weights.injects() ? layout_.take(s.hidden * plane) : 0;
    first_ = layout_.take(s.hidden * padded);
    second_ = layout_.take(s.hidden * plane);
    first_slope_ = layout_.take(s.hidden * plane);
    second_slope_ = layout_.take(s.hidden * plane);
    dots_ = layout_.take(bands_.count * kMostDots * 8);
    band_sums_ = layout_.take(bands_.count * sums_of(s) * 8);
    const int64_t images = u.size(0);
    together_ = bands_.count == 1 ? ceil_div(images, kGroups) : 1;
    sums_.resize(static_cast<size_t>(ceil_div(images, together_) * sums_of(s)));
  }

  const Bands& bands() const { return bands_; }
  int64_t bytes() const { return layout_.size(); }
  int64_t together() const { return together_; }

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
    char* const memory = image.memory;
    double* const dots = dots_of(image) + band * kMostDots;
    const auto load = [&](const Tensor& maps, int64_t planes, int64_t to) {
      return k.load({dtype_, planes, s_.height, s_.width, image_of(maps, image.index), memory + to},
                    first, past);
    };
    switch (image.phase) {
      case Phase::kLoad:
        load(u_, s_.inputs, inputs_);
        load(z_, s_.channels, solution_);
        load(grad_, s_.channels, shift_);
        // The adjoint begins at the gradient itself.
        dots[0] = load(grad_, s_.channels, values_[0]);
        return;
      case Phase::kInject: return k.inject(image.pass, memory + injected_, first, past, scratch);
      case Phase::kSlopes:
        return k.slopes({image.pass, memory + first_, memory + second_, memory + first_slope_,
                         memory + second_slope_},
                        first, past, scratch);
      case Phase::kAdjoint: return k.adjoint(image.pass, first, past, scratch, dots);
      case Phase::kGradients: {
        Gradients g{};
        g.sizes = s_;
        g.v = memory + values_[static_cast<size_t>(image.solve.best())];
        g.z = memory + solution_;
        g.u = memory + inputs_;
        g.first = memory + first_, g.second = memory + second_;
        g.first_slope = memory + first_slope_, g.second_slope = memory + second_slope_;
        g.in = image.pass.in, g.middle = image.pass.middle, g.out = weights_.turned_input();
        g.grad_u = memory + grad_inputs_;
        return k.gradients(g, first, past, scratch, band_sums_of(image) + band * sums_of(s_));
      }
      case Phase::kStore:
        k.store({dtype_, s_.inputs, s_.height, s_.width, memory + grad_inputs_,
                 result_of(grad_u_, image.index)},
                first, past);
    }
  }

  bool next(Image& image) {
    switch (image.phase) {
      case Phase::kLoad:
        if (!std::isfinite(s_.wide ? data<double>(residual_)[image.index]
                                   : static_cast<double>(data<float>(residual_)[image.index]))) {
          return give_up(image);
        }
        image.pass.sizes = s_;
        image.pass.activation = activation_;
        image.pass.u = image.memory + inputs_;
        if (weights_.injects()) {
          weights_.injection(image.pass);
          image.phase = Phase::kInject;
          return true;
        }
        return take_slopes(image);
      case Phase::kInject:
        image.pass.injected = image.memory + injected_;
        return take_slopes(image);
      case Phase::kSlopes:
        weights_.adjoint(image.pass);
        image.pass.injected = nullptr;
        image.pass.first_slope = image.memory + first_slope_;
        image.pass.second_slope = image.memory + second_slope_;
        image.pass.shift = image.memory + shift_;
        image.solve.begin(options_, std::sqrt(sum_of_dots(image, 0)));
        image.phase = Phase::kAdjoint;
        break;
      case Phase::kAdjoint: {
        double sums[kMostDots];
        for (int i = 0; i < kMostDots; ++i) sums[i] = sum_of_dots(image, i);
        if (image.solve.advance(sums)) break;
        if (!std::isfinite(image.solve.residual())) return give_up(image);
        image.phase = Phase::kGradients;
        return true;
      }
      case Phase::kGradients: {
        const int64_t numbers = sums_of(s_);
        const double* from = band_sums_of(image);
        double* const to = sums_.data() + image.index / together_ * numbers;
        for (int64_t band = 0; band < bands_.count; ++band, from += numbers) {
          for (int64_t i = 0; i < numbers; ++i) to[i] += from[i];
        }
        image.phase = Phase::kStore;
        return true;
      }
      case Phase::kStore: return false;
    }
    const auto lies = [&](const std::vector<int64_t>& offsets) {
      return [&](int state) { return image.memory + offsets[static_cast<size_t>(state)]; };
    };
    image.solve.prepare(image.pass, lies(values_), lies(residuals_));
    return true;
  }

  // The sums over all images.
  std::vector<double> total() const {
    const auto numbers = static_cast<size_t>(sums_of(s_));
    std::vector<double> result(numbers);
    for (size_t at = 0; at < sums_.size(); ++at) result[at % numbers] += sums_[at];
    return result;
  }

 private:
  // Every gradient that the image takes part in is NaN.
  bool give_up(Image& image) {
    const int64_t numbers = sums_of(s_), elements = s_.inputs * s_.plane();
    std::fill_n(sums_.data() + image.index / together_ * numbers, numbers, NAN);
    char* const grads = image.memory + grad_inputs_;
    if (s_.wide) {
      std::fill_n(reinterpret_cast<double*>(grads), elements, static_cast<double>(NAN));
    } else {
      std::fill_n(reinterpret_cast<float*>(grads), elements, NAN);
    }
    image.phase = Phase::kStore;
    return true;
  }

  bool take_slopes(Image& image) const {
    weights_.forward(image.pass);
    image.pass.values[0] = image.memory + solution_;
    image.phase = Phase::kSlopes;
    return true;
  }

  double sum_of_dots(const Image& image, int which) const {
    double sum = 0;
    for (int64_t band = 0; band < bands_.count; ++band) {
      sum += dots_of(image)[band * kMostDots + which];
    }
    return sum;
  }
  double* dots_of(const Image& image) const {
    return reinterpret_cast<double*>(image.memory + dots_);
  }
  double* band_sums_of(const Image& image) const {
    return reinterpret_cast<double*>(image.memory + band_sums_);
  }

  const Sizes s_;
  const Bands bands_;
  const Weights& weights_;
  const Options options_;
  const Activation activation_;
  const Tensor &grad_, &u_, &z_, &residual_, &grad_u_;
  const DType dtype_;
  Layout layout_;
  std::vector<int64_t> values_, residuals_;
  int64_t shift_, solution_, inputs_, grad_inputs_, injected_, first_, second_, first_slope_,
      second_slope_, dots_, band_sums_, together_;
  std::vector<double> sums_;
};

// Columns first to past of rows that are `pitch` apart, in the dtype of `to`.
void write(const Sizes& s, const double* from, int64_t pitch, int64_t first, const Tensor& to) {
  const int64_t rows = to.size(0), columns = to.numel() / rows;
  const auto narrow = [&](auto zero) {
    using S = decltype(zero);
    std::vector<S> dense(static_cast<size_t>(row_pitch(rows * columns)));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < columns; ++i) {
        dense[static_cast<size_t>(row * columns + i)] =
            static_cast<S>(from[row * pitch + first + i]);
      }
    }
    kernels().store(
        {kernel_dtype(to.scalar_type()), 1, 1, rows * columns, dense.data(), to.mutable_data_ptr()},
        0, 1);
  };
  if (s.wide) return narrow(double{});
  narrow(float{});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
equilibrium_conv_cell_backward(Tensor grad_z, Tensor u, Tensor w_u, Tensor w1, Tensor b1, Tensor w2,
                               Tensor b2, Tensor w3, Tensor z, Tensor residual,
                               StringHandle activation_name, StringHandle solver_name, double atol,
                               std::optional<double> rtol, int64_t max_iter) {
  const char* op = "equilibrium_conv_cell_backward";
  const String activation(activation_name), solver(solver_name);
  Parameters p{w_u, w1, b1, w2, b2, w3, std::nullopt};
  const Sizes s = check_cell(op, u, p);
  check_map(op, "grad_z", grad_z, u, s);
  check_map(op, "z", z, u, s);
  const ScalarType dtype = u.scalar_type();
  check_dim(op, "residual", residual, "B");
  check_dtype(op, "residual", residual, {wide_dtype(dtype)}, "what u is summed in");
  check_size(op, "residual", "B", residual.size(0), u.size(0), "as u");
  const double tolerance = rtol.value_or(s.wide ? 1e-12 : 1e-6);
  const Activation chosen = check_solver(op, activation, solver, atol, tolerance, max_iter);

  const int64_t images = u.size(0), r = s.hidden, c = s.channels, i = s.inputs;
  Tensor grad_u = new_tensor({images, i, s.height, s.width}, dtype);
  Tensor grad_w_u = new_tensor({r, i}, dtype), grad_w1 = new_tensor({r, c}, dtype);
  Tensor grad_b1 = new_tensor({r}, dtype), grad_w2 = new_tensor({r, r, 3, 3}, dtype);
  Tensor grad_b2 = new_tensor({r}, dtype), grad_w3 = new_tensor({c, r}, dtype);
  Tensor grad_b3 = new_tensor({c}, dtype);
  std::vector<double> sums(static_cast<size_t>(sums_of(s)));
  if (z.numel() != 0) {
    grad_z = closed(grad_z), u = closed(u), z = closed(z), residual = closed(residual);
    const Weights weights(s, p, kernel_dtype(dtype), true);
    const Options options{solver.text() == "anderson", atol, tolerance, s.wide ? 1e-12 : 1e-8,
                          max_iter};
    Backward job(s, weights, options, chosen, grad_z, u, z, residual, grad_u);
    const int64_t scratch =
        std::max(kernels().scratch(s), kernels().gradients_scratch(s, job.bands().rows));
    run_images(job, images, job.together(), job.bands(), products_of(s), scratch);
    sums = job.total();
  }
  const double* from = sums.data();
  const int64_t of_first = i + c + 1, of_second = 9 * r + 1;
  write(s, from, of_first, 0, grad_w_u);
  write(s, from, of_first, i, grad_w1);
  write(s, from, of_first, i + c, grad_b1);
  from += r * of_first;
  write(s, from, of_second, 0, grad_w2);
  write(s, from, of_second, 9 * r, grad_b2);
  from += r * of_second;
  write(s, from, r + 1, 0, grad_w3);
  write(s, from, r + 1, r, grad_b3);
  return {grad_u, grad_w_u, grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, grad_b3};
}

}  // namespace ppmoe::conv_cell
