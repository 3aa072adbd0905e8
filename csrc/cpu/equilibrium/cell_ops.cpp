#include "cpu/equilibrium/cell_ops.h"

#include <cmath>
#include <cstdio>
#include <vector>

#include "ppmoe/capability.h"

namespace ppmoe::cell {
namespace {

constexpr int64_t kLargest = 256;
constexpr int64_t kMostSteps = (int64_t{1} << 31) - 1;
// Rows of one part of the gradient of a; no result depends on anything else about the cut.
constexpr int64_t kPartRows = 256;
constexpr int64_t kMostParts = 64;

template <class Value>
struct Named {
  const char* name;
  Value value;
};
constexpr Named<Activation> kActivations[] = {
    {"tanh", Activation::kTanh},       {"relu", Activation::kRelu},
    {"gelu", Activation::kGelu},       {"silu", Activation::kSilu},
    {"sigmoid", Activation::kSigmoid}, {"leaky_relu", Activation::kLeakyRelu},
};
constexpr Named<Solver> kSolvers[] = {
    {"fixed_point", Solver::kFixedPoint},
    {"anderson", Solver::kAnderson},
    {"newton", Solver::kNewton},
};

template <class Value, size_t kSize>
Value chosen(const char* op, const char* argument, const String& came,
             const Named<Value> (&allowed)[kSize]) {
  std::string names;
  for (const Named<Value>& each : allowed) {
    if (came.text() == each.name) return each.value;
    names += (names.empty() ? "" : ", ") + std::string(each.name);
  }
  bad_value(op, ": ", argument, " is '", came.text(), "'; allowed: ", names);
}

void check_tolerance(const char* op, const char* name, double value) {
  if (value >= 0 && std::isfinite(value)) return;
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  bad_value(op, ": ", name, " is ", std::isnan(value) ? "nan" : text,
            "; allowed: 0 or more, finite");
}

void check_rows(const char* op, const char* name, const Tensor& rows, const Tensor& a) {
  check_dim(op, name, rows, "N, r");
  check_dtype(op, name, rows, {a.scalar_type()}, "as a");
  check_size(op, name, "r", rows.size(1), a.size(0), "as a");
}
void check_rows(const char* op, const char* name, const Tensor& rows, const Tensor& a,
                const Tensor& c) {
  check_rows(op, name, rows, a);
  check_size(op, name, "N", rows.size(0), c.size(0), "as c");
}

void check_cell(const char* op, const Tensor& a, const Tensor& c) {
  check_dim(op, "a", a, "r, r");
  check_dtype(op, "a", a, kFloats);
  check_between(op, "r", a.size(0), 1, kLargest);
  check_size(op, "a", "r", a.size(1), a.size(0), "a is square");
  check_rows(op, "c", c, a);
}

Matrix matrix_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
Matrix turned(const Matrix& m) { return {m.data, m.col_stride, m.row_stride}; }

int64_t wide_bytes(DType dtype) { return dtype == DType::kF64 ? 8 : 4; }

// Runs body(first row, rows, scratch). No result depends on the cut: tasks are a multiple of the
// threads where there are rows enough to fill the lanes of each.
template <class F>
void by_rows(int64_t rows, int64_t lanes, int64_t row_products, int64_t scratch, const F& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = ceil_div(rows, 2 * lanes);
  const int64_t tasks =
      std::max<int64_t>(1, std::min(blocks, threads * ceil_div(rows, threads * 16 * lanes)));
  const int64_t each = ceil_div(rows, tasks);
  run_tasks(ceil_div(rows, each), rows * row_products, scratch, [&](int64_t task, char* bytes) {
    body(task * each, std::min(each, rows - task * each), bytes);
  });
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const table = [] {
    const Kernels* const all[kIsaCount] = PPMOE_KERNEL_TABLES;
    return all[static_cast<int>(selected_isa())];
  }();
  return *table;
}

std::tuple<Tensor, Tensor, Tensor> equilibrium_cell(Tensor a, Tensor c, std::optional<Tensor> x0,
                                                    StringHandle activation_, StringHandle solver_,
                                                    double atol, double rtol, int64_t max_iter) {
  const char* op = "equilibrium_cell";
  const String activation(activation_), solver(solver_);
  check_cell(op, a, c);
  if (x0) check_rows(op, "x0", *x0, a, c);
  Solve p{};
  p.activation = chosen(op, "activation", activation, kActivations);
  p.solver = chosen(op, "solver", solver, kSolvers);
  check_tolerance(op, "atol", atol);
  check_tolerance(op, "rtol", rtol);
  check_between(op, "max_iter", max_iter, 1, kMostSteps);
  const ScalarType type = a.scalar_type();
  const int64_t rows = c.size(0), r = a.size(0);
  Tensor x = new_tensor({rows, r}, type), steps = new_tensor({rows}, ScalarType::Int);
  Tensor residual = new_tensor({rows}, wide_dtype(type));
  if (rows == 0) return {x, steps, residual};
  const Kernels& k = kernels();
  p.dtype = kernel_dtype(type);
  p.atol = atol, p.rtol = rtol, p.max_iter = max_iter, p.r = r;
  const Bytes packed = aligned_bytes(r * r * wide_bytes(p.dtype));
  k.pack(p.dtype, matrix_of(a), r, packed.get());
  p.a = packed.get();
  p.c = matrix_of(c);
  if (x0) p.x0 = matrix_of(*x0);
  p.x = x.mutable_data_ptr();
  p.steps = data<int32_t>(steps);
  p.residual = residual.mutable_data_ptr();
  // An evaluation of an element of x takes about as long as 64 products.
  const int64_t products = std::min<int64_t>(max_iter, 6) * r * (r + 64);
  by_rows(rows, k.lanes(p.dtype), products, k.solve_scratch(p),
          [&](int64_t row, int64_t count, char* scratch) { k.solve(p, row, count, scratch); });
  return {x, steps, residual};
}

std::tuple<Tensor, Tensor> equilibrium_cell_backward(Tensor grad_x, Tensor a, Tensor c, Tensor x,
                                                     Tensor residual, StringHandle activation_) {
  const char* op = "equilibrium_cell_backward";
  const String activation(activation_);
  check_cell(op, a, c);
  check_rows(op, "grad_x", grad_x, a, c);
  check_rows(op, "x", x, a, c);
  const ScalarType type = a.scalar_type();
  check_dim(op, "residual", residual, "N");
  check_dtype(op, "residual", residual, {wide_dtype(type)}, "wide");
  check_size(op, "residual", "N", residual.size(0), c.size(0), "as c");
  Adjoint p{};
  p.activation = chosen(op, "activation", activation, kActivations);
  const int64_t rows = c.size(0), r = a.size(0);
  Tensor grad_a = new_tensor({r, r}, type), grad_c = new_tensor({rows, r}, type);
  if (rows == 0) {
    std::fill_n(data<char>(grad_a), grad_a.numel() * grad_a.element_size(), 0);
    return {grad_a, grad_c};
  }
  const Kernels& k = kernels();
  p.dtype = kernel_dtype(type);
  p.r = r;
  const int64_t size = wide_bytes(p.dtype), lanes = k.lanes(p.dtype);
  p.pitch = ceil_div(r, lanes) * lanes;
  const int64_t part_rows = std::max(kPartRows, ceil_div(rows, kMostParts));
  const int64_t parts = ceil_div(rows, part_rows), part = r * p.pitch * size;
  const int64_t wide = rows * p.pitch * size;
  const Bytes memory = aligned_bytes(2 * r * r * size + 64 + 2 * wide + parts * part);
  char* const sums = memory.get();
  char* const wide_grad = sums + parts * part;
  char* const packed = wide_grad + 2 * wide;
  k.pack(p.dtype, matrix_of(a), r, packed);
  k.pack(p.dtype, turned(matrix_of(a)), r, packed + r * r * size);
  p.a = packed, p.turned = packed + r * r * size;
  p.grad = matrix_of(grad_x), p.c = matrix_of(c), p.x = matrix_of(x);
  p.residual = residual.const_data_ptr(), p.residual_stride = residual.stride(0);
  p.grad_c = grad_c.mutable_data_ptr();
  p.wide_grad = wide_grad, p.wide_x = wide_grad + wide;
  by_rows(rows, lanes, r * r * (r / 3 + 8), k.adjoint_scratch(p),
          [&](int64_t row, int64_t count, char* scratch) { k.adjoint(p, row, count, scratch); });
  run_tasks(parts, rows * r * r, 0, [&](int64_t task, char*) {
    k.outer(p, task * part_rows, std::min(part_rows, rows - task * part_rows), sums + task * part);
  });
  k.sum_parts(p, sums, parts, grad_a.mutable_data_ptr());
  return {grad_a, grad_c};
}

}  // namespace ppmoe::cell
