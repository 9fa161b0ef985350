"""Every tile configuration: chosen from the kind of product, the dtype and the bucket of rows per expert, never timed.

The tables were found on an H200 by `benchmarks/tune_tiles.py`; other GPUs of compute capability 8.0 and up run the same
tiles with shared memory permitting. Buckets keep a change of T from compiling anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


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


# kind -> {rows per expert up to: config}; the last entry serves everything above.
_HALF: dict[str, dict[int, GemmConfig]] = {
    "up": {
        16: GemmConfig(16, 64, 128, 4, 4, programs_per_sm=2),
        32: GemmConfig(32, 64, 128, 4, 4, programs_per_sm=2),
        96: GemmConfig(64, 64, 64, 4, 4, programs_per_sm=2),
        1 << 31: GemmConfig(128, 128, 64, 8, 3),
    },
    "down": {
        16: GemmConfig(16, 128, 128, 4, 4, programs_per_sm=2),
        32: GemmConfig(32, 128, 128, 4, 4, programs_per_sm=2),
        96: GemmConfig(64, 128, 64, 4, 4, programs_per_sm=2),
        1 << 31: GemmConfig(128, 256, 64, 8, 3),
    },
    "grad_act": {
        32: GemmConfig(32, 64, 64, 4, 3, programs_per_sm=2),
        96: GemmConfig(64, 64, 64, 4, 3, programs_per_sm=2),
        1 << 31: GemmConfig(128, 128, 64, 8, 3),
    },
    "grad_x": {
        32: GemmConfig(32, 128, 64, 4, 3, programs_per_sm=2),
        96: GemmConfig(64, 128, 64, 4, 3, programs_per_sm=2),
        1 << 31: GemmConfig(128, 256, 64, 8, 3),
    },
    "grad_w": {
        96: GemmConfig(32, 128, 128, 4, 3, programs_per_sm=2),
        1 << 31: GemmConfig(64, 128, 256, 8, 3),
    },
}
# Exact float32 runs on the plain cores: small tiles, whatever the load.
_FLOAT32 = GemmConfig(32, 32, 32, 4, 2, programs_per_sm=4)
_FLOAT32_GRAD_W = GemmConfig(32, 32, 32, 4, 2, programs_per_sm=4)

FUSED_MLP_MAX_ROWS_PER_EXPERT = 4


def gemm_config(kind: str, dtype: torch.dtype, num_rows: int, num_experts: int) -> GemmConfig:
    """The tile for a product of `kind` (up, down, grad_act, grad_x, grad_w) over `num_rows` rows of all experts."""
    if dtype == torch.float32:
        return _FLOAT32_GRAD_W if kind == "grad_w" else _FLOAT32
    rows_per_expert = num_rows / num_experts
    table = _HALF[kind]
    return next(config for limit, config in table.items() if rows_per_expert <= limit)


def mlp_config(dtype: torch.dtype, hidden_dim: int, num_rows: int, num_experts: int, num_sms: int) -> MlpConfig:
    """The tile of the fused expert MLP: slices of the intermediate narrow enough to give every SM work."""
    active = min(num_rows, num_experts)
    block_i = 128
    while block_i > 32 and active * -(-hidden_dim // block_i) < 2 * num_sms:
        block_i //= 2
    config = MlpConfig(16, block_i, 128, 128, 4, 4)
    return replace(config, block_i=32, block_k=32, block_o=32, num_stages=2) if dtype == torch.float32 else config
