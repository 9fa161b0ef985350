"""The reference's grouped product as an operator, so that a traced graph can hold it: it reads offsets on the host."""

from __future__ import annotations

import functools

import torch

from moe_gpu.reference import grouped_gemm_reference

_LIBRARIES: list[torch.library.Library] = []  # operators live as long as the library that defined them


def _forward(a, w, offsets, bias):
    return grouped_gemm_reference(a, w, offsets, bias)


def _forward_fake(a, w, offsets, bias):
    return a.new_empty(a.shape[0], w.shape[1])


def _backward(grad, a, w, offsets, bias):
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (a, w, bias) if tensor is not None]
        out = grouped_gemm_reference(leaves[0], leaves[1], offsets, None if bias is None else leaves[2])
    grads = [grad.contiguous() for grad in torch.autograd.grad(out, leaves, grad)]
    return grads[0], grads[1], a.new_empty(0) if bias is None else grads[2]


def _backward_fake(grad, a, w, offsets, bias):
    return a.new_empty(a.shape), w.new_empty(w.shape), a.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grad(ctx, grad):
    bias = ctx.saved_tensors[3]
    grad_a, grad_w, grad_bias = torch.ops.moe_gpu.grouped_gemm_reference_backward(grad, *ctx.saved_tensors)
    return grad_a, grad_w, None, None if bias is None else grad_bias


@functools.cache
def register() -> None:
    """Define `torch.ops.moe_gpu.grouped_gemm_reference` and its gradient for every device, once a process."""
    library = torch.library.Library("moe_gpu", "FRAGMENT")
    library.define("grouped_gemm_reference(Tensor a, Tensor w, Tensor offsets, Tensor? bias) -> Tensor")
    library.define(
        "grouped_gemm_reference_backward(Tensor grad, Tensor a, Tensor w, Tensor offsets, Tensor? bias)"
        " -> (Tensor, Tensor, Tensor)"
    )
    for name, function, fake in (
        ("grouped_gemm_reference", _forward, _forward_fake),
        ("grouped_gemm_reference_backward", _backward, _backward_fake),
    ):
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"moe_gpu::{name}", fake, lib=library)
    torch.library.register_autograd("moe_gpu::grouped_gemm_reference", _grad, setup_context=_save, lib=library)
    _LIBRARIES.append(library)
