"""Tile configurations, and the rules that choose one where no measured table (tile_table.py) has an entry.

The rules come from runs on an H200; `benchmarks/results/README.md` says which of them were recorded. GPUs with less
shared memory a program get narrower tiles that fit, not tuned there. Buckets keep a change of T from compiling anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own costs microseconds a call on the host, several times a launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, 1 for n of 0 or 1."""
    return 1 << max(0, n - 1).bit_length()


# Row tiles that one launch can hold: from the least of the tensor cores' products on.
ROW_CLASSES = (16, 32, 64, 128)


@dataclass(frozen=True)
class GemmConfig:
    """Tile of a grouped product: BLOCK_M rows, BLOCK_N columns (of each half when gated), BLOCK_K deep.

    smaller_ms: rows of the smaller tiles, one of which takes what is left of an expert's rows after tiles of BLOCK_M:
    some of ROW_CLASSES. Of the products by `grouped_gemm_forward` alone (`up`, `down`, `grad_x`).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    programs_per_sm: int = 1
    smaller_ms: tuple[int, ...] = ()


def row_classes_fit(tile: GemmConfig) -> bool:
    """Whether the classes of row tiles are what one launch can hold: none, or some of ROW_CLASSES below BLOCK_M."""
    smaller = tile.smaller_ms
    if not smaller:
        return smaller == ()
    known = isinstance(smaller, tuple) and set(smaller) <= set(ROW_CLASSES) and len(set(smaller)) == len(smaller)
    return known and tile.block_m in ROW_CLASSES and max(smaller) < tile.block_m


@dataclass(frozen=True)
class HopperConfig:
    """A product by the warp-specialised kernels for Hopper: tiles of `rows` x 256, STAGES steps of 64 in flight.

    width, slots: columns of a store, and how many stores a consumer may have on their way. rows: 128, or for `up`,
    `down` and `grad_x` 192. claimed: programs claim tiles from a counter instead of taking every so many-th; for the
    same three kinds.
    """

    stages: int
    width: int = 64
    slots: int = 2
    group_m: int = 8
    rows: int = 128
    claimed: bool = False

    def store_width(self, gated: bool) -> int:
        """Columns of a store: `width`, but no more than the narrowest sums that a tile ends with."""
        return min(self.width, 256 // (2 if gated else 1) // (2 if self.rows > 128 else 1))


@dataclass(frozen=True)
class HopperDecodeConfig:
    """Of `hopper_decode.py`: tiles of `rows` rows of an expert against height // fold weight rows, and stages of both.

    An expert with more rows has tiles of twice as many. height: 64, or 128 without folds, in stages half as deep.
    """

    rows: int
    up_fold: int
    down_fold: int
    stages: int
    height: int = 64

    @property
    def columns(self) -> int:
        """Of the sums: a tile's rows for each fold."""
        return self.rows * max(self.up_fold, self.down_fold)

    @property
    def stage_bytes(self) -> int:
        """Of 256 columns of 64 weight rows, or 128 of 128, and as many columns of rows, all of 16 bits."""
        return 2 * 64 * (256 + 256 // self.height * self.columns)

    @property
    def sums_bytes(self) -> int:
        """Of float32 sums of 64 weight rows of a tile of twice the rows."""
        return 4 * 64 * self.columns * 2


@dataclass(frozen=True)
class TwoProducts:
    """Instead of that launch: up and down projection each by what serves it."""


@dataclass(frozen=True)
class MlpConfig:
    """Tile of the fused expert MLP: BLOCK_M rows, a slice of BLOCK_I of the intermediate, BLOCK_K and BLOCK_O steps."""

    block_m: int
    block_i: int
    block_k: int
    block_o: int
    num_warps: int
    num_stages: int


KINDS = ("up", "down", "grad_act", "grad_x", "grad_w", "grad_w_gather")
TUNED = (*KINDS, "decode")  # what tables have entries of: products, and up and down projection of few rows as one
_ANY = 1 << 62

# kind -> {rows per expert up to: tile}
_HALF: dict[str, dict[int, GemmConfig]] = {
    "up": {
        16: GemmConfig(16, 64, 128, 4, 4, programs_per_sm=2),
        40: GemmConfig(32, 64, 64, 4, 5, programs_per_sm=2),
        96: GemmConfig(64, 64, 64, 4, 4, programs_per_sm=2),
        512: GemmConfig(128, 128, 64, 8, 4, group_m=16),
        _ANY: GemmConfig(128, 128, 64, 8, 3),
    },
    "down": {
        16: GemmConfig(16, 128, 128, 4, 4, programs_per_sm=2),
        40: GemmConfig(32, 64, 128, 4, 4, programs_per_sm=2),
        96: GemmConfig(64, 128, 64, 8, 4, programs_per_sm=2),
        512: GemmConfig(128, 256, 64, 8, 4, group_m=16),
        _ANY: GemmConfig(128, 256, 64, 8, 3, group_m=16),
    },
    "grad_act": {
        96: GemmConfig(64, 64, 64, 4, 5, programs_per_sm=2),
        512: GemmConfig(64, 128, 64, 4, 4, programs_per_sm=2),
        _ANY: GemmConfig(128, 256, 64, 8, 4),
    },
    "grad_x": {96: GemmConfig(64, 128, 64, 4, 4, programs_per_sm=2), _ANY: GemmConfig(128, 256, 64, 8, 4)},
    "grad_w": {
        96: GemmConfig(32, 128, 128, 4, 2, programs_per_sm=2),
        512: GemmConfig(64, 128, 128, 4, 3, programs_per_sm=2),
        _ANY: GemmConfig(64, 128, 256, 8, 3),
    },
    "grad_w_gather": {
        96: GemmConfig(32, 128, 128, 4, 2, programs_per_sm=2),
        512: GemmConfig(64, 128, 128, 4, 4, programs_per_sm=2),
        _ANY: GemmConfig(64, 128, 256, 8, 5),
    },
}
# For 163 KiB of shared memory a program (compute capability 8.0): what serves more than 96 rows per expert there.
_NARROWER = {
    "up": GemmConfig(128, 64, 64, 8, 3),
    "down": GemmConfig(128, 128, 64, 8, 3),
    "grad_act": GemmConfig(64, 128, 64, 4, 3),
    "grad_x": GemmConfig(128, 128, 64, 8, 3),
    "grad_w": GemmConfig(32, 128, 128, 8, 3),
    "grad_w_gather": GemmConfig(32, 128, 128, 8, 3),
}
# For 99 KiB (8.6, 8.9, 12.0): small tiles, whatever the load.
_SMALL = {
    "up": {40: GemmConfig(32, 64, 64, 4, 3), _ANY: GemmConfig(64, 64, 64, 4, 3)},
    "down": {40: GemmConfig(32, 128, 64, 4, 3), _ANY: GemmConfig(64, 128, 64, 4, 3)},
    "grad_act": {_ANY: GemmConfig(64, 64, 64, 4, 3)},
    "grad_x": {_ANY: GemmConfig(64, 128, 64, 4, 3)},
    "grad_w": {_ANY: GemmConfig(32, 128, 128, 8, 3)},
    "grad_w_gather": {_ANY: GemmConfig(32, 128, 128, 8, 3)},
}
# For weights read as FP8: by what compiles without spills; no others were timed. 64 rows at most: beside the sums of a
# step that are still to be scaled, those of taller tiles would spill.
_FP8 = {
    "up": {
        16: GemmConfig(16, 64, 128, 4, 4, programs_per_sm=2),
        40: GemmConfig(32, 64, 64, 8, 6, programs_per_sm=2),
        _ANY: GemmConfig(64, 64, 64, 8, 6),
    },
    "down": {
        16: GemmConfig(16, 128, 128, 4, 4, programs_per_sm=2),
        40: GemmConfig(32, 64, 128, 4, 4, programs_per_sm=2),
        _ANY: GemmConfig(64, 128, 64, 8, 6),
    },
}
_FP8_SMALL = {
    "up": {_ANY: GemmConfig(32, 64, 64, 4, 3)},
    "down": {40: GemmConfig(32, 128, 64, 4, 3), _ANY: GemmConfig(64, 128, 64, 4, 3)},
}
# FP8 weights, rows an expert (h200_fp8_4810e96.jsonl, Qwen3): to 40, one row tile, the grouped products serve (16 rows:
# 0.249 ms); then the decode kernels, whose left operand is the weight (64 rows: 0.546 ms, grouped 0.797, dequantised
# first 0.808); from where their lines cross (256 rows: 1.580 and 1.052) weights are dequantised for the Hopper kernels.
FP8_GROUPED_ROWS_PER_EXPERT = 40
FP8_MAX_ROWS_PER_EXPERT = 128
# What compute capability 9.0 runs from HOPPER_MIN_ROWS_PER_EXPERT rows per expert on. Forward they win from there on,
# by 6 % at 16 rows and 15 % at 32 in graphs; launched eagerly they cost the host 0.04 ms more a layer (Qwen3, H200).
_HOPPER = {
    "up": HopperConfig(4),
    "down": HopperConfig(3, width=256, slots=1),
    "grad_act": HopperConfig(3),
    "grad_x": HopperConfig(3, width=256, slots=1),
    "grad_w": HopperConfig(4),
    "grad_w_gather": HopperConfig(4),
}
HOPPER_MIN_ROWS_PER_EXPERT = 16
# Up to 64 rows an expert, forward: claimed, they took 1 to 4 % less than in turns, Qwen3's 1024 tokens 354.7 instead of
# 358.8 us, DeepSeek-V3's 5540 instead of 5671, skewed 5841 instead of 6059 (printed).
_CLAIMED = HopperConfig(4, group_m=4, claimed=True)
# Rows per expert, beyond 64, up to which tiles of 192 rows serve: with them Qwen3's and Mixtral's products, tuned on an
# H200, took up to 10 % less, since one reads an expert's weights where two of 128 rows would.
_TALL_UP_TO = {"up": 1024, "down": 512, "grad_x": 1024}
_TALL = HopperConfig(3, slots=3, group_m=4, rows=192, claimed=True)
HOPPER_SHARED_BYTES, AMPERE_SHARED_BYTES, SMALL_SHARED_BYTES = 227 * 1024, 163 * 1024, 99 * 1024
_SHARED_BYTES = {
    (8, 0): AMPERE_SHARED_BYTES,
    (8, 7): AMPERE_SHARED_BYTES,
    (9, 0): HOPPER_SHARED_BYTES,
    (10, 0): HOPPER_SHARED_BYTES,
    (10, 3): HOPPER_SHARED_BYTES,
}
# What `decode_forward_hopper` serves, by what it and two products took on an H200, uniform and skewed
# (docs/kernels.md): it gains until items wait for the L2, the sooner the more rows there are.
HOPPER_DECODE_MOST_TOKENS, HOPPER_DECODE_MOST_ROWS = 2048, 48  # rows an expert
FOLDED_DEPTH = 4096
# Exact float32 runs on the plain cores: small tiles, whatever the load.
_FLOAT32 = GemmConfig(32, 32, 32, 4, 2, programs_per_sm=4)

# Up to how many rows per expert the fused expert MLP serves inference. 0: on an H200 the grouped products were faster
# at every size measured, since the partial sums of the fused kernel cost more than the intermediate it saves.
FUSED_MLP_MAX_ROWS_PER_EXPERT = 0


def tile_beside_bias(kind: str, tile: GemmConfig | HopperConfig) -> GemmConfig | HopperConfig:
    """The tile that serves where there is a bias: beside the sums of 192 rows it would spill."""
    return _HOPPER[kind] if isinstance(tile, HopperConfig) and tile.rows > 128 else tile


def operand_bytes(kind: str, tile: GemmConfig | HopperConfig, gated: bool = True) -> int:
    """Shared memory that the stages (and Hopper's output slots) of a tile of 16-bit numbers take, barriers aside."""
    if isinstance(tile, HopperConfig):
        columns = 5 * 64 if kind == "grad_act" else tile.slots * tile.width
        return 2 * ((tile.rows + 256) * 64 * tile.stages + 2 * 64 * columns)
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    if kind.startswith("grad_w"):
        # A loop that gathers spends two of its stages on the indices.
        return 2 * m * (n + k) * max(1, tile.num_stages - (2 if kind == "grad_w_gather" else 0))
    return 2 * (m * k + n * k * (2 if gated and kind == "up" else 1)) * tile.num_stages


def gather_first(width: int, num_rows: int, num_experts: int) -> bool:
    """Whether a weight gradient of `width` rows gains by copying its gathered operand into order first.

    Gathering inside the product costs a fifth of its rate on an H200; the copy costs reading and writing the rows.
    """
    return width >= 1024 and num_rows / num_experts > 96


def shared_bytes_of(capability: tuple[int, int]) -> int:
    """Shared memory that one program may use at a compute capability, where there is no such GPU to ask."""
    return _SHARED_BYTES.get(capability, SMALL_SHARED_BYTES)


def half_tiles(kind: str, shared_bytes: int) -> dict[int, GemmConfig]:
    """The 16-bit tiles of a kind where a program may use `shared_bytes` of shared memory.

    Each with the largest number of rows per expert that it serves.
    """
    if shared_bytes >= HOPPER_SHARED_BYTES:
        return _HALF[kind]
    if shared_bytes >= AMPERE_SHARED_BYTES:
        return {limit: tile if limit <= 96 else _NARROWER[kind] for limit, tile in _HALF[kind].items()}
    return _SMALL[kind]


def gemm_config(
    kind: str,
    dtype: torch.dtype,
    num_rows: int,
    num_experts: int,
    shared_bytes: int = HOPPER_SHARED_BYTES,
    hopper: bool = False,
) -> GemmConfig | HopperConfig:
    """The tile by rule for a product of `kind` (one of KINDS) over `num_rows` rows of all experts.

    hopper: whether the kernels for Hopper can serve; they do where they are faster.
    """
    if dtype == torch.float32:
        return _FLOAT32
    rows_per_expert = num_rows / num_experts
    if hopper and rows_per_expert >= HOPPER_MIN_ROWS_PER_EXPERT:
        if rows_per_expert <= 64 and kind in ("up", "down"):
            return _CLAIMED
        return _TALL if 64 < rows_per_expert <= _TALL_UP_TO.get(kind, 0) else _HOPPER[kind]
    return next(tile for limit, tile in half_tiles(kind, shared_bytes).items() if rows_per_expert <= limit)


def fp8_tiles(kind: str, shared_bytes: int) -> dict[int, GemmConfig]:
    """As `half_tiles`, of `up` and `down` with weights that are read as FP8."""
    return (_FP8 if shared_bytes >= AMPERE_SHARED_BYTES else _FP8_SMALL)[kind]


def fp8_config(kind: str, num_rows: int, num_experts: int, shared_bytes: int, step: int) -> GemmConfig:
    """The tile by rule for FP8 weights, no deeper than `step`: the scales of a step must be of one block."""
    tiles = fp8_tiles(kind, shared_bytes).items()
    tile = next(tile for limit, tile in tiles if num_rows / num_experts <= limit)
    return replace(tile, block_k=min(tile.block_k, step))


def load_aware_tiles(kind: str) -> list[GemmConfig]:
    """Tiles of several classes in one launch: a shape for few rows an expert, and one for many."""
    few = {"up": GemmConfig(128, 64, 64, 8, 3, 8, 2), "down": GemmConfig(128, 128, 64, 8, 3, 8, 2)}
    many = {"up": GemmConfig(128, 128, 64, 8, 4, 16), "down": GemmConfig(128, 256, 64, 8, 4, 16)}
    few["grad_x"], many["grad_x"] = few["down"], many["down"]
    if kind not in few:
        return []
    return [replace(tile, smaller_ms=smaller) for tile in (few[kind], many[kind]) for smaller in ((16, 64), (64,))]


def mlp_config(
    dtype: torch.dtype,
    hidden_dim: int,
    num_rows: int,
    num_experts: int,
    num_sms: int,
    shared_bytes: int = HOPPER_SHARED_BYTES,
) -> MlpConfig:
    """The tile of the fused expert MLP: slices of the intermediate narrow enough to give every SM work."""
    if dtype == torch.float32:
        return MlpConfig(16, 32, 32, 32, 4, 2)
    if shared_bytes < AMPERE_SHARED_BYTES:
        return MlpConfig(16, 32, 64, 64, 4, 3)
    active = min(num_rows, num_experts)
    narrow = active * cdiv(hidden_dim, 64) < num_sms
    tile = MlpConfig(16, 64, 128, 256, 8, 4)
    return replace(tile, block_i=32, num_warps=4) if narrow else tile


def hopper_decode_serves(num_rows: int, num_tokens: int, num_experts: int) -> bool:
    """Whether one launch computes up and down projection of so many rows of all experts, by rule."""
    return num_tokens <= HOPPER_DECODE_MOST_TOKENS and num_rows <= HOPPER_DECODE_MOST_ROWS * num_experts


def hopper_decode_config(
    num_rows: int, num_tokens: int, num_experts: int, input_dim: int, hidden_dim: int
) -> HopperDecodeConfig:
    """The fastest of the tiles tried on an H200 for the experts of Qwen3, Mixtral and DeepSeek-V3, skewed too.

    More rows in a tile than experts have cost stages, fewer cost reading weights again. Folding makes items even and
    pays where one is still many stages long, or where there are hardly more items than SMs.
    """
    if num_rows > 16 * num_experts or (num_rows > 4 * num_experts and num_tokens > 256):
        return HopperDecodeConfig(rows=64, up_fold=1, down_fold=1, stages=4, height=128)
    if num_rows > 4 * num_experts:
        return HopperDecodeConfig(rows=32, up_fold=1, down_fold=1, stages=4)
    up_fold, down_fold = (2 if depth >= FOLDED_DEPTH else 1 for depth in (input_dim, hidden_dim))
    if 2 * num_rows > num_experts:
        return HopperDecodeConfig(16, up_fold, down_fold, stages=4 if max(up_fold, down_fold) > 1 else 5)
    return HopperDecodeConfig(8, 2 if num_rows <= 8 else up_fold, down_fold, stages=5)
