"""DTensor rules: the one place that touches torch's experimental `register_sharding`.

A contract's rule names placements by one character a tensor, in the order of the schema: a digit
shards that axis, `R` replicates, `P` is a pending sum, `-` stands for an argument that is None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from ppmoe_ops._library import OPERATORS, Operator


@cache
def enable_dtensor() -> None:
    """Let the operators take `torch.distributed.tensor.DTensor` arguments.

    Not done at import, since importing DTensor takes longer than importing the rest of the package.

    Example:
        >>> import ppmoe_ops
        >>> ppmoe_ops.enable_dtensor()
    """
    from torch.distributed.tensor.experimental import register_sharding

    for op in OPERATORS.values():
        if not op.composite:
            register_sharding(op.overload)(_strategy(op))


def _strategy(op: Operator) -> Callable[..., list[Any]]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    schema = op.overload._schema
    is_tensor = ["Tensor" in str(argument.type) for argument in schema.arguments]
    outputs = len(schema.returns)

    def placement(letter: str) -> Any:
        if letter == "-":
            return None
        fixed = {"R": Replicate(), "P": Partial()}
        return fixed[letter] if letter in fixed else Shard(int(letter))

    def strategy(*args: Any, **kwargs: Any) -> list[Any]:
        rules = list(op.sharding(*args, **kwargs)) if op.sharding else []
        rules.append(("R" * outputs, "R" * sum(is_tensor)))
        acceptable = []
        for produced, taken in rules:
            letters = iter(taken)
            given: list[Any] = []
            for tensor, value in zip(is_tensor, args, strict=False):
                each = placement(next(letters)) if tensor else None
                if tensor and isinstance(value, (list, tuple)):
                    given += [each] * len(value)  # one for every tensor of a list
                else:
                    given.append(None if value is None else each)
            acceptable.append(([placement(letter) for letter in produced], given))
        return acceptable

    return strategy
