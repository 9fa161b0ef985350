"""The tuner's set-up on the interpreter: right products pass its check and get times, wrong ones are never chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_gpu import tune, tune_problem
from moe_gpu.benchmark.timing import Timer
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.explain import both_products, layer_products
from moe_gpu.triton_kernels.tuning import GemmConfig, HopperDecodeConfig, TwoProducts

CONFIG = MoEConfig(64, 64, 32, 4, 2)
PRODUCTS = [*layer_products(CONFIG), dataclasses.replace(layer_products(CONFIG)[-2], kind="grad_w")]
TILES = [GemmConfig(16, 32, 32, 4, 2), GemmConfig(32, 32, 32, 4, 2)]


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: f"{product.kind} {product.weights}")
def test_right_tiles_are_timed_and_wrong_ones_never_chosen(product, monkeypatch):
    monkeypatch.setattr(tune_problem, "PRESETS", {**PRESETS, "tiny": CONFIG})
    monkeypatch.setattr(tune, "FIRST_SAMPLES", 1)
    monkeypatch.setattr(tune, "LAST_SAMPLES", 1)
    operands = tune_problem.Operands(CONFIG, 24, torch.device("cpu"))
    case = tune_problem.Case("tiny", product, 24, 2)
    timer = Timer(torch.device("cpu"))
    outcome = tune.measure(case, operands, TILES, {"triton": TILES[0]}, TILES[0], timer)
    assert [row.error for row in outcome.rows] == [None, None]
    assert outcome.tiles[0][0] in TILES

    right = operands.run

    def wrong_for_the_second(product, products):
        off = 1.05 if products.tile(product.kind) == TILES[1] else 1.0
        return {name: value * off for name, value in right(product, products).items()}

    monkeypatch.setattr(operands, "run", wrong_for_the_second)
    outcome = tune.measure(case, operands, TILES, {"triton": TILES[0]}, TILES[0], timer)
    assert [tile for tile, _ in outcome.tiles] == TILES[:1]
    assert "is wrong" in outcome.rows[1].error
    assert outcome.rows[1].time_ms is None


def test_two_products_are_timed_and_a_launch_that_cannot_serve_is_a_row(monkeypatch):
    monkeypatch.setattr(tune_problem, "PRESETS", {**PRESETS, "tiny": CONFIG})
    operands = tune_problem.Operands(CONFIG, 24, torch.device("cpu"))
    case = tune_problem.Case("tiny", both_products(CONFIG), 24, 2)
    tiles = [TwoProducts(), HopperDecodeConfig(8, 1, 1, 5)]
    outcome = tune.measure(case, operands, tiles, {"two products": tiles[0]}, tiles[0], Timer(torch.device("cpu")))
    assert [tile for tile, _ in outcome.tiles] == tiles[:1]
    assert outcome.rows[0].tflops > 0
    assert "need a GPU" in outcome.rows[1].error
