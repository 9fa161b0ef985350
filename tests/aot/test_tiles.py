"""Every shipped tile compiles for sm_80, sm_89 and sm_90: no spills, within shared memory, tensor cores in use."""

from __future__ import annotations

import pytest
import triton

from moe_gpu.triton_kernels import expert_mlp, grouped_gemm, grouped_gemm_grad, routing, routing_grad, tuning
from tests.aot.compiling import Compiled, compile_for

SHARED_LIMIT = {80: tuning.AMPERE_SHARED_BYTES, 89: tuning.SMALL_SHARED_BYTES, 90: tuning.HOPPER_SHARED_BYTES}
STRIDES = ("a_stride", "d_stride", "x_stride", "w_stride_e", "w_stride_n", "w_stride_k")
UP_STRIDES = tuple(f"{which}_stride_{axis}" for which in ("up", "down") for axis in "enk")
ALIGNED = ("N", "K", "H", "I", "O", *STRIDES, *UP_STRIDES)
POINTERS = {
    "*bf16": ("a_ptr", "w_ptr", "out_ptr", "h_ptr", "grad_h_ptr", "act_ptr", "d_ptr", "grad_w_ptr", "x_ptr", "up_ptr"),
    "*i32": ("route_ptr", "offsets_ptr", "ids_ptr", "row_route_ptr", "row_of_route_ptr", "demand_ptr"),
    "*fp32": ("route_weight_ptr", "grad_weight_ptr", "partial_ptr", "weights_ptr", "grad_weights_ptr"),
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names}
TYPES |= {"down_ptr": "*bf16", "logits_ptr": "*bf16", "grad_logits_ptr": "*bf16", "block_counts_ptr": "*i32"}
TYPES |= dict.fromkeys((*ALIGNED, "E", "R", "T", "capacity", "num_routes", "num_blocks", "logits_stride"), "i32")
TYPES["scale"] = "fp32"


def build(kernel, arch: int, constants: dict, **options: int) -> Compiled:
    """Compile with the given constants; every other parameter has its usual type."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: TYPES[name] for name in kernel.arg_names if name not in constants}
    return compile_for(kernel, arch, signature, constants, ALIGNED, **options)


def check(compiled: Compiled, arch: int, wgmma: bool) -> None:
    assert compiled.spills == 0
    assert compiled.shared_bytes <= SHARED_LIMIT[arch]
    assert compiled.num_wgmma > 0 if wgmma else compiled.num_mma_sync > 0
    assert compiled.num_async_copies > 0 or compiled.num_tma > 0


def gemm_tiles():
    for arch in SHARED_LIMIT:
        for kind in tuning.KINDS:
            for limit, config in tuning.half_tiles(kind, SHARED_LIMIT[arch]).items():
                yield pytest.param(arch, kind, config, id=f"sm_{arch}-{kind}-up to {limit} rows")


@pytest.mark.parametrize(("arch", "kind", "config"), list(gemm_tiles()))
def test_gemm_tile(arch, kind, config):
    by_column = kind in ("grad_act", "grad_x")
    constants = {
        "TOP_K": 8,
        "GATHER": kind in ("up", "grad_act"),
        "GATHER_D": False,
        "GATHER_A": kind == "grad_w_gather",
        "GATED": kind in ("up", "grad_act"),
        "FUNCTION": "silu" if kind in ("up", "grad_act") else "none",
        "HAS_BIAS": False,
        "bias_ptr": None,
        "SAVE_H": kind == "up",
        "PRECISION": "ieee",
        "EVEN_K": True,
        "EVEN": True,
        "BY_COLUMN": by_column,
        "BLOCK_E": 128,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "GROUP_N": config.group_m,
        "w_stride_n" if by_column else "w_stride_k": 1,
    }
    kernel = {
        "grad_act": grouped_gemm_grad._grouped_gemm_grad_act_kernel,
        "grad_w": grouped_gemm_grad._grouped_gemm_grad_w_kernel,
        "grad_w_gather": grouped_gemm_grad._grouped_gemm_grad_w_kernel,
    }.get(kind, grouped_gemm._grouped_gemm_fwd_kernel)
    compiled = build(kernel, arch, constants, num_warps=config.num_warps, num_stages=config.num_stages)
    rows = config.block_n if kind.startswith("grad_w") else config.block_m
    check(compiled, arch, wgmma=arch >= 90 and rows >= 64)


@pytest.mark.parametrize("rows", [8, 512])
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_fused_mlp_tile(arch, rows):
    import torch

    config = tuning.mlp_config(torch.bfloat16, 768, rows, 128, 132, SHARED_LIMIT[arch])
    constants = {
        "TOP_K": 8,
        "FUNCTION": "silu",
        "GATED": True,
        "HAS_BIAS": False,
        "up_bias_ptr": None,
        "down_bias_ptr": None,
        "PRECISION": "ieee",
        "EVEN_H": True,
        "BLOCK_E": 128,
        "BLOCK_M": config.block_m,
        "BLOCK_I": config.block_i,
        "BLOCK_K": config.block_k,
        "BLOCK_O": config.block_o,
        "up_stride_k": 1,
        "down_stride_k": 1,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    check(build(expert_mlp._expert_mlp_kernel, arch, constants, **options), arch, wgmma=False)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (128, 8), (256, 8), (512, 10)])
@pytest.mark.parametrize("num_tokens", [16, 4096])
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_routing_kernels(arch, num_tokens, num_experts, top_k):
    blocks = routing._Blocks.choose(num_tokens, num_experts, top_k)
    deepseek = num_experts == 256
    constants = {
        "TOP_K": top_k,
        "BLOCK_K": triton.next_power_of_2(top_k),
        "BLOCK_T": blocks.tokens,
        "BLOCK_E": blocks.experts,
        "BLOCK_P": blocks.bins,
        "ROUTES": blocks.routes,
        "BLOCK_ROUTES": blocks.tokens * top_k,
        "BINS": 16,
        "CHUNK": 128,
        "N_GROUP": 8 if deepseek else 1,
        "TOPK_GROUP": 4 if deepseek else 1,
        "SIGMOID": deepseek,
        "BY_LOGIT": False,
        "OVER_CHOSEN": not deepseek,
        "NORM": True,
        "HAS_BIAS": False,
        "bias_ptr": None,
        "HAS_LOGITS": True,
        "SINGLE": blocks.single,
    }
    built = [build(routing._route_kernel, arch, constants, num_warps=blocks.num_warps(constants["N_GROUP"]))]
    if not blocks.single:
        built.append(build(routing._prefix_kernel, arch, constants))
        built.append(build(routing._place_kernel, arch, constants))
    constants |= {"BLOCK_T": max(1, min(32, 4096 // blocks.experts))}
    built.append(build(routing_grad._router_bwd_kernel, arch, constants))
    for compiled in built:
        assert compiled.spills == 0
        assert compiled.shared_bytes <= SHARED_LIMIT[arch]
