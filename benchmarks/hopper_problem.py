"""One problem of the experts alone, on a Hopper GPU in bf16, that every provider of `run_hopper.py` computes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from moe_gpu.benchmark.problem import sample_choices
from moe_gpu.config import MoEConfig
from moe_gpu.reference import ExpertWeights, QuantisedExperts
from moe_gpu.triton_kernels.ops import TritonExpertOps

CHECKED_TOKENS = 64


def make_weights(config: MoEConfig, device: str = "cuda") -> ExpertWeights:
    """Stacked random weights in bf16, drawn on the device; scaled in place, so that nothing is held twice."""
    c = config
    generator = torch.Generator(device=device).manual_seed(1)
    new: dict[str, Any] = dict(device=device, dtype=torch.bfloat16, generator=generator)
    up_EGH = torch.randn(c.num_experts, c.up_rows, c.input_dim, **new).mul_(c.input_dim**-0.5)
    down_EOI = torch.randn(c.num_experts, c.expert_dim, c.hidden_dim, **new).mul_(c.hidden_dim**-0.5)
    return ExpertWeights(up_EGH, down_EOI)


class Problem:
    """Inputs, stacked weights and given choices of one experts' problem, in bf16.

    `weights`: those of another problem of the same config, used as they are; without them new ones are drawn.
    """

    def __init__(
        self,
        config: MoEConfig,
        num_tokens: int,
        routing: str,
        weights: ExpertWeights | None = None,
        device: str = "cuda",
    ) -> None:
        c, self.config, self.num_tokens, self.routing = config, config, num_tokens, routing
        generator = torch.Generator(device=device).manual_seed(0)
        new: dict[str, Any] = dict(device=device, dtype=torch.bfloat16, generator=generator)
        self.x = torch.randn(num_tokens, c.input_dim, **new).requires_grad_()
        weights = make_weights(c, device) if weights is None else weights
        self.up, self.down = (w.detach().requires_grad_() for w in (weights.up_EGH, weights.down_EOI))
        self.ids = sample_choices(c, num_tokens, routing, torch.Generator().manual_seed(0)).int().to(device)
        scores = torch.rand(num_tokens, c.top_k, device=device, generator=generator)
        self.scores = (scores / scores.sum(1, keepdim=True)).requires_grad_()
        self.grad = torch.randn(num_tokens, c.expert_dim, **new)
        self.leaves = [self.x, self.up, self.down, self.scores]

    def flops(self, mode: str) -> int:
        return self.config.forward_flops(self.ids.numel()) * (1 if mode == "forward" else 3)

    def min_bytes(self, weight_bytes: int = 2) -> int:
        """Of a forward pass: the weights that are hit (not their scales, if any), input and output, once each."""
        hit = int(torch.bincount(self.ids.flatten().long(), minlength=self.config.num_experts).count_nonzero())
        rows = self.num_tokens * (self.config.input_dim + self.config.expert_dim)
        return weight_bytes * hit * self.config.parameters_per_expert + 2 * rows

    @functools.cached_property
    def checked(self) -> torch.Tensor:
        """The tokens whose outputs are checked."""
        count = min(CHECKED_TOKENS, self.num_tokens)
        return torch.linspace(0, self.num_tokens - 1, count, device=self.x.device).round().long()

    @torch.no_grad()
    def compute(self, dtype: torch.dtype) -> torch.Tensor:
        """The checked tokens' outputs by plain products in `dtype`, summed in float64 and rounded to `dtype`."""
        at = self.checked
        total = torch.zeros(len(at), self.config.expert_dim, device=at.device, dtype=torch.float64)
        for k in range(self.config.top_k):
            for t, (token, expert) in enumerate(zip(at.tolist(), self.ids[at, k].tolist(), strict=True)):
                gate, up = (self.up[expert].to(dtype) @ self.x[token].to(dtype)).chunk(2)
                y = self.down[expert].to(dtype) @ (torch.nn.functional.silu(gate) * up)
                total[t] += y.double() * self.scores[token, k].double()
        return total.to(dtype).double()

    @functools.cached_property
    def truth(self) -> tuple[torch.Tensor, float]:
        """The checked tokens' outputs in float64; the error allowed: twice PyTorch's in bf16, plus a rounding."""
        truth = self.compute(torch.float64)
        own = (self.compute(torch.bfloat16) - truth).abs().max().item()
        return truth, 2 * own + torch.finfo(torch.bfloat16).eps * truth.abs().max().item()

    @torch.no_grad()
    def check(self, out: torch.Tensor) -> dict[str, float]:
        """The largest error and the allowed one, in a row's field names; RuntimeError where it is exceeded."""
        truth, allowed = self.truth
        error = (out[self.checked].double() - truth).abs().max().item()
        if not error <= allowed:
            raise RuntimeError(f"wrong output: error {error:.3g}, allowed {allowed:.3g}")
        return dict(max_error=error, allowed_error=allowed)


def run_ours(p: Problem, ops: TritonExpertOps, weights: ExpertWeights | QuantisedExperts | None = None) -> torch.Tensor:
    routing = ops.sort_routes(p.ids, p.scores, p.config.num_experts)
    return ops.experts(p.x, routing, weights or ExpertWeights(p.up, p.down))
