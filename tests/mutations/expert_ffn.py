"""Bugs in the kernels of `expert_ffn`, forward and backward."""

from __future__ import annotations

from mutations.mutation import CPU, INCLUDE, mutations

EXPERT_FFN = (
    *mutations(
        f"{INCLUDE}/activation.h", "test_expert_ffn_values", "ffn_in ffn_in_backward",
        ("slope = z * near * near;", "slope = z * near;", "slope of the logistic"),
        ("p * t + 1.969631402e-01f;", "p * t + 1.969031402e-01f;", "a coefficient of erfc"),
        ("slope = x <= 0 ? V{} : V{} + scalar(1);", "slope = x < 0 ? V{} : V{} + scalar(1);",
         "slope of relu at 0"),
        ("return x <= 0 ? V{} : x;", "return x > 0 ? x : V{};", "relu of NaN is 0"),
        ("0.39894228040143267794", "0.39994228040143267794", "slope of gelu"),
        ("scalar(1.59576912160573071176)", "scalar(1.59676912160573071176)", "slope of tanh"),
        ("scalar(0.044715)", "scalar(0.044815)", "the cubic term of gelu_tanh"),
        ("scalar(1) + 3 * (kCubic * x)", "scalar(1) + (kCubic * x)", "slope of the cubic"),
    ),
    *mutations(
        f"{CPU}/ffn.cpp", "test_expert_ffn", "ffn_in",
        ("if constexpr (kGated) value *= load<V>(up + j);",
         "if constexpr (kGated) value *= load<V>(gate + j);", "the gate times itself"),
        ("if (bias != nullptr) row[j] += to_float(bias[j]);", "", "no bias at a row's end"),
        ("if (pre != nullptr) pre[j] = narrow<T>(row[j]);", "", "a row's end is not saved"),
        ("nullptr ? nullptr : bias + half * width,", "nullptr ? nullptr : bias,",
         "the gate's bias for both halves"),
        ("block.expert * halves * width + first;", "block.expert * width + first;",
         "another expert's bias"),
        ("count, first, columns);", "count, 0, columns);", "later columns over the first"),
    ),
    *mutations(
        f"{CPU}/ffn.cpp", "test_expert_ffn", "ffn_panel_bytes",
        ("return parts * Panels<T>::bytes(rows, depth);", "return Panels<T>::bytes(rows, depth);",
         "no room for the second half"),
    ),
    *mutations(
        f"{CPU}/ffn.cpp", "test_expert_ffn_bits", "ffn_out",
        ("load<V>(to + j) + rounded(value * weight)", "load<V>(to + j) + value * weight",
         "products are not rounded before the sum"),
        ("to[j] += rounded(value * weight);", "to[j] += value * weight;",
         "products at a row's end are not rounded"),
    ),
    *mutations(
        f"{CPU}/ffn.cpp", "test_expert_ffn", "ffn_out",
        ("(f.weights)[block.row + i] : 1;", "(f.weights)[i] : 1;", "weights of other rows"),
        ("if (bias != nullptr) value += to_float(bias[j]);", "", "no bias at a row's end"),
        ("(f.tokens[block.row + i] - task.first)", "(f.tokens[block.row + i])",
         "tokens counted from the first chunk's"),
        ("static_cast<size_t>(task.columns) * sizeof(wide_t<T>));", "size_t{0});",
         "sums do not begin at zero"),
        ("slab_of(block, part), part != 0,", "slab_of(block, part), false,", "the last half alone"),
        ("part * f.depth * f.w.row + task", "task", "the gate's weights for both halves"),
    ),
    *mutations(
        f"{CPU}/ffn_backward.cpp", "test_expert_ffn", "ffn_in_backward",
        ("dots += grad * whole;", "dots = grad * whole;", "the last vector's product"),
        ("store_wide(activated, whole * r.weight);", "store_wide(activated, whole);", "no weight"),
        ("if (r.activated != nullptr) r.activated[j + i] = activated[i];", "",
         "activations at a row's end"),
        ("if (kGated) r.grad_up[j + i] = grad_up[i];", "", "the gradient of up at a row's end"),
        ("kGated ? grad * up * slope : grad * slope", "grad * slope", "up is not in the gate's"),
        ("f.dot_slabs + first / kSlabColumns] = dot;", "f.dot_slabs] = dot;",
         "the last slab's product"),
        ("block.panels + half * part_bytes", "block.panels", "up is packed over the gate"),
    ),
    *mutations(
        f"{CPU}/ffn_backward.cpp", "test_expert_ffn", "ffn_weights_backward",
        ("i < f.dot_slabs; ++i", "i < 1; ++i", "the first slab's product"),
        ("for (; j < f.hidden; ++j) rest", "for (; j + 1 < f.hidden; ++j) rest", "last of a bias"),
    ),
    *mutations(
        f"{CPU}/ffn_plan.cpp", "test_expert_ffn", "",
        ("if (!ordered || hit == 0) return ordered", "if (hit == 0) return ordered",
         "chunks of slots in any order"),
        ("bounds[e + 1], end) - token;", "bounds[e + 1], end + 1) - token;",
         "a chunk takes the next one's first token"),
        ("next[e] = high;", "", "a chunk's rows again in the next"),
    ),
    *mutations(
        f"{CPU}/ffn_plan.cpp", "test_expert_ffn_bits", "",
        ("here, rows(e), panel_bytes}", "here, high - low, panel_bytes}",
         "a chunk's rows decide on the order of sums"),
    ),
    *mutations(
        f"{CPU}/ffn_plan.cpp", "test_bad_input", "",
        ("bound[i] < 0 || bound[i] > most", "bound[i] < 0 || bound[i] > most + 1",
         "a row too many"),
        ("slot[row] < 0 || slot[row] >= count", "slot[row] < 0 || slot[row] > count",
         "a slot too many"),
    ),
    *mutations(
        f"{CPU}/ffn_ops.cpp", "test_expert_ffn_bits", "",
        ("plain = w_out.stride(2) == 1;", "plain = true;", "thin products of spread weights"),
    ),
    *mutations(
        f"{CPU}/ffn_backward_ops.cpp", "test_expert_ffn_values", "",
        ("std::fill_n(data<char>(grad_weights), grad_weights.numel() * "
         "grad_weights.element_size(), 0);", "", "weights of foreign slots have no gradient"),
        ("std::fill_n(static_cast<char*>(gemm.c), gemm.m * gemm.n * size, 0);", "",
         "experts without tokens have no gradient"),
    ),
    *mutations(
        f"{CPU}/ffn_backward_ops.cpp", "test_expert_ffn", "",
        ("plan.weights.get() + low * wide", "plan.weights.get()", "the first expert's weights"),
        ("at(grad_b_in, e * inner)", "at(grad_b_in, 0)", "one gradient of bias"),
    ),
    *mutations(
        f"{CPU}/ffn_backward_ops.cpp", "test_expert_ffn_autograd", "",
        ("need_b_in || need_w_out) {", "need_b_in) {", "no activations for w_out alone"),
    ),
)  # fmt: skip
