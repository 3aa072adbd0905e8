"""Calls every row of the bad-input table on memory that cannot be touched; run by its test."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "expert_slice"))

from ladder_bad_input import BAD_CALLS
from protected import forbidden
from torch import Tensor

from ppmoe_ops._library import OPERATORS


def out_of_reach(value: Any) -> Any:
    if isinstance(value, list):
        return [out_of_reach(each) for each in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return forbidden(value)
    return value


def main() -> None:
    for row in BAD_CALLS:
        print(row, flush=True)
        try:
            OPERATORS[row.op].overload(*(out_of_reach(each) for each in row.args()))
        except row.error:
            continue
        raise SystemExit("was not refused")
    print(f"{len(BAD_CALLS)} calls refused")


if __name__ == "__main__":
    main()
