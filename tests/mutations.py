"""The bugs that `mutate.py` plants: a changed sign, bound or weight for every kernel and contract.

Every one of them must fail a test. A change that no result depends on (a block size, an order of
independent steps) does not belong here.
"""

from __future__ import annotations

import dataclasses

_CPU = "csrc/cpu/expert_slice"
_OPS = "ppmoe_ops/ops/expert_slice"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One planted bug.

    Attributes:
        file: where, from the root of the tree.
        old: text that occurs there exactly once.
        new: what it becomes.
        note: what is wrong then.
        tests: the pytest arguments that should catch it; where they do not, all kernel tests run.
        kernels: members of the kernel table that it changes.
    """

    file: str
    old: str
    new: str
    note: str
    tests: str
    kernels: str = ""


def _mutations(
    file: str, tests: str, kernels: str, *changes: tuple[str, str, str]
) -> tuple[Mutation, ...]:
    selection = f"tests/expert_slice/{tests}.py"
    return tuple(Mutation(file, old, new, note, selection, kernels) for old, new, note in changes)


MUTATIONS = (
    *_mutations(
        f"{_CPU}/route.cpp", "test_route", "route",
        ("splat(-kInfinity)) + 0.f;", "splat(-kInfinity));", "-0 ranks below +0"),
        ("(x == x ? x : splat(-kInfinity))", "(x == x ? x : splat(kInfinity))", "NaN ranks first"),
        ("larger(v[i], w[D - 1 - i])", "larger(v[i], w[i])", "lists are merged the same way round"),
        ("descend(v[i], v[D - 1 - i]);", "descend(v[i], v[i + D / 2]);", "a wrong sorting network"),
        ("k > 0 && best[k - 1] < keys[i]", "k > 1 && best[k - 1] < keys[i]", "one place too few"),
        ("if (top_k <= 8) return", "if (top_k <= 9) return", "nine from lists of eight"),
        ("(x < 0.f ? e : splat(1.f))", "(x < 0.f ? splat(1.f) : e)", "sigmoid of -x"),
        ("load<VecF>(score + i) / all)", "load<VecF>(score + i))", "softmax without its sum"),
        ("next = max(next, x < high ? x : high);", "next = max(next, x);", "the best one twice"),
        ("rank[g] && other < g)", "rank[g] && other > g)", "equal groups go to the higher"),
        ("if (better < top_groups)", "if (better <= top_groups)", "a group more"),
        ("return any(nan) || top ==", "return top ==", "NaN that was not selected is missed"),
        ("= static_cast<float>(scale / total);", "= static_cast<float>(1 / total);", "no scale"),
        ("i < padded; ++i) row[i] = -kInfinity;", "i < padded; ++i) row[i] = 0.f;", "padding of 0"),
        ("double total = kSigmoidSumFloor;", "double total = 0;", "zero divided by zero"),
        ("score[i] + bias[i] : score[i]", "score[i] - bias[i] : score[i]", "bias subtracted"),
    ),
    *_mutations(
        f"{_CPU}/route_f64.cpp", "test_route", "route",
        ("(a == b && a_id < b_id)", "(a == b && a_id > b_id)", "ties go to the higher id"),
        ("weights[k] * a.scale;", "weights[k];", "no scale"),
        ("size == 1 ? first : first + second", "first", "a group counts by its best one"),
        ("a.scale / (total + kSigmoidSumFloor)", "a.scale / total", "zero divided by zero"),
    ),
    *_mutations(
        f"{_CPU}/route_backward.cpp", "test_route", "route_backward",
        ("static_cast<W>(-mean * a.scale)", "static_cast<W>(mean * a.scale)",
         "sign of the unselected"),
        ("(grad[k] - mean) * a.scale", "(grad[k] - mean)", "no scale on the selected"),
        ("weights[k] * (grad[k] - mean)", "weights[k] * (grad[k] + mean)", "sign of the mean"),
        ("mean *= unscale;", "", "mean of scaled weights"),
        ("sigmoid.score * sigmoid.rest", "sigmoid.score * sigmoid.score", "derivative of sigmoid"),
        ("rest = x < 0 ? larger : smaller;", "rest = x < 0 ? smaller : larger;", "1 - s swapped"),
        ("static_cast<size_t>(a.experts) * sizeof(T));", "0);", "unselected are not written"),
    ),
    *_mutations(
        f"{_CPU}/losses.cpp", "test_router_losses", "losses",
        ("experts - whole, lowest);", "experts - whole, W(0));", "padding of 0"),
        ("static_cast<double>(lse) * static_cast<double>(lse)", "static_cast<double>(lse)",
         "z is not squared"),
        ("store(mass + i, load<V>(mass + i) + p);", "store(mass + i, p);", "mass of the last row"),
        ("if (top - top != 0 && !has_nan(row, experts)) lse = top;", "", "NaN for an infinity"),
    ),
    *_mutations(
        f"{_CPU}/losses.cpp", "test_router_losses", "losses_backward",
        ("* lse - balance * sum(dot)", "* lse + balance * sum(dot)", "sign of the mean share"),
        ("V dot = part * part_shares;", "V dot{};", "the row's end has no share"),
    ),
    *_mutations(
        f"{_CPU}/index.cpp", "test_expert_index", "count place",
        ("distance < 0xffffffffu ? static_cast<uint32_t>(distance) : 0xffffffffu",
         "static_cast<uint32_t>(distance)", "64-bit ids are cut to 32 bits"),
        ("a.local < most ? a.local : most", "a.local < most ? a.local : a.local",
         "ids wrap around past int32"),
    ),
    *_mutations(
        f"{_CPU}/index.cpp", "test_expert_index", "place",
        ("if (to + i >= stream.first) to[i]", "to[i]", "a line overwrites its neighbour's slots"),
        ("if (place == kLine - 1) flush", "if (place == kLine - 2) flush", "lines one slot short"),
        ("place_ids<int64_t>(a, begin, end, streams)", "place_ids<int32_t>(a, begin, end, streams)",
         "int64 ids read as int32"),
    ),
    *_mutations(
        f"{_CPU}/rows.cpp", "test_rows", "slice",
        ("      if (to >= 0)\n", "      if (to > 0)\n", "the first row is not written"),
        ("for (; at < bytes; ++at) to[at]", "for (; at + 1 < bytes; ++at) to[at]",
         "the last byte of a streamed row"),
    ),
    *_mutations(
        f"{_CPU}/rows.cpp", "test_rows", "slice_clear",
        ("if (a.slots[i] >= 0) continue;", "if (a.slots[i] > 0) continue;", "slot 0 is cleared"),
    ),
    *_mutations(
        f"{_CPU}/rows.cpp", "test_rows", "merge",
        ("total[v] += load_wide(row + v * lanes) * w;", "total[v] += load_wide(row + v * lanes);",
         "no weights"),
        ("total += W(to_float(value)) *", "total -= W(to_float(value)) *", "sign of a row's end"),
    ),
    *_mutations(
        f"{_CPU}/rows.cpp", "test_rows", "merge_backward",
        ("dot[v] += g * load_wide(rows", "dot[v] = g * load_wide(rows", "the last block's product"),
        ("grad_weights[slot] = total;", "grad_weights[slot] = -total;", "sign"),
        ("scaled[v] = g * weight;", "scaled[v] = g;", "no weight"),
        ("out[i] = narrow<T>(g * weight);", "out[i] = narrow<T>(g);", "no weight at a row's end"),
        ("slot / a.top_k * a.grad_stride", "slot % a.top_k * a.grad_stride", "another token"),
    ),
    *_mutations(
        f"{_CPU}/gemm.cpp", "test_grouped_linear", "gemm",
        ("j < n; ++j) to[j] = narrow<T>(from[j]);", "j + 1 < n; ++j) to[j] = narrow<T>(from[j]);",
         "last of a product's row"),
    ),
    *_mutations(
        f"{_CPU}/gemm.cpp", "test_grouped_linear", "column_sums",
        ("total[c] += part[c];", "total[c] = part[c];", "the last strip alone"),
    ),
    *_mutations(
        f"{_CPU}/gemm.cpp", "test_expert_ffn", "column_sums",
        ("part[c] += weight * to_float(row[c", "part[c] += to_float(row[c", "no weights"),
        ("load_wide(part + c) + weight * load_wide(row + c)",
         "load_wide(part + c) + load_wide(row + c)", "no weights in whole vectors"),
    ),
    *_mutations(
        f"{_CPU}/gemm_kernel.cpp", "test_grouped_linear", "gemm",
        ("cell = add ? cell + total[i][j] : total[i][j];", "cell = total[i][j];",
         "the last chain alone"),
        ("depth != 0 || step != 0, ahead", "depth != 0, ahead", "a slab's last chain alone"),
        ("rest = d; rest < k; ++rest", "rest = d; rest + 1 < k; ++rest", "last of a thin sum"),
        ("if (k == 0 && !add) {", "if (k < 0) {", "empty sums unwritten"),
    ),
    *_mutations(
        f"{_CPU}/gemm_kernel.cpp", "test_expert_ffn", "ffn_in ffn_in_backward ffn_out",
        ("least(first + columns, low + kDepth) - d;", "first + columns - d;",
         "packed past the end of a depth"),
        ("at(row, low) + (d - low) * width);", "at(row, low));", "columns packed over the first"),
        ("add || depth != 0 || step", "depth != 0 || step", "the last half's product alone"),
    ),
    *_mutations(
        f"{_CPU}/gemm_kernel.cpp", "test_expert_ffn_bits", "gemm ffn_in ffn_in_backward ffn_out",
        ("chain_steps<S>(group);", "chain_steps<S>(m);", "chains as long as a block is tall"),
    ),
    *_mutations(
        f"{_CPU}/gemm.h", "test_grouped_linear", "gemm",
        ("v += load_wide(bias + j);", "v -= load_wide(bias + j);", "sign of the bias"),
        ("from[j] + wide_t<T>(to_float(bias[j]))", "from[j]", "no bias at a row's end"),
        ("data + d * rows + row * padded(d)", "data + row * padded(d)", "the first slab of a again"),
        (" && b_depth.closed();", ";", "thin products of spread weights"),
        ("a_depth.closed() && ", "", "thin products of spread rows"),
    ),
    *_mutations(
        f"{_CPU}/gemm.h", "test_expert_ffn", "ffn_in",
        ("shifted.data += i * part;", "", "the gate's columns again"),
    ),
    *_mutations(
        f"{_CPU}/pack.h", "test_grouped_linear", "gemm",
        ("t[i + 1] = unpack_high(r[i], r[i + 1]);", "t[i + 1] = unpack_low(r[i], r[i + 1]);",
         "half of a transpose"),
        ("for (int64_t i = 0; i < count; ++i) part[i] = line[i];",
         "for (int64_t i = 0; i + 1 < count; ++i) part[i] = line[i];", "last of a line"),
        ("(low | high << 16)", "(high | low << 16)", "pairs the other way round"),
        ("for (int64_t i = 0; i < here; ++i) part[0][i] = line[i];",
         "for (int64_t i = 1; i < here; ++i) part[0][i] = line[i];", "first of the last lines"),
    ),
    *_mutations(
        f"{_CPU}/pack.h", "test_expert_ffn", "ffn_in ffn_in_backward",
        ("axis.index += by;", "", "the first tokens in every panel"),
    ),
    *_mutations(
        f"{_CPU}/activation.h", "test_expert_ffn_values", "ffn_in ffn_in_backward",
        ("x < 0 ? z * near : near;", "x < 0 ? near : z * near;", "logistic of -x"),
        ("slope = z * near * near;", "slope = z * near;", "slope of the logistic"),
        ("p * t + 1.969631402e-01f;", "p * t + 1.969031402e-01f;", "a coefficient of erfc"),
        ("x < 0.f ? tail : 1.f - tail;", "1.f - tail;", "normal of |x|"),
        ("slope = x <= 0 ? V{} : V{} + scalar(1);", "slope = x < 0 ? V{} : V{} + scalar(1);",
         "slope of relu at 0"),
        ("return x <= 0 ? V{} : x;", "return x > 0 ? x : V{};", "relu of NaN is 0"),
        ("0.39894228040143267794", "0.39994228040143267794", "slope of gelu"),
        ("scalar(1.59576912160573071176)", "scalar(1.59676912160573071176)", "slope of tanh"),
        ("scalar(0.044715)", "scalar(0.044815)", "the cubic term of gelu_tanh"),
        ("scalar(1) + 3 * kCubic * square", "scalar(1) + kCubic * square", "slope of the cubic"),
    ),
    *_mutations(
        f"{_CPU}/ffn.cpp", "test_expert_ffn", "ffn_in",
        ("if constexpr (kGated) value *= load<V>(up + j);",
         "if constexpr (kGated) value *= load<V>(gate + j);", "the gate times itself"),
        ("store_wide(row + j, value += load_wide(bias + j));", "store_wide(row + j, value);",
         "no bias"),
        ("if (bias != nullptr) row[j] += to_float(bias[j]);", "", "no bias at a row's end"),
        ("if (pre != nullptr) pre[j] = narrow<T>(row[j]);", "", "a row's end is not saved"),
        ("half * width + first;", "first;", "both halves saved in one place"),
        ("nullptr ? nullptr : bias + half * width,", "nullptr ? nullptr : bias,",
         "the gate's bias for both halves"),
        ("block.expert * halves * width + first;", "block.expert * width + first;",
         "another expert's bias"),
        ("count, first, columns);", "count, 0, columns);", "later columns over the first"),
        ("w.from(first, 0), least(most,", "w.from(column, 0), least(most,", "the first slab again"),
    ),
    *_mutations(
        f"{_CPU}/ffn.cpp", "test_expert_ffn", "ffn_panel_bytes",
        ("return parts * Panels<T>::bytes(rows, depth);", "return Panels<T>::bytes(rows, depth);",
         "no room for the second half"),
    ),
    *_mutations(
        f"{_CPU}/ffn.cpp", "test_expert_ffn_bits", "ffn_out",
        ("load<V>(to + j) + rounded(value * weight)", "load<V>(to + j) + value * weight",
         "products are not rounded before the sum"),
        ("to[j] += rounded(value * weight);", "to[j] += value * weight;",
         "products at a row's end are not rounded"),
    ),
    *_mutations(
        f"{_CPU}/ffn.cpp", "test_expert_ffn", "ffn_out",
        ("(f.weights)[block.row + i] : 1;", "(f.weights)[i] : 1;", "weights of other rows"),
        ("if (bias != nullptr) value += load_wide(bias + j);", "", "no bias"),
        ("if (bias != nullptr) value += to_float(bias[j]);", "", "no bias at a row's end"),
        ("(f.tokens[block.row + i] - task.first)", "(f.tokens[block.row + i])",
         "tokens counted from the first chunk's"),
        ("static_cast<size_t>(task.columns) * sizeof(wide_t<T>));", "size_t{0});",
         "sums do not begin at zero"),
        ("slab_of(block, part), part != 0,", "slab_of(block, part), false,", "the last half alone"),
        ("part * f.depth * f.w.row + task", "task", "the gate's weights for both halves"),
        ("(at) + part * part_bytes", "(at)", "the gate's gradient for both halves"),
    ),
    *_mutations(
        f"{_CPU}/ffn_backward.cpp", "test_expert_ffn", "ffn_in_backward",
        ("dots += grad * whole;", "dots = grad * whole;", "the last vector's product"),
        ("store_wide(activated, whole * r.weight);", "store_wide(activated, whole);", "no weight"),
        ("if (r.activated != nullptr) r.activated[j + i] = activated[i];", "",
         "activations at a row's end"),
        ("if (kGated) r.grad_up[j + i] = grad_up[i];", "", "the gradient of up at a row's end"),
        ("kGated ? grad * up * slope : grad * slope", "grad * slope", "up is not in the gate's"),
        ("store_wide(grad_up, grad * value);", "store_wide(grad_up, grad * slope);",
         "a slope in the gradient of up"),
        ("f.dot_slabs + first / kSlab] = dot;", "f.dot_slabs] = dot;", "the last slab's product"),
        ("block.panels + half * part_bytes", "block.panels", "up is packed over the gate"),
        ("lines{out + half * width, {inner}", "lines{out, {inner}", "the gate is packed twice"),
    ),
    *_mutations(
        f"{_CPU}/ffn_backward.cpp", "test_expert_ffn", "ffn_weights_backward",
        ("i < f.dot_slabs; ++i", "i < 1; ++i", "the first slab's product"),
        ("for (; j < f.hidden; ++j) rest", "for (; j + 1 < f.hidden; ++j) rest", "last of a bias"),
        ("total += rest;", "total -= rest;", "sign of the bias"),
    ),
    *_mutations(
        f"{_CPU}/ffn_plan.cpp", "test_expert_ffn", "",
        ("if (!ordered || hit == 0) return 1;", "if (hit == 0) return 1;",
         "chunks of slots in any order"),
        ("bounds[e + 1], end) - token;", "bounds[e + 1], end + 1) - token;",
         "a chunk takes the next one's first token"),
        ("next[e] = high;", "", "a chunk's rows again in the next"),
    ),
    *_mutations(
        f"{_CPU}/ffn_plan.cpp", "test_expert_ffn_bits", "",
        ("here, rows(e), panel_bytes}", "here, high - low, panel_bytes}",
         "a chunk's rows decide on the order of sums"),
    ),
    *_mutations(
        f"{_CPU}/ffn_plan.cpp", "test_bad_input", "",
        ("bound[i] < 0 || bound[i] > most", "bound[i] < 0 || bound[i] > most + 1", "a row too many"),
        ("slot[row] < 0 || slot[row] >= count", "slot[row] < 0 || slot[row] > count",
         "a slot too many"),
    ),
    *_mutations(
        f"{_CPU}/ffn_ops.cpp", "test_expert_ffn_bits", "",
        ("plain = w_out.stride(2) == 1;", "plain = true;", "thin products of spread weights"),
    ),
    *_mutations(
        f"{_CPU}/ffn_ops.cpp", "test_expert_ffn", "",
        ("w_out.stride(2), w_out.stride(1)}", "w_out.stride(1), w_out.stride(2)}",
         "w_out the other way round"),
        ("a.b_out.has_value() ? a.b_out->const_data_ptr() : nullptr", "nullptr", "no bias"),
    ),
    *_mutations(
        f"{_CPU}/ffn_backward_ops.cpp", "test_expert_ffn_values", "",
        ("std::fill_n(data<char>(grad_weights), grad_weights.numel() * "
         "grad_weights.element_size(), 0);", "", "weights of foreign slots have no gradient"),
        ("std::fill_n(static_cast<char*>(gemm.c), gemm.m * gemm.n * size, 0);", "",
         "experts without tokens have no gradient"),
    ),
    *_mutations(
        f"{_CPU}/ffn_backward_ops.cpp", "test_expert_ffn", "",
        ("plan.weights.get() + low * wide", "plan.weights.get()", "the first expert's weights"),
        ("at(grad_b_in, e * inner)", "at(grad_b_in, 0)", "one gradient of bias"),
    ),
    *_mutations(
        f"{_CPU}/ffn_backward_ops.cpp", "test_expert_ffn_autograd", "",
        ("need_b_in || need_w_out) {", "need_b_in) {", "no activations for w_out alone"),
    ),
    *_mutations(
        f"{_CPU}/rows_ops.cpp", "test_expert_index", "",
        (" + table[3 * num_local];", ";", "a quarter is not counted"),
        ("std::fill(first + running, first + count, -1);", "", "the tail is not written"),
    ),
    *_mutations(
        f"{_CPU}/rows_ops.cpp", "test_bad_input", "",
        ("if (row >= 0) bad_value", "if (row > 0) bad_value", "row 0 may be listed twice"),
        ("slot[i] < -1 || slot[i] >= count", "slot[i] < -1 || slot[i] > count",
         "a slot too many"),
    ),
    *_mutations(
        f"{_CPU}/rows_ops.cpp", "test_rows", "",
        ("std::fill_n(data<char>(grad_weights), count * weights.element_size(), 0);", "",
         "weights of foreign slots have no gradient"),
    ),
    *_mutations(
        f"{_CPU}/router_ops.cpp", "test_router_losses", "",
        ("scalar(grad_z) * 2 / rows", "scalar(grad_z) / rows", "half of the gradient of z"),
        ("(tokens + kLossBlock - 1) / kLossBlock", "tokens / kLossBlock", "the last rows"),
        ("all > 0 ? all : 1", "all > 0 ? tokens : 1", "shares of tokens and not of choices"),
    ),
    *_mutations(
        f"{_CPU}/router_ops.cpp", "test_bad_input", "",
        ("1, top_groups * (experts / groups)", "1, experts", "more than the groups hold"),
    ),
    *_mutations(
        f"{_CPU}/gemm_ops.cpp", "test_grouped_linear", "",
        ("std::fill_n(data<char>(out), bounds.front() * bytes, 0);", "", "rows before the first"),
        ("(out.size(0) - bounds.back()) * bytes, 0);", "0, 0);", "rows after the last"),
        ("at(*bias, block.expert * width + block.column)", "at(*bias, block.column)",
         "the first expert's bias"),
        ("const int64_t low = bounds[block.expert];", "const int64_t low = bounds[0];",
         "the first expert's rows"),
        ("width, at(grad_bias, e * width)", "width, at(grad_bias, 0)", "one gradient of bias"),
    ),
    *_mutations(
        f"{_CPU}/gemm_ops.cpp", "test_bad_input", "",
        ("bound[i] < 0 || bound[i] > rows", "bound[i] < 0 || bound[i] > rows + 1",
         "a row too many"),
    ),
    *_mutations(
        "csrc/include/ppmoe/vec.h", "test_route", "",
        ("q = q * r + 1.666652113e-01f;", "q = q * r + 1.666052113e-01f;", "a coefficient of exp"),
    ),
    *_mutations(
        "csrc/include/ppmoe/vec.h", "test_rows", "",
        ("rounded = (bits & 0x7fffffffu) > 0x7f800000u ? (VecU{} + 0x7fc0u) : rounded;", "",
         "some NaN round to zero"),
    ),
    *_mutations(
        "csrc/include/ppmoe/check.h", "test_bad_input", "",
        ("if (came < low || came > high) {", "if (came < low) {", "no upper bounds"),
    ),
    *_mutations(
        f"{_OPS}/route.py", "test_route", "",
        ("weights.masked_fill(poisoned, torch.nan)", "weights", "reference without NaN"),
        ("descending=True, stable=True).indices[:, :top_k]", "stable=True).indices[:, :top_k]",
         "the reference takes the worst"),
        ('return score == "sigmoid" or not renormalize', 'return score == "sigmoid"',
         "logits are not kept"),
        ("logits, num_experts, dtype, score, renormalize, scale\n    )\n    return (grad",
         "logits, num_experts, dtype, score, renormalize, 1.0\n    )\n    return (grad",
         "scale does not reach the backward"),
        ("- (grad_scores * shares).sum(-1, keepdim=True)", "", "reference without the mean"),
    ),
    *_mutations(
        f"{_OPS}/router_losses.py", "test_router_losses", "",
        ("overload(grad_balance, grad_z, logits, shares, lse), None",
         "overload(grad_z, grad_balance, logits, shares, lse), None", "gradients swapped"),
        ("lse.square().sum() / max", "lse.sum() / max", "z of the reference is not squared"),
    ),
    *_mutations(
        f"{_OPS}/expert_index.py", "test_expert_index", "",
        ("(local >= 0) & (local < num_local)", "(local >= 0) & (local <= num_local)",
         "one expert more"),
    ),
    *_mutations(
        f"{_OPS}/grouped_linear.py", "test_grouped_linear", "",
        ("(asked[0], asked[2], asked[3])", "(asked[0], asked[3], asked[2])", "the wrong gradients"),
        ("product = product + bias[expert]", "product = product - bias[expert]",
         "sign of the reference's bias"),
        ("part.sum(0).to(rows.dtype)", "part.mean(0).to(rows.dtype)", "a mean for a sum"),
    ),
    *_mutations(
        f"{_OPS}/rows.py", "test_rows", "",
        ("torch.where(here, total + weights", "torch.where(here, total - weights",
         "sign of the reference"),
        ("x.index_select(0, slots.clamp(min=0).long() // top_k)",
         "x.index_select(0, slots.clamp(min=0).long() % x.size(0))", "another token"),
        ("return grad_rows, None, grad_weights", "return -grad_rows, None, grad_weights", "sign"),
    ),
    *_mutations(
        f"{_OPS}/expert_ffn.py", "test_expert_ffn", "",
        ("hidden = hidden + b_in[expert]", "hidden = hidden - b_in[expert]",
         "sign of the reference's bias"),
        ("row * weights.reshape(-1)[group].unsqueeze(-1)", "row", "reference without weights"),
    ),
    *_mutations(
        f"{_OPS}/expert_ffn.py", "test_expert_ffn_autograd", "",
        ("needs = (asked[0], *asked[3:8])", "needs = (asked[0], *asked[2:7])",
         "the wrong gradients"),
        ("save = torch.is_grad_enabled() and any(", "save = any(", "saved without a derivative"),
    ),
    *_mutations(
        f"{_OPS}/expert_ffn_backward.py", "test_expert_ffn", "",
        ("dots = dots + row_grad", "dots = dots - row_grad", "sign of the reference's bias"),
        ("(weight * activated).to(x.dtype)", "activated.to(x.dtype)", "w_out without weights"),
        ("(weight * row_grad).sum(0)", "row_grad.sum(0)", "b_out without weights"),
    ),
    *_mutations(
        f"{_OPS}/activations.py", "test_expert_ffn", "",
        ("s * (1 + x * (1 - s))", "s * (1 + x * s)", "slope of silu"),
        ("(1 + 3 * 0.044715 * x * x)", "(1 + 0.044715 * x * x)", "slope of the cubic"),
        ("return _pointwise(gate, activation) * up", "return _pointwise(up, activation) * gate",
         "the wrong half"),
    ),
    *_mutations(
        f"{_OPS}/moe_ffn.py", "test_moe_ffn", "",
        ("expert_index(experts, first_expert,", "expert_index(experts, 0,", "the first experts"),
    ),
)  # fmt: skip
