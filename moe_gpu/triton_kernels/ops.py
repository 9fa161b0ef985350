"""TritonExpertOps: picks the backend for a device once, says which and why, and offers every operation on it."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

from moe_gpu import reference
from moe_gpu.config import ACTIVATIONS, RouterConfig
from moe_gpu.reference import ExpertWeights, Routing

MIN_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """Which implementation serves a device, `triton` or `reference`, and why."""

    name: str
    reason: str


@functools.cache
def choose_backend(device_type: str, device_index: int | None = None, use_triton: bool = True) -> Backend:
    """The backend for a device: Triton where it can run, else plain PyTorch, with the reason."""
    if not use_triton:
        return Backend("reference", "use_triton=False")
    if importlib.util.find_spec("triton") is None:
        return Backend("reference", "the package triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Backend("triton", "Triton's interpreter (TRITON_INTERPRET=1)")
    if device_type != "cuda":
        return Backend("reference", f"Triton needs an NVIDIA GPU, and the tensors are on {device_type}")
    capability = torch.cuda.get_device_capability(device_index)
    name = torch.cuda.get_device_name(device_index)
    if capability < MIN_CAPABILITY:
        return Backend("reference", f"{name} has compute capability {capability[0]}.{capability[1]}, below 8.0")
    return Backend("triton", f"{name}, compute capability {capability[0]}.{capability[1]}")


class TritonExpertOps:
    """Every operation of a MoE layer on one device, by Triton kernels or by the plain reference.

    `backend.name` and `backend.reason` say which and why. float64 tensors are served by the reference on any device,
    as the kernels compute in float32, float16 and bfloat16.
    """

    def __init__(self, device: torch.device | str, use_triton: bool = True) -> None:
        device = torch.device(device)
        self.backend = choose_backend(device.type, device.index, use_triton)

    def route(
        self,
        logits_TE: torch.Tensor,
        top_k: int,
        router: RouterConfig,
        bias_E: torch.Tensor | None = None,
        capacity: int | None = None,
    ) -> Routing:
        """Logits to a Routing, differentiable in the logits through the weights. Raises ValueError for bad sizes."""
        if logits_TE.dim() != 2:
            raise ValueError(f"logits have shape {tuple(logits_TE.shape)}; expected (tokens, experts)")
        router.validate_for(logits_TE.shape[1], top_k)
        return reference.route_reference(logits_TE, top_k, router, bias_E, capacity)

    def sort_routes(
        self, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, num_experts: int, capacity: int | None = None
    ) -> Routing:
        """A Routing from given choices, such as a replayed trace or another router's."""
        if topk_ids_TK.shape != topk_weights_TK.shape or topk_ids_TK.dim() != 2:
            raise ValueError(
                f"topk_ids {tuple(topk_ids_TK.shape)} and topk_weights {tuple(topk_weights_TK.shape)} "
                "must both be (tokens, top_k)"
            )
        sorted_routes = reference.sort_routes_reference(topk_ids_TK, num_experts, capacity)
        return Routing(topk_ids_TK.to(torch.int32), topk_weights_TK, *sorted_routes)

    def experts(
        self, x_TH: torch.Tensor, routing: Routing, weights: ExpertWeights, activation: str = "swiglu"
    ) -> torch.Tensor:
        """The routed experts' weighted output, (T, O); differentiable in x, the routing weights and every weight."""
        check_experts(x_TH, routing, weights, activation)
        return reference.experts_reference(x_TH, routing, weights, activation)


def check_experts(x_TH: torch.Tensor, routing: Routing, weights: ExpertWeights, activation: str) -> None:
    """Raise ValueError unless the tensors of `experts` fit together."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if x_TH.dim() != 2:
        raise ValueError(f"x has shape {tuple(x_TH.shape)}; expected (tokens, input_dim)")
    num_experts, up_rows, input_dim = weights.up_EGH.shape
    hidden_dim = up_rows // 2 if ACTIVATIONS[activation].gated else up_rows
    if x_TH.shape[1] != input_dim:
        raise ValueError(f"x has input_dim={x_TH.shape[1]}, the expert weights have {input_dim}")
    if x_TH.shape[0] != routing.topk_ids_TK.shape[0]:
        raise ValueError(f"x has {x_TH.shape[0]} tokens, the routing has {routing.topk_ids_TK.shape[0]}")
    if routing.num_experts != num_experts:
        raise ValueError(f"the routing has {routing.num_experts} experts, the weights have {num_experts}")
    if weights.down_EOI.shape[0] != num_experts or weights.down_EOI.shape[2] != hidden_dim:
        raise ValueError(
            f"down weights {tuple(weights.down_EOI.shape)} do not fit {num_experts} experts of hidden_dim={hidden_dim}"
        )
    if x_TH.dtype != weights.up_EGH.dtype or x_TH.dtype != weights.down_EOI.dtype:
        raise ValueError(
            f"x is {x_TH.dtype} and the expert weights are {weights.up_EGH.dtype}; convert one, or run under autocast"
        )
