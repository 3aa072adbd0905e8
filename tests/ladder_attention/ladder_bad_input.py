"""Calls that must raise: for every operator of the family what is wrong, and in which words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

B, H, W, G, D = 2, 4, 3, 6, 5
ROWS = (2 * 3 - 1) * (2 * 2 - 1)


@dataclasses.dataclass(frozen=True)
class BadCall:
    """One row: an operator, good arguments with some replaced, and what they must raise."""

    op: str
    changes: dict[str, Any]
    message: str
    error: type[Exception] = ValueError

    def args(self) -> tuple[Any, ...]:
        good = dict(GOOD[self.op]())
        assert set(self.changes) <= set(good)
        return tuple({**good, **self.changes}.values())

    def __str__(self) -> str:
        return f"{self.op}: {self.message}"


def _f(*shape: int) -> Tensor:
    return torch.ones(shape)


def _d(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def _h(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def _i(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int32)


def _grid() -> dict[str, Any]:
    return {"num_heads": 2, "window": [3, 2], "shift": [1, -1]}


def _attention() -> dict[str, Any]:
    maps = {name: _f(B, H, W, G) for name in ("q", "k", "v")}
    return {**maps, "bias_table": _f(ROWS, 2), **_grid(), "scale": None}


def _branch() -> dict[str, Any]:
    return {
        "x": _f(B, H, W, G), "v": _f(B, H, W, G), "ln_w": _f(G), "ln_b": _f(G),
        "w_in": _f(2 * G, G), "b_in": _f(2 * G), "bias_table": _f(ROWS, 2), "w_out": _f(G, G),
        "b_out": _f(G), "row_scale": _f(B), **_grid(), "eps": 1e-5,
    }  # fmt: skip


def _feed() -> dict[str, Any]:
    return {
        "x": _f(B, H, W, G), "ln_w": _f(G), "ln_b": _f(G), "w1": _f(G, G), "b1": _f(G),
        "dw_w": _f(G, 3, 3), "dw_b": _f(G), "w2": _f(G, G), "b2": _f(G), "bn_w": _f(3, G),
        "bn_b": _f(3, G), "running_mean": _f(3, G), "running_var": _f(3, G), "row_scale": _f(B),
        "training": False, "eps": 1e-5,
    }  # fmt: skip


def _fusion() -> dict[str, Any]:
    return {
        "x": _f(B, H, W, G), "w1": _f(D, G), "b1": _f(D), "w2": _f(G, D), "b2": _f(G),
        "wp": _f(G, G), "bp": _f(G),
    }  # fmt: skip


def _block_params() -> list[Tensor]:
    params = []
    for parts in (3, 2, 2):
        params += [_f(G), _f(G), _f(parts * G, G), _f(parts * G), _f(ROWS, 2), _f(G, G), _f(G)]
        params += [_f(G), _f(G), _f(G, G), _f(G), _f(G, 3, 3), _f(G), _f(G, 3, 3), _f(G, G), _f(G)]
    c = 3 * G
    return [*params, _f(D, c), _f(D), _f(c, D), _f(c), _f(c, c), _f(c)]


def _without(args: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name not in names}


# Arguments that are right, in the order of the schema.
GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "window_attention": _attention,
    "window_attention_backward": lambda: {
        "grad": _f(B, H, W, G), **_attention(), "need_bias": True,
    },
    "ladder_attention": _branch,
    "ladder_attention_backward": lambda: {
        "grad": _f(B, H, W, G), **_without(_branch(), "b_out"), "need_maps": True,
        "need_parameters": True,
    },
    "ladder_ffn": _feed,
    "ladder_ffn_backward": lambda: {
        "grad": _f(B, H, W, G),
        **_without(_feed(), "running_mean", "running_var", "row_scale", "training", "eps"),
        "mean": _f(3, G), "var": _f(3, G), "row_scale": _f(B), "training": True, "eps": 1e-5,
    },
    "pixel_adaptive_fusion": _fusion,
    "pixel_adaptive_fusion_backward": lambda: {
        "grad": _f(B, H, W, G), **_without(_fusion(), "bp"),
    },
    "ladder_block": lambda: {"x": _f(B, H, W, 3 * G), "params": _block_params(), **_grid()},
}  # fmt: skip

FLOATS = "allowed: float32, bfloat16, float16, float64"
WIDE = "that of the map, or what it is summed in"
WINDOW_BACKWARD = "window_attention_backward"
Rows = list[tuple[dict[str, Any], str]]


def _window_rows(channels: int) -> Rows:
    """Heads, windows and shifts, where C or g is `channels`."""
    most = 2**15 - 1
    heads = f"divisors of C = {channels}"
    return [
        ({"num_heads": 4}, f"num_heads is 4; allowed: {heads}"),
        ({"num_heads": 0}, f"num_heads is 0; allowed: {heads}"),
        ({"num_heads": -2}, f"num_heads is -2; allowed: {heads}"),
        ({"num_heads": 2**40}, f"num_heads is {2**40}; allowed: {heads}"),
        ({"window": [3]}, "window has 1 numbers; expected 2: [rows, columns]"),
        ({"window": [3, 2, 1]}, "window has 3 numbers; expected 2: [rows, columns]"),
        ({"window": []}, "window has 0 numbers; expected 2: [rows, columns]"),
        ({"shift": [1]}, "shift has 1 numbers; expected 2: [rows, columns]"),
        ({"window": [0, 2]}, f"window (rows) is 0; allowed: 1 to {most}"),
        ({"window": [3, 0]}, f"window (columns) is 0; allowed: 1 to {most}"),
        ({"window": [-7, 2]}, f"window (rows) is -7; allowed: 1 to {most}"),
        ({"window": [3, 2**15]}, f"window (columns) is 32768; allowed: 1 to {most}"),
        ({"window": [2**62, 2]}, f"window (rows) is {2**62}; allowed: 1 to {most}"),
        ({"shift": [3, 0]}, "shift (rows) is 3; allowed: -2 to 2 (smaller than the window)"),
        ({"shift": [-3, 0]}, "shift (rows) is -3; allowed: -2 to 2 (smaller than the window)"),
        ({"shift": [0, 2]}, "shift (columns) is 2; allowed: -1 to 1 (smaller than the window)"),
        ({"shift": [0, -2]}, "shift (columns) is -2; allowed: -1 to 1 (smaller than the window)"),
        ({"shift": [0, -(2**63)]}, f"shift (columns) is {-(2**63)}; allowed: -1 to 1 (smaller"),
    ]


def _table_rows() -> Rows:
    size = "(2 * window rows - 1) * (2 * window columns - 1)"
    return [
        ({"bias_table": _f(ROWS)}, "bias_table has 1 axes; expected 2: [R, heads]"),
        ({"bias_table": _d(ROWS, 2)}, f"bias_table has dtype float64; allowed: float32 ({WIDE})"),
        ({"bias_table": _h(ROWS, 2)}, f"bias_table has dtype bfloat16; allowed: float32 ({WIDE})"),
        ({"bias_table": _f(16, 2)}, f"bias_table has R = 16; expected 15 ({size})"),
        ({"bias_table": _f(0, 2)}, f"bias_table has R = 0; expected 15 ({size})"),
        ({"bias_table": _f(ROWS, 1)}, "bias_table has heads = 1; expected 2 (num_heads)"),
        ({"window": [2, 2]}, f"bias_table has R = 15; expected 9 ({size})"),
        ({"num_heads": 3}, "bias_table has heads = 2; expected 3 (num_heads)"),
    ]


def _map_rows(name: str, like: str) -> Rows:
    return [
        ({name: _f(H, W, G)}, f"{name} has 3 axes; expected 4: [B, H, W, C]"),
        ({name: _d(B, H, W, G)}, f"{name} has dtype float64; allowed: float32 (as {like})"),
        ({name: _f(1, H, W, G)}, f"{name} has B = 1; expected 2 (as {like})"),
        ({name: _f(B, W, W, G)}, f"{name} has H = 3; expected 4 (as {like})"),
        ({name: _f(B, H, H, G)}, f"{name} has W = 4; expected 3 (as {like})"),
        ({name: _f(B, H, W, 4)}, f"{name} has C = 4; expected 6 (as {like})"),
    ]


def _attention_rows() -> Rows:
    return [
        ({"q": _f(B, H, G)}, "q has 3 axes; expected 4: [B, H, W, C]"),
        ({"q": _i(B, H, W, G)}, f"q has dtype int32; {FLOATS}"),
        ({"q": _f(B, H, W, G).cfloat()}, f"q has dtype complex64; {FLOATS}"),
        *_map_rows("k", "q"), *_map_rows("v", "q"), *_window_rows(G), *_table_rows(),
    ]  # fmt: skip


def _vector_rows(names: dict[str, tuple[str, int, str]], wide: tuple[str, ...]) -> Rows:
    """For each name its axis, size and reason."""
    rows: Rows = []
    for name, (axis, size, why) in names.items():
        words = f"float32 ({WIDE})" if name in wide else "float32 (as x)"
        rows += [
            ({name: _f(size, 1)}, f"{name} has 2 axes; expected 1: [{axis}]"),
            ({name: _d(size)}, f"{name} has dtype float64; allowed: {words}"),
            ({name: _f(size + 1)}, f"{name} has {axis} = {size + 1}; expected {size} ({why})"),
        ]
    return rows


def _branch_rows() -> Rows:
    vectors = {"ln_w": ("g", G, "as x"), "ln_b": ("g", G, "as x"), "b_in": ("O", 12, "2g with v"),
               "row_scale": ("B", B, "as x")}  # fmt: skip
    return [
        ({"x": _f(B, H, G)}, "x has 3 axes; expected 4: [B, H, W, g]"),
        ({"x": _i(B, H, W, G)}, f"x has dtype int32; {FLOATS}"),
        *_map_rows("v", "x"),
        *_vector_rows(vectors, ("ln_w", "ln_b", "row_scale")),
        ({"w_in": _f(G)}, "w_in has 1 axes; expected 2: [O, g]"),
        ({"w_in": _d(12, G)}, "w_in has dtype float64; allowed: float32 (as x)"),
        ({"w_in": _f(18, G)}, "w_in has O = 18; expected 12 (2g with v; g as x)"),
        ({"w_in": _f(12, 5)}, "w_in has g = 5; expected 6 (2g with v; g as x)"),
        ({"v": None}, "w_in has O = 12; expected 18 (3g without v; g as x)"),
        ({"v": None, "w_in": _f(18, G)}, "b_in has O = 12; expected 18 (3g without v)"),
        ({"w_out": _f(G)}, "w_out has 1 axes; expected 2: [O, g]"),
        ({"w_out": _f(5, G)}, "w_out has O = 5; expected 6 (g of x)"),
        ({"w_out": _f(G, 5)}, "w_out has g = 5; expected 6 (g of x)"),
        ({"w_out": _h(G, G)}, "w_out has dtype bfloat16; allowed: float32 (as x)"),
        *_window_rows(G), *_table_rows(),
    ]  # fmt: skip


def _feed_rows() -> Rows:
    rows: Rows = [
        ({"x": _f(B, H, G)}, "x has 3 axes; expected 4: [B, H, W, g]"),
        ({"x": _i(B, H, W, G)}, f"x has dtype int32; {FLOATS}"),
    ]
    axes = {"ln_w": "g", "ln_b": "g", "w1": "g, g", "b1": "g", "dw_w": "g, 3, 3", "dw_b": "g",
            "w2": "g, g", "b2": "g", "bn_w": "3, g", "bn_b": "3, g"}  # fmt: skip
    for name, letters in axes.items():
        sizes = [G if each == "g" else int(each) for each in letters.split(", ")]
        count = len(sizes)
        rows += [
            ({name: _f(*sizes, 1)}, f"{name} has {count + 1} axes; expected {count}: [{letters}]"),
            ({name: _d(*sizes)}, f"{name} has dtype float64; allowed: float32 (for this x)"),
            ({name: _i(*sizes)}, f"{name} has dtype int32; allowed: float32 (for this x)"),
        ]
        for at, letter in enumerate(letters.split(", ")):
            wrong = [size + (axis == at) for axis, size in enumerate(sizes)]
            why = "as x" if letter == "g" else f"[{letters}]"
            words = f"{name} has axis {at} = {wrong[at]}; expected {sizes[at]} ({why})"
            rows.append(({name: _f(*wrong)}, words))
    return [
        *rows,
        ({"row_scale": _f(B, 1)}, "row_scale has 2 axes; expected 1: [B]"),
        ({"row_scale": _d(B)}, "row_scale has dtype float64; allowed: float32 (for this x)"),
        ({"row_scale": _f(3)}, "row_scale has B = 3; expected 2 (as x)"),
        ({"x": _f(1, 1, 1, G), "training": True, "row_scale": None},
         "x has B * H * W = 1; allowed in training: 2 or more"),
        ({"x": _f(0, H, W, G), "training": True, "row_scale": None},
         "x has B * H * W = 0; allowed in training: 2 or more"),
    ]  # fmt: skip


def _fusion_rows() -> Rows:
    rows: Rows = [
        ({"x": _f(G)}, "x has 1 axes; expected 2 or more: [..., C]"),
        ({"x": torch.ones(())}, "x has 0 axes; expected 2 or more: [..., C]"),
        ({"x": _i(B, G)}, f"x has dtype int32; {FLOATS}"),
    ]
    shapes = {"w1": "D, C", "b1": "D", "w2": "C, D", "b2": "C", "wp": "C, C"}
    for name, letters in shapes.items():
        sizes = [{"C": G, "D": D}[each] for each in letters.split(", ")]
        count = len(sizes)
        rows += [
            ({name: _f(*sizes, 1)}, f"{name} has {count + 1} axes; expected {count}: [{letters}]"),
            ({name: _d(*sizes)}, f"{name} has dtype float64; allowed: float32 (as x)"),
        ]
        for at, letter in enumerate(letters.split(", ")):
            if name == "w1" and letter == "D":
                continue  # which is what D is
            wrong = [size + (axis == at) for axis, size in enumerate(sizes)]
            why = "as x" if letter == "C" else "as w1"
            words = f"{name} has {letter} = {wrong[at]}; expected {sizes[at]} ({why})"
            rows.append(({name: _f(*wrong)}, words))
    return rows


def _block(changes: dict[int, Tensor]) -> dict[str, Any]:
    return {"params": [changes.get(at, each) for at, each in enumerate(_block_params())]}


def _block_rows() -> Rows:
    parts = "(three times 16 of a branch, 6 of the fusion)"
    return [
        ({"x": _f(B, H, G)}, "x has 3 axes; expected 4: [B, H, W, C]"),
        ({"x": _i(B, H, W, 18)}, f"x has dtype int32; {FLOATS}"),
        ({"x": _f(B, H, W, 20)}, "x has C = 20; expected a multiple of 3 (three branches)"),
        *((changes, words.replace("C = 18", "C = 6")) for changes, words in _window_rows(G)),
        ({"params": []}, f"params has 0 tensors; expected 54 {parts}"),
        ({"params": _block_params()[:-1]}, f"params has 53 tensors; expected 54 {parts}"),
        ({"params": [*_block_params(), _f(1)]}, f"params has 55 tensors; expected 54 {parts}"),
        (_block({0: _f(5)}), "params[0] (branch 0 ln1_w) has shape [5]; expected [6]"),
        (_block({17: _d(G)}), "params[17] (branch 1 ln1_b) has dtype float64; allowed: float32"),
        (_block({2: _f(12, G)}), "params[2] (branch 0 w_in) has shape [12, 6]; expected [18, 6]"),
        (_block({18: _f(18, G)}), "params[18] (branch 1 w_in) has shape [18, 6]; expected [12, 6]"),
        (
            _block({36: _f(ROWS)}),
            "params[36] (branch 2 bias_table) has shape [15]; expected [15, 2]",
        ),
        (_block({4: _f(16, 2)}), "params[4] (branch 0 bias_table) has shape [16, 2]; expected [15"),
        (_block({11: _f(G, 9)}), "params[11] (branch 0 dw_w) has shape [6, 9]; expected [6, 3, 3]"),
        (_block({29: _f(G)}), "params[29] (branch 1 dw_off) has shape [6]; expected [6, 3, 3]"),
        (_block({46: _h(G, G)}), "params[46] (branch 2 f2_w) has dtype bfloat16; allowed: float32"),
        (_block({48: _f(D, G)}), "params[48] (fusion w1) has shape [5, 6]; expected [5, 18]"),
        (_block({48: _f(D)}), "params[48] (fusion w1) has shape [5]; expected [0, 18]"),
        (_block({49: _f(4)}), "params[49] (fusion b1) has shape [4]; expected [5]"),
        (_block({50: _f(D, 18)}), "params[50] (fusion w2) has shape [5, 18]; expected [18, 5]"),
        (_block({53: _f(1, 18)}), "params[53] (fusion bp) has shape [1, 18]; expected [18]"),
        (_block({53: _i(18)}), "params[53] (fusion bp) has dtype int32; allowed: float32 (as x)"),
    ]  # fmt: skip


def _calls(rows: Rows, *ops: str) -> list[BadCall]:
    return [BadCall(op, changes, f"{op}: {words}") for op in ops for changes, words in rows]


_STATISTICS: Rows = [
    ({"running_mean": None}, "running_mean is None; allowed only with training"),
    ({"running_var": None}, "running_var is None; allowed only with training"),
    ({"running_mean": _f(3)}, "running_mean has 1 axes; expected 2: [3, g]"),
    ({"running_var": _d(3, G)}, "running_var has dtype float64; allowed: float32 (for this x)"),
    ({"running_var": _f(3, 5)}, "running_var has axis 1 = 5; expected 6 (as x)"),
    ({"running_mean": _f(2, G)}, "running_mean has axis 0 = 2; expected 3 ([3, g])"),
]
_OWN_STATISTICS: Rows = [
    ({"mean": _f(3)}, "mean has 1 axes; expected 2: [3, g]"),
    ({"mean": _h(3, G)}, "mean has dtype bfloat16; allowed: float32 (for this x)"),
    ({"var": _f(3, 5)}, "var has axis 1 = 5; expected 6 (as x)"),
]
_GRAD: Rows = [
    ({"grad": _d(B, H, W, G)}, "grad has dtype float64; allowed: float32 (as x)"),
    ({"grad": _f(H, W, G)}, "grad has shape [4, 3, 6]; expected [2, 4, 3, 6] (as x)"),
    ({"grad": _f(B, W, H, G)}, "grad has shape [2, 3, 4, 6]; expected [2, 4, 3, 6] (as x)"),
]
_LAST = {"b_out": ("g", G, "as x")}

BAD_CALLS = [
    *_calls(_attention_rows(), "window_attention", "window_attention_backward"),
    *_calls(_map_rows("grad", "q"), "window_attention_backward"),
    *_calls(_branch_rows(), "ladder_attention", "ladder_attention_backward"),
    *_calls(_vector_rows(_LAST, ()), "ladder_attention"),
    *_calls(_map_rows("grad", "x"), "ladder_attention_backward"),
    *_calls(_feed_rows(), "ladder_ffn", "ladder_ffn_backward"),
    *_calls(_STATISTICS, "ladder_ffn"),
    *_calls(_OWN_STATISTICS, "ladder_ffn_backward"),
    *_calls(
        [
            (changes, words.replace("C]", "g]").replace("has C =", "has g ="))
            for changes, words in _map_rows("grad", "x")
        ],
        "ladder_ffn_backward",
    ),
    *_calls(_fusion_rows(), "pixel_adaptive_fusion", "pixel_adaptive_fusion_backward"),
    *_calls([({"bp": _f(G, 1)}, "bp has 2 axes; expected 1: [C]"),
             ({"bp": _d(G)}, "bp has dtype float64; allowed: float32 (as x)"),
             ({"bp": _f(5)}, "bp has C = 5; expected 6 (as x)")], "pixel_adaptive_fusion"),
    *_calls(_GRAD, "pixel_adaptive_fusion_backward"),
    *_calls(_block_rows(), "ladder_block"),
]  # fmt: skip
