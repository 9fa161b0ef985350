"""Load-aware tiles on the interpreter: classes at their boundaries, empty and hot experts, whole layers."""

from __future__ import annotations

import pytest
import torch

from moe_gpu.triton_kernels.products import Products, given_tiles
from moe_gpu.triton_kernels.tuning import GemmConfig
from tests.kernel_cases import EXPERT_CASES, check_experts
from tests.load_aware_cases import CLASSES, COUNTS, check_products, check_tiles

TILE = GemmConfig(64, 32, 32, 4, 2, smaller_ms=(16,))


@pytest.mark.parametrize("classes", CLASSES, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_row_is_in_one_tile_of_its_class(counts, classes):
    for programs in (1, 2, 5):
        check_tiles(counts, *classes, "cpu", programs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", CLASSES[::2], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products(counts, classes, dtype):
    check_products(counts, *classes, dtype, "cpu")


def test_a_budget_of_one_program_takes_every_class():
    check_products(COUNTS["hot beside cold"], 128, (16, 64), torch.float32, "cpu", sm_budget=1)


def test_given_tiles_serve_and_give_way_again():
    x, w = torch.zeros(40, 64, dtype=torch.bfloat16), torch.zeros(4, 64, 64, dtype=torch.bfloat16)
    products = Products.of((x,), (w,), torch.zeros(5, dtype=torch.int32), 40)
    before, given = products.tile("up", w), GemmConfig(64, 32, 32, 4, 2, smaller_ms=(16,))
    with given_tiles({"up": given}), given_tiles({"down": TILE}):
        assert (products.tile("up", w), products.tile("down", w)) == (given, TILE)
    assert products.tile("up", w) == before != given


@pytest.mark.parametrize("case", EXPERT_CASES[1:9], ids=lambda case: case.name)
def test_whole_layers(case):
    with given_tiles(dict.fromkeys(("up", "down", "grad_x"), TILE)):
        check_experts(case, torch.bfloat16, "cpu")
