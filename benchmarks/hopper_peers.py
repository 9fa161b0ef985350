"""The rivals, called as their own layers call them, from given ids and weights: of few tokens, and of training.

None is a dependency: one that cannot be imported is a row that says why. vLLM's experts take our layout. OpenAI's
triton_kernels (https://github.com/triton-lang/triton, python/triton_kernels) wants the gate and up rows of its fused
activation interleaved: a copy of the weights, made before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from hopper_problem import Problem

from moe_gpu.benchmark.timing import Job
from moe_gpu.reference import ExpertWeights


@dataclass(frozen=True)
class Peer:
    """A rival. `convert` lays weights out as it wants them; `bind` gives the timed call of a problem with them.

    modules: names that must import and hold an attribute. backend: what is timed, in words.
    """

    name: str
    backend: str
    modules: tuple[tuple[str, str], ...]
    convert: Callable[[ExpertWeights], Any]
    bind: Callable[[Problem, Any], Callable[[], torch.Tensor]]

    def unavailable(self) -> str | None:
        """The reason why it cannot be called here, or None."""
        for module, attribute in self.modules:
            try:
                found = import_module(module)
            except (ImportError, OSError, AttributeError, RuntimeError) as error:  # extensions fail in all these ways
                return f"{module} cannot be imported: {' '.join(str(error).split())[:200]}"
            if not hasattr(found, attribute):
                return f"{module} has no {attribute}: another version, or another package of that name"
        return None


def _keep(weights: ExpertWeights) -> ExpertWeights:
    return weights


def _bind_vllm(p: Problem, weights: ExpertWeights) -> Callable[[], torch.Tensor]:
    fused_experts = import_module("vllm.model_executor.layers.fused_moe.fused_moe").fused_experts
    x, scores = p.x.detach(), p.scores.detach()
    return lambda: fused_experts(x, weights.up_EGH, weights.down_EOI, scores, p.ids)


@dataclass(frozen=True)
class Interleaved:
    """Weights for triton_kernels: up_EHG with gate and up columns in turn, down_EIO, and the first product's bias."""

    up_EHG: torch.Tensor
    down_EIO: torch.Tensor
    bias_EG: torch.Tensor


def interleave(weights: ExpertWeights) -> Interleaved:
    """Its fused activation is silu(gate) * (up + 1): a bias of -1 on every up column makes it SwiGLU."""
    e, g, h = weights.up_EGH.shape
    up_EGH = weights.up_EGH.view(e, 2, g // 2, h).transpose(1, 2).reshape(e, g, h)
    bias_EG = torch.zeros(e, g, device=up_EGH.device)
    bias_EG[:, 1::2] = -1
    return Interleaved(up_EGH.transpose(1, 2), weights.down_EOI.transpose(1, 2), bias_EG)


def _bind_triton_kernels(p: Problem, weights: Interleaved) -> Callable[[], torch.Tensor]:
    module, tensor = import_module("triton_kernels.matmul"), import_module("triton_kernels.tensor")
    swiglu = import_module("triton_kernels.swiglu").swiglu_fn
    specs = module.FnSpecs("swiglu", swiglu, ("alpha", "limit"), reduction_n=2)
    activation = module.FusedActivation(specs, (1.0, None))
    x, w, k = p.x.detach(), weights, p.config.top_k
    expert_R, route_R = p.ids.flatten().long().sort(stable=True)
    counts_E = torch.bincount(expert_R, minlength=p.config.num_experts).int()
    ragged = tensor.make_ragged_tensor_metadata(counts_E, route_R.numel())
    token_R, scores_R, route_R = (route_R // k).int(), p.scores.detach().flatten()[route_R], route_R.int()

    def run() -> torch.Tensor:
        a = module.matmul(
            x, w.up_EHG, w.bias_EG, a_ragged_metadata=ragged, gather_indx=token_R, fused_activation=activation
        )
        y = module.matmul(a, w.down_EIO, None, a_ragged_metadata=ragged, scatter_indx=route_R, gammas=scores_R)
        return y.view(p.num_tokens, k, -1).sum(1)

    return run


PEERS = (
    Peer(
        "vllm",
        "vllm fused_experts: alignment, experts, sum",
        (("vllm.model_executor.layers.fused_moe.fused_moe", "fused_experts"),),
        _keep,
        _bind_vllm,
    ),
    Peer(
        "triton_kernels",
        "triton_kernels.matmul with its fused activation and torch's sum; sorting the routes is not timed",
        (
            ("triton_kernels.matmul", "matmul"),
            ("triton_kernels.tensor", "make_ragged_tensor_metadata"),
            ("triton_kernels.swiglu", "swiglu_fn"),
        ),
        interleave,
        _bind_triton_kernels,
    ),
)


def run_sonicmoe(p: Problem) -> torch.Tensor:
    """As SonicMoE's own layer calls its kernels, from given ids."""
    functional = import_module("sonicmoe.functional")
    metadata = import_module("sonicmoe.functional.triton_kernels").TC_topk_router_metadata_triton
    swiglu = import_module("sonicmoe.enums").ActivationType.SWIGLU
    (t, k), e = p.ids.shape, p.config.num_experts
    new: dict[str, Any] = dict(dtype=torch.int32, device="cuda")
    frequency, offsets = torch.empty(e, **new), torch.empty(e + 1, **new)
    rows = [torch.empty(t * k, **new) for _ in range(3)]
    metadata(p.ids, e, frequency, offsets, *rows)
    up, down = p.up.permute(1, 2, 0), p.down.permute(1, 2, 0)
    a, h = functional._UpProjection.apply(
        p.x, up, None, offsets, t * k, k, *rows, None, False, swiglu, not torch.is_grad_enabled(), True
    )
    return functional._DownProjection.apply(a, h, down, None, p.scores, offsets, t, k, *rows, None, False, swiglu)


def batched_products(p: Problem, mode: str) -> Job:
    """The matrix products of a pass over equal groups, by torch.bmm."""
    c, groups = p.config, p.ids.numel() // p.config.num_experts
    x = torch.randn(c.num_experts, groups, c.input_dim, device="cuda", dtype=torch.bfloat16)
    a = torch.randn(c.num_experts, groups, c.hidden_dim, device="cuda", dtype=torch.bfloat16)
    h = torch.randn(c.num_experts, groups, c.up_rows, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(c.num_experts, groups, c.expert_dim, device="cuda", dtype=torch.bfloat16)
    up, down = p.up.detach(), p.down.detach()

    def run(_: None) -> None:
        torch.bmm(x, up.mT)
        torch.bmm(a, down.mT)
        if mode != "forward":
            torch.bmm(y, down)
            torch.bmm(y.mT, a)
            torch.bmm(h.mT, x)
            torch.bmm(h, up)

    return Job(run)
