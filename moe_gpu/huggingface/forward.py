"""The experts' forward that transformers calls: `(experts, hidden_states, top_k_index, top_k_weights) -> (T, H)`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_gpu.huggingface.layout import Conventions, read_weights
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.reference import ExpertWeights, QuantisedExperts, Routing
from moe_gpu.triton_kernels.ops import TritonExpertOps

ATTACHMENT = "_moe_gpu"
"""The attribute that `enable` gives a module: its Attachment."""


@dataclass(frozen=True)
class Attachment:
    """What `enable` leaves at an experts module, and what `disable` needs to put back.

    config: the configuration that the module had; previous: the implementation that it named. profiler counts the
    module's routes as layer `layer_index`. A copy of the module, or a pickled one, counts nothing.
    """

    config: Any
    previous: str | None
    profiler: ExpertProfiler | None = None
    layer_index: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Attachment, (self.config, self.previous)


_OPS: dict[tuple[str, int | None], TritonExpertOps] = {}


@torch.compiler.assume_constant_result
def _prepare(device_type: str, device_index: int | None) -> bool:
    """Have operations for the device ready in `_OPS`; while a graph is traced, this runs and leaves no trace."""
    key = device_type, device_index
    if key not in _OPS:
        _OPS[key] = TritonExpertOps(
            torch.device(device_type if device_index is None else f"{device_type}:{device_index}")
        )
    return True


def operations(device: torch.device) -> TritonExpertOps:
    """The operations of a device, made once a process."""
    _prepare(device.type, device.index)
    return _OPS[device.type, device.index]


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
    ops = operations(hidden_states.device)
    weights, dtype = read_weights(experts, hidden_states)
    x_TH = hidden_states.to(dtype)
    routing = ops.sort_routes(top_k_index, top_k_weights, weights.up_EGH.shape[0])
    if x_TH.dtype == torch.float64:  # the reference serves, and need not round them to float32
        routing = replace(routing, topk_weights_TK=top_k_weights.double())
    attachment = getattr(experts, ATTACHMENT, None)
    if attachment is not None and attachment.profiler is not None:
        attachment.profiler.record(routing.demand_P, attachment.layer_index)
    activation = conventions.activation_of(experts)
    if activation is None:
        out_TO = _experts_with_own_gate(ops, experts, x_TH, routing, weights)
    else:
        out_TO = ops.experts(x_TH, routing, weights, activation)
    return out_TO.to(hidden_states.dtype)


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
