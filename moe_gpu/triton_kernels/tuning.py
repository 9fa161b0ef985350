"""Every tile configuration: chosen from the kind of product, the dtype and the bucket of rows per expert, never timed.

The tables were found on an H200 with `benchmarks/tune_tiles.py`; `benchmarks/results/README.md` says which of the runs
were recorded. GPUs with less shared memory a program get narrower
tiles that fit, not tuned there. Buckets keep a change of T from compiling anew.
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


@dataclass(frozen=True)
class GemmConfig:
    """Tile of a grouped product: BLOCK_M rows, BLOCK_N columns (of each half when gated), BLOCK_K deep."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    programs_per_sm: int = 1


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
HOPPER_SHARED_BYTES, AMPERE_SHARED_BYTES, SMALL_SHARED_BYTES = 227 * 1024, 163 * 1024, 99 * 1024
# Exact float32 runs on the plain cores: small tiles, whatever the load.
_FLOAT32 = GemmConfig(32, 32, 32, 4, 2, programs_per_sm=4)

# Up to how many rows per expert the fused expert MLP serves inference. 0: on an H200 the grouped products were faster
# at every size measured, since the partial sums of the fused kernel cost more than the intermediate it saves.
FUSED_MLP_MAX_ROWS_PER_EXPERT = 0


def gather_first(width: int, num_rows: int, num_experts: int) -> bool:
    """Whether a weight gradient of `width` rows gains by copying its gathered operand into order first.

    Gathering inside the product costs a fifth of its rate on an H200; the copy costs reading and writing the rows.
    """
    return width >= 1024 and num_rows / num_experts > 96


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
    kind: str, dtype: torch.dtype, num_rows: int, num_experts: int, shared_bytes: int = HOPPER_SHARED_BYTES
) -> GemmConfig:
    """The tile for a product of `kind` (one of KINDS) over `num_rows` rows of all experts."""
    if dtype == torch.float32:
        return _FLOAT32
    rows_per_expert = num_rows / num_experts
    return next(tile for limit, tile in half_tiles(kind, shared_bytes).items() if rows_per_expert <= limit)


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
