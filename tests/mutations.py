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
        ("cell = add ? cell + total[i][j] : total[i][j];", "cell = total[i][j];",
         "the last chain alone"),
        ("depth != 0 || step != 0, next", "depth != 0, next", "a slab's last chain alone"),
        ("v += load_wide(bias + j);", "v -= load_wide(bias + j);", "sign of the bias"),
        ("from[j] + wide_t<T>(to_float(bias[j]))", "from[j]", "no bias at a row's end"),
        ("rest = d; rest < g.k; ++rest", "rest = d; rest + 1 < g.k; ++rest", "last of a thin sum"),
        ("if (g.k == 0) __builtin_memset", "if (g.k < 0) __builtin_memset", "empty sums unwritten"),
        ("a_slab += size.rows * padded;", "", "the first slab of a again"),
        ("g.bias != nullptr) value += to_float", "g.bias != nullptr) value -= to_float",
         "sign of a thin product's bias"),
    ),
    *_mutations(
        f"{_CPU}/gemm.cpp", "test_grouped_linear", "column_sums",
        ("total[c] += part[c];", "total[c] = part[c];", "the last strip alone"),
        ("part[c] += to_float(row[c", "part[c] -= to_float(row[c", "sign"),
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
)  # fmt: skip
