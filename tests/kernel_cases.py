"""What every kernel must satisfy, on whatever device the caller names: the interpreter's CPU or a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_gpu import reference
from moe_gpu.config import ACTIVATIONS, RouterConfig
from moe_gpu.reference import ExpertWeights, Routing
from moe_gpu.triton_kernels.ops import TritonExpertOps

ROUTERS = {
    "softmax_renormalised": RouterConfig(),
    "softmax_plain": RouterConfig(norm_topk_prob=False),
    "softmax_after_topk": RouterConfig(softmax_after_topk=True, routed_scaling_factor=1.5),
    "sigmoid": RouterConfig("sigmoid", norm_topk_prob=False),
    "deepseek_v3": RouterConfig("sigmoid", routed_scaling_factor=2.5, n_group=4, topk_group=2),
}


def check_close(
    what: str, got: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype
) -> None:
    """STYLE's error rule: no worse than twice PyTorch computing in `dtype`, plus one rounding; and zeros must fail."""
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{what}: not finite (an element was not written, or poison was read)"
    scale = truth.abs().max().item()
    if scale == 0:
        assert (got == 0).all(), f"{what}: must be exactly zero"
        return
    error = (got.double() - truth).abs().max().item()
    torch_error = (same_dtype.double() - truth).abs().max().item()
    allowed = 2 * torch_error + torch.finfo(dtype).eps * scale
    summary = f"{what}: error {error:.3g}, allowed {allowed:.3g}, PyTorch {torch_error:.3g}, scale {scale:.3g}"
    assert error <= allowed, summary
    assert scale > 10 * allowed, f"{summary}: zeros would pass"


def check_routing(got: Routing, expected: Routing) -> None:
    """Integers to the bit, weights within float32 rounding."""
    for name in ("topk_ids_TK", "demand_P", "offsets_P", "row_route_R", "row_of_route_TK"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    torch.testing.assert_close(got.topk_weights_TK, expected.topk_weights_TK.float(), atol=2e-6, rtol=2e-6)


@dataclass(frozen=True)
class ExpertCase:
    """One expert problem; each names the edge it is there for."""

    name: str
    tokens: int
    input_dim: int
    hidden_dim: int
    experts: int
    top_k: int
    output_dim: int | None = None
    activation: str = "swiglu"
    depth: int = 1
    bias: bool = False
    routing: str = "random"
    capacity: int | None = None
    strided: bool = False


EXPERT_CASES = [
    ExpertCase("no tokens", 0, 32, 16, 4, 2),
    ExpertCase("one token", 1, 32, 16, 4, 2),
    ExpertCase("several tiles of rows, odd widths", 75, 45, 37, 3, 2),
    ExpertCase("empty experts", 20, 32, 24, 8, 2, routing="few"),
    ExpertCase("all tokens to one expert", 40, 32, 24, 4, 1, routing="one"),
    ExpertCase("k = 1", 33, 40, 16, 5, 1),
    ExpertCase("k = E, prime E", 40, 24, 16, 7, 7),
    ExpertCase("another output width", 30, 32, 24, 4, 2, output_dim=51),
    ExpertCase("capacity drops routes", 50, 32, 24, 4, 2, capacity=7, routing="few"),
    ExpertCase("ids out of range and -1", 24, 32, 24, 4, 2, routing="out of range"),
    ExpertCase("one expert", 10, 24, 16, 1, 1),
    ExpertCase("width one", 12, 1, 1, 3, 2, output_dim=1),
    ExpertCase("geglu with biases", 40, 32, 24, 4, 2, activation="geglu", bias=True),
    ExpertCase("tanh geglu", 40, 32, 24, 4, 2, activation="geglu_tanh"),
    ExpertCase("reglu", 40, 32, 24, 4, 2, activation="reglu"),
    ExpertCase("plain relu, no bias", 40, 32, 24, 4, 2, activation="relu"),
    ExpertCase("three linear layers with biases", 40, 32, 24, 4, 2, activation="gelu", depth=2, bias=True),
    ExpertCase("three linear layers, silu", 18, 20, 33, 5, 2, activation="silu", depth=2),
]


# x as a slice of wider rows, and weights stored with their last two axes exchanged, as gpt-oss stores them.
STRIDED_CASES = [
    ExpertCase("strided", 40, 32, 24, 4, 2, strided=True),
    ExpertCase("strided, odd widths", 21, 27, 19, 3, 2, output_dim=13, strided=True),
    ExpertCase("strided, with biases", 40, 32, 24, 4, 2, activation="gelu", depth=2, bias=True, strided=True),
]


def other_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with other strides: a column slice of a wider matrix, or stacked matrices stored transposed."""
    if tensor.dim() == 3:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=1)[:, : tensor.shape[1]]


def make_ids(case: ExpertCase, generator: torch.Generator) -> torch.Tensor:
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    if case.routing == "one":
        scores[:, case.experts - 1] = 2
    if case.routing == "few":
        scores[:, 1] = 2
        scores[:, 4 % case.experts] = 3
    ids = scores.topk(case.top_k, dim=1).indices.to(torch.int32)
    if case.routing == "out of range":
        ids[1] = torch.tensor([-1, case.experts])
        ids[5, 0] = 1_000_000
        ids[7] = -(2**31)
    return ids


@dataclass
class ExpertProblem:
    case: ExpertCase
    x_TH: torch.Tensor
    weights: ExpertWeights
    ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor
    grad_TO: torch.Tensor

    def leaves(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, ExpertWeights, list[torch.Tensor]]:
        """Fresh differentiable copies in a dtype; routing weights are float32 (float64 for the oracle)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def leaf(tensor: torch.Tensor | None, to: torch.dtype) -> torch.Tensor | None:
            if tensor is None:
                return None
            value = tensor.detach().to(to).clone()
            return (other_strides(value) if self.case.strided else value).requires_grad_()

        x = leaf(self.x_TH, dtype)
        routing_weights = leaf(self.topk_weights_TK, wide)
        w = self.weights
        names = ("up_EGH", "down_EOI", "mid_EII", "up_bias_EG", "mid_bias_EI", "down_bias_EO")
        weights = ExpertWeights(*(leaf(getattr(w, name), dtype) for name in names))
        tensors = [x, routing_weights, *(getattr(weights, n) for n in names if getattr(weights, n) is not None)]
        return x, routing_weights, weights, tensors


def make_problem(case: ExpertCase, dtype: torch.dtype, device: str, seed: int = 0) -> ExpertProblem:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    c = case
    output_dim = c.output_dim or c.input_dim
    up_rows = c.hidden_dim * (2 if ACTIVATIONS[c.activation].gated else 1)
    weights = ExpertWeights(
        randn(c.experts, up_rows, c.input_dim, scale=c.input_dim**-0.5),
        randn(c.experts, output_dim, c.hidden_dim, scale=c.hidden_dim**-0.5),
        randn(c.experts, c.hidden_dim, c.hidden_dim, scale=c.hidden_dim**-0.5) if c.depth == 2 else None,
        randn(c.experts, up_rows) if c.bias else None,
        randn(c.experts, c.hidden_dim) if c.bias and c.depth == 2 else None,
        randn(c.experts, output_dim) if c.bias else None,
    )
    ids = make_ids(c, generator).to(device)
    routing_weights = torch.rand(c.tokens, c.top_k, generator=generator).to(device) + 0.1
    return ExpertProblem(c, randn(c.tokens, c.input_dim), weights, ids, routing_weights, randn(c.tokens, output_dim))


def reference_run(problem: ExpertProblem, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients of the plain reference in a dtype."""
    x, routing_weights, weights, tensors = problem.leaves(dtype)
    rows = reference.sort_routes_reference(problem.ids_TK, problem.case.experts, problem.case.capacity)
    routing = Routing(problem.ids_TK, routing_weights, *rows)
    out = reference.experts_reference(x, routing, weights, problem.case.activation)
    return out.detach(), list(torch.autograd.grad(out, tensors, problem.grad_TO.to(dtype)))


def check_experts(case: ExpertCase, dtype: torch.dtype, device: str, seed: int = 0) -> None:
    """Training forward, inference forward and every gradient against the float64 oracle."""
    problem = make_problem(case, dtype, device, seed)
    truth, truth_grads = reference_run(problem, torch.float64)
    same, same_grads = reference_run(problem, dtype)
    ops = TritonExpertOps(device)
    assert ops.backend.name == "triton", ops.backend.reason
    x, routing_weights, weights, tensors = problem.leaves(dtype)
    routing = ops.sort_routes(problem.ids_TK, routing_weights, case.experts, case.capacity)
    out = ops.experts(x, routing, weights, case.activation)
    check_close(f"{case.name}: training forward", out.detach(), same, truth, dtype)
    with torch.no_grad():
        for fused in (False, True) if case.depth == 1 else (False,):
            out_inference = ops.experts(x, routing, weights, case.activation, fused=fused)
            check_close(f"{case.name}: inference forward, {fused=}", out_inference, same, truth, dtype)
    grads = torch.autograd.grad(out, tensors, problem.grad_TO)
    names = ["x", "routing weights", "up", "down"]
    names += [name for name, w in (("mid", weights.mid_EII), ("up bias", weights.up_bias_EG)) if w is not None]
    names += [n for n, w in (("mid bias", weights.mid_bias_EI), ("down bias", weights.down_bias_EO)) if w is not None]
    for name, grad, same_grad, truth_grad in zip(names, grads, same_grads, truth_grads, strict=True):
        check_close(f"{case.name}: gradient of {name}", grad, same_grad, truth_grad, dtype)
