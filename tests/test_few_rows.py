"""How inference of few rows is served: by tables or the rule, tuned, explained, and what keeps it from one launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_gpu import tune
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.explain import explain_layer
from moe_gpu.triton_kernels import tile_table
from moe_gpu.triton_kernels.products import decode_tile, given_tiles
from moe_gpu.triton_kernels.tile_table import Cell, Entry, choose_decode
from moe_gpu.triton_kernels.tuning import (
    HOPPER_DECODE_MOST_ROWS,
    HOPPER_DECODE_MOST_TOKENS,
    HOPPER_SHARED_BYTES,
    HopperDecodeConfig,
    TwoProducts,
    cdiv,
    hopper_decode_config,
)
from tests.tuning_cases import CELL, GLUON, GPU, H200, empty_table, table_of  # noqa: F401 fixtures

DECODE_CELL = Cell("decode", 16, 4, 768, 2048, 132)
LAUNCH = HopperDecodeConfig(16, 2, 1, 4)


def choose_few(tokens=64, **changed):
    sizes = {"num_rows": 8 * tokens, "num_tokens": tokens, "num_experts": 128, "input_dim": 2048, "hidden_dim": 768}
    return choose_decode(**{"dtype": torch.bfloat16, **sizes, "device_name": H200, "sms": 132, **changed})


def test_a_table_says_whether_few_rows_go_by_one_launch_and_by_which_tile(table_file):
    tile_table.write_table(table_file, table_of(Entry(DECODE_CELL, ((LAUNCH, 0.25), (TwoProducts(), 0.5)))))
    assert (choose_few().tile, choose_few().time_ms) == (LAUNCH, 0.25)
    assert str(table_file) in choose_few().reason
    for other in ({"tokens": 65}, {"hidden_dim": 8 * 768}, {"device_name": None}):
        choice = choose_few(**other)
        assert choice.reason.startswith("heuristic")
        tokens, hidden = other.get("tokens", 64), other.get("hidden_dim", 768)
        assert choice.tile == hopper_decode_config(8 * tokens, tokens, 128, 2048, hidden)


def test_two_products_serve_where_they_were_faster_and_beyond_the_rules_bounds(table_file):
    tokens, rows = HOPPER_DECODE_MOST_TOKENS, HOPPER_DECODE_MOST_ROWS
    assert choose_few(tokens=tokens, num_rows=128 * rows).tile is not None
    assert choose_few(tokens=tokens, num_rows=128 * rows + 1).tile is None
    assert choose_few(tokens=tokens + 1, num_rows=128 * rows).tile is None
    tile_table.write_table(table_file, table_of(Entry(DECODE_CELL, ((TwoProducts(), 0.25), (LAUNCH, 0.5)))))
    tile_table.forget_tables()
    assert choose_few().tile is None


def test_below_a_row_for_each_second_expert_the_rule_serves_few_rows(table_file):
    tile_table.write_table(
        table_file, table_of(Entry(replace(DECODE_CELL, rows_per_expert=1), ((TwoProducts(), 0.25),)))
    )
    assert choose_few(tokens=9).tile is None
    assert choose_few(tokens=8).tile == hopper_decode_config(64, 8, 128, 2048, 768)


def test_tiles_that_are_given_for_up_or_down_are_not_passed_over_by_one_launch():
    x = torch.zeros(64, 2048, dtype=torch.bfloat16)
    for given in ({"up": GLUON}, {"down": GLUON}, {"up": GLUON, "decode": TwoProducts()}):
        with given_tiles(given):
            assert decode_tile(x, 512, 128, 768, 132) is None
    with given_tiles({"up": GLUON, "decode": LAUNCH}):
        assert decode_tile(x, 512, 128, 768, 132) == LAUNCH


@pytest.mark.parametrize(
    "entry",
    [
        Entry(DECODE_CELL, ((GLUON, 0.25),)),
        Entry(CELL, ((LAUNCH, 0.25),)),
        Entry(DECODE_CELL, ((replace(LAUNCH, rows=24), 0.25),)),
        Entry(DECODE_CELL, ((replace(LAUNCH, up_fold=3), 0.25),)),
        Entry(DECODE_CELL, ((replace(LAUNCH, up_fold=1, height=256), 0.25),)),
        Entry(DECODE_CELL, ((replace(LAUNCH, height=128), 0.25),)),
    ],
    ids=("a product's tile", "of a product", "24 rows", "three folds", "256 weight rows", "folds of 128"),
)
def test_a_damaged_entry_of_few_rows_is_a_warning(entry, table_file, caplog):
    tile_table.write_table(table_file, table_of(entry))
    assert choose_few().reason.startswith("heuristic")
    assert "damaged" in caplog.text


def test_few_rows_are_planned_and_tried_with_all_that_fits():
    cases = [case for case in tune.plan(GPU, ["qwen3-30b-a3b"]) if case.cell.kind == "decode"]
    assert [case.cell.rows_per_expert for case in cases] == [1, 2, 4, 8, 16, 32, 64]
    assert cases[0].flops == PRESETS["qwen3-30b-a3b"].forward_flops(16 * 8)
    assert [case.tokens for case in tune.plan(GPU, ["qwen3-30b-a3b"], [1, 16, 4096], ["decode"])] == [16]
    newer = replace(GPU, capability=(10, 0))
    assert not tune.plan(newer, ["qwen3-30b-a3b"], kinds=["decode"])
    for case in cases:
        tiles, incumbents, current = tune._candidates_of(case, GPU)
        assert TwoProducts() in tiles
        assert current in tiles
        assert set(incumbents.values()) == {TwoProducts(), current}
        for tile in tiles:
            if isinstance(tile, HopperDecodeConfig):
                assert tile.stages * tile.stage_bytes + tile.sums_bytes + 1024 <= HOPPER_SHARED_BYTES


def test_inference_with_few_rows_is_explained_as_the_decode_path(table_file):
    config = PRESETS["qwen3-30b-a3b"]
    steps = explain_layer(GPU, config, 16, torch.bfloat16)
    assert [step.step for step in steps][:6] == ["route", "up (inference)", "down (inference)", "up", "down", "combine"]
    assert steps[1].path == "gluon decode"
    assert steps[2].min_bytes == steps[4].min_bytes + 2 * 128 * 2048  # float32, up to a row an expert
    assert steps[1].programs == 132
    assert explain_layer(GPU, config, 16, torch.bfloat16, sm_budget=66)[1].programs == 66
    steps = explain_layer(GPU, config, 128, torch.bfloat16)
    assert steps[1].path == "gluon decode"
    assert steps[2].min_bytes == steps[4].min_bytes
    for other in ({"num_tokens": 769}, {"dtype": torch.float32}):
        steps = explain_layer(GPU, config, **{"num_tokens": 16, "dtype": torch.bfloat16, **other})
        assert not any("decode" in step.path for step in steps)


def test_what_gluon_does_not_decode_plain_triton_does(table_file):
    newer, odd = replace(GPU, capability=(10, 0)), MoEConfig(2044, 2044, 768, 128, 8)
    for gpu, config in ((newer, PRESETS["qwen3-30b-a3b"]), (GPU, odd)):
        assert explain_layer(gpu, config, 16, torch.bfloat16)[1].path == "decode"
        for other in ({"num_tokens": 17}, {"sm_budget": 66}):
            steps = explain_layer(gpu, config, **{"num_tokens": 16, "dtype": torch.bfloat16, **other})
            assert not any("decode" in step.path for step in steps)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"save": True}, "keep nothing for a gradient"),
        ({"depth": 2}, "depth 1, not 2"),
        ({"dtype": torch.float32}, "not in torch.float32"),
        ({"experts": 513}, "513 experts are more than 512"),
        ({"width": 36}, "do not start on 16 bytes"),
        ({"hidden": 20}, "do not start on 16 bytes"),
        ({"by_column": True}, "strided"),
        ({"offset": 1}, "does not start on 16 bytes"),
    ],
    ids=str,
)
def test_why_the_launch_for_few_rows_does_not_serve(changed, reason, monkeypatch):
    from moe_gpu.triton_kernels import decode

    monkeypatch.setattr(decode, "hopper_unavailable", lambda device: None)
    sizes = {"tokens": 5, "width": 64, "hidden": 32, "experts": 8, "dtype": torch.bfloat16, "depth": 1, "save": False}
    case = {**sizes, "by_column": False, "offset": 0, **changed}
    experts, width, hidden = case["experts"], case["width"], case["hidden"]
    x = torch.empty(case["tokens"] * width + 1, dtype=case["dtype"])[case["offset"] :][: case["tokens"] * width]
    up = torch.empty(experts, 2 * hidden, width, dtype=case["dtype"])
    down = torch.empty(experts, width, hidden, dtype=case["dtype"])
    if case["by_column"]:
        down = down.transpose(1, 2).contiguous().transpose(1, 2)
    got = decode.hopper_decode_unfit(x.view(-1, width), (up, down), experts, case["depth"], case["save"])
    assert got is None if reason is None else reason in got


def test_there_are_counters_for_every_row_tile_that_the_rule_can_give_and_more_are_cleared():
    from moe_gpu.triton_kernels.counters import Counters

    for experts in (1, 8, 128, 512):
        for rows in range(1, 48 * experts + 1):
            tile = hopper_decode_config(rows, 256, experts, 2048, 768)
            assert 1 + cdiv(rows, tile.rows) + min(rows, experts) <= Counters.SIZE
    more = Counters().get(torch.device("cpu"), 5 * Counters.SIZE)
    assert more.shape == (5 * Counters.SIZE,)
    assert not more.any()


@pytest.mark.parametrize("sizes", [(2048, 768), (4096, 14336), (7168, 2048), (40, 24)])
def test_every_tile_for_few_rows_fits_in_shared_memory_and_grows_with_the_rows(sizes):
    tiles = [hopper_decode_config(rows, 256, 128, *sizes) for rows in range(1, 48 * 128 + 1)]
    for tile in set(tiles):
        assert tile.stages * tile.stage_bytes + tile.sums_bytes + 1024 <= HOPPER_SHARED_BYTES
    assert [tile.rows for tile in tiles] == sorted(tile.rows for tile in tiles)
    assert {tile.rows for tile in tiles} == {8, 16, 32, 64}
    assert hopper_decode_config(128 * 8, 257, 128, *sizes).rows == 64
