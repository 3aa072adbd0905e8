"""The tables that a device run prints; needs nothing but the standard library.

What matters most comes last: the end of a long output is what a reader still has on the screen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
NONE = "-"
NOT_RUN = "not run"


def rate(value: float, unit: float) -> str:
    """`value` in units of `unit`, in two digits or whole."""
    if not value:
        return NONE
    return f"{value / unit:.0f}" if value >= 10 * unit else f"{value / unit:.2g}"


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)] if lines else []
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _took(row: Row) -> float:
    median: float = row["seconds"]["median"]
    return median


def _times(other: float | None, took: float) -> str:
    return f"{other / took:.2f}" if other else NONE


def _memory(row: Row) -> str:
    """Peak beyond the inputs, and what it may be where something was said of that."""
    if row.get("peak") is None:
        return NONE
    text = f"{row['peak'] / (1 << 20):.0f}"
    if row.get("bound"):
        text += f" of {row['bound'] / (1 << 20):.0f}"
    if row.get("reserve"):
        text += f" + {row['reserve'] / (1 << 20):.0f}"
    return text


def _bits(row: Row) -> str:
    return {True: "same", False: "DIFFER", None: NONE}[row.get("same_bits")]


def _waits(row: Row) -> str:
    return NONE if row.get("waits") is None else str(row["waits"])


ROW_HEAD = ["operator", "shape", "by", "us", "TFLOP/s", "GB/s", "of bound", "predicted us",
            "dense", "copy", "waits", "bits", "peak MiB", "inputs", "timed by"]  # fmt: skip


def row_cells(row: Row) -> list[str]:
    """One row of the operators' own."""
    start = [row["operator"], row["label"], row["by"]]
    if not row.get("seconds"):
        return [*start, "refused", row["refused"][:70], *[""] * (len(ROW_HEAD) - 5)]
    took = _took(row)
    share = row.get("bound_seconds")
    predicted = row.get("predicted")
    return [
        *start,
        f"{1e6 * took:.1f}",
        rate(row["flops"] / took, 1e12),
        rate(row["nbytes"] / took, 1e9),
        f"{100 * share / took:.0f}%" if share else NONE,
        f"{1e6 * predicted:.1f}" if predicted else NONE,
        _times(row.get("dense"), took),
        _times(row.get("copy"), took),
        _waits(row),
        _bits(row),
        _memory(row),
        row["inputs"],
        row["how"],
    ]


PEER_HEAD = ["shape", "baseline", "us", "TFLOP/s", "time relative to ours", "waits", "bits",
             "peak MiB", "timed by"]  # fmt: skip


def peer_cells(row: Row, ours: Row | None) -> list[str]:
    """One row of a baseline, beside the operator's own of the same case."""
    start = [row["label"], row["by"]]
    took = _took(row)
    ratio = f"{took / _took(ours):.2f}" if ours and ours.get("seconds") else NONE
    return [*start, f"{1e6 * took:.1f}", rate(row["flops"] / took, 1e12), ratio, _waits(row),
            _bits(row), _memory(row), row["how"]]  # fmt: skip


TARGET_HEAD = ["operator", "shape", "target", "measured", "must", "aim", "verdict"]


def target_cells(rows: Iterable[Row]) -> list[list[str]]:
    """What rows are held to, and whether they hold; peak memory of those that have a bound."""
    lines = []
    for row in rows:
        start = [row["operator"], row["label"]]
        if row.get("held"):
            lines.append([*start, *row["held"]])
        if row.get("bound") and row.get("peak") is not None:
            touched, bound = row["peak"] - row["reserve"], row["bound"]
            sizes = [f"{each / (1 << 20):.0f} MiB" for each in (touched, bound, bound)]
            verdict = "aim" if touched <= bound else "missed"
            lines.append([*start, "peak memory", *sizes, verdict])
    return lines


def family(rows: Sequence[Row]) -> list[str]:
    """Everything about the rows of expert slicing, the layer and the targets last."""
    own = [row for row in rows if not row.get("peer") and not row.get("tuned")]
    tuned = [row for row in rows if row.get("tuned")]
    theirs = [row for row in rows if row.get("peer")]
    by_key = {row["key"]: row for row in own}
    others = [row for row in own if row["operator"] != "expert_ffn"]
    layer = [row for row in own if row["operator"] == "expert_ffn"]
    lines: list[str] = []

    def section(title: str, head: list[str], cells: list[list[str]]) -> None:
        if cells:
            lines.extend(["", title, *columns([head, *cells])])

    section("operators", ROW_HEAD, [row_cells(row) for row in others])
    section("the layer, from ids on", ROW_HEAD, [row_cells(row) for row in layer])
    section("the layer after tuning", ROW_HEAD, [row_cells(row) for row in tuned])
    left_out: dict[tuple[str, str], int] = {}
    for row in theirs:
        if not row.get("seconds"):
            why = row["by"], row["refused"]
            left_out[why] = left_out.get(why, 0) + 1
    ran = [peer_cells(row, by_key.get(row["key"])) for row in theirs if row.get("seconds")]
    section("baselines of the layer", PEER_HEAD, ran)
    for (name, reason), count in left_out.items():
        lines.append(f"left out: {name}, {count} case{'s' * (count > 1)}: {reason}")
    section("targets", TARGET_HEAD, target_cells(own))
    return lines


def problems(rows: Iterable[Row]) -> list[str]:
    """Own rows that are wrong: refused, of other bits from call to call, or waited for."""
    found = []
    for row in rows:
        name = f"{row['operator']}, {row['label']}"
        if row.get("peer"):
            continue
        if row["refused"] and not row["refused"].startswith(NOT_RUN):
            found.append(f"{name}: {row['refused']}")
        if row.get("same_bits") is False:
            found.append(f"{name}: its bits differ from call to call")
        if row.get("waits"):
            found.append(f"{name}: host synchronisations in a call: {row['waits']}")
        elif row.get("how", "").startswith("events"):
            found.append(f"{name}: {row['how']}")
    return found


OTHER_HEAD = ["operator", "shape", "by", "us", "GB/s", "TFLOP/s", "ceiling", "dense",
              "times faster than the best composition"]  # fmt: skip


def other_cells(row: Row) -> list[str]:
    """A row of another family, as `harness.py` measures it."""
    start = [row["operator"], row["label"], row["backend"]]
    if not row.get("seconds"):
        return [*start, "refused", row["refused"][:60], *[""] * (len(OTHER_HEAD) - 5)]
    share = row.get("ceiling_share")
    plain = {name: each["median"] for name, each in row["speedups"].items()}
    dense = [value for name, value in plain.items() if "dense" in name]
    rivals = {name: value for name, value in plain.items() if "dense" not in name}
    nearest = min(rivals, key=lambda name: rivals[name]) if rivals else ""
    return [
        *start,
        f"{1e6 * _took(row):.1f}",
        rate(row["byte_rate"], 1e9),
        rate(row["flop_rate"], 1e12),
        f"{100 * share:.0f}% {row['ceiling']}" if share else NONE,
        f"{dense[0]:.2f}" if dense else NONE,
        f"{rivals[nearest]:.2f} {nearest}" if nearest else NONE,
    ]


def whole(known: dict[str, Any]) -> str:
    """Steps, ceilings, call costs, rows; `known` is what device.json has."""
    lines = ["", "=" * 40 + " device " + "=" * 40]
    lines += [f"{name}: {value}" for name, value in known["facts"].items()]
    ceilings = known["ceilings"]
    if ceilings:
        copies = max(ceilings["copies"], key=lambda each: each["nbytes"])
        lines.append(f"copy from memory: {rate(copies['bytes_per_second'], 1e9)} GB/s")
        for name, value in ceilings["gemm"].items():
            lines.append(f"dense GEMM {name}: {rate(value, 1e12)} TFLOP/s")
    for name, value in known["calls"].items():
        lines.append(f"host time of a call, {name}: {value * 1e6:.1f} us")
    if known["unserved"]:
        reasons: dict[str, list[str]] = {}
        for name, why in known["unserved"].items():
            reasons.setdefault(why, []).append(name)
        lines += [f"no kernel ({why}): {', '.join(names)}" for why, names in reasons.items()]
    if known["others"]:
        lines += ["", *columns([OTHER_HEAD, *map(other_cells, known["others"])])]
    lines += family(known["rows"])
    wrong = problems(known["rows"])
    lines += ["", *(f"WRONG: {each}" for each in wrong)] if wrong else []
    lines += ["", "steps"]
    for step in known["steps"]:
        mark = "ok    " if step["passed"] else "FAILED"
        lines.append(
            f"{mark} {step['name']} ({step['seconds']:.0f} s) {step['detail'][:300]}".rstrip()
        )
    if not known["rows"] and not known["others"]:
        lines.append("no rows")
    return "\n".join(lines)
