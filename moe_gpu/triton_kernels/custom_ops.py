"""The kernels as PyTorch operators `torch.ops.moe_gpu.*`, with shapes for tracing and with gradients.

Registered by `register()` on first use, never by importing. Second derivatives are not provided: the backward operators
have no gradient formula, so asking for one raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from moe_gpu.config import RouterConfig
from moe_gpu.triton_kernels import routing
from moe_gpu.triton_kernels.decode import (
    decode_config,
    decode_forward,
    decode_unsupported,
    fp8_decode_config,
    hopper_decode_unfit,
    rows_dtype,
)
from moe_gpu.triton_kernels.dispatch import IMPLEMENTATIONS, NAMESPACE, autograd_kernel, call, is_heard
from moe_gpu.triton_kernels.expert_mlp import expert_mlp_forward
from moe_gpu.triton_kernels.fp8 import dequantise, step_depth
from moe_gpu.triton_kernels.gather_scatter import (
    combine_forward,
    grad_bias,
    permute_forward,
    route_dot,
    weight_gradient,
)
from moe_gpu.triton_kernels.grouped_gemm import num_sms, row_contiguous, shared_bytes, usable_sms
from moe_gpu.triton_kernels.load_counts import count_load
from moe_gpu.triton_kernels.placing import sort_routes
from moe_gpu.triton_kernels.products import Products, decode_tile
from moe_gpu.triton_kernels.routing_grad import route_backward
from moe_gpu.triton_kernels.tuning import FP8_GROUPED_ROWS_PER_EXPERT, FP8_MAX_ROWS_PER_EXPERT, mlp_config

_ROUTER = (
    "str score_function, bool softmax_after_topk, bool norm_topk_prob, float routed_scaling_factor, "
    "int n_group, int topk_group"
)
_ROUTES = "Tensor row_route, Tensor row_of_route, Tensor offsets"
_WEIGHTS = (
    "Tensor up, Tensor down, Tensor? mid, Tensor? up_bias, Tensor? mid_bias, Tensor? down_bias, "
    "str activation, int? sm_budget"
)
_SCHEMAS = {
    "route": f"(Tensor logits, Tensor? bias, int top_k, {_ROUTER}, int? capacity)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "route_backward": f"(Tensor logits, Tensor ids, Tensor weights, Tensor grad_weights, {_ROUTER}) -> Tensor",
    "sort_routes": "(Tensor ids, int num_experts, int? capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "count_load": "(Tensor(a!) state, Tensor demand) -> ()",
    "experts": f"(Tensor x, Tensor weights, Tensor ids, {_ROUTES}, {_WEIGHTS}, bool save, bool fused)"
    " -> (Tensor, Tensor, Tensor)",
    "experts_backward": f"(Tensor grad_out, Tensor x, Tensor weights, Tensor ids, {_ROUTES}, {_WEIGHTS}, Tensor h,"
    " Tensor h2, bool need_x, bool need_weights, bool drop_h)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "experts_quantised": f"(Tensor x, Tensor weights, Tensor ids, {_ROUTES}, Tensor up, Tensor down, Tensor up_scales,"
    " Tensor down_scales, Tensor? up_bias, Tensor? down_bias, str activation, int? sm_budget) -> Tensor",
    "grouped_gemm_quantised": "(Tensor a, Tensor w, Tensor scales, Tensor? bias, Tensor offsets, int? sm_budget)"
    " -> Tensor",
    "dequantise": "(Tensor values, Tensor scales, ScalarType dtype) -> Tensor",
    "permute": f"(Tensor x, {_ROUTES}) -> Tensor",
    "combine": f"(Tensor y, Tensor weights, {_ROUTES}) -> Tensor",
    "combine_backward": f"(Tensor grad_out, Tensor y, Tensor weights, {_ROUTES}) -> (Tensor, Tensor)",
    "sum_routes": "(Tensor y, Tensor row_of_route) -> Tensor",
    "grouped_gemm": "(Tensor a, Tensor w, Tensor? bias, Tensor offsets, int? sm_budget) -> Tensor",
    "grouped_gemm_backward": "(Tensor grad, Tensor a, Tensor w, Tensor? bias, Tensor offsets, int? sm_budget)"
    " -> (Tensor, Tensor, Tensor)",
}


_router = functools.lru_cache(maxsize=64)(RouterConfig)


def _route(logits, bias, top_k, *rest):
    *router, capacity = rest
    ids, weights, *rows = routing.route_forward(logits, bias, top_k, _router(*router), capacity)
    return weights, ids, *rows


def _route_fake(logits, bias, top_k, *rest):
    num_tokens, num_experts = logits.shape
    ids = logits.new_empty(num_tokens, top_k, dtype=torch.int32)
    weights = logits.new_empty(num_tokens, top_k, dtype=torch.float32)
    return weights, ids, *_rows_fake(ids, num_experts)


def _route_backward(logits, ids, weights, grad_weights, *router):
    return route_backward(logits, ids, weights, grad_weights, _router(*router))


def _route_backward_fake(logits, ids, weights, grad_weights, *router):
    return logits.new_empty(logits.shape)


def _rows_fake(ids, num_experts):
    bins = ids.new_empty(num_experts + 1, dtype=torch.int32)
    rows = ids.new_empty(ids.shape[0] * ids.shape[1], dtype=torch.int32)
    return bins, torch.empty_like(bins), rows, ids.new_empty(ids.shape, dtype=torch.int32)


def _narrow(ids):
    """Memory for ids as int32; empty where they are."""
    return ids.new_empty(0 if ids.dtype == torch.int32 else ids.shape, dtype=torch.int32)


def _sort_routes(ids, num_experts, capacity):
    narrow = _narrow(ids)
    return narrow, *sort_routes(ids, num_experts, capacity, None if ids.dtype == torch.int32 else narrow)


def _sort_routes_fake(ids, num_experts, capacity):
    return _narrow(ids), *_rows_fake(ids, num_experts)


def _count_load(state, demand):
    count_load(state, demand)


def _count_load_fake(state, demand):
    return None


class _Operands(NamedTuple):
    """What `experts` and its gradient share, in the order of their schemas."""

    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    row_route: torch.Tensor
    row_of_route: torch.Tensor
    offsets: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    mid: torch.Tensor | None
    up_bias: torch.Tensor | None
    mid_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activation: str
    sm_budget: int | None

    @classmethod
    def split(cls, arguments: tuple) -> tuple[_Operands, tuple]:
        """The operands at the front of an operator's arguments, and the arguments after them."""
        size = len(cls._fields)
        return cls(*arguments[:size]), arguments[size:]

    @property
    def num_rows(self) -> int:
        return self.row_route.shape[0]

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    def products(self, *more_rows: torch.Tensor, tiled_experts: int | None = None) -> Products:
        weights = (self.up, self.down) if self.mid is None else (self.up, self.mid, self.down)
        rows = (self.x, *more_rows)
        return Products.of(rows, weights, self.offsets, self.num_rows, self.sm_budget, tiled_experts)

    def absent(self) -> torch.Tensor:
        """Stands for a result that there is not: operators return tensors only."""
        return self.x.new_empty(0)


def _experts(*arguments):
    o, (save, fused) = _Operands.split(arguments)
    if fused:
        device = o.x.device
        sizes = (o.down.shape[2], o.num_rows, o.num_experts, num_sms(device), shared_bytes(device))
        tile = mlp_config(o.x.dtype, *sizes)
        y = expert_mlp_forward(
            o.x, o.row_route, o.offsets, o.top_k, o.up, o.down, o.activation, tile, o.up_bias, o.down_bias
        )
        return combine_forward(y, o.row_of_route, o.weights, o.x.dtype), o.absent(), o.absent()
    y, h, h2 = _rows(o, save, o.num_experts)
    out = combine_forward(y, o.row_of_route, o.weights, o.x.dtype)
    return out, o.absent() if h is None else h, o.absent() if h2 is None else h2


def _rows(
    o: _Operands, save: bool, tiled_experts: int, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The experts' rows before the weighted combine, and the pre-activations if they are saved.

    Kernel and tile are chosen as for `tiled_experts` experts, so that rows are the same to the bit whether the weights
    are of all experts or of some.
    """
    o = o._replace(x=row_contiguous(o.x))
    depth = 1 if o.mid is None else 2
    rows, biases = (o.x, o.row_route, o.offsets, o.top_k), (o.up_bias, o.down_bias)
    tile, programs = None, usable_sms(o.x.device, o.sm_budget)
    if hopper_decode_unfit(o.x, (o.up, o.down), tiled_experts, depth, save) is None:
        tile = decode_tile(o.x, o.num_rows, tiled_experts, o.down.shape[2], programs)
    if tile is not None:
        from moe_gpu.triton_kernels.hopper_decode import decode_forward_hopper

        if out is None:
            out = o.x.new_empty(o.num_rows, o.down.shape[1], dtype=rows_dtype(o.x.dtype, o.num_rows, tiled_experts))
        return decode_forward_hopper(*rows, o.up, o.down, o.activation, tile, programs, *biases, out), None, None
    if decode_unsupported(o.x, o.num_rows, tiled_experts, depth, save, o.sm_budget) is None:
        config = decode_config(o.num_rows)
        return decode_forward(*rows, o.up, o.down, o.activation, config, *biases, out), None, None
    products = o.products(tiled_experts=tiled_experts)
    keep: dict[str, Any] = {"activation": o.activation, "save_h": save}
    gather: dict[str, Any] = {"route_R": o.row_route, "top_k": o.top_k}
    a, h = products.forward("up", o.x, o.up, bias_EN=o.up_bias, **gather, **keep)
    h2 = None
    if o.mid is not None:
        a, h2 = products.forward("up", a, o.mid, bias_EN=o.mid_bias, **keep)
    y, _ = products.forward("down", a, o.down, bias_EN=o.down_bias, out=out)
    return y, h, h2


def _experts_quantised(x, weights, ids, row_route, row_of_route, offsets, up, down, up_scales, down_scales, *rest):
    up_bias, down_bias, activation, sm_budget = rest
    top_k, num_rows, num_experts = ids.shape[1], row_route.shape[0], up.shape[0]
    x = row_contiguous(x)
    products = Products.of((x,), (up, down), offsets, num_rows, sm_budget)
    sizes = num_rows, num_experts, 1, False, sm_budget, FP8_MAX_ROWS_PER_EXPERT
    by_decode = num_rows > FP8_GROUPED_ROWS_PER_EXPERT * num_experts and decode_unsupported(x, *sizes) is None
    if by_decode and products.reads_fp8(up, up_scales) and products.reads_fp8(down, down_scales):
        config = fp8_decode_config(step_depth(up, up_scales), step_depth(down, down_scales))
        y = decode_forward(
            x, row_route, offsets, top_k, up, down, activation, config, up_bias, down_bias, None, up_scales, down_scales
        )
    else:
        gather: dict[str, Any] = {"route_R": row_route, "top_k": top_k, "activation": activation}
        a, _ = products.forward("up", x, up, up_scales, bias_EN=up_bias, **gather)
        y, _ = products.forward("down", a, down, down_scales, bias_EN=down_bias)
    return combine_forward(y, row_of_route, weights, x.dtype)


def _experts_quantised_fake(x, weights, ids, row_route, row_of_route, offsets, up, down, *rest):
    return x.new_empty(x.shape[0], down.shape[1])


def expert_rows(*arguments: Any, tiled_experts: int, out: torch.Tensor | None) -> torch.Tensor:
    """`_rows` for inference, of the arguments of the operator `experts` up to `sm_budget`."""
    return _rows(_Operands(*arguments), False, tiled_experts, out)[0]


def _experts_fake(*arguments):
    o, (save, _fused) = _Operands.split(arguments)
    out = o.x.new_empty(o.x.shape[0], o.down.shape[1])
    h = o.x.new_empty(o.num_rows, o.up.shape[1]) if save else o.absent()
    h2 = o.x.new_empty(o.num_rows, o.mid.shape[1]) if save and o.mid is not None else o.absent()
    return out, h, h2


def _experts_backward(grad_out, *arguments):
    o, (h, h2, need_x, need_weights, drop_h) = _Operands.split(arguments)
    grad_out = grad_out.contiguous()
    # Kernels that go by route address these flat.
    o = o._replace(x=row_contiguous(o.x), weights=o.weights.contiguous(), ids=o.ids.contiguous())
    products = o.products(grad_out)
    by_route: dict[str, Any] = {"route_R": o.row_route, "route_weight_TK": o.weights}
    gather: dict[str, Any] = {"route_R": o.row_route, "top_k": o.top_k}
    grad_down = grad_up = grad_mid = grad_up_bias = grad_mid_bias = grad_down_bias = None
    last_h = h if o.mid is None else h2
    grad_last, act_last, partials = products.grad_act(
        grad_out, o.down.transpose(1, 2), last_h, o.activation, **by_route
    )
    grad_h, act = grad_last, None
    if o.mid is not None:
        grad_h, act, _ = products.grad_act(grad_last, o.mid.transpose(1, 2), h, o.activation)
    if drop_h:  # autograd holds them to the end of this call, while the gradients of the weights take their memory
        for kept in (h, h2):
            kept.untyped_storage().resize_(0)
    assert partials is not None  # gathered, so there are some
    # First what takes little: its sums, like the rows of x's gradient, are gone before the weights' take memory.
    grad_weights = weight_gradient(partials, o.row_of_route, o.ids, grad_out, o.down_bias)
    del partials
    grad_x = None
    if need_x:
        grad_rows, _ = products.forward("grad_x", grad_h, o.up.transpose(1, 2))
        grad_x = combine_forward(grad_rows, o.row_of_route, None, o.x.dtype)
        del grad_rows
    if need_weights:
        grad_down = products.grad_w(grad_out, act_last, o.down, gather_d=True, **gather)
        if o.down_bias is not None:
            grad_down_bias = grad_bias(grad_out, o.down_bias, o.offsets, **by_route)
        del act_last
        if o.mid is not None:
            assert act is not None
            grad_mid = products.grad_w(grad_last, act, o.mid)
            if o.mid_bias is not None:
                grad_mid_bias = grad_bias(grad_last, o.mid_bias, o.offsets)
        del act, grad_last
        grad_up = products.grad_w(grad_h, o.x, o.up, **gather)
        if o.up_bias is not None:
            grad_up_bias = grad_bias(grad_h, o.up_bias, o.offsets)
    grads = (grad_x, grad_weights, grad_up, grad_down, grad_mid, grad_up_bias, grad_mid_bias, grad_down_bias)
    return tuple(o.absent() if grad is None else grad for grad in grads)


def _experts_backward_fake(grad_out, *arguments):
    o, (_h, _h2, need_x, need_weights, _drop_h) = _Operands.split(arguments)

    def like(tensor):
        return torch.empty_like(tensor) if need_weights and tensor is not None else o.absent()

    grad_x = o.x.new_empty(o.x.shape) if need_x else o.absent()
    grad_weights = o.weights.new_empty(o.weights.shape, dtype=torch.float32)
    biases = (None if bias is None else bias.new_empty(bias.shape) for bias in (o.up_bias, o.mid_bias, o.down_bias))
    return grad_x, grad_weights, like(o.up), like(o.down), like(o.mid), *map(like, biases)


def _permute(x, row_route, row_of_route, offsets):
    return permute_forward(x, row_route, offsets, row_of_route.shape[1])


def _permute_fake(x, row_route, row_of_route, offsets):
    return x.new_empty(row_route.shape[0], x.shape[1])


def _combine(y, weights, row_route, row_of_route, offsets):
    return combine_forward(y, row_of_route, weights, y.dtype)


def _combine_fake(y, weights, row_route, row_of_route, offsets):
    return y.new_empty(row_of_route.shape[0], y.shape[1])


def _combine_backward(grad_out, y, weights, row_route, row_of_route, offsets):
    grad_y = permute_forward(grad_out, row_route, offsets, row_of_route.shape[1], weights)
    return grad_y, route_dot(y, grad_out, row_of_route)


def _combine_backward_fake(grad_out, y, weights, row_route, row_of_route, offsets):
    return y.new_empty(y.shape), weights.new_empty(weights.shape, dtype=torch.float32)


def _sum_routes(y, row_of_route):
    return combine_forward(y, row_of_route, None, y.dtype)


def _sum_routes_fake(y, row_of_route):
    return y.new_empty(row_of_route.shape[0], y.shape[1])


def _grouped_gemm(a, w, bias, offsets, sm_budget):
    a = row_contiguous(a)
    products = Products.of((a,), (w,), offsets, a.shape[0], sm_budget)
    return products.forward("down", a, w, bias_EN=bias, zero_tail=True)[0]


def _grouped_gemm_fake(a, w, bias, offsets, sm_budget):
    return a.new_empty(a.shape[0], w.shape[1])


def _grouped_gemm_quantised(a, w, scales, bias, offsets, sm_budget):
    a = row_contiguous(a)
    products = Products.of((a,), (w,), offsets, a.shape[0], sm_budget)
    return products.forward("down", a, w, scales, bias_EN=bias, zero_tail=True)[0]


def _grouped_gemm_quantised_fake(a, w, scales, bias, offsets, sm_budget):
    return a.new_empty(a.shape[0], w.shape[1])


def _dequantise(values, scales, dtype):
    return dequantise(values, scales, dtype)


def _dequantise_fake(values, scales, dtype):
    return torch.empty_like(values, dtype=dtype)


def _grouped_gemm_backward(grad, a, w, bias, offsets, sm_budget):
    a = row_contiguous(a)
    products = Products.of((a, grad), (w,), offsets, a.shape[0], sm_budget)
    grad_a, _ = products.forward("grad_x", grad, w.transpose(1, 2), zero_tail=True)
    grad_w = products.grad_w(grad, a, w)
    return grad_a, grad_w, a.new_empty(0) if bias is None else grad_bias(grad, bias, offsets)


def _grouped_gemm_backward_fake(grad, a, w, bias, offsets, sm_budget):
    grad_bias_ = a.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return a.new_empty(a.shape), torch.empty_like(w), grad_bias_


def _save_route(ctx, inputs, output):
    logits, _, _, *rest = inputs
    ctx.save_for_backward(logits, output[1], output[0])
    ctx.mark_non_differentiable(*output[1:])
    ctx.router = rest[:-1]


def _grad_route(ctx, grad_weights, *_integers):
    logits, ids, weights = ctx.saved_tensors
    grad = None
    if grad_weights is not None:
        grad = call("route_backward", logits, ids, weights, grad_weights, *ctx.router)
    return grad, None, None, *(None for _ in ctx.router), None


def _save_experts(ctx, inputs, output):
    *tensors, activation, sm_budget, save, _fused = inputs
    out, h, h2 = output
    ctx.set_materialize_grads(False)
    if not save:
        raise RuntimeError("moe_gpu::experts was called with save=False, which keeps nothing for a gradient")
    ctx.save_for_backward(*tensors, h, h2)
    ctx.activation, ctx.sm_budget = activation, sm_budget
    # Autograd alone holds h and h2, whose memory a backward pass may then give back.
    instead = out.new_empty(0), out.new_empty(0)
    ctx.mark_non_differentiable(*instead)
    return out, *instead


# Whether the backward pass under way keeps its graph for another; taken for granted where PyTorch does not say.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _grad_experts(ctx, grad_out, _h, _h2):
    if grad_out is None:
        return (None,) * 16
    *tensors, h, h2 = ctx.saved_tensors
    need = ctx.needs_input_grad
    need_weights = any(need[6:12])
    arguments = (grad_out, *tensors, ctx.activation, ctx.sm_budget, h, h2, need[0], need_weights)
    drop_h = not _keeps_graph() and not is_heard(arguments)  # where nobody comes back for them
    grads = call("experts_backward", *arguments, drop_h)
    grad_x, grad_weights, *grad_parameters = grads
    parameters = tensors[6:12]
    wanted = [grad if need[6 + i] and parameters[i] is not None else None for i, grad in enumerate(grad_parameters)]
    return grad_x if need[0] else None, grad_weights, None, None, None, None, *wanted, None, None, None, None


def _save_permute(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _grad_permute(ctx, grad):
    (row_of_route,) = ctx.saved_tensors
    return call("sum_routes", grad.contiguous(), row_of_route), None, None, None


def _save_combine(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grad_combine(ctx, grad):
    y, weights, row_route, row_of_route, offsets = ctx.saved_tensors
    grad_y, grad_weights = call("combine_backward", grad.contiguous(), y, weights, row_route, row_of_route, offsets)
    return grad_y, grad_weights, None, None, None


def _save_grouped_gemm(ctx, inputs, output):
    *tensors, ctx.sm_budget = inputs
    ctx.save_for_backward(*tensors)


def _grad_grouped_gemm(ctx, grad):
    a, w, bias, offsets = ctx.saved_tensors
    grad_a, grad_w, grad_bias_ = call("grouped_gemm_backward", grad.contiguous(), a, w, bias, offsets, ctx.sm_budget)
    return grad_a, grad_w, None if bias is None else grad_bias_, None, None


# Operators live as long as the library that defined them.
_LIBRARIES: list[torch.library.Library] = []
_AUTOGRAD: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "route": (_grad_route, _save_route),
    "experts": (_grad_experts, _save_experts),
    "permute": (_grad_permute, _save_permute),
    "combine": (_grad_combine, _save_combine),
    "grouped_gemm": (_grad_grouped_gemm, _save_grouped_gemm),
}


@functools.cache
def register() -> None:
    """Define the operators, once a process.

    Straight on the dispatcher: `torch.library.custom_op` adds checks to every call that cost more than our launches.
    """
    library = torch.library.Library(NAMESPACE, "DEF")
    IMPLEMENTATIONS.update({name: globals()[f"_{name}"] for name in _SCHEMAS})
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        for dispatch_key in ("CPU", "CUDA"):
            library.impl(name, IMPLEMENTATIONS[name], dispatch_key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", globals()[f"_{name}_fake"], lib=library)
        if name in _AUTOGRAD:
            library.impl(name, autograd_kernel(name, *_AUTOGRAD[name]), "Autograd", with_keyset=True)
    _LIBRARIES.append(library)
