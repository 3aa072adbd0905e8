// equilibrium_cell by Newton's method, its steps halved while the residual would grow.
#include "cpu/equilibrium/cell_lu.h"

namespace ppmoe::cell::PPMOE_ISA {
namespace {

template <class V>
void run(const Solve& p, int64_t row, int64_t count, char* scratch) {
  using S = Scalar<V>;
  const S* const a = static_cast<const S*>(p.a);
  const int64_t r = p.r;
  Rows<V> rows(p, row, count, scratch);
  V* const turn = take<V>(scratch, r);
  V* const base = take<V>(scratch, r);        // the point that steps are taken from,
  V* const base_image = take<V>(scratch, r);  // and f of it
  V* const direction = take<V>(scratch, r);
  V* const right = take<V>(scratch, r);
  V* const matrix = take<V>(scratch, r * r);
  Pivot<V>* const pivots = reinterpret_cast<Pivot<V>*>(scratch);
  V base_norm{}, length{};
  // The first point, and steps z <- f(z): they are taken whatever the residual does.
  Mask<V> plain = base_norm == 0;
  Evaluation<V> e{};
  e.a = a, e.r = r, e.c = rows.c, e.z = rows.z;
  e.image = rows.image, e.residual = rows.residual, e.turn = turn;
  const auto f = evaluator<true, V>(p.activation);
  while (true) {
    e.scale = rows.scale;
    f(e);
    const V old_scale = rows.scale;
    rows.observe(e.residual_square, e.image_square, ~plain);
    if (rows.running == 0 && rows.next == rows.end) return;
    base_norm = rows.rescaled ? base_norm / old_scale * rows.scale : base_norm;
    const Mask<V> accepted = plain | (rows.norm <= base_norm);
    base_norm = accepted ? rows.norm : base_norm;
    if (some(accepted & mask_of<V>(rows.running))) {
      newton_matrix(a, r, turn, matrix);
      for (int64_t i = 0; i < r; ++i) right[i] = rows.residual[i];
      factor(matrix, r, pivots);
      substitute(matrix, r, pivots, right);
    }
    length = accepted ? V{} + 1 : length * S(0.5);
    Mask<V> finite = length > 0;
    for (int64_t i = 0; i < r; ++i) {
      direction[i] = accepted ? right[i] : direction[i];
      finite &= direction[i] - direction[i] == 0;
    }
    // Eight halvings, and then a plain step.
    plain = (length < S(1. / 256)) | ~finite;
    for (int64_t i = 0; i < r; ++i) {
      base[i] = accepted ? rows.z[i] : base[i];
      base_image[i] = accepted ? rows.image[i] : base_image[i];
      rows.z[i] = plain ? base_image[i] : base[i] + length * direction[i];
    }
    rows.refill();
    plain |= mask_of<V>(rows.fresh);
  }
}

}  // namespace

int64_t newton_scratch(const Solve& p) { return (Rows<VecF>::kVectors + 6 + p.r) * p.r * kBytes; }

void newton(const Solve& p, int64_t row, int64_t rows, void* scratch) {
  if (p.dtype == DType::kF64) return run<VecD>(p, row, rows, static_cast<char*>(scratch));
  run<VecF>(p, row, rows, static_cast<char*>(scratch));
}

}  // namespace ppmoe::cell::PPMOE_ISA
