"""Every shipped tile compiles for sm_80, sm_89 and sm_90: no spills, within shared memory, tensor cores in use."""

from __future__ import annotations

import json
import re
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from moe_gpu.triton_kernels import expert_mlp, fp8, grouped_gemm, grouped_gemm_grad, tile_table, tuning
from moe_gpu.triton_kernels.tuning import GemmConfig, load_aware_tiles
from tests.aot.compiling import CHOSEN_TRITON, Compiled, compile_for

SHARED_LIMIT = {80: tuning.AMPERE_SHARED_BYTES, 89: tuning.SMALL_SHARED_BYTES, 90: tuning.HOPPER_SHARED_BYTES}
STRIDES = ("a_stride", "d_stride", "x_stride", "w_stride_e", "w_stride_n", "w_stride_k")
UP_STRIDES = tuple(f"{which}_stride_{axis}" for which in ("up", "down") for axis in "enk")
ALIGNED = ("N", "K", "H", "I", "O", *STRIDES, *UP_STRIDES)
POINTERS = {
    "*bf16": ("a_ptr", "w_ptr", "out_ptr", "h_ptr", "grad_h_ptr", "act_ptr", "d_ptr", "grad_w_ptr", "x_ptr", "up_ptr"),
    "*i32": ("route_ptr", "offsets_ptr"),
    "*fp32": ("route_weight_ptr", "grad_weight_ptr", "partial_ptr"),
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names}
TYPES |= {"down_ptr": "*bf16"}
TYPES |= dict.fromkeys((*ALIGNED, "E", "R"), "i32")


def build(kernel, arch: int, constants: dict, types: dict = TYPES, **options: int) -> Compiled:
    """Compile with the given constants; every other parameter has its usual type."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    return compile_for(kernel, arch, signature, constants, ALIGNED, **options)


def check(compiled: Compiled, arch: int, wgmma: bool) -> None:
    assert compiled.spills == 0
    assert compiled.shared_bytes <= SHARED_LIMIT[arch]
    assert compiled.num_wgmma > 0 if wgmma else compiled.num_mma_sync > 0
    assert compiled.num_async_copies > 0 or compiled.num_tma > 0


def some(tiles: dict[int, GemmConfig]) -> list[tuple[int, GemmConfig]]:
    """Tiles of a kind with the most rows that they serve: all, or on another Triton the one for the most."""
    return list(tiles.items()) if CHOSEN_TRITON else list(tiles.items())[-1:]


def shipped_tiles():
    """The plain tiles of the tables that ship, with the kind that each serves, where no rule gives them too."""
    found = set()
    for path in (Path(tile_table.__file__).parent / "tiles").glob("*.json"):
        device = json.loads(path.read_text())["machines"][0]["device"]
        table = tile_table.read_table(path, device)
        arch = int(table.machines[-1].compute_capability.replace(".", ""))
        for entry in table.entries:
            plain = {tile for tile, _ in entry.tiles if isinstance(tile, GemmConfig)}
            ruled = tuning.half_tiles(entry.cell.kind, SHARED_LIMIT[arch]).values()
            found |= {(arch, entry.cell.kind, tile) for tile in plain - set(ruled)}
    for arch, kind, tile in sorted(found, key=str):
        yield pytest.param(arch, kind, tile, id=f"sm_{arch}-{kind}-{'x'.join(map(str, astuple(tile)))}")


def gemm_tiles():
    for arch in SHARED_LIMIT:
        for kind in tuning.KINDS:
            for limit, config in some(tuning.half_tiles(kind, SHARED_LIMIT[arch])):
                yield pytest.param(arch, kind, config, id=f"sm_{arch}-{kind}-up to {limit} rows")


FP8_TYPES = TYPES | {"w_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}


def build_gemm(arch: int, kind: str, config: GemmConfig, save_h: bool, types: dict = TYPES, **more: object) -> Compiled:
    """`more`: constants beside those of weights in bf16."""
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
        **({} if "scale_ptr" in types else {"scale_ptr": None}),
        "SCALE_N": 0,
        "SCALE_K": 0,
        "SAVE_H": save_h,
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
        "SMALLER": sum(config.smaller_ms),
        "w_stride_n" if by_column else "w_stride_k": 1,
        **more,
    }
    kernel = {
        "grad_act": grouped_gemm_grad._grouped_gemm_grad_act_kernel,
        "grad_w": grouped_gemm_grad._grouped_gemm_grad_w_kernel,
        "grad_w_gather": grouped_gemm_grad._grouped_gemm_grad_w_kernel,
    }.get(kind, grouped_gemm._grouped_gemm_fwd_kernel)
    return build(kernel, arch, constants, types, num_warps=config.num_warps, num_stages=config.num_stages)


@pytest.mark.parametrize(("arch", "kind", "config"), [*gemm_tiles(), *(shipped_tiles() if CHOSEN_TRITON else ())])
def test_gemm_tile(arch, kind, config):
    compiled = build_gemm(arch, kind, config, save_h=kind == "up")
    rows = config.block_n if kind.startswith("grad_w") else config.block_m
    check(compiled, arch, wgmma=arch >= 90 and rows >= 64)


def fp8_tiles():
    """In bfloat16, and what serves most rows in float16 too."""
    for arch in (89, 90):
        for kind in ("up", "down"):
            tiles = some(tuning.fp8_tiles(kind, SHARED_LIMIT[arch]))
            for limit, config in tiles:
                for dtype in ("bf16", "fp16") if limit == tiles[-1][0] else ("bf16",):
                    yield pytest.param(arch, kind, config, dtype, id=f"sm_{arch}-{kind}-up to {limit} rows-{dtype}")


@pytest.mark.parametrize(("arch", "kind", "config", "dtype"), list(fp8_tiles()))
def test_fp8_tile(arch, kind, config, dtype):
    """Weights copied 16 bytes at a time as they are, and converted by the instruction for it."""
    types = FP8_TYPES | dict.fromkeys(("a_ptr", "out_ptr", "h_ptr"), f"*{dtype}")
    compiled = build_gemm(arch, kind, config, False, types, SCALE_N=128, SCALE_K=128)
    check(compiled, arch, wgmma=arch >= 90 and config.block_m >= 64)
    assert "cvt.rn.f16x2.e4m3x2" in compiled.ptx
    copies = set(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*(0x[0-9a-f]+)", compiled.ptx))
    assert copies == {"0x10"}


@pytest.mark.parametrize("scales", ["*fp32", "*u8"])
@pytest.mark.parametrize(("arch", "dtype"), [(89, "*bf16"), (90, "*bf16"), (90, "*fp16"), (90, "*fp32")])
def test_dequantising_kernel(arch, dtype, scales):
    types = {"values_ptr": "*fp8e4nv", "scale_ptr": scales, "out_ptr": dtype} | dict.fromkeys(("N", "K"), "i32")
    constants = {"SCALE_N": 128, "SCALE_K": 128, "BLOCK_N": fp8.DEQUANTISED_ROWS, "BLOCK_K": fp8.DEEPEST_STEP}
    compiled = build(fp8._dequantise_kernel, arch, constants, types)
    assert compiled.spills == 0
    assert re.search(r"ld\.global[^;]*v4\.b32", compiled.ptx), "values are loaded 16 at a time"
    assert re.search(r"st\.global[^;]*v4\.b32", compiled.ptx)


def load_aware():
    """On sm_80 those of three classes, which are the same on sm_89 and compiled for it once."""
    kinds = {80: ("up", "down", "grad_x"), 89: ("down",), 90: ("up", "down", "grad_x")}
    for arch, limit in SHARED_LIMIT.items():
        for kind in kinds[arch] if CHOSEN_TRITON else ("up", "grad_x"):
            tiles = load_aware_tiles(kind)
            if arch < 90 or not CHOSEN_TRITON:
                tiles = tiles[:1]
            elif kind != "up":
                tiles = tiles[::3]  # either shape, either number of classes
            for config in tiles:
                if tuning.operand_bytes(kind, config) < limit:
                    yield pytest.param(arch, kind, config, id=f"sm_{arch}-{kind}-{'x'.join(map(str, astuple(config)))}")


# Words that a training step's `up` spills beside the widest tile, which fills the registers by itself (12 with Triton
# 3.9, 8 with 3.6). May only fall.
SAVED_H_SPILLS = 12


@pytest.mark.parametrize(("arch", "kind", "config"), list(load_aware()))
def test_load_aware_tile(arch, kind, config):
    compiled = build_gemm(arch, kind, config, save_h=False)
    check(compiled, arch, wgmma=arch >= 90)
    if arch == 80 and tuning.operand_bytes(kind, config) < SHARED_LIMIT[89]:
        assert compiled.shared_bytes <= SHARED_LIMIT[89]
    alone = build_gemm(arch, kind, replace(config, smaller_ms=()), save_h=False)
    assert compiled.shared_bytes == alone.shared_bytes, "the classes share their stages"
    if arch >= 90:  # a class of 16 rows is too short for wgmma, one of 64 has its own
        assert (compiled.num_mma_sync > 0) == (16 in config.smaller_ms)
        assert compiled.num_wgmma > alone.num_wgmma or 64 not in config.smaller_ms
    if kind == "up":
        assert build_gemm(arch, kind, config, save_h=True).spills <= SAVED_H_SPILLS


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
