"""Calls that must raise: for every operator what is wrong, and in which words it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from bad_ffn_input import BACKWARD, COMMON, FORWARD, INDICES, ONE_EXPERT
from torch import Tensor

T, E, K, H, L, N = 4, 8, 2, 5, 3, 6


@dataclasses.dataclass(frozen=True)
class BadCall:
    """One row: an operator, good arguments with some replaced, and what they must raise.

    `by_shape` is False where the error is in the values of an index tensor, so that a fake tensor
    cannot show it.
    """

    op: str
    changes: dict[str, Any]
    message: str
    error: type[Exception] = ValueError
    by_shape: bool = True

    def args(self) -> tuple[Any, ...]:
        good = dict(GOOD[self.op]())
        assert set(self.changes) <= set(good)
        return tuple({**good, **self.changes}.values())

    def __str__(self) -> str:
        return f"{self.op}: {self.message}"


def _slots(*values: int) -> Tensor:
    return torch.tensor(values or (6, 1, 3, 7, 0, -1, -1, -1), dtype=torch.int32)


def _offsets(*values: int) -> Tensor:
    return torch.tensor(values or (0, 2, 2, 7), dtype=torch.int32)


def _ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def _f(*shape: int) -> Tensor:
    return torch.ones(shape)


def _d(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def _ffn() -> dict[str, Any]:
    return {
        "x": _f(T, H), "slots": _slots(6, 1, 3, 7, 0, 4, -1, -1),
        "offsets": _offsets(0, 2, 2, 6), "weights": _f(T, K),
        "w_in": _f(L, N, H), "b_in": _f(L, N), "w_out": _f(L, H, N), "b_out": _f(L, H),
        "activation": "gelu",
    }  # fmt: skip


# Arguments that are right, in the order of the schema.
GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "route": lambda: {
        "logits": _f(T, E), "top_k": K, "score": "softmax", "renormalize": True,
        "selection_bias": None, "groups": 1, "top_groups": 1, "scale": 1.0,
    },
    "route_backward": lambda: {
        "grad_weights": _f(T, K), "weights": _f(T, K), "experts": _ids(T, K), "logits": _f(T, E),
        "num_experts": E, "dtype": torch.float32, "score": "sigmoid", "renormalize": True,
        "scale": 1.0,
    },
    "router_losses_forward": lambda: {"logits": _f(T, E), "experts": _ids(T, K)},
    "router_losses": lambda: {"logits": _f(T, E), "experts": _ids(T, K)},
    "router_losses_backward": lambda: {
        "grad_balance": _f(), "grad_z": _f(), "logits": _f(T, E), "shares": _f(E), "lse": _f(T),
    },
    "expert_index": lambda: {"experts": _ids(T, K), "first_expert": 0, "num_local": L},
    "slice_rows": lambda: {"x": _f(T, H), "slots": _slots(), "top_k": K},
    "slice_rows_backward": lambda: {"grad": _f(T * K, H), "slots": _slots(), "top_k": K},
    "merge_rows": lambda: {"rows": _f(T * K, H), "slots": _slots(), "weights": _f(T, K)},
    "merge_rows_backward": lambda: {
        "grad": _f(T, H), "rows": _f(T * K, H), "slots": _slots(), "weights": _f(T, K),
    },
    "grouped_linear": lambda: {
        "rows": _f(T * K, H), "offsets": _offsets(), "weight": _f(L, N, H), "bias": None,
    },
    "grouped_linear_backward": lambda: {
        "grad": _f(T * K, N), "rows": _f(T * K, H), "offsets": _offsets(), "weight": _f(L, N, H),
        "need_rows": True, "need_weight": True, "need_bias": True,
    },
    "expert_ffn": lambda: _ffn(),
    "expert_ffn_forward": lambda: {**_ffn(), "save": True},
    "expert_ffn_backward": lambda: {
        "grad": _f(T, H),
        **{key: each for key, each in _ffn().items() if key not in ("b_in", "activation")},
        "pre": _f(T * K, N), "activation": "gelu", "need_x": True, "need_weights": True,
        "need_w_in": True, "need_b_in": True, "need_w_out": True, "need_b_out": True,
    },
}  # fmt: skip

FLOATS = "allowed: float32, bfloat16, float16, float64"
HUGE = torch.zeros(1, 1, dtype=torch.int32).expand(2**16, 2**15)


def _both(forward: str, *rows: tuple[dict[str, Any], str]) -> list[BadCall]:
    """The same rows for a `_forward` operator and the composite over it."""
    return [BadCall(op, *row) for op in (f"{forward}_forward", forward) for row in rows]


def _named(op: str, *rows: tuple[dict[str, Any], str]) -> list[tuple[dict[str, Any], str]]:
    return [(changes, f"{op}: {words}" if " has " in words else words) for changes, words in rows]


def _beyond_one_expert(op: str) -> tuple[dict[str, Any], str, type[Exception]]:
    rest = {"pre": _f(T, N)} if op == "expert_ffn_backward" else {"b_in": _f(1, N)}
    message = "offsets holds 5; allowed: 0 to 4 (T * min(K, L))"
    return {**ONE_EXPERT, **rest}, message, IndexError


BAD_CALLS = [
    BadCall("route", {"logits": _f(E)}, "route: logits has 1 axes; expected 2: [T, E]"),
    BadCall("route", {"logits": _f(1, T, E)}, "route: logits has 3 axes; expected 2: [T, E]"),
    BadCall("route", {"logits": _ids(T, E)}, f"route: logits has dtype int32; {FLOATS}"),
    BadCall("route", {"score": "tanh"}, "route: score is 'tanh'; allowed: softmax, sigmoid"),
    BadCall("route", {"score": ""}, "route: score is ''; allowed: softmax, sigmoid"),
    BadCall("route", {"groups": 0}, "route: groups is 0; allowed: 1 to 8"),
    BadCall("route", {"groups": 3}, "route: groups is 3; allowed: divisors of E = 8"),
    BadCall("route", {"groups": 9}, "route: groups is 9; allowed: 1 to 8"),
    BadCall("route", {"top_groups": 2}, "route: top_groups is 2; allowed: 1 to 1"),
    BadCall("route", {"groups": 4, "top_groups": 0}, "top_groups is 0; allowed: 1 to 4"),
    BadCall("route", {"top_k": 0}, "route: top_k is 0; allowed: 1 to 8"),
    BadCall("route", {"top_k": -1}, "route: top_k is -1; allowed: 1 to 8"),
    BadCall("route", {"top_k": 9}, "route: top_k is 9; allowed: 1 to 8"),
    BadCall("route", {"top_k": 5, "groups": 4, "top_groups": 2}, "top_k is 5; allowed: 1 to 4"),
    BadCall("route", {"logits": _f(T, 0)}, "route: groups is 1; allowed: 1 to 0"),
    BadCall("route", {"selection_bias": _f(T, E)}, "selection_bias has 2 axes; expected 1: [E]"),
    BadCall("route", {"selection_bias": _ids(E)}, f"selection_bias has dtype int32; {FLOATS}"),
    BadCall("route", {"selection_bias": _f(T)}, "selection_bias has E = 4; expected 8"),
    BadCall("route_backward", {"score": "relu"}, "route_backward: score is 'relu'; allowed"),
    BadCall("route_backward", {"weights": _f(K)}, "weights has 1 axes; expected 2: [T, K]"),
    BadCall("route_backward", {"weights": _f(T, K).half()}, "weights has dtype float16; allowed"),
    BadCall("route_backward", {"experts": _ids(K)}, "experts has 1 axes; expected 2: [T, K]"),
    BadCall("route_backward", {"experts": _ids(T, K).long()}, "experts has dtype int64; allowed"),
    BadCall("route_backward", {"experts": _ids(T, 1)}, "experts has K = 1; expected 2"),
    BadCall("route_backward", {"grad_weights": _f(T)}, "grad_weights has 1 axes; expected 2"),
    BadCall("route_backward", {"grad_weights": _d(T, K)}, "grad_weights has dtype float64; allo"),
    BadCall("route_backward", {"grad_weights": _f(3, K)}, "grad_weights has T = 3; expected 4"),
    BadCall("route_backward", {"logits": None}, "logits is None; expected a tensor"),
    BadCall("route_backward", {"logits": _f(E)}, "logits has 1 axes; expected 2: [T, E]"),
    BadCall("route_backward", {"logits": _d(T, E)}, "logits has dtype float64; allowed: float32"),
    BadCall("route_backward", {"logits": _f(3, E)}, "logits has T = 3; expected 4"),
    BadCall("route_backward", {"num_experts": 9}, "logits has E = 8; expected 9"),
    BadCall("route_backward", {"num_experts": 0}, "num_experts is 0; allowed: 1 to 2147483647"),
    BadCall("route_backward", {"num_experts": -1}, "num_experts is -1; allowed: 1 to 2147483647"),
    BadCall("route_backward", {"score": "softmax", "dtype": torch.float64},
            "the result has dtype float64; allowed: float32, bfloat16, float16"),
    BadCall("route_backward", {"score": "softmax", "dtype": torch.int32},
            "the result has dtype int32; allowed: float32, bfloat16, float16"),
    BadCall("route_backward", {"grad_weights": _d(T, K), "weights": _d(T, K)},
            "the result has dtype float32; allowed: float64"),
    BadCall("route_backward", {"experts": _ids(T, K) + E}, "experts holds 8; allowed: 0 to 7",
            IndexError, by_shape=False),
    BadCall("route_backward", {"experts": _ids(T, K) - 1}, "experts holds -1; allowed: 0 to 7",
            IndexError, by_shape=False),
    *_both("router_losses",
        ({"logits": _f(E)}, "router_losses: logits has 1 axes; expected 2: [T, E]"),
        ({"logits": _ids(T, E)}, f"router_losses: logits has dtype int32; {FLOATS}"),
        ({"logits": _f(T, 0)}, "router_losses: E is 0; allowed: 1 to 2147483647"),
        ({"experts": _ids(T)}, "router_losses: experts has 1 axes; expected 2: [T, K]"),
        ({"experts": _f(T, K)}, "experts has dtype float32; allowed: int32, int64"),
        ({"experts": _ids(3, K)}, "router_losses: experts has T = 3; expected 4 (as logits)"),
    ),
    BadCall("router_losses_backward", {"logits": _f(E)}, "logits has 1 axes; expected 2"),
    BadCall("router_losses_backward", {"logits": _ids(T, E)}, f"logits has dtype int32; {FLOATS}"),
    BadCall("router_losses_backward", {"shares": _f(E, 1)}, "shares has 2 axes; expected 1: [E]"),
    BadCall("router_losses_backward", {"shares": _f(7)}, "shares has E = 7; expected 8"),
    BadCall("router_losses_backward", {"shares": _d(E)}, "shares has dtype float64; allowed: fl"),
    BadCall("router_losses_backward", {"lse": _f()}, "lse has 0 axes; expected 1: [T]"),
    BadCall("router_losses_backward", {"lse": _f(E)}, "lse has T = 8; expected 4"),
    BadCall("router_losses_backward", {"lse": _d(T)}, "lse has dtype float64; allowed: float32"),
    BadCall("router_losses_backward", {"grad_balance": _f(2)}, "grad_balance has elements = 2"),
    BadCall("router_losses_backward", {"grad_balance": _d()}, "grad_balance has dtype float64"),
    BadCall("router_losses_backward", {"grad_z": _f(0)}, "grad_z has elements = 0; expected 1"),
    BadCall("router_losses_backward", {"grad_z": _d()}, "grad_z has dtype float64; allowed"),
    BadCall("expert_index", {"experts": _ids(T)}, "experts has 1 axes; expected 2: [T, K]"),
    BadCall("expert_index", {"experts": _f(T, K)}, "experts has dtype float32; allowed: int32, i"),
    BadCall("expert_index", {"experts": _ids(T, K).short()}, "experts has dtype int16; allowed"),
    BadCall("expert_index", {"first_expert": -1}, "first_expert is -1; allowed: 0 to 2147483647"),
    BadCall("expert_index", {"first_expert": 2**31}, "first_expert is 2147483648; allowed: 0 to"),
    BadCall("expert_index", {"num_local": -1}, "num_local is -1; allowed: 0 to 2147483646"),
    BadCall("expert_index", {"num_local": 2**31}, "num_local is 2147483648; allowed: 0 to"),
    BadCall("expert_index", {"experts": HUGE}, "T*K is 2147483648; allowed: 0 to 2147483647"),
    BadCall("slice_rows", {"x": _f(H)}, "slice_rows: x has 1 axes; expected 2: [T, H]"),
    BadCall("slice_rows", {"x": _ids(T, H)}, f"slice_rows: x has dtype int32; {FLOATS}"),
    BadCall("slice_rows", {"top_k": 0}, "slice_rows: top_k is 0; allowed: 1 to 2147483647"),
    BadCall("slice_rows", {"top_k": 2**31}, "top_k is 2147483648; allowed: 1 to 2147483647"),
    BadCall("slice_rows", {"slots": _slots().view(T, K)}, "slots has 2 axes; expected 1: [T*K]"),
    BadCall("slice_rows", {"slots": _slots().long()}, "slots has dtype int64; allowed: int32"),
    BadCall("slice_rows", {"top_k": 3}, "slots has T*K = 8; expected 12 (T of x times top_k)"),
    BadCall("slice_rows", {"slots": _slots(8, *[-1] * 7)}, "slots holds 8; allowed: -1 to 7",
            IndexError, by_shape=False),
    BadCall("slice_rows", {"slots": _slots(0, -2, *[-1] * 6)}, "slots holds -2; allowed: -1 to 7",
            IndexError, by_shape=False),
    BadCall("slice_rows", {"slots": _slots(4, 2, 4, *[-1] * 5)}, "slots holds 4 twice; allowed: ea",
            by_shape=False),
    BadCall("slice_rows_backward", {"grad": _f(H)}, "grad has 1 axes; expected 2: [T*K, H]"),
    BadCall("slice_rows_backward", {"grad": _ids(8, H)}, f"grad has dtype int32; {FLOATS}"),
    BadCall("slice_rows_backward", {"top_k": 0}, "top_k is 0; allowed: 1 to 2147483647"),
    BadCall("slice_rows_backward", {"slots": _slots(1, 0)}, "slots has T*K = 2; expected 8"),
    BadCall("slice_rows_backward", {"top_k": 3}, "T*K = 8; expected a multiple of top_k = 3"),
    BadCall("slice_rows_backward", {"slots": _slots(*[-1] * 7, 9)}, "slots holds 9; allowed: -1 to",
            IndexError, by_shape=False),
    BadCall("slice_rows_backward", {"slots": _slots(*[-1] * 6, 3, 3)}, "slots holds 3 twice",
            by_shape=False),
    BadCall("merge_rows", {"rows": _f(8)}, "merge_rows: rows has 1 axes; expected 2: [T*K, H]"),
    BadCall("merge_rows", {"rows": _ids(8, H)}, f"merge_rows: rows has dtype int32; {FLOATS}"),
    BadCall("merge_rows", {"weights": _f(8)}, "weights has 1 axes; expected 2: [T, K]"),
    BadCall("merge_rows", {"weights": _d(T, K)}, "weights has dtype float64; allowed: float32"),
    BadCall("merge_rows", {"rows": _f(8, H).half(), "weights": _f(T, K).half()},
            "weights has dtype float16; allowed: float32 (for these rows)"),
    BadCall("merge_rows", {"rows": _d(8, H)}, "weights has dtype float32; allowed: float64"),
    BadCall("merge_rows", {"weights": _f(T, 3)}, "rows has T*K = 8; expected 12"),
    BadCall("merge_rows", {"slots": _slots().long()}, "slots has dtype int64; allowed: int32"),
    BadCall("merge_rows", {"slots": _slots(0, 1)}, "slots has T*K = 2; expected 8 (as rows)"),
    BadCall("merge_rows", {"slots": _slots(8, *[-1] * 7)}, "slots holds 8; allowed: -1 to 7",
            IndexError, by_shape=False),
    BadCall("merge_rows", {"slots": _slots(5, 2, 5, *[-1] * 5)}, "slots holds 5 twice",
            by_shape=False),
    BadCall("merge_rows_backward", {"grad": _f(H)}, "grad has 1 axes; expected 2: [T, H]"),
    BadCall("merge_rows_backward", {"grad": _d(T, H)}, "grad has dtype float64; allowed: float32"),
    BadCall("merge_rows_backward", {"grad": _f(3, H)}, "grad has T = 3; expected 4 (as weights)"),
    BadCall("merge_rows_backward", {"grad": _f(T, 4)}, "grad has H = 4; expected 5 (as rows)"),
    BadCall("merge_rows_backward", {"weights": _f(8)}, "weights has 1 axes; expected 2: [T, K]"),
    BadCall("merge_rows_backward", {"slots": _slots(-9, *[-1] * 7)}, "slots holds -9; allowed: -1",
            IndexError, by_shape=False),
    BadCall("merge_rows_backward", {"slots": _slots(1, 1, *[-1] * 6)}, "slots holds 1 twice",
            by_shape=False),
    BadCall("grouped_linear", {"rows": _f(H)}, "rows has 1 axes; expected 2: [R, K_in]"),
    BadCall("grouped_linear", {"rows": _ids(8, H)}, f"rows has dtype int32; {FLOATS}"),
    BadCall("grouped_linear", {"rows": _f(1, H).expand(2**31, H)}, "R is 2147483648; allowed: 0 "),
    BadCall("grouped_linear", {"weight": _f(N, H)}, "weight has 2 axes; expected 3: [L, N, K_in]"),
    BadCall("grouped_linear", {"weight": _d(L, N, H)}, "weight has dtype float64; allowed: float"),
    BadCall("grouped_linear", {"weight": _f(L, H, N)}, "weight has K_in = 6; expected 5 (as rows)"),
    BadCall("grouped_linear", {"offsets": _offsets().view(2, 2)}, "offsets has 2 axes; expected 1"),
    BadCall("grouped_linear", {"offsets": _offsets().long()}, "offsets has dtype int64; allowed"),
    BadCall("grouped_linear", {"offsets": _offsets(0, 8)}, "offsets has L+1 = 2; expected 4"),
    BadCall("grouped_linear", {"bias": _f(N)}, "bias has 1 axes; expected 2: [L, N]"),
    BadCall("grouped_linear", {"bias": _d(L, N)}, "bias has dtype float64; allowed: float32"),
    BadCall("grouped_linear", {"bias": _f(2, N)}, "bias has L = 2; expected 3 (as weight)"),
    BadCall("grouped_linear", {"bias": _f(L, H)}, "bias has N = 5; expected 6 (as weight)"),
    BadCall("grouped_linear", {"offsets": _offsets(0, 2, 3, 9)}, "offsets holds 9; allowed: 0 to 8",
            IndexError, by_shape=False),
    BadCall("grouped_linear", {"offsets": _offsets(-1, 2, 3, 8)}, "offsets holds -1; allowed: 0",
            IndexError, by_shape=False),
    BadCall("grouped_linear", {"offsets": _offsets(0, 5, 3, 8)}, "offsets holds 3 after 5; allowed",
            by_shape=False),
    BadCall("grouped_linear_backward", {"rows": _f(H)}, "rows has 1 axes; expected 2: [R, K_in]"),
    BadCall("grouped_linear_backward", {"grad": _f(N)}, "grad has 1 axes; expected 2: [R, N]"),
    BadCall("grouped_linear_backward", {"grad": _d(8, N)}, "grad has dtype float64; allowed: floa"),
    BadCall("grouped_linear_backward", {"grad": _f(7, N)}, "grad has R = 7; expected 8 (as rows)"),
    BadCall("grouped_linear_backward", {"grad": _f(8, H)}, "grad has N = 5; expected 6 (as weight"),
    BadCall("grouped_linear_backward", {"weight": _d(L, N, H)}, "weight has dtype float64; allowe"),
    BadCall("grouped_linear_backward", {"offsets": _offsets(0, 99, 99, 99)}, "offsets holds 99; al",
            IndexError, by_shape=False),
    BadCall("grouped_linear_backward", {"offsets": _offsets(4, 2, 2, 8)}, "offsets holds 2 after 4",
            by_shape=False),
    *_both("expert_ffn", *_named("expert_ffn", *FORWARD, *COMMON)),
    *(
        BadCall("expert_ffn_backward", *row)
        for row in _named("expert_ffn_backward", *COMMON, *BACKWARD)
    ),
    *(
        BadCall(op, changes, message, error, by_shape=False)
        for op in ("expert_ffn", "expert_ffn_forward", "expert_ffn_backward")
        for changes, message, error in (*INDICES, _beyond_one_expert(op))
    ),
]  # fmt: skip
