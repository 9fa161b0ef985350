"""The decode kernel for Hopper on the emulator: right on ragged rows, and no operation that orders memory is idle."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch

from moe_gpu.config import ACTIVATIONS
from moe_gpu.reference import activate_reference
from moe_gpu.triton_kernels import hopper_common, hopper_decode, hopper_decode_producers
from moe_gpu.triton_kernels.counters import Counters
from moe_gpu.triton_kernels.hopper_decode import decode_forward_hopper
from moe_gpu.triton_kernels.tuning import HopperDecodeConfig, hopper_decode_config
from tests.emulator.emulator import emulated, key_of
from tests.emulator.faults import faults_in, functions_of
from tests.emulator.products import TOP_K, Ragged


def load_acquire(ptr):
    return gl.load(ptr, volatile=True)  # noqa: F821 among the kernel's names


def count_on(counter_ptr, most):
    before = gl.atomic_add(counter_ptr, 1)  # noqa: F821
    gl.store(counter_ptr, 0, mask=before == most)  # noqa: F821
    return before


INLINE_ASSEMBLY = {
    key_of(hopper_decode_producers._count_on.fn): count_on,
    key_of(hopper_common.sigmoid.fn): torch.sigmoid,
    key_of(hopper_decode_producers._load_acquire.fn): load_acquire,
}
# One more row than a tile, none, one, a tile.
FEW = Ragged(torch.bfloat16, (9, 0, 1, 8), tail=4)
SMALL = HopperDecodeConfig(rows=8, up_fold=1, down_fold=1, stages=2)
HIGH = [HopperDecodeConfig(32, 1, 1, 5, height=128), HopperDecodeConfig(64, 1, 1, 4, height=128)]
CONFIGS = set(HIGH) | {
    hopper_decode_config(num_rows, num_tokens, 128, width, hidden)
    for num_rows, num_tokens in ((8, 1), (32, 4), (256, 32), (2048, 256), (4096, 256))
    for width, hidden in ((2048, 768), (4096, 14336), (7168, 2048))
}


def check(
    on: Ragged,
    config: HopperDecodeConfig,
    activation: str = "swiglu",
    bias: tuple[bool, bool] = (False, False),
    width: int = 320,
    hidden: int = 104,
    output: int = 136,
    out_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    replaced=None,
) -> None:
    """The rows of all experts; those of dropped routes must be as they were."""
    torch.manual_seed(seed)
    route, x = on.route(), on.new(on.num_tokens, width)
    up = on.weights(hidden * (2 if ACTIVATIONS[activation].gated else 1), width, True)
    down = on.weights(output, hidden, True)
    up_bias, down_bias = (
        on.new(on.experts, w.shape[1]) if has else None for w, has in zip((up, down), bias, strict=True)
    )
    out = torch.full((on.num_rows, output), torch.nan, dtype=out_dtype)
    with emulated(seed, INLINE_ASSEMBLY | (replaced or {})):
        decode_forward_hopper(
            x, route, on.offsets, TOP_K, up, down, activation, config, on.programs, up_bias, down_bias, out
        )

    def compute(dtype: torch.dtype) -> torch.Tensor:
        # Sums are float32 up to the activation's rounding.
        wide = torch.float32 if dtype == on.dtype else dtype
        h = on.product(x[route.long() // TOP_K].to(wide), up.to(wide), None if up_bias is None else up_bias.to(wide))
        a = activate_reference(h, activation).to(dtype).to(wide)
        return on.product(a, down.to(wide), None if down_bias is None else down_bias.to(wide)).to(dtype)

    on.check("rows", out, compute)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": (True, True)},
        {"bias": (True, False), "activation": "gelu_tanh"},
        {"bias": (False, True), "activation": "geglu", "out_dtype": torch.bfloat16},
        {"activation": "relu", "width": 64, "hidden": 512, "output": 8},
        {"width": 8, "hidden": 8, "output": 1},
        {"width": 1032, "hidden": 264},
    ],
    ids=str,
)
def test_decode(options):
    check(FEW, SMALL, **options)


@pytest.mark.parametrize("config", sorted(CONFIGS, key=str), ids=str)
def test_every_tile_by_rule(config):
    on = replace(FEW, rows_per_expert=(2 * config.rows + 1, 0, config.rows + 1, 1), tail=1)
    check(on, config, width=520, hidden=136, output=72, bias=(True, True))


def test_activations_without_a_gate_in_items_of_128_weight_rows():
    on = replace(FEW, rows_per_expert=(70, 0, 1, 64), tail=1)
    check(on, HIGH[1], "gelu_tanh", (True, False), width=200, hidden=136, output=200)


@pytest.mark.parametrize("seed", range(1, 7))
def test_any_order_and_float16(seed):
    config = HopperDecodeConfig(
        rows=8 << seed % 2, up_fold=1 << seed % 3, down_fold=1 << (seed + 1) % 3, stages=2 + seed % 2
    )
    check(replace(FEW, dtype=torch.float16, programs=seed), config, width=600, seed=seed)


@pytest.mark.parametrize(
    "on",
    [
        Ragged(torch.bfloat16, (19,), tail=1),
        Ragged(torch.bfloat16, (0, 0, 5), tail=1),
        Ragged(torch.bfloat16, (8, 16), tail=0),
        Ragged(torch.bfloat16, (13, 0, 2), tail=1),  # of 8 tokens: some chose the first expert twice
        Ragged(torch.bfloat16, (0, 0, 0), tail=8),
        Ragged(torch.bfloat16, (2, 2), tail=0, programs=40),
    ],
    ids=str,
)
def test_edge(on):
    check(on, SMALL)


def test_counters_are_left_at_zero_for_the_next_launch():
    state = torch.zeros(Counters.SIZE, dtype=torch.int32)
    with mock.patch.object(hopper_decode._COUNTERS, "get", return_value=state):
        for on in (FEW, Ragged(torch.bfloat16, (0, 3), tail=1), replace(FEW, programs=300), FEW):
            check(on, SMALL)
            assert not state.any()


def planted_faults():
    for function in functions_of(hopper_decode._decode_hopper_kernel):
        if function.__module__.startswith(hopper_decode.__name__):
            for fault in faults_in(function):
                yield pytest.param(fault, id=str(fault))


HARMLESS = {
    # Each turn of the loop has waited for its own products.
    "_multiply: one product more in flight in `warpgroup_mma_wait(num_outstanding=0, deps=(acc,))`",
    # It is about who claims the next item, not about memory.
    "_bring_panels: without `mbarrier.wait(empty.index(step % STAGES), step // STAGES & 1 ^ 1)`",
}


# Items longer than the ring; and items of one stage, of which the ring holds more than the queue of claims does.
WITNESSES = ((SMALL, {"width": 600, "hidden": 520}), (replace(SMALL, stages=6), {"width": 200, "output": 264}))


@pytest.mark.parametrize("fault", list(planted_faults()))
def test_planted_fault_is_noticed(fault):
    noticed = False
    for seed, (config, sizes) in itertools.product(range(2), WITNESSES):
        try:
            check(FEW, config, seed=seed, replaced=fault.replaced, **sizes)
        except (AssertionError, ZeroDivisionError):  # an item that there is not has no rows
            noticed = True
            break
    assert noticed == (str(fault) not in HARMLESS)
