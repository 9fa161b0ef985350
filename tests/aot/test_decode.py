"""Decode tiles compile for sm_90: no spills, in shared memory, wgmma, dependent launch, wide copies.

Weights in bf16 are copied 16 bytes at a time, weights read as FP8 8 bytes.
"""

from __future__ import annotations

import re

import pytest
import torch

from moe_gpu.triton_kernels import decode, tuning
from moe_gpu.triton_kernels.hopper_decode import decode_forward_hopper
from tests.aot.compiling import CHOSEN_TRITON, compile_for, compiling_launches

COPY = r"cp\.async\.c[ag]\.shared\.global[^;]*(0x[0-9a-f]+)"
ALIGNED = ("H", "I", "O", "x_stride", "w_stride_e", "w_stride_n")
TYPES = dict.fromkeys(("x_ptr", "w_ptr", "a_ptr"), "*bf16")
TYPES |= dict.fromkeys(("route_ptr", "offsets_ptr"), "*i32")
TYPES |= {"y_ptr": "*fp32"} | dict.fromkeys((*ALIGNED, "E"), "i32")


TILES = [(16, "bf16"), (8192, "fp8"), (128, "bf16"), (8192, "fp8, UE8M0")]


@pytest.mark.parametrize(("num_rows", "weights"), TILES if CHOSEN_TRITON else TILES[:2])
def test_decode_tile(num_rows, weights):
    fp8 = weights != "bf16"
    config = decode.fp8_decode_config(128, 128) if fp8 else decode.decode_config(num_rows)
    types = TYPES
    if fp8:
        types = TYPES | {"w_ptr": "*fp8e4nv", "scale_ptr": "*fp32" if weights == "fp8" else "*u8"}
    for kernel, tile in ((decode._decode_up_kernel, config.up), (decode._decode_down_kernel, config.down)):
        constants = {
            "w_stride_k": 1,
            "bias_ptr": None,
            **({"SCALE_N": 128, "SCALE_K": 128} if fp8 else {"scale_ptr": None, "SCALE_N": 0, "SCALE_K": 0}),
            "TOP_K": 8,
            "FUNCTION": "silu",
            "GATED": True,
            "HAS_BIAS": False,
            "EVEN_K": True,
            "BY_COLUMN": False,
            "PDL": True,
            "PREFETCH": config.prefetch,
            "BLOCK_E": 128,
            "BLOCK_M": config.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        }
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {name: types[name] for name in kernel.arg_names if name not in constants}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        compiled = compile_for(kernel, 90, signature, constants, ALIGNED, **options)
        assert compiled.spills == 0
        assert compiled.shared_bytes <= tuning.HOPPER_SHARED_BYTES
        assert "griddepcontrol.wait" in compiled.ptx
        assert compiled.num_wgmma > 0
        widths = [int(width, 16) for width in re.findall(COPY, compiled.ptx)]
        rows_width = min(16, 2 * config.block_m * tile.block_k // (32 * tile.num_warps))  # one copy a thread
        assert len(widths) == compiled.num_async_copies > 0
        # FP8 lies in shared memory by eights, as sixteen bytes of what it is converted into.
        assert set(widths) == ({8, 16} if fp8 else {16, rows_width})


QWEN, MIXTRAL, DEEPSEEK = (128, 8, 2048, 768), (8, 2, 4096, 14336), (256, 8, 7168, 2048)  # E, K, H, I
# Between them every tile that the rule gives, every kind of activation, biases, and the most experts.
GLUON = [
    (1, QWEN, "swiglu", False),
    (16, QWEN, "geglu", True),
    (8, (512, 8, 2048, 768), "gelu_tanh", True),
    (128, QWEN, "swiglu", False),
    (384, QWEN, "swiglu", True),
    (1, MIXTRAL, "swiglu", True),
    (8, MIXTRAL, "swiglu", False),
    (64, DEEPSEEK, "swiglu", False),
]


HIGH = [tuning.HopperDecodeConfig(32, 1, 1, 5, height=128), tuning.HopperDecodeConfig(64, 1, 1, 4, height=128)]
CASES = [(*case, None) for case in (GLUON if CHOSEN_TRITON else GLUON[:2])]
CASES += [(256, QWEN, "swiglu", False, HIGH[0]), (256, QWEN, "geglu", True, HIGH[1])]


@pytest.mark.parametrize(("num_tokens", "shape", "activation", "bias", "tile"), CASES)
def test_gluon_decode_tile(num_tokens, shape, activation, bias, tile):
    """Those of the rule, and what the tuner offers beside them."""
    experts, top_k, width, hidden = shape

    def new(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    rows, up_rows = num_tokens * top_k, hidden * (2 if activation in ("swiglu", "geglu") else 1)
    with compiling_launches(90) as launches:
        decode_forward_hopper(
            new(num_tokens, width),
            new(rows, dtype=torch.int32),
            new(experts + 1, dtype=torch.int32),
            top_k,
            new(experts, up_rows, width),
            new(experts, width, hidden),
            activation,
            tile or tuning.hopper_decode_config(rows, num_tokens, experts, width, hidden),
            132,
            new(experts, up_rows) if bias else None,
            new(experts, width) if bias else None,
        )
    (compiled,) = launches
    assert compiled.spills == 0
    assert compiled.shared_bytes <= tuning.HOPPER_SHARED_BYTES
    assert compiled.num_wgmma > 0
    assert compiled.num_mma_sync == 0
    assert compiled.num_tma > 0
    assert compiled.num_setmaxnreg > 0
    widths = {int(width, 16) for width in re.findall(COPY, compiled.ptx)}
    assert widths == {16}
