"""The kernels for Hopper on the emulator: right on ragged rows, and no operation that orders their memory is idle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch

from moe_gpu.triton_kernels import hopper, hopper_common, hopper_grad, hopper_grad_w, tuning
from moe_gpu.triton_kernels.hopper_common import list_row_tiles
from moe_gpu.triton_kernels.tuning import HopperConfig
from tests.emulator.emulator import emulated, key_of
from tests.emulator.faults import faults_in, functions_of
from tests.emulator.products import ROWS_PER_EXPERT, Ragged, check_down, check_grad_act, check_grad_w, check_up

INLINE_ASSEMBLY = {key_of(hopper_common.sigmoid.fn): torch.sigmoid}
CASES: dict[str, dict[str, Callable[[Ragged, HopperConfig], None]]] = {
    "up": {
        "swiglu": check_up,
        "swiglu, saved H": functools.partial(check_up, save_h=True),
        "geglu, saved H, bias": functools.partial(check_up, activation="geglu", save_h=True, bias=True),
        "not gated, saved H, bias": functools.partial(check_up, activation="gelu_tanh", save_h=True, bias=True),
        "weights by column": functools.partial(check_up, activation="reglu", by_row=False),
        "between linear layers": functools.partial(check_up, activation="relu", gather=False, save_h=True),
        "K of one step": functools.partial(check_up, width=64),
        "K of many steps": functools.partial(check_up, width=640),
        "columns less than a tile": functools.partial(check_up, columns=64),
    },
    "down": {
        "several tiles of columns": functools.partial(check_down, columns=320),
        "bias": functools.partial(check_down, columns=64, bias=True),
    },
    "grad_x": {"weights by column": functools.partial(check_down, columns=448, by_row=False)},
    "grad_act": {
        "swiglu": check_grad_act,
        "geglu, weights by row": functools.partial(check_grad_act, activation="geglu_tanh", by_row=True),
        "not gated": functools.partial(check_grad_act, activation="gelu"),
        "between linear layers": functools.partial(check_grad_act, activation="silu", gather=False),
    },
    "grad_w": {"plain": check_grad_w, "transposed": functools.partial(check_grad_w, transposed=True)},
    "grad_w_gather": {
        "plain": functools.partial(check_grad_w, gather=True),
        "transposed": functools.partial(check_grad_w, gather=True, transposed=True),
    },
}


# Tiles of 192 rows, claimed: rows that fill one, that end in each of its granules, and that make tiles of two.
TALL = HopperConfig(3, rows=192, claimed=True)
TALL_KINDS = ("up", "down", "grad_x")
TALL_ROWS = Ragged(torch.bfloat16, (330, 0, 1, 64, 130, 160, 161, 192, 193), tail=5)


def run(kind: str, name: str, on: Ragged, config: HopperConfig | None = None, seed: int = 0, replaced=None) -> None:
    torch.manual_seed(seed)
    with emulated(seed, INLINE_ASSEMBLY | (replaced or {})):
        CASES[kind][name](on, config or tuning._HOPPER[kind])


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CASES.items() for name in names])
def test_product(kind, name):
    run(kind, name, Ragged(torch.bfloat16))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in TALL_KINDS for name in CASES[kind]])
def test_tall_tiles(kind, name):
    run(kind, name, TALL_ROWS, TALL)


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("kind", CASES)
def test_any_order_and_float16(kind, seed):
    run(kind, next(iter(CASES[kind])), Ragged(torch.float16), seed=seed)


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("kind", TALL_KINDS)
def test_tall_tiles_in_any_order(kind, seed):
    on = replace(TALL_ROWS, dtype=torch.float16, programs=1 + seed)
    run(kind, next(iter(CASES[kind])), on, TALL, seed)


EDGES = {
    "one expert": Ragged(torch.bfloat16, (190,)),
    "rows of the last expert alone": Ragged(torch.bfloat16, (0, 0, 5), tail=1),
    "no route dropped": Ragged(torch.bfloat16, (128, 64), tail=0),
    "all routes dropped": Ragged(torch.bfloat16, (0, 0, 0), tail=8),
    "more programs than tiles": Ragged(torch.bfloat16, (70, 30), tail=0, programs=40),
    "one program": Ragged(torch.bfloat16, programs=1),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("kind", CASES)
def test_edge(kind, edge):
    run(kind, next(iter(CASES[kind])), EDGES[edge])


@pytest.mark.parametrize("edge", EDGES)
def test_edge_of_tall_tiles(edge):
    run("down", "bias", EDGES[edge], TALL)


@pytest.mark.parametrize(
    "config", [HopperConfig(2, claimed=True), HopperConfig(2, width=128, slots=1, rows=192)], ids=str
)
def test_tall_and_claimed_each_alone(config):
    run("grad_x", "weights by column", TALL_ROWS, config)


def test_claims_leave_the_counter_for_the_next_product():
    row_tiles = []

    def keep(*arguments):
        row_tiles.append(list_row_tiles(*arguments))
        return row_tiles[0]  # the same list for both products

    with mock.patch("tests.emulator.products.list_row_tiles", keep):
        for _ in range(2):
            run("down", "bias", TALL_ROWS, TALL)
            assert int(row_tiles[0].tiles[1]) == 0


@pytest.mark.parametrize(
    "config", [HopperConfig(2), HopperConfig(2, group_m=1), HopperConfig(5, width=128, slots=1)], ids=str
)
@pytest.mark.parametrize("kind", CASES)
def test_other_tile(kind, config):
    run(kind, next(iter(CASES[kind])), Ragged(torch.bfloat16), config)


@pytest.mark.parametrize("rows_per_expert", [ROWS_PER_EXPERT, (0,), (64,) * 70, (1, 0, 1000, 128, 129)], ids=str)
def test_row_tiles_cover_every_row_once(rows_per_expert):
    entries = listed(rows_per_expert, 128)
    expected, first = [], 0
    for expert, rows in enumerate(rows_per_expert):
        expected += [[expert, first + at, min(128, rows - at)] for at in range(0, rows, 128)]
        first += rows
    assert entries == expected


def listed(rows_per_expert: tuple[int, ...], tile_rows: int) -> list[list[int]]:
    """Expert, first row and rows of every tile."""
    offsets = torch.tensor([0, *rows_per_expert]).cumsum(0).to(torch.int32)
    with emulated():
        row_tiles = list_row_tiles(offsets, int(offsets[-1]) + 7, tile_rows)
    count, claims = row_tiles.tiles[:2].tolist()
    assert count <= row_tiles.capacity
    assert claims == 0
    return row_tiles.tiles[2:].reshape(3, -1)[:, :count].T.tolist()


def test_tall_row_tiles_are_few_and_none_is_of_one_granule_but_the_only_one():
    rows_per_expert = (*range(0, 600, 7), 64, 128, 192, 256, 320, 384)
    entries = listed(rows_per_expert, 192)
    first = 0
    for expert, rows in enumerate(rows_per_expert):
        mine = [(row - first, count) for e, row, count in entries if e == expert]
        assert [row for row, _ in mine] == [sum(n for _, n in mine[:i]) for i in range(len(mine))]
        assert sum(count for _, count in mine) == rows
        granules = [-(-count // 64) for _, count in mine]
        assert len(granules) == -(-rows // 192)
        assert all(2 <= n <= 3 for n in granules) or granules == [1]
        assert all(count % 64 == 0 for _, count in mine[:-1])
        first += rows


# Where each kernel's operations are at work, and those whose absence changes nothing.
Witness = tuple[str, str, Ragged, HopperConfig]
SMALL = (Ragged(torch.bfloat16), HopperConfig(3))
WITNESSES: dict[object, list[Witness]] = {
    hopper._grouped_gemm_hopper_kernel: [
        ("up", "swiglu, saved H", *SMALL),
        ("down", "several tiles of columns", *SMALL),
        ("up", "swiglu", TALL_ROWS, TALL),
        ("down", "bias", TALL_ROWS, TALL),
    ],
    hopper_grad._grouped_gemm_grad_act_hopper_kernel: [
        ("grad_act", "swiglu", *SMALL),
        ("grad_act", "not gated", *SMALL),
    ],
    hopper_grad_w._grouped_gemm_grad_w_hopper_kernel: [
        ("grad_w_gather", "transposed", *SMALL),
        ("grad_w", "plain", *SMALL),
    ],
}
HARMLESS = {
    # Each turn of the loop has waited for its own product.
    "multiply: one product more in flight in `warpgroup_mma_wait(num_outstanding=0, deps=(acc,))`",
    "multiply_three: one product more in flight in `warpgroup_mma_wait(num_outstanding=0, deps=(acc, third))`",
    # A tile's stages come after the next tile's claim, so whoever has multiplied them finds the claim told.
    "claimed_tile: without `mbarrier.wait(published.index(turn % 2), turn // 2 & 1)`",
}


def planted_faults():
    done = set()
    for kernel, witnesses in WITNESSES.items():
        for function in functions_of(kernel):
            if function not in done and function.__module__.startswith(hopper.__name__):
                done.add(function)
                for fault in faults_in(function):
                    yield pytest.param(fault, witnesses, id=str(fault))


@pytest.mark.parametrize(("fault", "witnesses"), list(planted_faults()))
def test_planted_fault_is_noticed(fault, witnesses):
    noticed = False
    for kind, name, on, config in witnesses:
        for seed in range(3):
            try:
                run(kind, name, on, config, seed, fault.replaced)
            except AssertionError:
                noticed = True
                break
        if noticed:
            break
    assert noticed == (str(fault) not in HARMLESS)
