"""Bugs in ladder attention: windows, branches, feed-forward, fusion, the block, their contracts."""

from __future__ import annotations

from mutations.mutation import SHARED, Mutation

CPU = "csrc/cpu/ladder_attention"
OPS = "ppmoe_ops/ops/ladder_attention"


def mutations(file: str, tests: str, *changes: tuple[str, str, str]) -> tuple[Mutation, ...]:
    selection = f"tests/ladder_attention/{tests}.py"
    return tuple(Mutation(file, old, new, note, selection) for old, new, note in changes)


LADDER_ATTENTION = (
    *mutations(
        f"{SHARED}/tile.cpp",
        "test_ladder_attention",
        ("add || s != 0);", "add);", "the last chain alone"),
        (
            "(rows - row + tiles - t - 1) / (tiles - t)",
            "(rows - row) / (tiles - t)",
            "rows are left over",
        ),
    ),
    *mutations(
        f"{CPU}/attention.cpp",
        "test_window_attention",
        ("head * table, bias, queries);", "table, bias, queries);", "another head's bias"),
        ("fresh = !next.same_size(window);", "fresh = false;", "the bias of another size"),
        ("inverse[tokens - 1] = 1;", "inverse[tokens - 1] = 2;", "twice the lone query"),
        (
            "if (i + lanes > tokens) s = first_lanes(s, tokens - i, least_score);",
            "",
            "the lone query sees past the last key",
        ),
    ),
    *mutations(
        f"{CPU}/attention_backward.cpp",
        "test_ladder_gradients",
        ("(load<V>(cell) - total));", "(load<V>(cell) + total));", "sign of the mean"),
        ("if (rest < lanes) value = first_lanes(value, rest);", "", "the next run's gradients"),
        (
            "store(grads + i, load<V>(grads + i) * scale);",
            "store(grads + i, load<V>(grads + i));",
            "no scale in the gradients of q and k",
        ),
    ),
    *mutations(
        f"{CPU}/attention.h",
        "test_window_attention",
        (
            "for (int64_t j = n; j < round_up(n, lanes); ++j) to[j] = 0;",
            "",
            "what is behind a row with strides",
        ),
        (
            "if (bias != nullptr) s += load<V>(bias + i * stride + j);",
            "if (bias != nullptr) s -= load<V>(bias + i * stride + j);",
            "sign of the bias",
        ),
    ),
    *mutations(
        f"{CPU}/attention.h",
        "test_window_attention_values",
        (
            "      largest = s > largest ? s : largest;",
            "      largest = s;",
            "the last of the scores",
        ),
    ),
    *mutations(
        f"{CPU}/attention_kernels.h",
        "test_window_attention",
        (
            "int64_t first = shift % window;",
            "int64_t first = -shift % window;",
            "windows shifted the other way",
        ),
    ),
    *mutations(
        f"{CPU}/attention_ops.cpp",
        "test_ladder_gradients",
        ("+= from[row];", "= from[row];", "the last part of the table alone"),
        ("std::fill_n(own, apart * size, 0);", "", "a table that is added to what was there"),
    ),
    *mutations(
        f"{CPU}/branch.cpp",
        "test_ladder_attention",
        ("if (b.normed != nullptr) value += load<V>(more + j);", "", "no inner shortcut"),
        ("load<V>(row + j) + value * scale);", "load<V>(row + j) + value);", "no stochastic depth"),
    ),
    *mutations(
        f"{CPU}/branch.cpp",
        "test_ladder_gradients",
        ("load<V>(row + j) * tilt", "load<V>(row + j)", "a norm's derivative without its slope"),
        ("sums + b.sums_stride + j) + each", "sums + b.sums_stride + j)", "no gradient of ln_b"),
        (
            "store(row + j, load<V>(row + j) * scale)",
            "store(row + j, load<V>(row + j))",
            "gradients without stochastic depth",
        ),
    ),
    *mutations(
        f"{CPU}/rows.h",
        "test_ladder_attention",
        ("+ static_cast<W>(eps)));", "));", "a norm without eps"),
        (
            "if (j + lanes > n) centred = first_lanes(centred, n - j);",
            "",
            "a variance of more than the row",
        ),
    ),
    *mutations(
        f"{CPU}/branch_ops.cpp",
        "test_ladder_attention",
        (
            "a.k = projected.map(channels, height, width);",
            "a.k = projected.map(0, height, width);",
            "q for k",
        ),
    ),
    *mutations(
        f"{CPU}/branch_ops.cpp",
        "test_ladder_gradients",
        (
            "branch.later ? scaled.data() : nullptr",
            "scaled.data()",
            "a gradient through a shortcut that is not there",
        ),
    ),
    *mutations(
        f"{CPU}/block_ops.cpp",
        "test_ladder_bad_input",
        ("(index < kBlockParts ? 3 : 2) * g", "3 * g", "every branch has values of its own"),
    ),
    *mutations(
        f"{CPU}/block_plan.cpp",
        "test_ladder_block",
        (
            "kSigns[kBranches] = {0, 1, -1};",
            "kSigns[kBranches] = {0, 1, 1};",
            "branch 2 shifted as branch 1",
        ),
        ("rows_map(b.y, c_, (i - 1) * g_)", "rows_map(b.y, c_, 0)", "branch 0's output for all"),
    ),
    *mutations(
        f"{CPU}/ffn.cpp",
        "test_ladder_ffn",
        ("taps[k * p.pitch + c] * shift[c];", "taps[k * p.pitch + c];", "no offset of a tap"),
        ("factor.of[i] * value", "value", "no stochastic depth"),
        ("apart * apart * both", "apart * both", "variance of two parts"),
    ),
    *mutations(
        f"{CPU}/ffn.h",
        "test_ladder_ffn",
        ("+ (last ? 8 : 0)", "+ 0", "offsets from below the map"),
        ("last ? V{} : centre};", "centre};", "a border that is not zero"),
    ),
    *mutations(
        f"{CPU}/ffn_ops.cpp",
        "test_ladder_bad_input",
        ("if (training && pixels() < 2)", "if (training && pixels() < 1)", "one value in training"),
    ),
    *mutations(
        f"{CPU}/fusion.cpp",
        "test_pixel_adaptive_fusion",
        (
            "const V whole = v + load<V>(p.bp() + j) + load_wide(gated.at(i) + j);",
            "const V whole = v + load<V>(p.bp() + j);",
            "no shortcut",
        ),
    ),
    *mutations(
        f"{CPU}/fusion_backward.cpp",
        "test_pixel_adaptive_fusion",
        ("<= 0 ? V{} : v);", "<= 0 ? v : V{});", "the other side of relu"),
        (
            "store(direct + i * wide_pitch + j, grad_t * gate);",
            "store(direct + i * wide_pitch + j, grad_t);",
            "no gate in the gradient of x",
        ),
    ),
    *mutations(
        f"{CPU}/fusion.h",
        "test_pixel_adaptive_fusion",
        ("return x <= 0 ? V{} : x;", "return x;", "no relu"),
    ),
    *mutations(
        f"{CPU}/fusion_gradient.cpp",
        "test_pixel_adaptive_fusion",
        ("part[r] += part[r + apart];", "part[r] -= part[r + apart];", "sign in a sum of rows"),
    ),
    *mutations(
        f"{CPU}/fusion_ops.cpp",
        "test_pixel_adaptive_fusion",
        (
            "add_product(blocks, rows_grad, rows_gated, true, grad_wp, count);",
            "add_product(blocks, rows_grad_gate, rows_gated, true, grad_wp, count);",
            "another gradient of wp",
        ),
        ("x.stride(axis) == stride * count", "stride >= 0", "rows at other distances"),
    ),
    *mutations(
        f"{CPU}/ffn_backward.cpp",
        "test_ladder_ffn",
        (
            "return factor * (grad - mean - (input - centre) * product);",
            "return factor * (grad - mean);",
            "a batch norm without its variance's gradient",
        ),
        (
            "columns[2 - k % 3][2 - k / 3]",
            "columns[k % 3][k / 3]",
            "a convolution for its transpose",
        ),
    ),
    *mutations(
        f"{CPU}/ffn_gradients.cpp",
        "test_ladder_ffn",
        ("write(b.ln_b, sums(0, 1));", "write(b.ln_b, sums(0, 2));", "gradient of ln_w for ln_b"),
        ("products[c] *= inverse[c];", "", "bn_w's gradient of what is not normalised"),
    ),
    *mutations(
        f"{CPU}/ffn_backward_ops.cpp",
        "test_ladder_ffn",
        ("forward ? task : groups - 1 - task", "forward ? task : groups - 1", "one group again"),
    ),
    *mutations(
        f"{OPS}/windows.py",
        "test_window_attention",
        (
            "inner = range(shift % window, length, window)",
            "inner = range(-shift % window, length, window)",
            "the other direction",
        ),
        ("rows = row[:, None] - row[None]", "rows = row[None] - row[:, None]", "key minus query"),
    ),
    *mutations(
        f"{OPS}/window_attention.py",
        "test_window_attention",
        ("ctx.rest = (*rest, None)[:4]", "ctx.rest = (*rest[:3], None)", "another scale backward"),
    ),
    *mutations(
        f"{OPS}/ladder_attention.py",
        "test_ladder_attention",
        ("        out = out + n\n", "        out = out + x\n", "the shortcut before the norm"),
        (
            "asked = any(needs[:2]), any(needs[2:])",
            "asked = needs[0], any(needs[2:])",
            "no gradient to v alone",
        ),
    ),
    *mutations(
        f"{OPS}/ladder_attention_backward.py",
        "test_ladder_gradients",
        (
            "into @ weight if v is None else into @ weight + scaled",
            "into @ weight",
            "no gradient through the shortcut",
        ),
    ),
    *mutations(
        f"{OPS}/ladder_ffn.py",
        "test_ladder_ffn",
        (
            "normal * p.bn_w[index] + p.bn_b[index]",
            "normal * p.bn_w[index]",
            "no shift in the reference's norm",
        ),
    ),
    *mutations(
        f"{OPS}/ladder_ffn_backward.py",
        "test_ladder_ffn",
        (
            "shifted(padded_grad, 2 - row, 2 - column)",
            "shifted(padded_grad, row, column)",
            "a convolution for its transpose",
        ),
    ),
    *mutations(
        f"{OPS}/pixel_adaptive_fusion.py",
        "test_pixel_adaptive_fusion",
        (
            "torch.relu(_wide(x) @ _wide(w1).T + _wide(b1))",
            "(_wide(x) @ _wide(w1).T + _wide(b1))",
            "no relu in the reference",
        ),
    ),
    *mutations(
        f"{OPS}/ladder_block.py",
        "test_ladder_block",
        ("sign = (0, 1, -1)[i]", "sign = (0, 1, 1)[i]", "branch 2 shifted as branch 1"),
    ),
)
