"""Calls of `expert_ffn` that must raise; `bad_input.py` has the rest and the meaning of a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = "allowed: gelu, gelu_tanh, relu, silu, swiglu, geglu"
FLOATS = "allowed: float32, bfloat16, float16, float64"
BOUNDS = "allowed: 0 to 8 (T * min(K, L))"


def _f(*shape: int) -> Tensor:
    return torch.ones(shape)


def _d(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def _i(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _gated(**changes: Tensor) -> dict[str, Any]:
    return {"activation": "swiglu", **changes}


# T, K, H, L, F are 4, 2, 5, 3, 6. Changes, and the message; of forward and composite.
FORWARD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"activation": "tanh"}, f"activation is 'tanh'; {ACTIVATIONS}"),
    ({"activation": ""}, f"activation is ''; {ACTIVATIONS}"),
    ({"activation": "GELU"}, f"activation is 'GELU'; {ACTIVATIONS}"),
    ({"activation": "gelu_tanh_and_a_name_longer_than_a_short_string"}, ACTIVATIONS),
    ({"b_in": _f(6)}, "b_in has 1 axes; expected 2: [L, F]"),
    ({"b_in": _d(3, 6)}, "b_in has dtype float64; allowed: float32 (as x)"),
    ({"b_in": _f(2, 6)}, "b_in has L = 2; expected 3 (as w_in)"),
    ({"b_in": _f(3, 5)}, "b_in has F = 5; expected 6 (as w_in)"),
    (_gated(w_in=_f(3, 12, 5), b_in=_f(12)), "b_in has 1 axes; expected 2: [L, 2F]"),
    (_gated(w_in=_f(3, 12, 5), b_in=_f(3, 6)), "b_in has 2F = 6; expected 12 (as w_in)"),
)
# Of all three operators.
COMMON: tuple[tuple[dict[str, Any], str], ...] = (
    ({"x": _f(5)}, "x has 1 axes; expected 2: [T, H]"),
    ({"x": _f(1, 4, 5)}, "x has 3 axes; expected 2: [T, H]"),
    ({"x": torch.ones(4, 5).int()}, f"x has dtype int32; {FLOATS}"),
    ({"weights": _f(8)}, "weights has 1 axes; expected 2: [T, K]"),
    ({"weights": _d(4, 2)}, "weights has dtype float64; allowed: float32 (for this x)"),
    ({"weights": _f(4, 2).half()}, "weights has dtype float16; allowed: float32 (for this x)"),
    ({"x": _d(4, 5)}, "weights has dtype float32; allowed: float64 (for this x)"),
    ({"weights": _f(3, 2)}, "weights has T = 3; expected 4 (as x)"),
    (
        {"x": _f(1, 5).expand(2**16, 5), "weights": _f(1, 1).expand(2**16, 2**15)},
        "T*K is 2147483648; allowed: 0 to 2147483647 (slots are int32)",
    ),
    ({"slots": _i(*range(8)).view(4, 2)}, "slots has 2 axes; expected 1: [T*K]"),
    ({"slots": _i(*range(8)).long()}, "slots has dtype int64; allowed: int32"),
    ({"slots": _i(0, 1)}, "slots has T*K = 2; expected 8 (T times K of weights)"),
    ({"w_out": _f(5, 6)}, "w_out has 2 axes; expected 3: [L, H, F]"),
    ({"w_out": _d(3, 5, 6)}, "w_out has dtype float64; allowed: float32 (as x)"),
    ({"w_out": _f(3, 6, 5)}, "w_out has H = 6; expected 5 (as x)"),
    ({"w_in": _f(6, 5)}, "w_in has 2 axes; expected 3: [L, F, H]"),
    ({"w_in": _f(3, 6, 5).bfloat16()}, "w_in has dtype bfloat16; allowed: float32 (as x)"),
    ({"w_in": _f(2, 6, 5)}, "w_in has L = 2; expected 3 (as w_out)"),
    ({"w_in": _f(3, 7, 5)}, "w_in has F = 7; expected 6 (as w_out)"),
    (_gated(w_in=_f(3, 6, 5)), "w_in has 2F = 6; expected 12 (swiglu, as w_out)"),
    (_gated(w_in=_f(3, 13, 5)), "w_in has 2F = 13; expected 12 (swiglu, as w_out)"),
    ({"activation": "geglu"}, "w_in has 2F = 6; expected 12 (geglu, as w_out)"),
    ({"w_in": _f(3, 6, 4)}, "w_in has H = 4; expected 5 (as x)"),
    ({"b_out": _f(5)}, "b_out has 1 axes; expected 2: [L, H]"),
    ({"b_out": _d(3, 5)}, "b_out has dtype float64; allowed: float32 (as x)"),
    ({"b_out": _f(2, 5)}, "b_out has L = 2; expected 3 (as w_out)"),
    ({"b_out": _f(3, 6)}, "b_out has H = 6; expected 5 (as x)"),
    ({"offsets": _i(0, 2, 2, 7).view(2, 2)}, "offsets has 2 axes; expected 1: [L+1]"),
    ({"offsets": _i(0, 2, 2, 7).long()}, "offsets has dtype int64; allowed: int32"),
    ({"offsets": _i(0, 7)}, "offsets has L+1 = 2; expected 4 (L of w_out plus 1)"),
)
# Of all three operators, where the values are wrong: seen by kernel and reference alone.
INDICES: tuple[tuple[dict[str, Any], str, type[Exception]], ...] = (
    ({"offsets": _i(0, 2, 2, 9)}, f"offsets holds 9; {BOUNDS}", IndexError),
    ({"offsets": _i(-1, 2, 2, 7)}, f"offsets holds -1; {BOUNDS}", IndexError),
    ({"offsets": _i(0, 2**31 - 1, 2, 7)}, f"offsets holds 2147483647; {BOUNDS}", IndexError),
    ({"offsets": _i(0, 5, 3, 8)}, "offsets holds 3 after 5; allowed: values that do not",
     ValueError),
    ({"offsets": _i(7, 2, 2, 1)}, "offsets holds 2 after 7; allowed: values that do not",
     ValueError),
    ({"slots": _i(0, 1, 8, 2, 3, 4, 5, -1)}, "slots holds 8; allowed: 0 to 7", IndexError),
    ({"slots": _i(-1, 1, 2, 3, 4, 5, 6, -1)}, "slots holds -1; allowed: 0 to 7", IndexError),
    ({"slots": _i(0, 1, 2, 3, 4, -(2**31), 6, 7)}, "slots holds -2147483648; allowed: 0 to 7",
     IndexError),
    ({"slots": _i(0, 1, 2, 1, 3, 4, 5, -1)}, "slots holds 1 twice; allowed: each slot once",
     ValueError),
    ({"slots": _i(6, 6, 2, 1, 3, 4, 5, -1)}, "slots holds 6 twice; allowed: each slot once",
     ValueError),
    # Both kinds: the range is looked at first.
    ({"slots": _i(6, 6, 2, 9, 3, 4, 5, -1)}, "slots holds 9; allowed: 0 to 7", IndexError),
)  # fmt: skip
BACKWARD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"activation": "swish"}, f"activation is 'swish'; {ACTIVATIONS}"),
    ({"grad": _f(5)}, "grad has 1 axes; expected 2: [T, H]"),
    ({"grad": _d(4, 5)}, "grad has dtype float64; allowed: float32 (as x)"),
    ({"grad": _f(3, 5)}, "grad has T = 3; expected 4 (as x)"),
    ({"grad": _f(4, 6)}, "grad has H = 6; expected 5 (as x)"),
    ({"pre": _f(6)}, "pre has 1 axes; expected 2: [R, F]"),
    ({"pre": _d(8, 6)}, "pre has dtype float64; allowed: float32 (as x)"),
    ({"pre": _f(0, 6)}, "pre has R = 0; expected 8 (T * min(K, L))"),
    ({"pre": _f(7, 6)}, "pre has R = 7; expected 8 (T * min(K, L))"),
    ({"pre": _f(8, 5)}, "pre has F = 5; expected 6 (as w_in)"),
    (_gated(w_in=_f(3, 12, 5)), "pre has F = 6; expected 12 (as w_in)"),
)
# T * min(K, L) with a single local expert: as many slots as that cannot differ in their token.
ONE_EXPERT: dict[str, Any] = {
    "w_in": _f(1, 6, 5), "w_out": _f(1, 5, 6), "b_out": _f(1, 5), "offsets": _i(0, 5),
}  # fmt: skip
