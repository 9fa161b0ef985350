"""Whether a provider's numbers are right, at a cost that does not grow with the problem: before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from moe_gpu.benchmark.problem import Problem
from moe_gpu.reference import INVALID, activate_reference, route_reference, topk_reference

CHECKED_TOKENS = 64


class WrongOutputError(RuntimeError):
    """A provider's output or gradient is further from the float64 truth than the rule allows."""


@dataclass(frozen=True)
class Comparison:
    """Largest distance of a tensor from the truth, what is allowed, and the truth's largest magnitude."""

    max_error: float
    allowed_error: float
    scale: float

    @property
    def right(self) -> bool:
        return self.max_error <= self.allowed_error  # False for NaN

    @property
    def sensitive(self) -> bool:
        """Whether a tensor of zeros would fail."""
        return self.scale > 10 * self.allowed_error


@dataclass(frozen=True)
class Numbers:
    """Results for the checked tokens N: out_NO, and gradients by leaf; of the experts' weights one expert's alone."""

    out_NO: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


class Checker:
    """The float64 truth of up to 64 tokens, spread over the problem, and what torch in its dtype misses it by.

    The choices are those of the problem's own logits, which every provider computes by the same product; tokens whose
    K-th and next best expert lie within rounding of each other are left out. For gradients, the incoming gradient is
    zero outside these tokens, so that every gradient depends on them alone.
    allowed = 2 * max_err(torch in the same dtype) + eps * scale.
    Raises ValueError where every token's choice is within rounding.
    """

    def __init__(self, problem: Problem, gradients: bool = False) -> None:
        c = problem.config
        self.problem, self.with_gradients = problem, gradients
        with torch.no_grad():
            logits_TE = problem.logits()
            routing = route_reference(
                logits_TE, c.top_k, c.router, problem.selection_bias_E, c.capacity(problem.num_tokens)
            )
        num_tokens = problem.num_tokens
        spread = torch.linspace(0, num_tokens - 1, min(num_tokens, CHECKED_TOKENS), dtype=torch.float64)
        token_N = spread.round().long().unique().to(problem.device)
        self.token_N = token_N[self._clear(logits_TE[token_N])]
        if self.token_N.numel() == 0:
            raise ValueError("no token to check has a clear choice of experts; give another seed")
        self._logits_NE = logits_TE[self.token_N]
        self._keeps_NE = torch.zeros_like(self._logits_NE, dtype=torch.bool)
        kept_NK = routing.row_of_route_TK[self.token_N] != INVALID
        self._keeps_NE.scatter_(1, routing.topk_ids_TK[self.token_N].long(), kept_NK)
        counts_E = self._keeps_NE.sum(0)
        self.expert = int(counts_E.argmax())
        idle = (counts_E == 0).nonzero()
        self.idle_expert = int(idle[0]) if idle.numel() else None
        self.truth = self._compute(torch.float64)
        self._torch = self._compute(problem.dtype)

    def _clear(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """Which tokens' K-th best expert stands apart from the next by more than rounding."""
        c = self.problem.config
        if c.top_k == c.num_experts or c.router.n_group > 1 or self.problem.selection_bias_E is not None:
            return torch.ones(logits_NE.shape[0], dtype=torch.bool, device=logits_NE.device)
        best = logits_NE.double().topk(c.top_k + 1).values
        margin = best[:, c.top_k - 1] - best[:, c.top_k]
        return margin > 4 * torch.finfo(self.problem.dtype).eps * best.abs().amax(-1)

    def grad_out(self) -> torch.Tensor:
        """The incoming gradient (T, O) of the check: the problem's for the checked tokens, zero for the others."""
        grad_TO = torch.zeros_like(self.problem.grad_out_TO)
        grad_TO[self.token_N] = self.problem.grad_out_TO[self.token_N]
        return grad_TO

    def check_output(self, out_TO: torch.Tensor) -> Comparison:
        """Compare a provider's output; WrongOutputError unless it is right, of the right shape and dtype."""
        problem = self.problem
        expected = (problem.num_tokens, problem.config.expert_dim)
        if tuple(out_TO.shape) != expected or out_TO.dtype != problem.dtype:
            raise WrongOutputError(
                f"output is {tuple(out_TO.shape)} {out_TO.dtype}, expected {expected} {problem.dtype}"
            )
        result = self._compare(out_TO.detach()[self.token_N], self.truth.out_NO, self._torch.out_NO)
        if not result.sensitive:
            raise WrongOutputError(
                f"the check cannot tell the output (at most {result.scale:.3g}) from zeros: "
                f"an error of {result.allowed_error:.3g} is allowed"
            )
        _require(result, "output")
        return result

    def check_gradients(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, Comparison]:
        """Compare the gradients of `Problem.leaves` under `grad_out`; WrongOutputError unless all are right."""
        results = {}
        for name, truth in self.truth.gradients.items():
            whole = gradients[name]
            if whole.shape != self.problem.leaves[name].shape:
                raise WrongOutputError(f"gradient of {name} has shape {tuple(whole.shape)}")
            part = whole
            if name == "x":
                part = whole[self.token_N]
            elif name != "router_weight":
                part = whole[self.expert]
                if self.idle_expert is not None and bool(whole[self.idle_expert].count_nonzero()):
                    raise WrongOutputError(f"gradient of {name} is not zero for an expert without rows")
            results[name] = self._compare(part, truth, self._torch.gradients[name])
            # One renormalised choice has weight 1 whatever the logits: that gradient is 0 but for rounding.
            if results[name].scale > 0:
                _require(results[name], f"gradient of {name}")
        return results

    def _compare(self, value: torch.Tensor, truth: torch.Tensor, same_dtype: torch.Tensor) -> Comparison:
        scale = truth.abs().max().item()
        torch_error = (same_dtype.double() - truth).abs().max().item()
        allowed = 2 * torch_error + torch.finfo(self.problem.dtype).eps * scale
        return Comparison((value.double() - truth).abs().max().item(), allowed, scale)

    def _compute(self, dtype: torch.dtype) -> Numbers:
        """The layer for the checked tokens in `dtype`, one expert in memory at a time: plain torch, as in the loop."""
        problem, c = self.problem, self.problem.config
        wants = self.with_gradients
        x_NH = problem.x_TH.detach()[self.token_N].to(dtype).requires_grad_(wants)
        router_EH = problem.router_weight_EH.detach().to(dtype).requires_grad_(wants)
        grad_NO = problem.grad_out_TO[self.token_N].to(dtype)
        with torch.set_grad_enabled(wants):
            product_NE = x_NH @ router_EH.t()
            # The value of the logits that everybody rounds alike, the derivative of the product.
            logits_NE = self._logits_NE.to(dtype) + (product_NE - product_NE.detach())
            ids_NK, weights_NK = topk_reference(logits_NE, c.top_k, c.router, problem.selection_bias_E)
        out_NO = torch.zeros_like(grad_NO)
        grad_x_NH = torch.zeros_like(x_NH)
        grad_weights_NK = torch.zeros_like(weights_NK)
        gradients: dict[str, torch.Tensor] = {}
        for expert in self._keeps_NE.any(0).nonzero().flatten().tolist():
            n, k = torch.where((ids_NK == expert) & self._keeps_NE[:, expert, None])
            rows = x_NH.detach()[n].requires_grad_(wants)
            scale = weights_NK.detach()[n, k].requires_grad_(wants)
            weights = self._expert_weights(expert, dtype)
            with torch.set_grad_enabled(wants):
                part = _expert(rows, weights, c.activation) * scale.unsqueeze(-1).to(dtype)
            out_NO.index_add_(0, n, part.detach())
            if wants:
                wanted = weights if expert == self.expert else {}
                grads = torch.autograd.grad(part, [rows, scale, *wanted.values()], grad_NO[n])
                grad_x_NH.index_add_(0, n, grads[0])
                grad_weights_NK[n, k] = grads[1]
                gradients.update(zip(wanted, grads[2:], strict=True))
        if wants:
            through_router, grad_router_EH = torch.autograd.grad(weights_NK, [x_NH, router_EH], grad_weights_NK)
            gradients.update(x=grad_x_NH + through_router, router_weight=grad_router_EH)
        return Numbers(out_NO, gradients)

    def _expert_weights(self, expert: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {
            name: stacked.detach()[expert].to(dtype).requires_grad_(self.with_gradients)
            for name, stacked in self.problem.leaves.items()
            if name not in ("x", "router_weight")
        }


def _expert(x: torch.Tensor, weights: Mapping[str, torch.Tensor], activation: str) -> torch.Tensor:
    h = activate_reference(F.linear(x, weights["up"], weights.get("up_bias")), activation)
    if "mid" in weights:
        h = activate_reference(F.linear(h, weights["mid"], weights.get("mid_bias")), activation)
    return F.linear(h, weights["down"], weights.get("down_bias"))


def _require(result: Comparison, what: str) -> None:
    if not result.right:
        raise WrongOutputError(f"{what} is off by {result.max_error:.3g}, allowed {result.allowed_error:.3g}")
