"""Every product of the kernels for Hopper compiles for sm_90 as it is launched: no spills, its units in use."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

from moe_gpu.config import ACTIVATIONS
from moe_gpu.triton_kernels import tile_table, tuning
from moe_gpu.triton_kernels.hopper import grouped_gemm_hopper
from moe_gpu.triton_kernels.hopper_common import RowTiles, list_row_tiles
from moe_gpu.triton_kernels.hopper_grad import grouped_gemm_grad_act_hopper
from moe_gpu.triton_kernels.hopper_grad_w import grouped_gemm_grad_w_hopper
from moe_gpu.triton_kernels.tuning import HopperConfig
from moe_gpu.tune import candidates
from tests.aot.compiling import CHOSEN_TRITON, compiling_launches

ARCH = 90
EXPERTS, TOKENS, TOP_K, WIDTH, HIDDEN = 128, 2048, 8, 2048, 768
ROWS, PROGRAMS = TOKENS * TOP_K, 132
Launch = Callable[["Operands", HopperConfig], object]


class Operands:
    """Tensors without storage, and the list of row tiles over them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.route = self.new(ROWS, dtype=torch.int32)
        self.offsets = self.new(EXPERTS + 1, dtype=torch.int32)
        self.routing_weights = self.new(TOKENS, TOP_K, dtype=torch.float32)

    def row_tiles(self, config: HopperConfig) -> RowTiles:
        return list_row_tiles(self.offsets, ROWS, config.rows)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def weights(self, rows: int, columns: int, by_row: bool = True) -> torch.Tensor:
        return self.new(EXPERTS, rows, columns) if by_row else self.new(EXPERTS, columns, rows).transpose(1, 2)


def hidden_columns(activation: str) -> int:
    return HIDDEN * (2 if ACTIVATIONS[activation].gated else 1)


def up(on: Operands, config: HopperConfig, activation: str, save_h=False, bias=False, gather=True, by_row=True):
    hidden = hidden_columns(activation)
    grouped_gemm_hopper(
        on.new(TOKENS if gather else ROWS, WIDTH),
        on.weights(hidden, WIDTH, by_row),
        on.row_tiles(config),
        config,
        PROGRAMS,
        activation=activation,
        save_h=save_h,
        bias_EN=on.new(EXPERTS, hidden) if bias else None,
        **({"route_R": on.route, "top_k": TOP_K} if gather else {}),
    )


def down(on: Operands, config: HopperConfig, bias=False, by_row=True):
    bias_EN = on.new(EXPERTS, WIDTH) if bias else None
    grouped_gemm_hopper(
        on.new(ROWS, HIDDEN), on.weights(WIDTH, HIDDEN, by_row), on.row_tiles(config), config, PROGRAMS, bias_EN=bias_EN
    )


def grad_x(on: Operands, config: HopperConfig, by_row=False):
    grouped_gemm_hopper(
        on.new(ROWS, 2 * HIDDEN), on.weights(WIDTH, 2 * HIDDEN, by_row), on.row_tiles(config), config, PROGRAMS
    )


def grad_act(on: Operands, config: HopperConfig, activation: str, gather=True, by_row=False):
    grouped_gemm_grad_act_hopper(
        on.new(TOKENS if gather else ROWS, WIDTH),
        on.weights(HIDDEN, WIDTH, by_row),
        on.new(ROWS, hidden_columns(activation)),
        activation,
        on.row_tiles(config),
        config,
        PROGRAMS,
        **({"route_R": on.route, "route_weight_TK": on.routing_weights} if gather else {}),
    )


def grad_w(on: Operands, config: HopperConfig, gather=False, transposed=False):
    grouped_gemm_grad_w_hopper(
        on.new(TOKENS if gather else ROWS, WIDTH),
        on.new(ROWS, HIDDEN),
        on.new(EXPERTS, HIDDEN, WIDTH) if transposed else on.new(EXPERTS, WIDTH, HIDDEN),
        on.offsets,
        config,
        PROGRAMS,
        transposed=transposed,
        **({"route_R": on.route, "top_k": TOP_K} if gather else {}),
    )


# Every function, gated or not; reglu and geglu_tanh differ from them by what grad_act compiles, too.
SAVING = tuple(act for act in ACTIVATIONS if act not in ("reglu", "geglu_tanh"))
LAUNCHES: dict[str, dict[str, Launch]] = {
    "up": {
        "swiglu": functools.partial(up, activation="swiglu"),
        "swiglu, weights by column": functools.partial(up, activation="swiglu", save_h=True, by_row=False),
        "silu": functools.partial(up, activation="silu"),
        "between linear layers": functools.partial(up, activation="silu", save_h=True, bias=True, gather=False),
        **{f"{act}, saved H": functools.partial(up, activation=act, save_h=True) for act in SAVING},
        **{
            f"{act}, saved H, bias": functools.partial(up, activation=act, save_h=True, bias=True)
            for act in ("swiglu", "relu")
        },
    },
    "down": {
        "plain": down,
        "bias": functools.partial(down, bias=True),
        "weights by column": functools.partial(down, by_row=False),
    },
    "grad_x": {"plain": grad_x, "weights by row": functools.partial(grad_x, by_row=True)},
    "grad_act": {
        **{act: functools.partial(grad_act, activation=act) for act in ACTIVATIONS},
        "swiglu, weights by row": functools.partial(grad_act, activation="swiglu", by_row=True),
        "between linear layers": functools.partial(grad_act, activation="silu", gather=False),
    },
    "grad_w": {"plain": grad_w, "transposed": functools.partial(grad_w, transposed=True)},
    "grad_w_gather": {
        "plain": functools.partial(grad_w, gather=True),
        "transposed": functools.partial(grad_w, gather=True, transposed=True),
    },
}
# Words that a thread spills all the same: the error function beside a tile's sums, or pre-activations stored beside
# the function. They may only fall.
SPILLS = {
    "grad_act-geglu": 92,
    "grad_act-geglu_tanh": 4,
    "up-silu, saved H": 6,
    "up-gelu, saved H": 4,
    "up-gelu_tanh, saved H": 12,
}
TALL_SPILLS = {"up-swiglu, weights by column": 4, "up-swiglu, saved H": 4, "up-geglu, saved H": 40}

# Of the tuner's candidates, one of each kind that differs from the rules' by more than numbers.
OFFERED = {
    "up": [HopperConfig(3, rows=192, claimed=True), tuning._CLAIMED],
    "down": [HopperConfig(3, width=128, slots=1, rows=192, claimed=True), tuning._CLAIMED],
    "grad_x": [HopperConfig(3, width=128, slots=1, rows=192, claimed=True)],
}
# What is launched with them beside the first of each kind. Of the activations, the one that is rated and the one that
# spills most; never beside a bias in 192 rows, as tile_beside_bias sees to.
WITH_CLAIMED = ("swiglu, saved H",)
WITH_TALL = ("swiglu, saved H", "geglu, saved H", "swiglu, weights by column", "weights by row")


def by_rule(kind: str) -> list[HopperConfig]:
    """What serves a kind of product where no table does, and what the tuner offers beside it."""
    return [tuning._HOPPER[kind], *OFFERED.get(kind, ())]


def in_tables(kind: str) -> list[HopperConfig]:
    """What else the package's tables hold: of each store one, since order and stages of tiles are no more than numbers.

    That with the most stages, which takes the most memory, and claimed if any is, which takes the most registers.
    """

    def store_of(config: HopperConfig) -> tuple[int, int, int]:
        return config.rows, config.width, config.slots

    found: dict[tuple[int, int, int], HopperConfig] = {}
    for path in (Path(tile_table.__file__).parent / "tiles").glob("*.json"):
        device = json.loads(path.read_text())["machines"][0]["device"]
        tiles = {
            tile for e in tile_table.read_table(path, device).entries if e.cell.kind == kind for tile, _ in e.tiles
        }
        for tile in sorted((tile for tile in tiles if isinstance(tile, HopperConfig)), key=astuple):
            have = found.get(store_of(tile), tile)
            most, claimed = max(have.stages, tile.stages), have.claimed or tile.claimed
            found[store_of(tile)] = replace(tile, group_m=8, stages=most, claimed=claimed)
    compiled = {store_of(config) for config in by_rule(kind)}
    return [config for store, config in sorted(found.items()) if store not in compiled]


def test_the_tuner_offers_what_is_compiled():
    for kind, configs in OFFERED.items():
        assert set(configs) <= set(candidates(kind, 256, tuning.HOPPER_SHARED_BYTES, kind == "up", True))


def launches_with(kind: str, config: HopperConfig) -> list[str]:
    """All with the tile by rule; with others one, and those whose registers depend on the tile."""
    first, *others = LAUNCHES[kind]
    if config == tuning._HOPPER[kind]:
        return [first, *others]
    if config not in OFFERED.get(kind, ()):
        return [first, *(name for name in others if name == "swiglu, saved H")]
    if not CHOSEN_TRITON:
        return [first]
    return [first, *(name for name in others if name in (WITH_TALL if config.rows > 128 else WITH_CLAIMED))]


def cases():
    for kind in LAUNCHES:
        rule, offered = tuning._HOPPER[kind], OFFERED.get(kind, ())
        if not CHOSEN_TRITON:  # tiles differ in numbers alone; those of 192 rows in code
            offered = [config for config in offered if config.rows > 128][:1]
        for config in (rule, *offered, *(in_tables(kind) if CHOSEN_TRITON else ())):
            names = launches_with(kind, config)
            both = [(names[0], torch.float16)] if config == rule and kind in ("up", "grad_act", "grad_w_gather") else []
            for name, dtype in [*((name, torch.bfloat16) for name in names), *both]:
                yield pytest.param(kind, config, name, dtype, id=f"{kind}-{name}-{dtype}-{config}")


@pytest.mark.parametrize(("kind", "config", "name", "dtype"), list(cases()))
def test_product(kind, config, name, dtype):
    with compiling_launches(ARCH) as launches:
        LAUNCHES[kind][name](Operands(dtype), config)
    *_, product = launches
    allowed = SPILLS if config.rows == 128 else TALL_SPILLS
    assert product.spills <= allowed.get(f"{kind}-{name}", 0)
    assert product.shared_bytes <= tuning.HOPPER_SHARED_BYTES
    assert product.num_wgmma > 0
    assert product.num_mma_sync == 0
    assert product.num_tma > 0
    assert product.num_setmaxnreg > 0
    gathers = kind in ("up", "grad_act", "grad_w_gather") and name != "between linear layers"
    assert (product.num_async_copies > 0) == gathers


@pytest.mark.parametrize("num_experts", [1, 8, 128, 512])
def test_list_of_row_tiles(num_experts):
    with compiling_launches(ARCH) as launches:
        list_row_tiles(torch.empty(num_experts + 1, dtype=torch.int32, device="meta"), 4096)
    assert launches[0].spills == 0
    assert "griddepcontrol.wait" in launches[0].ptx
