"""What a layer executes: rows padded to tiles, weights once if hit, by the tiles that serve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_gpu import AdvancedMoELayer
from moe_gpu.config import PRESETS
from moe_gpu.energy_work import LayerWork, ProductWork
from moe_gpu.explain import described_gpu, explain_layer, layer_work
from tests.energy_cases import simple_work
from tests.tuning_cases import own_cache  # noqa: F401 a fixture

QWEN = PRESETS["qwen3-30b-a3b"]


def test_rows_are_padded_to_the_tile_and_weights_come_once_if_hit():
    done = simple_work().execute([0, 1, 16, 17])
    per_row = 2 * (256 * 128 + 128 * 128)
    assert done.flops_E.tolist() == [0, 16 * per_row, 16 * per_row, 32 * per_row]
    assert done.padded_E.tolist() == [0, 16, 16, 32]
    weights = 2 * (256 * 128 + 128 * 128)
    assert done.bytes_E.tolist() == [0, *(weights + 2 * rows * (200 + 256) for rows in (1, 16, 17))]


def test_calls_go_round_through_the_steps_and_add_up():
    work = simple_work(shared_flops_per_token=10.0, shared_bytes_per_token=3.0, shared_bytes_per_call=5.0)
    steps = [[1, 0, 0, 3], [0, 2, 2, 0]]
    both = work.execute(steps, calls=10)
    each = [work.execute(step, calls=5) for step in steps]
    for name in ("rows_E", "flops_E", "bytes_E"):
        assert getattr(both, name) == pytest.approx(sum(getattr(one, name) for one in each))
    assert both.rows_E.tolist() == [5, 10, 10, 15]
    assert both.shared_flops == 20 * 10
    assert both.shared_bytes == 20 * 3 + 10 * 5


@pytest.mark.parametrize("tile", [1, 16, 64])
@pytest.mark.parametrize("mean", [0.05, 0.5, 3.7, 40.25, 700.5])
def test_mean_counts_stand_for_poissons_scatter(mean, tile):
    drawn = np.random.default_rng(0).poisson(mean, (4000, 4))
    work = simple_work(tile=tile)
    expected = work.execute([mean] * 4)
    sampled = work.execute(drawn)
    assert expected.flops_E.sum() == pytest.approx(sampled.flops_E.sum(), rel=0.03)
    assert expected.bytes_E.sum() == pytest.approx(sampled.bytes_E.sum(), rel=0.03)


def test_counts_of_any_kind_are_the_same_and_wrong_ones_are_refused():
    work = simple_work()
    plain = work.execute([1, 2, 3, 4])
    for counts in (torch.tensor([1, 2, 3, 4]), np.array([1, 2, 3, 4])):
        assert (work.execute(counts).flops_E == plain.flops_E).all()
    layer = AdvancedMoELayer(8, 8, 16, 4, enable_energy_monitoring=False)
    _, stats = layer(torch.randn(10, 8))
    assert work.execute(stats.routing).rows_E.tolist() == stats.counts_E.tolist()
    for wrong in ([1, 2, 3], [[1, 2], [3, 4]], [1, -2, 3, 4], [1, math.nan, 3, 4], []):
        with pytest.raises(ValueError, match="counts"):
            work.execute(wrong)


def test_the_work_of_a_layer_is_that_of_the_tiles_that_serve_it():
    pytest.importorskip("triton", reason="the kernels' own rules are asked")
    gpu = described_gpu("NVIDIA H200")
    tiles = {}
    for tokens in (8, 64, 200, 600, 4096):
        work = layer_work(gpu, QWEN, tokens, torch.bfloat16)
        tiles[tokens] = [product.row_tile for product in work.products]
        steps = {step.step: step for step in explain_layer(gpu, QWEN, tokens, torch.bfloat16)}
        for product, row_tile in zip(work.products, tiles[tokens], strict=True):
            step = steps.get(f"{product.name} (inference)") or steps[product.name]
            assert row_tile == (64 if step.path == "gluon" else step.tile["block_m"])
    assert tiles == {8: [8, 8], 64: [16, 16], 200: [32, 32], 600: [64, 64], 4096: [64, 64]}
    both = layer_work(gpu, QWEN, 4096, torch.bfloat16, "forward+backward")
    assert [product.row_tile for product in both.products] == [64] * 6
    even = [256] * 128
    assert both.execute(even).flops_E.sum() == 3 * QWEN.forward_flops(4096 * 8)
    least = sum(step.min_bytes for step in explain_layer(gpu, QWEN, 4096, torch.bfloat16)[1:3])
    assert layer_work(gpu, QWEN, 4096, torch.bfloat16).execute(even).bytes_E.sum() == pytest.approx(least, rel=0.05)


def test_load_aware_tiles_pad_the_rest_to_their_smallest_class():
    per_row = 2.0 * 16 * 8
    aware = ProductWork("up", 16, 8, 128, 1.0, smaller_tiles=(16, 64))
    work = LayerWork(6, 1, "bfloat16", 2, (aware,))
    padded = work.execute([0, 1, 64, 65, 130, 256]).flops_E / per_row
    assert padded.tolist() == [0, 16, 64, 128, 144, 256]
    mean = work.execute([0, 0, 0, 0, 0, 3000.5]).flops_E[5] / per_row
    rests = np.mean([min(size for size in (16, 64, 128) if size >= rest) - rest for rest in range(1, 129)])
    assert mean == pytest.approx(3000.5 + rests, abs=1)


def test_plain_torch_has_no_known_padding_and_depth_2_no_known_work():
    work = layer_work(None, QWEN, 64, torch.float32)
    assert {product.row_tile for product in work.products} == {1}
    assert (work.dtype, work.element_bytes) == ("float32", 4)
    deep = QWEN.with_(activation="gelu", depth=2)
    with pytest.raises(ValueError, match="depth=2"):
        layer_work(None, deep, 64, torch.float32)
    with pytest.raises(ValueError, match="mode='backward'"):
        layer_work(None, QWEN, 64, torch.float32, "backward")
