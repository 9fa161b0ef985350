"""Tables of tiles: what is looked up where, damage that never breaks a call, what the tuner picks, and explanations."""

from __future__ import annotations

import builtins
import json
import logging
import timeit
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_gpu import tune, tune_problem
from moe_gpu.config import PRESETS
from moe_gpu.explain import described_gpu, explain_layer, layer_products, layer_work
from moe_gpu.triton_kernels import tile_table
from moe_gpu.triton_kernels.tile_table import Entry, choose_tile, rows_bucket
from moe_gpu.triton_kernels.tuning import (
    HOPPER_MIN_ROWS_PER_EXPERT,
    HOPPER_SHARED_BYTES,
    KINDS,
    TUNED,
    GemmConfig,
    HopperConfig,
    gemm_config,
    operand_bytes,
    tile_beside_bias,
)
from tests.tuning_cases import CELL, GLUON, GPU, H200, MACHINE, OTHER, PLAIN, empty_table, table_of  # noqa: F401 fixtures


def choose(rows=256 * 128, shape=(1536, 2048), sms=132, hopper=True, dtype=torch.bfloat16, kind="up", name=H200):
    return choose_tile(kind, dtype, rows, 128, shape, name, sms, HOPPER_SHARED_BYTES, hopper)


def by_rule(rows=256 * 128, hopper=True, dtype=torch.bfloat16):
    return gemm_config("up", dtype, rows, 128, HOPPER_SHARED_BYTES, hopper)


def test_a_written_table_reads_back_and_its_folder_is_named_by_the_variable(table_file, tmp_path):
    table = table_of(Entry(CELL, ((GLUON, 0.25), (PLAIN, 0.5))))
    tile_table.write_table(table_file, table)
    assert table_file == tmp_path / "cache" / "tiles" / "h200.json"
    assert tile_table.read_table(table_file, H200) == table
    assert list(table_file.parent.iterdir()) == [table_file]


def test_the_entry_of_a_cell_serves_and_the_other_path_where_gluon_cannot(table_file):
    tile_table.write_table(table_file, table_of(Entry(CELL, ((GLUON, 0.25), (PLAIN, 0.5)))))
    assert choose().tile == GLUON
    assert choose().time_ms == 0.25
    assert str(table_file) in choose().reason
    assert "up to 256 rows an expert" in choose().reason
    assert choose(hopper=False).tile == PLAIN
    assert choose(rows=200 * 128).tile == GLUON, "the bucket of 129 to 256 rows"


def test_below_the_hosts_bound_no_table_brings_gluon(table_file):
    at, few = replace(CELL, rows_per_expert=16), 15 * 128
    tile_table.write_table(table_file, table_of(Entry(at, ((GLUON, 0.25), (PLAIN, 0.26)))))
    assert choose(rows=16 * 128).tile == GLUON
    assert choose(rows=few).tile == by_rule(few), "the plain tile beside it was measured at 16 rows an expert"
    tile_table.write_table(table_file, table_of(Entry(at, ((PLAIN, 0.25), (GLUON, 0.26)))))
    tile_table.forget_tables()
    assert choose(rows=few).tile == PLAIN


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": 128 * 128},
        {"rows": 257 * 128},
        {"kind": "down"},
        {"shape": (64, 2048)},
        {"shape": (1536 * 4, 2048 * 2)},
        {"shape": None},
        {"name": None},
        {"name": "NVIDIA A100-SXM4-80GB"},
        {"dtype": torch.float32},
    ],
    ids=str,
)
def test_no_entry_is_the_heuristic(changed, table_file):
    tile_table.write_table(table_file, table_of(Entry(CELL, ((GLUON, 0.25),))))
    choice = choose(**changed)
    assert "heuristic" in choice.reason
    rows, kind = changed.get("rows", 256 * 128), changed.get("kind", "up")
    dtype = changed.get("dtype", torch.bfloat16)
    assert choice.tile == gemm_config(kind, dtype, rows, 128, HOPPER_SHARED_BYTES, True)


@pytest.mark.parametrize(
    ("kind", "rows_per_expert", "tall"),
    [
        ("up", 64, False),
        ("up", 65, True),
        ("up", 1024, True),
        ("up", 1025, False),
        ("down", 512, True),
        ("down", 513, False),
        ("grad_x", 128, True),
        ("grad_act", 128, False),
        ("grad_w", 128, False),
    ],
)
def test_tiles_of_192_rows_serve_by_rule_where_one_reads_what_two_would(kind, rows_per_expert, tall):
    tile = gemm_config(kind, torch.bfloat16, rows_per_expert * 8, 8, HOPPER_SHARED_BYTES, True)
    assert tile.rows == (192 if tall else 128)
    assert tile.claimed == (tall or (kind == "up" and rows_per_expert == 64))
    assert tile_beside_bias(kind, tile).rows == 128
    assert isinstance(gemm_config(kind, torch.bfloat16, rows_per_expert * 8, 8, HOPPER_SHARED_BYTES, False), GemmConfig)


def test_the_nearest_shape_and_then_the_nearest_budget_serve(table_file):
    tiles = [replace(GLUON, group_m=group) for group in (1, 2, 3)]
    cells = (CELL, replace(CELL, sms=66), replace(CELL, n=3072))
    entries = [Entry(cell, ((tile, 1.0),)) for cell, tile in zip(cells, tiles, strict=True)]
    tile_table.write_table(table_file, table_of(*entries))
    assert choose().tile == tiles[0]
    assert choose(sms=50).tile == tiles[1]
    assert choose(shape=(2880, 2048), sms=66).tile == tiles[2]


def test_a_load_aware_tile_is_kept_with_its_classes(table_file):
    aware = GemmConfig(128, 64, 64, 8, 3, 8, 2, smaller_ms=(16, 64))
    tile_table.write_table(table_file, table_of(Entry(CELL, ((aware, 0.25),))))
    assert choose(hopper=False).tile == aware
    up = explain_layer(described_gpu(H200), PRESETS["qwen3-30b-a3b"], 4096, torch.bfloat16)[1]
    assert up.tile["smaller_ms"] == (16, 64)
    work = layer_work(described_gpu(H200), PRESETS["qwen3-30b-a3b"], 4096, torch.bfloat16).products[0]
    assert (work.row_tile, work.smaller_tiles) == (128, (16, 64))


def test_a_tall_claimed_tile_is_kept_and_gives_way_to_a_bias(table_file):
    tall = HopperConfig(3, rows=192, claimed=True)
    tile_table.write_table(table_file, table_of(Entry(CELL, ((tall, 0.25),))))
    assert choose().tile == tall
    assert tile_beside_bias("up", tall) == gemm_config("up", torch.bfloat16, 1025, 1, hopper=True)
    assert tile_beside_bias("up", GLUON) == GLUON
    assert tile_beside_bias("up", PLAIN) == PLAIN
    config = PRESETS["qwen3-30b-a3b"]
    up, biased = (
        explain_layer(described_gpu(H200), c, 4096, torch.bfloat16)[1] for c in (config, config.with_(bias=True))
    )
    assert (up.tile["rows"], biased.tile["rows"]) == (192, 128)
    assert "bias" in biased.why


@pytest.mark.parametrize(
    ("tile", "gated", "width"),
    [
        (HopperConfig(3, width=256), False, 256),
        (HopperConfig(3, width=256), True, 128),
        (HopperConfig(3, width=256, rows=192), False, 128),
        (HopperConfig(3, width=128, rows=192), True, 64),
        (HopperConfig(3, width=64, rows=192), True, 64),
    ],
)
def test_a_store_is_no_wider_than_what_a_tile_ends_with(tile, gated, width):
    assert tile.store_width(gated) == width


def test_an_entry_of_gluon_alone_does_not_serve_where_gluon_cannot(table_file):
    tile_table.write_table(table_file, table_of(Entry(CELL, ((GLUON, 0.25),))))
    assert choose(hopper=False).tile == by_rule(hopper=False)


def test_the_users_table_comes_before_the_shipped_one(table_file):
    shipped = tile_table.shipped_path(H200)
    tile_table.write_table(
        shipped, table_of(Entry(CELL, ((PLAIN, 1.0),)), Entry(replace(CELL, k=512), ((PLAIN, 1.0),)))
    )
    assert choose().tile == PLAIN
    tile_table.write_table(table_file, table_of(Entry(CELL, ((GLUON, 1.0),))))
    tile_table.forget_tables()
    assert choose().tile == GLUON
    assert choose(shape=(1536, 128)).tile == PLAIN


# Of the rows of smaller tiles beside tiles of 64.
DAMAGED_CLASSES = {
    "a class of 24 rows": [24],
    "a class as large as the tile": [16, 64],
    "a class twice": [16, 16],
    "classes in one number": 16,
    "classes in words": ["few"],
}


def damaged(what: str, whole: dict) -> str:
    entry = whole["entries"][0]
    if what == "cut":
        return json.dumps(whole)[:-40]
    if what == "a list":
        return "[]"
    if what == "newer":
        whole["schema"] = 2
    elif what == "foreign":
        whole["machines"][0]["device"] = "NVIDIA A100"
    elif what == "no machine":
        whole["machines"] = []
    elif what == "machine out of range":
        entry["machine"] = 3
    elif what == "no entries":
        del whole["entries"]
    elif what == "unknown field":
        entry["tiles"][0]["mood"] = 1
    elif what == "unknown path":
        entry["tiles"][0]["path"] = "cuda"
    elif what == "block of 48" or what in DAMAGED_CLASSES:
        smaller = DAMAGED_CLASSES.get(what)
        entry["tiles"][0] = {"path": "triton", "block_m": 48, "block_n": 64, "block_k": 64, "num_warps": 4}
        entry["tiles"][0] |= {"num_stages": 3, "time_ms": 1.0}
        if smaller is not None:
            entry["tiles"][0] |= {"block_m": 64, "smaller_ms": smaller}
    elif what == "rows of 160":
        entry["tiles"][0]["rows"] = 160
    elif what == "claimed in words":
        entry["tiles"][0]["claimed"] = "yes"
    elif what == "no time":
        entry["tiles"][0]["time_ms"] = None
    elif what == "size of nought":
        entry["n"] = 0
    elif what == "tiles of text":
        entry["tiles"] = ["fast"]
    return json.dumps(whole)


DAMAGES = (
    *DAMAGED_CLASSES,
    "cut",
    "a list",
    "newer",
    "foreign",
    "no machine",
    "machine out of range",
    "no entries",
    "unknown field",
    "unknown path",
    "block of 48",
    "rows of 160",
    "claimed in words",
    "no time",
    "size of nought",
    "tiles of text",
)


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_table_is_one_warning_that_names_it_then_the_heuristic(what, table_file, caplog):
    tile_table.write_table(table_file, table_of(Entry(CELL, ((GLUON, 0.25),))))
    table_file.write_text(damaged(what, json.loads(table_file.read_text())))
    with caplog.at_level(logging.WARNING):
        assert choose().tile == by_rule()
        assert choose(rows=128).tile == by_rule(rows=128)
    assert len(caplog.records) == 1
    assert str(table_file) in caplog.text
    assert caplog.text.count("\n") == 1


def test_a_binary_or_unreadable_table_is_a_warning_too(table_file, caplog):
    table_file.parent.mkdir(parents=True)
    table_file.write_bytes(b"\xff\xfe\x00")
    assert choose().tile == by_rule()
    table_file.unlink()
    table_file.mkdir()
    tile_table.forget_tables()
    assert choose().tile == by_rule()
    assert len(caplog.records) == 2


def test_a_cache_folder_that_is_a_file_is_no_table(table_file, monkeypatch, caplog):
    table_file.parent.parent.write_text("not a folder")
    assert choose().tile == by_rule()
    assert not caplog.records


def test_after_the_first_answer_nothing_is_read_and_it_costs_no_time(table_file, monkeypatch):
    tile_table.write_table(table_file, table_of(Entry(CELL, ((GLUON, 0.25),))))
    first = choose()

    def refuse(*_, **__):
        raise AssertionError("a file was opened on the hot path")

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    assert choose() is first
    assert choose(rows=255 * 128).tile == GLUON, "another size asks the table in memory"
    arguments = ("up", torch.bfloat16, 256 * 128, 128, (1536, 2048), H200, 132, HOPPER_SHARED_BYTES, True)
    seconds = min(timeit.repeat(lambda: choose_tile(*arguments), number=1000, repeat=5)) / 1000
    assert seconds < 5e-6


def test_tokens_within_a_bucket_do_not_change_the_tile():
    assert [rows_bucket(rows, 8) for rows in (0, 1, 8, 9, 16, 17, 1 << 30)] == [1, 1, 1, 2, 2, 4, 4096]


def test_a_new_run_replaces_its_own_cells_and_keeps_the_others_with_their_machine():
    later = replace(MACHINE, recorded_at="later")
    old = table_of(Entry(CELL, ((PLAIN, 1.0),)), Entry(replace(CELL, n=64), ((PLAIN, 2.0),)))
    merged = old.merged(later, [Entry(CELL, ((GLUON, 0.5),))], ())
    found = {entry.cell.n: (entry.tiles[0][0], merged.machines[entry.machine]) for entry in merged.entries}
    assert found == {1536: (GLUON, later), 64: (PLAIN, MACHINE)}
    again = merged.merged(later, [Entry(replace(CELL, n=64), ((GLUON, 0.5),)), *merged.entries[1:]], ())
    assert again.machines == (later,)


SHIPPED = sorted((Path(tile_table.__file__).parent / "tiles").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_table_is_whole_and_lies_where_its_device_looks(path):
    device = json.loads(path.read_text())["machines"][0]["device"]
    assert tile_table.shipped_path(device) == path
    table = tile_table.read_table(path, device)
    assert {entry.cell.kind for entry in table.entries} == set(KINDS)
    assert {ceiling.name for ceiling in table.ceilings} == {"matmul", "copy"}
    assert all(machine.commit for machine in table.machines)


# Picking


def test_what_serves_stays_unless_beaten_by_more_than_a_hundredth():
    now = {"hopper": GLUON, "triton": PLAIN}
    faster = replace(GLUON, stages=4)
    assert tune.pick({GLUON: 1.0, faster: 0.995, PLAIN: 2.0}, now, GLUON) == ((GLUON, 1.0), (PLAIN, 2.0))
    assert tune.pick({GLUON: 1.0, faster: 0.98, PLAIN: 2.0}, now, GLUON)[0] == (faster, 0.98)
    assert tune.pick({GLUON: 1.0, PLAIN: 0.995, OTHER: 0.992}, now, GLUON) == ((GLUON, 1.0), (PLAIN, 0.995))
    assert tune.pick({GLUON: 1.0, PLAIN: 0.7, OTHER: 0.5}, now, GLUON) == ((OTHER, 0.5), (GLUON, 1.0))
    assert tune.pick({PLAIN: 1.0, OTHER: 0.9}, {}, GLUON) == ((OTHER, 0.9),), "what served cannot run any more"
    assert tune.pick({}, now, GLUON) == ()


def numbers(error: float = 0.0) -> dict[str, torch.Tensor]:
    return {"out": torch.linspace(-1, 1, 64, dtype=torch.float64) + error}


def test_a_wrong_result_is_told_from_a_right_one():
    rounded = {"out": numbers()["out"].bfloat16()}
    tune_problem.compare(rounded, rounded, numbers())
    for wrong in (numbers(0.05), {"out": torch.zeros(64)}, {"out": torch.full((64,), torch.nan)}):
        with pytest.raises(tune_problem.WrongTileError, match="out is wrong"):
            tune_problem.compare(wrong, rounded, numbers())


# Plans and candidates


def test_a_plan_has_a_case_for_every_cell_and_none_twice():
    cases = tune.plan(GPU, ["qwen3-30b-a3b"], tokens=[4096, 4000, 64], sm_budgets=[132, 66])
    distinct = len({case.cell for case in cases})
    assert distinct == len(cases) == 2 * (2 * 7 + 1), "4000 and 4096 tokens share a bucket, and are not few"
    assert {case.cell.kind for case in cases} == set(TUNED)
    assert {case.cell.rows_per_expert for case in cases} == {4, 256}
    only = tune.plan(GPU, ["mixtral-8x7b"], kinds=["down"])
    assert [case.cell.rows_per_expert for case in only] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    with pytest.raises(ValueError, match="--sm-budget 133 exceeds the 132 SMs"):
        tune.plan(GPU, ["qwen3-30b-a3b"], sm_budgets=[133])
    skewed = tune.plan(GPU, ["qwen3-30b-a3b"], kinds=["up"], tokens=[512], routing="zipf-1.2")
    assert [str(case) for case in skewed] == ["qwen3-30b-a3b up T=512 zipf-1.2 on 132 SMs"]
    for routing in ("trace", "steep"):
        with pytest.raises(ValueError, match=routing):
            tune.plan(GPU, ["qwen3-30b-a3b"], routing=routing)


@pytest.mark.parametrize("rows", [4, 32, 64, 256, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_fit_the_gpu_and_hold_what_the_rules_choose(kind, rows):
    tiles = tune.candidates(kind, rows, HOPPER_SHARED_BYTES, gated=True, hopper=True)
    assert len(tiles) == len(set(tiles)) <= 44
    assert all(operand_bytes(kind, tile) < HOPPER_SHARED_BYTES for tile in tiles)
    assert gemm_config(kind, torch.bfloat16, rows, 1, hopper=rows >= HOPPER_MIN_ROWS_PER_EXPERT) in tiles
    hopper = [tile for tile in tiles if isinstance(tile, HopperConfig)]
    assert {tile.group_m for tile in hopper} == {4, 8, 16}
    assert not any(isinstance(t, HopperConfig) for t in tune.candidates(kind, rows, HOPPER_SHARED_BYTES, True, False))


# Explanations


def test_an_explanation_names_entry_floor_and_measured_time(table_file):
    tile_table.write_table(table_file, table_of(Entry(CELL, ((GLUON, 0.25), (PLAIN, 0.5)))))
    gpu = described_gpu(H200)
    assert (gpu.capability, gpu.num_sms, gpu.device) == ((9, 0), 132, None)
    steps = {step.step: step for step in explain_layer(gpu, PRESETS["qwen3-30b-a3b"], 4096, torch.bfloat16)}
    up = steps["up"]
    assert (up.path, up.programs, up.measured_ms, up.not_hopper) == ("gluon", 132, 0.25, None)
    assert str(table_file) in up.why
    assert up.floor_ms == pytest.approx(max(up.flops / 8e14, up.min_bytes / 4e12) * 1e3)
    assert steps["down"].why.startswith("heuristic")
    assert steps["combine"].tile is None


def test_an_explanation_says_why_gluon_cannot_serve(table_file):
    odd = PRESETS["qwen3-30b-a3b"].with_(hidden_dim=100)
    up = explain_layer(described_gpu(H200), odd, 4096, torch.bfloat16)[1]
    assert (up.path, up.not_hopper) == ("triton", "a width of 200 is not a multiple of 64")
    a100 = described_gpu("NVIDIA A100-SXM4-80GB")
    steps = explain_layer(a100, PRESETS["qwen3-30b-a3b"], 4096, torch.bfloat16, sm_budget=20)
    assert all("has 8.0" in step.not_hopper for step in steps if step.tile)
    assert all(step.programs <= 40 for step in steps if step.tile)
    assert any("copy of the gathered rows" in step.why for step in steps)
    wide = explain_layer(described_gpu(H200), PRESETS["small"], 64, torch.float32)
    assert {step.path for step in wide} == {"triton"}


def test_the_flops_of_the_products_are_those_of_the_layer():
    config = PRESETS["qwen3-30b-a3b"]
    steps = explain_layer(GPU, config, 1024, torch.bfloat16)
    assert sum(step.flops for step in steps) == 3 * config.forward_flops(1024 * 8)
    assert {product.kind for product in layer_products(config)} == set(KINDS) - {"grad_w"}
