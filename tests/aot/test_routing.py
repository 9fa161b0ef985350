"""Routing and combine compile for sm_80 and sm_90: no spills, a token within a warp, 16-byte loads."""

from __future__ import annotations

import pytest
import torch

from moe_gpu.config import RouterConfig
from moe_gpu.triton_kernels import gather_scatter, placing, routing, routing_grad
from tests.aot.compiling import CHOSEN_TRITON, Compiled, compile_for, compiling_launches

DEEPSEEK = RouterConfig("sigmoid", routed_scaling_factor=2.5, n_group=8, topk_group=4)
# Mixtral, OLMoE, Qwen3, DeepSeek-V3, the same without groups, Qwen3-Next, and the most that is meant to be quick.
ROUTERS = {
    (8, 2): RouterConfig(),
    (64, 8): RouterConfig(norm_topk_prob=False),
    (128, 8): RouterConfig(),
    (256, 8): DEEPSEEK,
    (257, 8): RouterConfig("sigmoid"),
    (512, 10): RouterConfig(),
    (1024, 16): RouterConfig(),
}
TYPES = {
    **dict.fromkeys(("ids_ptr", "counts_ptr", "row_of_route_ptr", "row_route_ptr"), "*i32"),
    **dict.fromkeys(("demand_ptr", "offsets_ptr"), "*i32"),
    **dict.fromkeys(("weights_ptr", "grad_weights_ptr", "bias_ptr", "weight_ptr"), "*fp32"),
    **dict.fromkeys(("T", "E", "O", "block_tokens", "capacity", "num_routes", "block_routes", "num_blocks"), "i32"),
    **dict.fromkeys(("stride_t", "stride_e", "logits_stride", "split_stride"), "i32"),
    "out_ptr": "*bf16",
    "scale": "fp32",
}


def build(kernel, arch: int, constants: dict, types: dict, num_warps: int) -> Compiled:
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: (TYPES | types)[name] for name in kernel.arg_names if name not in constants}
    return compile_for(kernel, arch, signature, constants, ("E", "O", "split_stride"), num_warps=num_warps)


LOGITS = [("bf16", False), ("fp32", True)]  # dtype, and whether they are biased and capped
# For sm_80 the longest code: the two differ in waiting for the launch before alone. On another Triton, each once.
ON_ARCH = [(90, tokens, *LOGITS[which]) for tokens, which in ((1, 0), (64, 1), (16384, 0), (16384, 1))]
ON_ARCH += [(80, 16384, *LOGITS[1])]
ON_ARCH = ON_ARCH if CHOSEN_TRITON else [(90, 64, *LOGITS[1]), (90, 16384, *LOGITS[0])]
GIVEN = [(90, 1, 3), (90, 64, None), (90, 64, 3), (90, 16384, 3), (80, 16384, 3)]


@pytest.mark.parametrize(("num_experts", "top_k"), ROUTERS)
@pytest.mark.parametrize(("arch", "num_tokens", "dtype", "biased"), ON_ARCH)
def test_routing(arch, num_tokens, num_experts, top_k, dtype, biased):
    router = ROUTERS[num_experts, top_k]
    blocks = routing._Blocks.choose(num_tokens, num_experts, top_k, router.n_group)
    constants = {
        "TOP_K": top_k,
        "N_GROUP": router.n_group,
        "TOPK_GROUP": router.topk_group,
        "ROWS": blocks.rows,
        "CHUNK": blocks.chunk,
        "CHUNKS": blocks.chunks,
        "LANES": blocks.lanes,
        "BLOCK_B": max(1, min(64, 8192 // blocks.experts)),
        "BLOCK_E": blocks.experts,
        "ROUTES": blocks.routes,
        "BY_LOGIT": False,
        "HAS_BIAS": biased,
        "UNIQUE": dtype == "bf16" and not biased and router.n_group == 1,
        "CAPPED": biased,
        "SINGLE": blocks.single,
        "PDL": arch >= 90,
        **routing.router_flags(router),
    }
    if not biased:
        constants["bias_ptr"] = None
    types = {"logits_ptr": f"*{dtype}"}
    choose = build(routing._choose_kernel, arch, constants, types, blocks.num_warps)
    if num_experts >= 32:
        assert "redux.sync.max.s32" in choose.ptx
    assert ("griddepcontrol.wait" in choose.ptx) == (arch >= 90)
    built = [choose]
    if not blocks.single:
        built.append(build(placing._place_kernel, arch, constants, types, 8))
    for compiled in built:
        assert compiled.spills == 0
        assert compiled.shared_bytes <= 48 * 1024


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (257, 8)])
@pytest.mark.parametrize(("arch", "num_tokens", "capacity"), GIVEN if CHOSEN_TRITON else GIVEN[2:4])
def test_given_choices(arch, num_tokens, num_experts, top_k, capacity):
    with compiling_launches(arch) as launches:
        placing.sort_routes(torch.empty(num_tokens, top_k, dtype=torch.int32, device="meta"), num_experts, capacity)
    assert len(launches) == (1 if num_tokens * top_k <= placing.SINGLE_LAUNCH_ROUTES else 2)
    for compiled in launches:
        assert compiled.spills <= 4  # words, in one launch of 512 routes; none elsewhere
        assert compiled.shared_bytes <= 48 * 1024
        assert "atom.global" not in compiled.ptx, "counts are added up within a program alone"


@pytest.mark.parametrize("num_tokens", [1, 64, 16384])
def test_given_choices_of_64_bits_take_no_launch_more(num_tokens):
    ids, narrow = (torch.empty(num_tokens, 8, dtype=kind, device="meta") for kind in (torch.int64, torch.int32))
    with compiling_launches(90) as launches:
        placing.sort_routes(ids, 128, None, narrow)
    assert len(launches) == (2 if num_tokens == 16384 else 1)
    assert all(compiled.spills <= 4 and compiled.shared_bytes <= 48 * 1024 for compiled in launches)


def test_few_tokens_take_one_launch():
    for num_experts, top_k, n_group in ((8, 2, 1), (128, 8, 1), (256, 8, 8)):
        assert routing._Blocks.choose(64, num_experts, top_k, n_group).single
        assert not routing._Blocks.choose(16384, num_experts, top_k, n_group).single


@pytest.mark.parametrize(("num_experts", "top_k"), ROUTERS)
@pytest.mark.parametrize("arch", [80, 90])
def test_router_gradient(arch, num_experts, top_k):
    block_e = routing.next_power_of_2(num_experts)
    block_t = max(1, min(32, 4096 // block_e))
    flags = routing.router_flags(ROUTERS[num_experts, top_k])
    constants = {"TOP_K": top_k, "BLOCK_T": block_t, "BLOCK_E": block_e, **flags}
    types = {"logits_ptr": "*bf16", "grad_logits_ptr": "*bf16"}
    assert build(routing_grad._router_bwd_kernel, arch, constants, types, 4).spills == 0


@pytest.mark.parametrize(("dtype", "top_k", "splits"), [("bf16", 8, 1), ("bf16", 10, 1), ("fp32", 8, 4)])
@pytest.mark.parametrize("num_tokens", [1, 16384])
@pytest.mark.parametrize("arch", [80, 90])
def test_combine(arch, num_tokens, dtype, top_k, splits):
    vector = {"bf16": 8, "fp32": 4}[dtype]
    block = gather_scatter._combine_block(2048, num_tokens, vector)
    constants = {
        "TOP_K": top_k,
        "SPLITS": splits,
        "WEIGHTED": True,
        "BLOCK_O": block,
        "BLOCK_J": min(16, routing.next_power_of_2(top_k * splits)),
        "PDL": arch >= 90,
    }
    num_warps = max(1, block // (32 * vector))
    compiled = build(gather_scatter._combine_kernel, arch, constants, {"y_ptr": f"*{dtype}"}, num_warps)
    assert compiled.spills == 0
    assert compiled.shared_bytes == 0  # a thread sums its own columns
    assert compiled.ptx.count("ld.global.v4") >= constants["BLOCK_J"]
