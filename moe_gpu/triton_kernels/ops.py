"""TritonExpertOps: picks the backend for a device once, says which and why, and offers every operation on it."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_gpu import reference
from moe_gpu.config import ACTIVATIONS, RouterConfig
from moe_gpu.reference import ExpertWeights, QuantisedExperts, QuantisedStack, Routing
from moe_gpu.triton_kernels import reference_op, tuning

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

    `backend.name` and `backend.reason` say which and why. Tensors of another dtype than float32, float16 and bfloat16
    are served by the reference on any device; `backend_for(dtype)` says so.
    """

    def __init__(self, device: torch.device | str, use_triton: bool = True, sm_budget: int | None = None) -> None:
        if sm_budget is not None and sm_budget < 1:
            raise ValueError(f"sm_budget={sm_budget} must be at least 1, or None for every SM")
        device = torch.device(device)
        self.device = device
        self.sm_budget = sm_budget
        self.backend = choose_backend(device.type, device.index, use_triton)
        reference_op.register()
        if self.backend.name == "triton":
            from moe_gpu.triton_kernels import custom_ops, dispatch

            custom_ops.register()
            self._call = dispatch.call

    def with_budget(self, sm_budget: int | None) -> TritonExpertOps:
        """The same operations in so many SMs; None: in every one."""
        if sm_budget == self.sm_budget:
            return self
        if sm_budget is not None and sm_budget < 1:
            raise ValueError(f"sm_budget={sm_budget} must be at least 1, or None for every SM")
        other = copy.copy(self)
        other.sm_budget = sm_budget
        return other

    def backend_for(self, dtype: torch.dtype) -> Backend:
        """The backend that serves tensors of this dtype, and why."""
        if self.backend.name == "triton" and dtype not in KERNEL_DTYPES:
            return Backend("reference", f"the kernels do not compute in {dtype}")
        return self.backend

    def _by_triton(self, tensor: torch.Tensor) -> bool:
        return self.backend.name == "triton" and tensor.dtype in KERNEL_DTYPES

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
        check_capacity(capacity)
        if not self._by_triton(logits_TE):
            return reference.route_reference(logits_TE, top_k, router, bias_E, capacity)
        weights_TK, ids_TK, *rows = self._call(
            "route",
            logits_TE,
            bias_E,
            top_k,
            router.score_function,
            router.softmax_after_topk,
            router.norm_topk_prob,
            router.routed_scaling_factor,
            router.n_group,
            router.topk_group,
            capacity,
        )
        return Routing(ids_TK, weights_TK, *rows)

    def sort_routes(
        self, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, num_experts: int, capacity: int | None = None
    ) -> Routing:
        """A Routing from given choices, such as a replayed trace or another router's; ids out of range are dropped."""
        if topk_ids_TK.shape != topk_weights_TK.shape or topk_ids_TK.dim() != 2:
            raise ValueError(
                f"topk_ids {tuple(topk_ids_TK.shape)} and topk_weights {tuple(topk_weights_TK.shape)} "
                "must both be (tokens, top_k)"
            )
        if topk_ids_TK.dtype.is_floating_point or topk_ids_TK.dtype.is_complex:
            raise ValueError(f"topk_ids are {topk_ids_TK.dtype}; give integers")
        check_capacity(capacity)
        ids_TK = topk_ids_TK if topk_ids_TK.dtype == torch.int32 else topk_ids_TK.long()
        if self.backend.name == "triton":
            narrow_TK, *rows = self._call("sort_routes", ids_TK, num_experts, capacity)
            ids_TK = ids_TK if ids_TK.dtype == torch.int32 else narrow_TK
        else:
            if ids_TK.dtype != torch.int32:  # converting alone would wrap a wild id into range
                ids_TK = ids_TK.clamp(-1, num_experts).to(torch.int32)
            rows = reference.sort_routes_reference(ids_TK, num_experts, capacity)
        return Routing(ids_TK, topk_weights_TK.float(), *rows)

    def experts(
        self,
        x_TH: torch.Tensor,
        routing: Routing,
        weights: ExpertWeights | QuantisedExperts,
        activation: str = "swiglu",
        fused: bool | None = None,
    ) -> torch.Tensor:
        """The routed experts' weighted output, (T, O); differentiable in x, the routing weights and every weight.

        FP8 weights take no gradient. The kernels read them as they are where `fp8_reason` is None, products have few
        enough rows and no gradient is asked for; else they are dequantised into x's dtype on every call.
        fused: whether the fused expert MLP serves (no gradient, depth 1) or the grouped products do; None chooses by
        the measured bound on rows per expert.
        Raises ValueError for tensors that do not fit together, with both sizes or dtypes.
        """
        check_experts(x_TH, routing, weights, activation)
        if isinstance(weights, QuantisedExperts):
            return self._quantised_experts(x_TH, routing, weights, activation, fused)
        if not self._by_triton(x_TH):
            return reference.experts_reference(
                x_TH, routing, weights, activation, _gemm_at_once(x_TH, routing, weights)
            )
        w = weights
        leaves = (x_TH, routing.topk_weights_TK, *w.tensors())
        save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in leaves)
        fusable = not save and w.mid_EII is None and (w.up_bias_EG is None) == (w.down_bias_EO is None)
        if fused and not fusable:
            raise ValueError("fused=True needs inference (no gradient), depth 1 and both biases or none")
        if fused is None:
            few = routing.row_route_R.shape[0] <= tuning.FUSED_MLP_MAX_ROWS_PER_EXPERT * routing.num_experts
            fused = fusable and few
        return self._call(
            "experts",
            x_TH,
            routing.topk_weights_TK,
            routing.topk_ids_TK,
            routing.row_route_R,
            routing.row_of_route_TK,
            routing.offsets_P,
            w.up_EGH,
            w.down_EOI,
            w.mid_EII,
            w.up_bias_EG,
            w.mid_bias_EI,
            w.down_bias_EO,
            activation,
            self.sm_budget,
            save,
            fused,
        )[0]

    def _quantised_experts(
        self, x_TH: torch.Tensor, routing: Routing, weights: QuantisedExperts, activation: str, fused: bool | None
    ) -> torch.Tensor:
        up, down, *biases = weights.up_EGH, weights.down_EOI, weights.up_bias_EG, weights.down_bias_EO
        wanted = torch.is_grad_enabled() and (x_TH.requires_grad or routing.topk_weights_TK.requires_grad)
        if wanted or fused or not self._by_triton(x_TH):
            plain = (self.dequantise(up, x_TH.dtype), self.dequantise(down, x_TH.dtype), None, biases[0], None)
            return self.experts(x_TH, routing, ExpertWeights(*plain, biases[1]), activation, fused)
        return self._call(
            "experts_quantised",
            x_TH,
            routing.topk_weights_TK,
            routing.topk_ids_TK,
            routing.row_route_R,
            routing.row_of_route_TK,
            routing.offsets_P,
            up.values_ENK,
            down.values_ENK,
            up.scales_EBC,
            down.scales_EBC,
            *biases,
            activation,
            self.sm_budget,
        )

    def fp8_reason(self, stack: QuantisedStack) -> str | None:
        """Why these FP8 weights are dequantised on every call, or None where kernels read them as they are."""
        if self.backend.name != "triton":
            return "plain PyTorch serves"
        from moe_gpu.triton_kernels.fp8 import fp8_unavailable, fp8_unfit

        return fp8_unavailable(self.device) or fp8_unfit(stack.values_ENK, stack.scales_EBC)

    def dequantise(self, stack: QuantisedStack, dtype: torch.dtype) -> torch.Tensor:
        """The weights' values times their scales, (E, N, K) in `dtype`; no gradient goes to them."""
        if self.backend.name != "triton":
            return reference.dequantise_reference(stack.values_ENK, stack.scales_EBC, dtype)
        return self._call("dequantise", stack.values_ENK.detach(), stack.scales_EBC.detach(), dtype)

    def expert_rows(
        self,
        x_TH: torch.Tensor,
        routing: Routing,
        weights: ExpertWeights,
        activation: str,
        first_bin: int,
        num_experts: int,
        out_RO: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rows of some experts before the weighted combine, into `out_RO` or a new (R, O); inference only.

        The weights are of the routing's bins from `first_bin` on; rows of other bins are not touched. Kernels and tiles
        are those that `experts` would use for `num_experts` experts, so a row has the same bits as there. The rows'
        dtype is the backend's choice; hand them to `combine_rows`.
        """
        bounds_P = routing.offsets_P[first_bin : first_bin + weights.up_EGH.shape[0] + 1]
        if not self._by_triton(x_TH):
            rows_RH = x_TH.index_select(0, routing.row_token_R)
            y_RO = reference.expert_rows_reference(rows_RH, bounds_P, weights, activation)
            if out_RO is None:
                return y_RO
            first, end = bounds_P[0], bounds_P[-1]
            out_RO[first:end] = y_RO[first:end]
            return out_RO
        from moe_gpu.triton_kernels.custom_ops import expert_rows

        return expert_rows(
            x_TH,
            routing.topk_weights_TK,
            routing.topk_ids_TK,
            routing.row_route_R,
            routing.row_of_route_TK,
            bounds_P.clone() if first_bin % 4 else bounds_P,  # kernels are compiled for 16-byte aligned pointers
            weights.up_EGH,
            weights.down_EOI,
            weights.mid_EII,
            weights.up_bias_EG,
            weights.mid_bias_EI,
            weights.down_bias_EO,
            activation,
            self.sm_budget,
            tiled_experts=num_experts,
            out=out_RO,
        )

    def combine_rows(self, y_RO: torch.Tensor, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
        """`combine` of the rows that `expert_rows` gave, (T, O) in `dtype`; inference only."""
        if self.backend.name != "triton" or dtype not in KERNEL_DTYPES:
            return reference.combine_reference(y_RO, routing)
        from moe_gpu.triton_kernels.gather_scatter import combine_forward

        return combine_forward(y_RO, routing.row_of_route_TK, routing.topk_weights_TK, dtype)

    def permute(self, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Rows sorted by expert, (R, H), zero where no expert computes; differentiable in x."""
        if not self._by_triton(x_TH):
            return reference.permute_reference(x_TH, routing)
        return self._call("permute", x_TH, routing.row_route_R, routing.row_of_route_TK, routing.offsets_P)

    def combine(self, y_RO: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The weighted sum of each token's rows, (T, O); differentiable in y and the routing weights."""
        if not self._by_triton(y_RO):
            return reference.combine_reference(y_RO, routing)
        return self._call(
            "combine", y_RO, routing.topk_weights_TK, routing.row_route_R, routing.row_of_route_TK, routing.offsets_P
        )

    def grouped_gemm(
        self,
        a_RK: torch.Tensor,
        w_ENK: torch.Tensor | QuantisedStack,
        offsets_P: torch.Tensor,
        bias_EN: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`a[rows of e] @ w[e].T + bias[e]`, (R, N), zero past the last offset; differentiable in a, w and bias.

        FP8 weights are read as in `experts`.
        """
        if a_RK.shape[1] != w_ENK.shape[2] or offsets_P.shape[0] != w_ENK.shape[0] + 1:
            raise ValueError(
                f"a {tuple(a_RK.shape)}, w {tuple(w_ENK.shape)} and {offsets_P.shape[0]} offsets do not fit together"
            )
        if isinstance(w_ENK, QuantisedStack):
            check_quantised("w", w_ENK)
            if self._by_triton(a_RK) and not (torch.is_grad_enabled() and a_RK.requires_grad):
                values, scales = w_ENK.values_ENK, w_ENK.scales_EBC
                return self._call("grouped_gemm_quantised", a_RK, values, scales, bias_EN, offsets_P, self.sm_budget)
            w_ENK = self.dequantise(w_ENK, a_RK.dtype)
        if a_RK.dtype != w_ENK.dtype:
            raise ValueError(f"a is {a_RK.dtype} and w is {w_ENK.dtype}; convert one")
        if not self._by_triton(a_RK):
            return (_traced_gemm(a_RK) or reference.grouped_gemm_reference)(a_RK, w_ENK, offsets_P, bias_EN)
        return self._call("grouped_gemm", a_RK, w_ENK, bias_EN, offsets_P, self.sm_budget)


def _traced_gemm(a_RK: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """The operator that stands for the reference's grouped product where there are no offsets to read on the host.

    That is so while a graph is traced, and on the meta device.
    """
    unread = torch.compiler.is_compiling() or a_RK.device.type == "meta"
    return torch.ops.moe_gpu.grouped_gemm_reference if unread else None


_MOST_AT_ONCE = 1 << 20  # pre-activations on a CPU; with more, one expert after another stays in the caches


def _gemm_at_once(x_TH: torch.Tensor, routing: Routing, weights: ExpertWeights) -> Callable[..., torch.Tensor] | None:
    """What multiplies all experts' rows in one call without Triton; None: one expert after another.

    On a CPU it is torch's grouped_mm where a call for each expert would cost more than it computes. Only where that
    gives the same bits: without biases, every row and every row's gradient on 64 bytes, and no dropped routes, whose
    rows it would not write.
    """
    traced = _traced_gemm(x_TH)
    if traced is not None or x_TH.device.type != "cpu" or x_TH.dtype != torch.float32 or not _grouped_mm_serves():
        return traced
    rows, width = routing.row_route_R.shape[0], weights.up_EGH.shape[1]
    stacks = [stack for stack in (weights.up_EGH, weights.mid_EII, weights.down_EOI) if stack is not None]
    biased = any(bias is not None for bias in (weights.up_bias_EG, weights.mid_bias_EI, weights.down_bias_EO))
    aligned = all(
        w.is_contiguous() and all(size % 16 == 0 for size in w.shape[1:]) and reference.starts_aligned(w)
        for w in stacks
    )
    if biased or not aligned or rows * width > _MOST_AT_ONCE or int(routing.offsets_P[-1]) < rows:
        return None
    return _grouped_mm


def _grouped_mm_serves() -> bool:
    """Whether torch's grouped_mm does here what `F.linear` does: it knows neither autocast nor forward derivatives."""
    forward_derivatives = torch.autograd.forward_ad._current_level >= 0
    return _has_grouped_mm() and not torch.is_autocast_enabled("cpu") and not forward_derivatives


def _grouped_mm(a_RK: torch.Tensor, w_ENK: torch.Tensor, offsets_P: torch.Tensor, _bias: None) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(a_RK, w_ENK.transpose(1, 2), offs=offsets_P[1:])


@functools.cache
def _has_grouped_mm() -> bool:
    """Whether this PyTorch multiplies groups of float32 on a CPU."""
    try:
        _grouped_mm(torch.ones(1, 16), torch.ones(1, 16, 16), torch.tensor([0, 1], dtype=torch.int32), None)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


def check_capacity(capacity: int | None) -> None:
    """Raise ValueError for an expert that may take no row: kernels would count rows below 0."""
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1 row an expert, or None for dropless")


def check_quantised(name: str, stack: QuantisedStack) -> None:
    """Raise ValueError unless a stack holds FP8 values and a scale for each whole block of them."""
    values, scales = stack.values_ENK, stack.scales_EBC
    if values.dtype != torch.float8_e4m3fn or scales.dtype not in (torch.float32, torch.float8_e8m0fnu):
        kinds = f"{values.dtype} values and {scales.dtype} scales"
        raise ValueError(f"{name} has {kinds}; give float8_e4m3fn with float32 or float8_e8m0fnu")
    fits = values.dim() == scales.dim() == 3 and values.shape[0] == scales.shape[0]
    if not fits or any(n < 1 or size % n for size, n in zip(values.shape[1:], scales.shape[1:], strict=True)):
        raise ValueError(
            f"{name} of {tuple(values.shape)} is not made of whole blocks for scales of {tuple(scales.shape)}"
        )


def check_experts(
    x_TH: torch.Tensor, routing: Routing, weights: ExpertWeights | QuantisedExperts, activation: str
) -> None:
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
    if isinstance(weights, QuantisedExperts):
        check_quantised("up_EGH", weights.up_EGH)
        check_quantised("down_EOI", weights.down_EOI)
        return
    if x_TH.dtype != weights.up_EGH.dtype or x_TH.dtype != weights.down_EOI.dtype:
        raise ValueError(
            f"x is {x_TH.dtype} and the expert weights are {weights.up_EGH.dtype}; convert one, or run under autocast"
        )
