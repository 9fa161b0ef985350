"""Every shipped tile compiles for sm_80 and sm_90: no spills, within shared memory, tensor cores in use."""

from __future__ import annotations

import pytest
import torch
import triton

from moe_gpu.triton_kernels import grouped_gemm, routing, tuning
from moe_gpu.triton_kernels.expert_mlp import _expert_mlp_kernel
from tests.aot.compiling import Compiled, compile_for

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
ARCHS = [80, 90]
SIZES = ("N", "K", "a_stride", "d_stride", "w_stride_e", "w_stride_n", "w_stride_k")


def tiles():
    for arch in ARCHS:
        for kind, table in tuning.half_tiles(arch).items():
            for limit, config in table.items():
                yield pytest.param(arch, kind, config, id=f"sm_{arch}-{kind}-rows<={limit}")


def gemm_arguments(kind: str, config: tuning.GemmConfig):
    transposed = kind in ("grad_act", "grad_x")
    pointers = {
        name: "*bf16" for name in ("a_ptr", "w_ptr", "out_ptr", "h_ptr", "grad_h_ptr", "act_ptr", "d_ptr", "grad_w_ptr")
    }
    pointers |= {"route_ptr": "*i32", "offsets_ptr": "*i32", "route_weight_ptr": "*fp32", "grad_weight_ptr": "*fp32"}
    signature = pointers | {name: "i32" for name in ("E", *SIZES)}
    constants = dict(
        TOP_K=8,
        GATED=kind in ("up", "grad_act"),
        HAS_BIAS=False,
        SAVE_H=kind == "up",
        PRECISION="ieee",
        EVEN_K=True,
        BY_COLUMN=transposed,
        GATHER=kind in ("up", "grad_act"),
        FUNCTION="silu" if kind in ("up", "grad_act") else "none",
        BLOCK_E=128,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        GROUP_N=config.group_m,
        GATHER_D=False,
        GATHER_A=True,
        bias_ptr=None,
    )
    constants["w_stride_n" if transposed else "w_stride_k"] = 1
    kernel = {
        "grad_act": grouped_gemm._grouped_gemm_grad_act_kernel,
        "grad_w": grouped_gemm._grouped_gemm_grad_w_kernel,
    }.get(kind, grouped_gemm._grouped_gemm_fwd_kernel)
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: kind for name, kind in signature.items() if name in names and name not in constants}
    return kernel, signature, constants


def check(compiled: Compiled, arch: int, wgmma: bool) -> None:
    assert compiled.spills == 0
    assert compiled.shared_bytes <= SHARED_LIMIT[arch]
    if wgmma:
        assert compiled.num_wgmma > 0
    else:
        assert compiled.num_mma_sync > 0
    assert compiled.num_async_copies > 0 or compiled.num_tma > 0


@pytest.mark.parametrize(("arch", "kind", "config"), tiles())
def test_gemm_tile(arch, kind, config):
    kernel, signature, constants = gemm_arguments(kind, config)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = compile_for(kernel, arch, signature, constants, SIZES, **options)
    rows = config.block_n if kind == "grad_w" else config.block_m
    check(compiled, arch, wgmma=arch >= 90 and rows >= 64)
