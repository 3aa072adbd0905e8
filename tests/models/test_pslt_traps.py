"""What is easily got wrong in a ladder block, each thing by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pslt_pair import calls, images
from torch import Tensor, nn

from ppmoe_models import PSLT
from ppmoe_models.pslt_blocks import LadderBlock, LadderBranch, PatchMerging


def branch(index: int, shift: int = 0) -> LadderBranch:
    made = LadderBranch(16, 2, shift, index > 0, 0.0, "authors").double().eval()
    nn.init.normal_(made.norm1.weight, 1.0, 0.3)
    nn.init.normal_(made.norm1.bias)
    return made


@torch.no_grad()
def attend_evenly(made: LadderBranch) -> None:
    """Equal keys, and a projection that changes nothing: attention gives the mean value."""
    into, (queries, keys) = made.attn.into, (slice(0, 16), slice(16, 32))
    nn.init.normal_(into.weight[queries])
    into.weight[keys] = 0
    nn.init.normal_(into.bias)
    made.attn.relative_position_bias_table.zero_()
    made.attn.proj.weight.copy_(torch.eye(16))
    made.attn.proj.bias.zero_()


@pytest.mark.parametrize(
    ("index", "edges"), [(0, (0, 7, 14, 21)), (1, (0, 3, 10, 17, 21)), (2, (0, 4, 11, 18, 21))]
)
def test_windows_of_the_three_branches(index: int, edges: tuple[int, ...]) -> None:
    """Which rows and columns a token sees: branch 2 is shifted the other way than Swin's."""
    made = LadderBlock(48, 2).double().eval().blocks[index]
    x, v = images(1, 21, 14, 16), images(1, 21, 14, 16)
    columns = [each for each in edges if each < 14] + [14]
    for row in range(21):
        leaf = x.clone().requires_grad_()
        z = made._attention(leaf, v if index else None, None)
        (grad,) = torch.autograd.grad(z[0, row, min(row, 13)].square().sum(), leaf)
        seen = grad[0].abs().sum(-1) > 0
        top, bottom = around(edges, row)
        left, right = around(columns, min(row, 13))
        expected = torch.zeros(21, 14, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        assert torch.equal(seen, expected), row


def around(edges: Any, at: int) -> tuple[int, int]:
    return max(e for e in edges if e <= at), min(e for e in edges if e > at)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_inner_shortcut_is_there_in_later_branches_alone(index: int) -> None:
    made = branch(index)
    with torch.no_grad():
        made.attn.proj.weight.zero_()
        made.attn.proj.bias.zero_()
    x = images(2, 7, 14, 16)
    v = images(2, 7, 14, 16) if index else None
    expected = x + made.norm1(x) if index else x
    torch.testing.assert_close(made._attention(x, v, None), expected)


def test_queries_come_before_keys_and_the_value_is_raw() -> None:
    """Equal keys give the mean of the value as it came; equal queries would not."""
    made = branch(1)
    attend_evenly(made)
    x, v = images(1, 7, 7, 16), images(1, 7, 7, 16)
    u = made._attention(x, v, None) - x - made.norm1(x)
    torch.testing.assert_close(u, v.mean((1, 2), keepdim=True).expand_as(u))


def test_value_of_the_first_branch_comes_last_and_normalised() -> None:
    made = branch(0)
    attend_evenly(made)
    x = images(1, 7, 7, 16)
    value = torch.nn.functional.linear(
        made.norm1(x), made.attn.qkv.weight[32:], made.attn.qkv.bias[32:]
    )
    u = made._attention(x, None, None) - x
    torch.testing.assert_close(u, value.mean((1, 2), keepdim=True).expand_as(u))


@torch.no_grad()
def test_value_is_the_finished_branch_before() -> None:
    """After its FFN and both residuals."""
    block = LadderBlock(48, 2).double().eval()
    given: list[tuple[Tensor, Tensor | None]] = []
    results: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, Tensor | None], out: Tensor) -> None:
        given.append(args)
        results.append(out)

    for each in block.blocks:
        each.register_forward_hook(note)
    x = images(1, 14, 14, 48)
    block(x)
    assert given[0][1] is None
    for index in (1, 2):
        assert given[index][1] is results[index - 1]
        assert torch.equal(given[index][0], x[..., 16 * index : 16 * index + 16])
    z = block.blocks[0]._attention(x[..., :16], None, None)
    ffn = block.blocks[0].mlp.conv(block.blocks[0].norm2(z).permute(0, 3, 1, 2))
    torch.testing.assert_close(results[0], z + ffn.permute(0, 2, 3, 1))


def windows_of(size: tuple[int, int], **options: Any) -> list[list[tuple[str, int, int]]]:
    """Operator, window and shift of every attention, a list for a stage."""
    with torch.device("meta"):
        model = PSLT(12, depths=(2, 1), **options).eval()
        x = torch.empty(1, 3, *size)
    with torch.no_grad(), calls() as mode:
        model(x)
    found = []
    for name, args in mode.seen:
        if name in ("ladder_attention", "window_attention"):
            window, shift = (args[11:13], args[5:7])[name == "window_attention"]
            assert window[0] == window[1]
            assert shift[0] == shift[1]
            found.append((name, window[0], shift[0]))
    return [found[:6], found[6:]]


def test_stage_four_is_not_shifted() -> None:
    ours = [("ladder_attention", 7, shift) for shift in (0, 3, -3)]
    level = [("ladder_attention", 7, 0)] * 3
    assert windows_of((224, 224)) == [ours * 2, level]
    assert windows_of((448, 448)) == [ours * 2, ours]  # but in detection
    assert windows_of((224, 224), shifts=False) == [level * 2, level]


def test_small_and_uneven_maps() -> None:
    """A map of at most seven rows or columns has windows of so many, and no shift."""
    whole = [("ladder_attention", 6, 0)] * 3
    assert windows_of((96, 96)) == [whole * 2, [("ladder_attention", 3, 0)] * 3]
    padded = [("window_attention", 7, shift) for shift in (0, 3, -3)]
    assert windows_of((144, 240)) == [padded * 2, [("window_attention", 5, 0)] * 3]
    ragged = [("ladder_attention", window, shift) for window, shift in ((7, 3), (7, -3), (5, 0))]
    stages = windows_of((144, 240), padding="ragged")
    assert stages[0][1:3] + stages[1][:1] == ragged


def test_merging_takes_the_even_row_and_column_first() -> None:
    merging = PatchMerging(1).double()
    merging.norm, merging.reduction = nn.Identity(), nn.Identity()
    x = torch.arange(6.0).reshape(1, 2, 3, 1)
    expected = [[0, 3, 1, 4], [2, 5, 0, 0]]
    assert merging(x).tolist() == [[expected]]
