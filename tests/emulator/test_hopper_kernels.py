"""The kernels for Hopper on the emulator: right on ragged rows, and no operation that orders their memory is idle."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from moe_gpu.triton_kernels import hopper, hopper_common, hopper_grad, tuning
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


def run(kind: str, name: str, on: Ragged, config: HopperConfig | None = None, seed: int = 0, replaced=None) -> None:
    torch.manual_seed(seed)
    with emulated(seed, INLINE_ASSEMBLY | (replaced or {})):
        CASES[kind][name](on, config or tuning._HOPPER[kind])


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CASES.items() for name in names])
def test_product(kind, name):
    run(kind, name, Ragged(torch.bfloat16))


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("kind", CASES)
def test_any_order_and_float16(kind, seed):
    run(kind, next(iter(CASES[kind])), Ragged(torch.float16), seed=seed)


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


@pytest.mark.parametrize(
    "config", [HopperConfig(2), HopperConfig(2, group_m=1), HopperConfig(5, width=128, slots=1)], ids=str
)
@pytest.mark.parametrize("kind", CASES)
def test_other_tile(kind, config):
    run(kind, next(iter(CASES[kind])), Ragged(torch.bfloat16), config)


@pytest.mark.parametrize("rows_per_expert", [ROWS_PER_EXPERT, (0,), (64,) * 70, (1, 0, 1000, 128, 129)], ids=str)
def test_row_tiles_cover_every_row_once(rows_per_expert):
    offsets = torch.tensor([0, *rows_per_expert]).cumsum(0).to(torch.int32)
    num_rows = int(offsets[-1]) + 7
    with emulated():
        row_tiles = list_row_tiles(offsets, num_rows)
    count = int(row_tiles.tiles[0])
    assert count <= row_tiles.capacity
    entries = row_tiles.tiles[1:].reshape(3, -1)[:, :count].T.tolist()
    expected = []
    for expert, rows in enumerate(rows_per_expert):
        first = int(offsets[expert])
        expected += [[expert, first + at, min(128, rows - at)] for at in range(0, rows, 128)]
    assert entries == expected


# Where each kernel's operations are at work, and those whose absence changes nothing.
WITNESSES = {
    hopper._grouped_gemm_hopper_kernel: [("up", "swiglu, saved H"), ("down", "several tiles of columns")],
    hopper_grad._grouped_gemm_grad_act_hopper_kernel: [("grad_act", "swiglu"), ("grad_act", "not gated")],
    hopper_grad._grouped_gemm_grad_w_hopper_kernel: [("grad_w_gather", "transposed"), ("grad_w", "plain")],
}
HARMLESS = {
    # Each turn of the loop has waited for its own product.
    "multiply: one product more in flight in `warpgroup_mma_wait(num_outstanding=0, deps=(acc,))`"
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
    for kind, name in witnesses:
        for seed in range(3):
            try:
                run(kind, name, Ragged(torch.bfloat16), HopperConfig(3), seed, fault.replaced)
            except AssertionError:
                noticed = True
                break
        if noticed:
            break
    assert noticed == (str(fault) not in HARMLESS)
