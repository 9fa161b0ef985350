"""Experts with FP8 weights: the problem, and each way by which the kernels can serve it, for `run_hopper.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hopper_problem import Problem, run_ours

from moe_gpu.reference import ExpertWeights, QuantisedExperts, QuantisedStack, dequantise_reference
from moe_gpu.triton_kernels.ops import TritonExpertOps

BLOCK = 128
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def quantise(weights: ExpertWeights) -> QuantisedExperts:
    """In blocks of 128 x 128, by powers of two: bfloat16 holds every weight then, so all ways compute one problem."""

    def stack(w_ENK: torch.Tensor) -> QuantisedStack:
        experts, rows, columns = w_ENK.shape
        n, k = min(BLOCK, rows), min(BLOCK, columns)
        scales = torch.empty(experts, rows // n, columns // k, device=w_ENK.device)
        values = torch.empty_like(w_ENK, dtype=torch.float8_e4m3fn)
        for w_NK, scales_BC, values_NK in zip(w_ENK, scales, values, strict=True):  # an expert at a time: float32
            tiles = w_NK.float().view(rows // n, n, columns // k, k)
            scales_BC.copy_((tiles.abs().amax((1, 3)) / FP8_MAX).log2().ceil().exp2())
            values_NK.copy_((tiles / scales_BC[:, None, :, None]).view(rows, columns))
        return QuantisedStack(values, scales)

    return QuantisedExperts(stack(weights.up_EGH), stack(weights.down_EOI))


def copy_of(weights: QuantisedExperts) -> QuantisedExperts:
    up, down = (QuantisedStack(s.values_ENK.clone(), s.scales_EBC) for s in (weights.up_EGH, weights.down_EOI))
    return QuantisedExperts(up, down)


def dequantised(weights: QuantisedExperts) -> ExpertWeights:
    """The same weights in bfloat16."""
    stacks = weights.up_EGH, weights.down_EOI
    return ExpertWeights(*(dequantise_reference(s.values_ENK, s.scales_EBC, torch.bfloat16) for s in stacks))


def by_products(p: Problem, ops: TritonExpertOps, weights: QuantisedExperts, read: bool) -> torch.Tensor:
    """The grouped products, of FP8 weights as they are or of weights dequantised on this call."""
    from moe_gpu.triton_kernels.fp8 import dequantise, step_depth
    from moe_gpu.triton_kernels.gather_scatter import combine_forward
    from moe_gpu.triton_kernels.grouped_gemm import grouped_gemm_forward, shared_bytes
    from moe_gpu.triton_kernels.products import Products
    from moe_gpu.triton_kernels.tuning import fp8_config

    routing = ops.sort_routes(p.ids, p.scores, p.config.num_experts)
    num_rows, device = p.ids.numel(), p.x.device
    rows = p.x.detach()
    options: dict = {"route_R": routing.row_route_R, "top_k": p.config.top_k, "activation": "swiglu"}
    products = Products.of((rows,), (weights.up_EGH.values_ENK,), routing.offsets_P, num_rows)
    for kind, stack in (("up", weights.up_EGH), ("down", weights.down_EOI)):
        values, scales = stack.values_ENK, stack.scales_EBC
        if read:
            sizes = num_rows, p.config.num_experts, shared_bytes(device), step_depth(values, scales)
            tile = fp8_config(kind, *sizes)
            rows, _ = grouped_gemm_forward(
                rows, values, routing.offsets_P, num_rows, tile, scales_EBC=scales, **options
            )
        else:
            rows, _ = products.forward(kind, rows, dequantise(values, scales, rows.dtype), **options)
        options = {}
    return combine_forward(rows, routing.row_of_route_TK, routing.topk_weights_TK, p.x.dtype)


def by_decode(p: Problem, ops: TritonExpertOps, weights: QuantisedExperts) -> torch.Tensor:
    """The decode kernels whatever the rows."""
    from moe_gpu.triton_kernels.decode import decode_forward, fp8_decode_config
    from moe_gpu.triton_kernels.fp8 import step_depth
    from moe_gpu.triton_kernels.gather_scatter import combine_forward

    up, down = weights.up_EGH, weights.down_EOI
    routing = ops.sort_routes(p.ids, p.scores, p.config.num_experts)
    config = fp8_decode_config(*(step_depth(one.values_ENK, one.scales_EBC) for one in (up, down)))
    y = decode_forward(
        p.x.detach(),
        routing.row_route_R,
        routing.offsets_P,
        p.config.top_k,
        up.values_ENK,
        down.values_ENK,
        "swiglu",
        config,
        up_scales_EBC=up.scales_EBC,
        down_scales_EBC=down.scales_EBC,
    )
    return combine_forward(y, routing.row_of_route_TK, routing.topk_weights_TK, p.x.dtype)


Way = Callable[[Problem, TritonExpertOps, QuantisedExperts], torch.Tensor]
WAYS: dict[str, Way] = {
    "moe_gpu fp8": run_ours,  # whichever the rules choose
    "moe_gpu fp8, decode kernels": by_decode,
    "moe_gpu fp8, grouped products": lambda p, ops, weights: by_products(p, ops, weights, read=True),
    "moe_gpu fp8, dequantised first": lambda p, ops, weights: by_products(p, ops, weights, read=False),
}
