"""The exact gradient of the routing weights in all logits, for every router that `routing.py` serves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_gpu.config import RouterConfig
from moe_gpu.triton_kernels.launch import launch
from moe_gpu.triton_kernels.routing import router_flags
from moe_gpu.triton_kernels.tuning import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["T"])
def _router_bwd_kernel(
    logits_ptr,  # (T, E)
    ids_ptr,  # (T, K) int32
    weights_ptr,  # (T, K) float32
    grad_weights_ptr,  # (T, K) float32
    grad_logits_ptr,  # (T, E), dtype of the logits
    T,
    E,
    scale,
    logits_stride,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SIGMOID: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    NORM: tl.constexpr,
):
    """One program BLOCK_T tokens: the exact gradient of the weights in all logits."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (t < T)[:, None] & (e < E)
    address = t.to(tl.int64)[:, None] * logits_stride + e
    x = tl.load(logits_ptr + address, mask=inside, other=float("-inf")).to(tl.float32)
    slot = t.to(tl.int64) * TOP_K
    dot = tl.zeros((BLOCK_T,), tl.float32)
    chosen_grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    chosen_weight = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    chosen = (e + tl.zeros((BLOCK_T, 1), tl.int32)) < 0
    for k in range(TOP_K):
        expert = tl.load(ids_ptr + slot + k, mask=t < T, other=-1)
        grad = tl.load(grad_weights_ptr + slot + k, mask=t < T, other=0.0)
        weight = tl.load(weights_ptr + slot + k, mask=t < T, other=0.0)
        at = e == expert[:, None]
        dot += grad * weight
        chosen = chosen | at
        chosen_grad = tl.where(at, grad[:, None], chosen_grad)
        chosen_weight = tl.where(at, weight[:, None], chosen_weight)
    if OVER_CHOSEN:
        grad_x = chosen_weight * (chosen_grad - dot[:, None] / scale)
    elif SIGMOID:
        scores = 1 / (1 + tl.exp(-x))
        if NORM:
            score_sum = tl.sum(tl.where(chosen, scores, 0.0), 1) + 1e-20
            grad_scores = (chosen_grad * scale - dot[:, None]) / score_sum[:, None]
        else:
            grad_scores = chosen_grad * scale
        grad_x = tl.where(chosen, grad_scores * scores * (1 - scores), 0.0)
    else:
        exps = tl.exp(x - tl.max(x, 1)[:, None])
        scores = exps / tl.sum(exps, 1)[:, None]
        grad_x = scores * (chosen_grad * scale - dot[:, None])
    has_choice = tl.max(chosen.to(tl.int32), 1) > 0
    grad_x = tl.where(has_choice[:, None], grad_x, 0.0)
    out = t.to(tl.int64)[:, None] * E + e
    tl.store(grad_logits_ptr + out, grad_x.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def route_backward(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    grad_weights_TK: torch.Tensor,
    router: RouterConfig,
) -> torch.Tensor:
    """Gradient of the logits, (T, E) in their dtype."""
    num_tokens, num_experts = logits_TE.shape
    grad_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return grad_TE
    if logits_TE.stride(1) != 1:
        logits_TE = logits_TE.contiguous()
    block_e = next_power_of_2(num_experts)
    block_t = max(1, min(32, 4096 // block_e))
    launch(
        _router_bwd_kernel,
        (cdiv(num_tokens, block_t),),
        logits_TE,
        ids_TK,
        weights_TK,
        grad_weights_TK.contiguous(),
        grad_TE,
        num_tokens,
        num_experts,
        float(router.routed_scaling_factor),
        logits_TE.stride(0),
        TOP_K=ids_TK.shape[1],
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        **router_flags(router),
    )
    return grad_TE
