"""What load-aware tiles must satisfy, on the interpreter's CPU or a GPU: every row once, in a tile of its class."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from moe_gpu import reference
from moe_gpu.triton_kernels.grouped_gemm import (
    LARGEST_ROW_TILE,
    NUM_ROW_CLASSES,
    _class_in_turn,
    _first_tile,
    _tile_ends,
    _tile_rows,
    grouped_gemm_forward,
)
from moe_gpu.triton_kernels.tuning import ROW_CLASSES, GemmConfig, next_power_of_2
from tests.kernel_cases import check_close

# Rows of each expert, and what they are there for.
COUNTS = {
    "around every class": [15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129],
    "empty experts first, between and last": [0, 5, 0, 0, 300, 0],
    "all rows to one expert": [0, 0, 0, 517],
    "one row": [1],
    "hot beside cold": [700, 3, 1, 90, 2, 0, 18],
    "whole tiles alone": [128, 256, 64, 16],
}
CLASSES = [(128, (16, 64)), (128, (16, 32, 64)), (128, (64,)), (64, (16,)), (64, (32, 16)), (32, (16,))]


def offsets_of(counts: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)


def expected_tiles(counts: list[int], block_m: int, smaller: tuple[int, ...]) -> set[tuple[int, int, int]]:
    """(class, expert, first row) of every row tile."""
    tiles, row = set(), 0
    for expert, count in enumerate(counts):
        for first in range(0, count, block_m):
            size = min(size for size in (block_m, *smaller) if size >= min(block_m, count - first))
            tiles.add((size, expert, row + first))
        row += count
    return tiles


@triton.jit
def _list_kernel(
    offsets_ptr,
    out_ptr,  # (capacity, 3) int32: class, expert and first row of each tile, in the order of all programs' claims
    order_ptr,  # (programs, classes) int32: the classes in the order in which a program takes them
    E,
    num_n,
    BLOCK_M: tl.constexpr,
    SMALLER: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Each program writes down the tiles that it would take, a tile at its number over all classes."""
    before = 0
    for step in tl.static_range(NUM_ROW_CLASSES):
        if (LARGEST_ROW_TILE >> step) & (BLOCK_M | SMALLER):
            ends = _tile_ends(offsets_ptr, E, LARGEST_ROW_TILE >> step, BLOCK_M, SMALLER, BLOCK_E)
            num = tl.max(ends, 0) * num_n
            first = _first_tile(offsets_ptr, E, LARGEST_ROW_TILE >> step, num_n, BLOCK_M, SMALLER, BLOCK_E)
            for tile in range(first, num, tl.num_programs(0)):
                expert, row, _ = _tile_rows(tile // num_n, ends, offsets_ptr, LARGEST_ROW_TILE >> step, BLOCK_M)
                entry = out_ptr + (before + tile) * 3
                tl.store(entry, LARGEST_ROW_TILE >> step)
                tl.store(entry + 1, expert)
                tl.store(entry + 2, row)
            before += num
    for turn in range(NUM_ROW_CLASSES):
        tl.store(order_ptr + tl.program_id(0) * NUM_ROW_CLASSES + turn, _class_in_turn(turn))


def check_tiles(counts: list[int], block_m: int, smaller: tuple[int, ...], device: str, programs: int = 5) -> None:
    """All tiles of all columns are taken, each by one program, and half the programs begin with the smallest class."""
    columns = 3
    expected = expected_tiles(counts, block_m, smaller)
    out = torch.full((len(expected) * columns + 8, 3), -1, dtype=torch.int32, device=device)
    order = torch.empty(programs, len(ROW_CLASSES), dtype=torch.int32, device=device)
    sizes = {"BLOCK_M": block_m, "SMALLER": sum(smaller), "BLOCK_E": next_power_of_2(len(counts))}
    _list_kernel[(programs,)](offsets_of(counts, device), out, order, len(counts), columns, **sizes)
    tiles = [tuple(tile) for tile in out.tolist() if tile[0] >= 0]
    assert sorted(tiles) == sorted(list(expected) * columns)
    assert tiles == [tuple(tile) for tile in out.tolist()][: len(tiles)], "a number was left out"
    for program, sizes_in_turn in enumerate(order.tolist()):
        assert sizes_in_turn == sorted(ROW_CLASSES, reverse=2 * program < programs)


def check_products(
    counts: list[int],
    block_m: int,
    smaller: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    widths: tuple[int, int] = (45, 37),
    blocks: tuple[int, int] = (32, 32),
    sm_budget: int | None = None,
) -> None:
    """`up` gathered with bias, H and SwiGLU, and a plain product with and without exchanged axes, against float64."""
    generator = torch.Generator().manual_seed(0)
    width, hidden = widths
    experts, rows, top_k = len(counts), sum(counts), 2

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    config = GemmConfig(block_m, *blocks, 4, 2, smaller_ms=smaller)
    offsets = offsets_of(counts, device)
    route = torch.randperm(rows + rows % top_k, generator=generator)[:rows].int().to(device)
    x = randn((rows + 1) // top_k, width)
    up, bias = randn(experts, 2 * hidden, width, scale=width**-0.5), randn(experts, 2 * hidden)
    options = {"route_R": route, "top_k": top_k, "activation": "swiglu", "bias_EN": bias, "save_h": True}
    out, h = grouped_gemm_forward(x, up, offsets, rows, config, sm_budget=sm_budget, **options)

    def by_torch(to: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        gathered = x.to(to)[route.long() // top_k]
        h = reference.grouped_gemm_reference(gathered, up.to(to), offsets, bias.to(to))
        return reference.activate_reference(h, "swiglu"), h

    for name, got, same, truth in zip(("out", "h"), (out, h), by_torch(dtype), by_torch(torch.float64), strict=True):
        check_close(f"up: {name}", got, same, truth, dtype)
    a = randn(rows, hidden)
    for weights in (randn(experts, width, hidden), randn(experts, hidden, width).transpose(1, 2)):
        got, _ = grouped_gemm_forward(a, weights, offsets, rows, config, sm_budget=sm_budget)
        same, truth = (
            reference.grouped_gemm_reference(a.to(to), weights.to(to), offsets, None) for to in (dtype, torch.float64)
        )
        check_close("plain", got, same, truth, dtype)
