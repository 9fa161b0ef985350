"""Every implementation of the layer that is compared: the plain loop, ours, and the peers that are installed.

A provider runs the whole layer: `Problem.logits()`, then its own routing, experts and combine.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from moe_gpu.benchmark.problem import Problem
from moe_gpu.config import ACTIVATIONS, MoEConfig, RouterConfig
from moe_gpu.model import AdvancedMoELayer
from moe_gpu.moe_layer import MoELayer
from moe_gpu.reference import activate_reference, apply_function


@dataclass(frozen=True)
class Built:
    """A provider set up for one problem: `run()` computes out_TO; `backend` says in words what serves it."""

    run: Callable[[], torch.Tensor]
    backend: str | None = None


@dataclass(frozen=True)
class Provider:
    """One implementation. `unavailable(problem, mode)` is the reason why it cannot serve the problem, or None."""

    name: str
    unavailable: Callable[[Problem, str], str | None]
    build: Callable[[Problem], Built]


def _always_available(problem: Problem, mode: str) -> None:
    return None


def route_by_torch(
    logits_TE: torch.Tensor, top_k: int, router: RouterConfig, bias_E: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing as models write it: ids int64 (T, K) and weights (T, K) in the dtype of the logits."""
    scores = logits_TE.float()
    if router.score_function == "sigmoid":
        scores = torch.sigmoid(scores)
    elif not router.softmax_after_topk:
        scores = torch.softmax(scores, dim=-1)
    choice = scores if bias_E is None else scores + bias_E
    if router.n_group > 1:
        grouped = choice.view(choice.shape[0], router.n_group, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(router.topk_group, dim=-1).indices
        keep = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
        choice = grouped.masked_fill(~keep.unsqueeze(-1), -torch.inf).view_as(choice)
    ids = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if router.softmax_after_topk:
        weights = torch.softmax(weights, dim=-1)
    elif router.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, (weights * router.routed_scaling_factor).to(logits_TE.dtype)


def _route(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    c = problem.config
    return route_by_torch(problem.logits(), c.top_k, c.router, problem.selection_bias_E)


def use_tensors(layer: nn.Module, problem: Problem) -> None:
    """Make the layer, built on no device, compute with the problem's own tensors, without a copy."""
    w = problem.weights
    tensors = {
        "router_weight": problem.router_weight_EH,
        "selection_bias_E": problem.selection_bias_E,
        "gate_up_proj": w.up_EGH,
        "down_proj": w.down_EOI,
        "mid_proj": w.mid_EII,
        "gate_up_bias": w.up_bias_EG,
        "mid_bias": w.mid_bias_EI,
        "down_bias": w.down_bias_EO,
    }
    for name, tensor in tensors.items():
        setattr(layer, name, tensor)
    layer.to(problem.device)


def _build_torch_loop(problem: Problem) -> Built:
    with torch.device("meta"):
        layer = MoELayer(problem.config)
    use_tensors(layer, problem)
    return Built(lambda: layer(problem.x_TH, problem.logits()), "a loop over experts")


def _build_moe_gpu(problem: Problem) -> Built:
    with torch.device("meta"):
        layer = AdvancedMoELayer.from_config(problem.config)
    use_tensors(layer, problem)
    backend = layer.ops.backend_for(problem.dtype)
    return Built(lambda: layer(problem.x_TH, router_logits_TE=problem.logits())[0], f"{backend.name}: {backend.reason}")


def find_grouped_mm() -> tuple[str, Callable[..., torch.Tensor]] | None:
    """torch's grouped matrix product under the name that this version has; None where there is none."""
    for name, home in (("torch.nn.functional.grouped_mm", F), ("torch._grouped_mm", torch)):
        function = getattr(home, name.rsplit(".", 1)[1], None)
        if function is not None:
            return name, function
    return None


def _dropless(problem: Problem) -> str | None:
    if problem.config.capacity_factor is not None:
        return f"is dropless: it has no capacity_factor={problem.config.capacity_factor}"
    return None


def _torch_grouped_mm_unavailable(problem: Problem, mode: str) -> str | None:
    if find_grouped_mm() is None:
        return f"torch {torch.__version__} has no grouped_mm"
    return _dropless(problem)


def _build_torch_grouped_mm(problem: Problem) -> Built:
    found = find_grouped_mm()
    assert found is not None, "unavailable() comes first"
    name, grouped_mm = found
    c, w, x_TH = problem.config, problem.weights, problem.x_TH

    def linear(rows, stacked, bias, expert_R, ends_E):
        y = grouped_mm(rows, stacked.transpose(1, 2), offs=ends_E)
        if bias is None:
            return y
        return y + bias.float()[expert_R].to(y.dtype)  # in float32, so that its gradient is summed there

    def run() -> torch.Tensor:
        ids_TK, weights_TK = _route(problem)
        expert_R, route_R = ids_TK.flatten().sort()
        bounds_E = torch.arange(c.num_experts, device=x_TH.device)
        ends_E = torch.searchsorted(expert_R, bounds_E, right=True, out_int32=True)
        rows = (expert_R, ends_E)
        h = activate_reference(linear(x_TH[route_R // c.top_k], w.up_EGH, w.up_bias_EG, *rows), c.activation)
        if w.mid_EII is not None:
            h = activate_reference(linear(h, w.mid_EII, w.mid_bias_EI, *rows), c.activation)
        y_RO = linear(h, w.down_EOI, w.down_bias_EO, *rows)
        y_RO = y_RO * weights_TK.flatten()[route_R].unsqueeze(-1)
        row_of_route = torch.empty_like(route_R)
        row_of_route[route_R] = torch.arange(route_R.numel(), device=route_R.device)
        return y_RO[row_of_route].view(-1, c.top_k, c.expert_dim).sum(1)

    return Built(run, name)


def _transformers_grouped_mm_forward() -> Callable[..., torch.Tensor] | None:
    """transformers' own grouped_mm experts forward (5.7 and later), None where there is none."""
    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        return getattr(import_module("transformers.integrations.moe"), "grouped_mm_experts_forward", None)
    except ImportError:
        return None


def _transformers_unavailable(problem: Problem, mode: str) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if _transformers_grouped_mm_forward() is None:
        return "transformers has no integrations.moe.grouped_mm_experts_forward; it comes with transformers>=5.7"
    if problem.config.depth != 1:
        return "has no experts of depth=2"
    return _dropless(problem)


def experts_stand_in(problem: Problem) -> SimpleNamespace:
    """What transformers' experts functions read of an experts module, over the problem's own weights."""
    c, w = problem.config, problem.weights
    kind = ACTIVATIONS[c.activation]

    def act_fn(x: torch.Tensor) -> torch.Tensor:
        return apply_function(kind.function, x)

    return SimpleNamespace(
        num_experts=c.num_experts,
        gate_up_proj=w.up_EGH,
        up_proj=w.up_EGH,
        down_proj=w.down_EOI,
        gate_up_proj_bias=w.up_bias_EG,
        up_proj_bias=w.up_bias_EG,
        down_proj_bias=w.down_bias_EO,
        has_bias=c.bias,
        has_gate=kind.gated,
        is_transposed=False,
        is_concatenated=True,
        has_post_expert_norm=False,
        _is_expert_parallel=False,
        act_fn=act_fn,
        _apply_gate=lambda gate_up: activate_reference(gate_up, c.activation),
    )


def _build_transformers_grouped_mm(problem: Problem) -> Built:
    from transformers import __version__

    forward = _transformers_grouped_mm_forward()
    assert forward is not None, "unavailable() comes first"
    experts = experts_stand_in(problem)
    return Built(lambda: forward(experts, problem.x_TH, *_route(problem)), f"transformers {__version__} grouped_mm")


def _peer_unavailable(problem: Problem, module: str) -> str | None:
    """Reasons that the peers with kernels for NVIDIA GPUs share."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        found = False
    if not found:
        return f"{module} is not installed"
    if problem.device.type != "cuda":
        return "needs an NVIDIA GPU"
    return _dropless(problem)


def _only_swiglu(c: MoEConfig) -> str | None:
    if c.activation != "swiglu":
        return f"the adapter serves activation=swiglu, not {c.activation}"
    return None


def _scattermoe_unavailable(problem: Problem, mode: str) -> str | None:
    reason = _peer_unavailable(problem, "scattermoe.parallel_experts")
    if reason is None and problem.config.bias:
        reason = "the adapter serves experts without biases"
    return reason


def _build_scattermoe(problem: Problem) -> Built:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    c, w = problem.config, problem.weights

    def run() -> torch.Tensor:
        ids_TK, weights_TK = _route(problem)
        order = flatten_sort_count(ids_TK, num_experts=c.num_experts)
        x = parallel_linear(problem.x_TH, w.up_EGH.permute(0, 2, 1), c.top_k, *order, grouped_out=True)
        h = activate_reference(x, c.activation)
        if w.mid_EII is not None:
            h = parallel_linear(h, w.mid_EII.permute(0, 2, 1), 1, *order, grouped_in=True, grouped_out=True)
            h = activate_reference(h, c.activation)
        return parallel_linear(h, w.down_EOI.permute(0, 2, 1), 1, *order, gates=weights_TK, grouped_in=True)

    return Built(run, "scattermoe.parallel_experts.parallel_linear")


# The name that sonic-moe gave the flag for a first weight of [gate; up] halves, newest first.
_SONIC_CONCATENATED = ("concat_layout", "is_concatenated_gate_up")


def _sonicmoe_unavailable(problem: Problem, mode: str) -> str | None:
    reason = _peer_unavailable(problem, "sonicmoe") or _only_swiglu(problem.config)
    if reason:
        return reason
    entry = getattr(import_module("sonicmoe"), "moe_general_routing_inputs", None)
    if entry is None:
        return "this sonicmoe has no moe_general_routing_inputs"
    if not set(_SONIC_CONCATENATED) & set(inspect.signature(entry).parameters):
        return "this sonicmoe takes interleaved weights only, and gradients here are of [gate; up] halves"
    if problem.dtype == torch.float32:
        return "computes in float16 and bfloat16, not float32"
    return None


def _build_sonicmoe(problem: Problem) -> Built:
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    c, w = problem.config, problem.weights
    flag = next(
        name for name in _SONIC_CONCATENATED if name in inspect.signature(moe_general_routing_inputs).parameters
    )

    def run() -> torch.Tensor:
        ids_TK, weights_TK = _route(problem)
        token_TK = torch.arange(ids_TK.shape[0], dtype=torch.int32, device=ids_TK.device).unsqueeze(1)
        return moe_general_routing_inputs(
            problem.x_TH,
            weights_TK.flatten(),
            token_TK.expand_as(ids_TK).flatten(),
            ids_TK.flatten().int(),
            w.up_EGH.permute(1, 2, 0),
            w.up_bias_EG,
            w.down_EOI.permute(1, 2, 0),
            w.down_bias_EO,
            E=c.num_experts,
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            **{flag: True},
        )[0]

    return Built(run, "sonicmoe.moe_general_routing_inputs")


def _triton_kernels_unavailable(problem: Problem, mode: str) -> str | None:
    reason = _peer_unavailable(problem, "triton_kernels")
    if reason:
        return reason
    # PyPI's triton-kernels is another package of the same name; the one of the Triton repository has these.
    for module, name in (("triton_kernels.matmul", "matmul"), ("triton_kernels.tensor", "make_ragged_tensor_metadata")):
        if _peer_unavailable(problem, module) or not hasattr(import_module(module), name):
            return f"this triton_kernels has no {module}.{name}; the package of the Triton repository (3.6) has it"
    if mode != "forward":
        return "its matmul has no gradient"
    if problem.config.depth != 1:
        return "the adapter serves experts of depth=1"
    return None


def _build_triton_kernels(problem: Problem) -> Built:
    from triton_kernels.matmul import matmul
    from triton_kernels.tensor import make_ragged_tensor_metadata

    c, w = problem.config, problem.weights
    # It takes (E, in, out) with `in` contiguous, which is our layout transposed, and biases in float32.
    up_EHG, down_EIO = w.up_EGH.detach().transpose(1, 2), w.down_EOI.detach().transpose(1, 2)
    up_bias_EG = None if w.up_bias_EG is None else w.up_bias_EG.detach().float()
    down_bias_EO = None if w.down_bias_EO is None else w.down_bias_EO.detach().float()
    bounds_E = torch.arange(c.num_experts, device=problem.device)
    first = torch.zeros(1, dtype=torch.int32, device=problem.device)

    def run() -> torch.Tensor:
        ids_TK, weights_TK = _route(problem)
        expert_R, route_R = ids_TK.flatten().sort()
        ends_E = torch.searchsorted(expert_R, bounds_E, right=True, out_int32=True)
        counts_E = torch.diff(ends_E, prepend=first)
        ragged = make_ragged_tensor_metadata(counts_E, route_R.numel())
        token_R = (route_R // c.top_k).int()
        h = matmul(problem.x_TH.detach(), up_EHG, up_bias_EG, a_ragged_metadata=ragged, gather_indx=token_R)
        h = activate_reference(h, c.activation)
        y = matmul(h, down_EIO, down_bias_EO, a_ragged_metadata=ragged, scatter_indx=route_R.int())
        return (y.view(-1, c.top_k, c.expert_dim) * weights_TK.unsqueeze(-1)).sum(1)

    return Built(run, "triton_kernels.matmul")


BASELINE = "torch_loop"
PROVIDERS: Mapping[str, Provider] = MappingProxyType(
    {
        provider.name: provider
        for provider in (
            Provider(BASELINE, _always_available, _build_torch_loop),
            Provider("torch_grouped_mm", _torch_grouped_mm_unavailable, _build_torch_grouped_mm),
            Provider("transformers_grouped_mm", _transformers_unavailable, _build_transformers_grouped_mm),
            Provider("scattermoe", _scattermoe_unavailable, _build_scattermoe),
            Provider("sonicmoe", _sonicmoe_unavailable, _build_sonicmoe),
            Provider("triton_kernels", _triton_kernels_unavailable, _build_triton_kernels),
            Provider("moe_gpu", _always_available, _build_moe_gpu),
        )
    }
)
