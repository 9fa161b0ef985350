"""The experts' forward that transformers calls: `(experts, hidden_states, top_k_index, top_k_weights) -> (T, H)`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moe_gpu.huggingface.attachment import Attachment
from moe_gpu.huggingface.host_weights import expert_weights
from moe_gpu.huggingface.layout import ATTACHMENT, FP8, Conventions, compute_dtype, read_weights, stored, up_name
from moe_gpu.reference import ExpertWeights, QuantisedExperts, Routing
from moe_gpu.triton_kernels.ops import Backend, TritonExpertOps

_OPS: dict[tuple[str, int | None, int | None], TritonExpertOps] = {}


@torch.compiler.assume_constant_result
def _prepare(device_type: str, device_index: int | None, sm_budget: int | None) -> bool:
    """Have operations for the device ready in `_OPS`; while a graph is traced, this runs and leaves no trace."""
    key = device_type, device_index, sm_budget
    if key not in _OPS:
        device = torch.device(device_type if device_index is None else f"{device_type}:{device_index}")
        _OPS[key] = TritonExpertOps(device, sm_budget=sm_budget)
    return True


def operations(device: torch.device, sm_budget: int | None = None) -> TritonExpertOps:
    """The operations of a device in so many SMs (None: all), made once a process."""
    _prepare(device.type, device.index, sm_budget)
    return _OPS[device.type, device.index, sm_budget]


def backend_of(experts: Any) -> Backend:
    """What serves a module where its hidden states are, and why."""
    attachment, up = vars(experts).get(ATTACHMENT), stored(experts, up_name(experts))
    host = None if attachment is None else attachment.host
    ops = operations(up.device if host is None else host.device)
    return ops.backend if up.dtype == FP8 else ops.backend_for(up.dtype)


def experts_forward(
    conventions: Conventions,
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The routed experts' weighted output, in the dtype of `hidden_states`; ids outside [0, E) contribute nothing.

    Raises ValueError for hidden states that are not (tokens, width) and for weights that cannot be served.
    """
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden states have shape {tuple(hidden_states.shape)}; expected (tokens, width)")
    attachment = getattr(experts, ATTACHMENT, None)
    inputs = hidden_states, top_k_index, top_k_weights
    if attachment is None or torch.compiler.is_compiling():
        return _compute(conventions, experts, attachment, *inputs)
    attachment.note(hidden_states.shape[0], top_k_index.shape[-1])
    if attachment.graphs is None or attachment.why_no_graph is not None:
        return _compute(conventions, experts, attachment, *inputs)
    profiler = attachment.profiler
    if profiler is not None and profiler.state_LS is None:
        profiler.attach(hidden_states.device)
    compute = partial(_compute, conventions, experts, attachment)
    out_TO = attachment.graphs.call(compute, inputs, (experts, attachment), attachment.graph_owner)
    if profiler is not None:
        profiler.poll_if_due()
    return out_TO


def _compute(
    conventions: Conventions,
    experts: Any,
    attachment: Attachment | None,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What a graph holds: everything that a call does on the device."""
    activation = conventions.activation_of(experts)
    if attachment is not None and attachment.hbm is not None:
        return _from_slots(experts, attachment, activation, hidden_states, top_k_index, top_k_weights)
    ops = operations(hidden_states.device, None if attachment is None else attachment.sm_budget)
    weights, dtype = read_weights(experts, hidden_states)
    x_TH = hidden_states.to(dtype)
    routing = _route(ops, attachment, dtype, top_k_index, top_k_weights, weights.up_EGH.shape[0])
    if activation is None:
        out_TO = _experts_with_own_gate(ops, experts, x_TH, routing, weights)
    else:
        out_TO = ops.experts(x_TH, routing, weights, activation)
    return out_TO.to(hidden_states.dtype)


def _route(
    ops: TritonExpertOps,
    attachment: Attachment | None,
    dtype: torch.dtype,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_experts: int,
) -> Routing:
    """The routes of a call, sorted and counted; dtype: of the products."""
    routing = ops.sort_routes(top_k_index, top_k_weights, num_experts)
    if dtype == torch.float64:  # the reference serves, and need not round them to float32
        routing = replace(routing, topk_weights_TK=top_k_weights.double())
    on_meta = top_k_index.device.type == "meta"  # where shapes are all that there is
    if attachment is not None and attachment.profiler is not None and not on_meta:
        attachment.profiler.record(routing.demand_P, attachment.layer_index)
    return routing


@torch.compiler.disable(reason="an hbm_budget decides on the host which experts to load")
def _from_slots(
    experts: Any,
    attachment: Attachment,
    activation: str | None,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    if experts.training:
        raise ValueError("hbm_budget serves inference only and these experts are training; call model.eval()")
    if activation is None:
        raise ValueError("hbm_budget needs the fused experts and the module's activation was replaced; enable anew")
    assert attachment.hbm is not None
    ops = operations(hidden_states.device, attachment.sm_budget)
    weights = expert_weights(experts)
    x_TH = hidden_states.to(compute_dtype(hidden_states, (weights.up_EGH, weights.down_EOI)))
    routing = _route(ops, attachment, x_TH.dtype, top_k_index, top_k_weights, attachment.hbm.num_experts)
    return attachment.hbm.run(x_TH, routing, weights, activation, ops).to(hidden_states.dtype)


def _experts_with_own_gate(
    ops: TritonExpertOps, experts: Any, x_TH: torch.Tensor, routing: Routing, weights: ExpertWeights | QuantisedExperts
) -> torch.Tensor:
    rows_RH = ops.permute(x_TH, routing)
    h_RG = ops.grouped_gemm(rows_RH, weights.up_EGH, routing.offsets_P, weights.up_bias_EG)
    a_RI = experts._apply_gate(h_RG) if experts.has_gate else experts.act_fn(h_RG)
    y_RO = ops.grouped_gemm(a_RI.to(h_RG.dtype), weights.down_EOI, routing.offsets_P, weights.down_bias_EO)
    if getattr(experts, "has_post_expert_norm", False):
        y_RO = experts.post_expert_norm(y_RO).to(h_RG.dtype)
    return ops.combine(y_RO, routing)
