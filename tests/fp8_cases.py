"""What must hold of experts whose weights kernels read as FP8, on whatever device the caller names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_gpu import reference
from moe_gpu.config import ACTIVATIONS
from moe_gpu.reference import ExpertWeights, QuantisedExperts, QuantisedStack, Routing, dequantise_reference
from moe_gpu.triton_kernels.fp8 import FP8, step_depth
from tests.kernel_cases import ExpertCase, check_close, make_ids

LARGEST = torch.finfo(FP8).max


@dataclass(frozen=True)
class Fp8Case:
    """Sizes of the experts, the weights that share a scale (None: all of an expert), and how scales are kept.

    An axis that is not made of whole blocks has one.
    """

    experts: ExpertCase
    block: tuple[int, int] | None = (32, 32)
    exponents: bool = False

    @property
    def name(self) -> str:
        block = "a scale an expert" if self.block is None else "blocks of {} x {}".format(*self.block)
        return f"{self.experts.name}, {block}{', UE8M0' if self.exponents else ''}"


FP8_CASES = [
    Fp8Case(ExpertCase("no tokens", 0, 64, 32, 4, 2)),
    Fp8Case(ExpertCase("one token", 1, 64, 32, 4, 2)),
    Fp8Case(ExpertCase("several tiles of rows", 75, 64, 96, 3, 2)),
    Fp8Case(ExpertCase("several tiles of rows", 75, 64, 96, 3, 2), exponents=True),
    Fp8Case(ExpertCase("several tiles of rows", 40, 128, 128, 3, 2), (128, 128)),
    Fp8Case(ExpertCase("blocks across gate and up", 20, 32, 36, 3, 2), (24, 32), True),
    Fp8Case(ExpertCase("odd widths", 21, 45, 37, 3, 2, output_dim=13), None),
    Fp8Case(ExpertCase("odd widths", 21, 45, 37, 3, 2, output_dim=13), (1, 45), True),
    Fp8Case(ExpertCase("width one", 12, 1, 1, 3, 2, output_dim=1), None),
    Fp8Case(ExpertCase("steps that end within a row", 9, 160, 96, 3, 2), (32, 32)),
    Fp8Case(ExpertCase("empty experts", 20, 64, 32, 8, 2, routing="few")),
    Fp8Case(ExpertCase("all tokens to one expert", 40, 32, 64, 4, 1, routing="one"), (16, 32)),
    Fp8Case(ExpertCase("k = E, prime E", 20, 32, 32, 7, 7)),
    Fp8Case(ExpertCase("ids out of range and -1", 24, 32, 64, 4, 2, routing="out of range")),
    Fp8Case(ExpertCase("geglu with biases", 20, 64, 32, 4, 2, activation="geglu", bias=True)),
    Fp8Case(ExpertCase("tanh geglu", 20, 64, 32, 4, 2, activation="geglu_tanh"), None, True),
    Fp8Case(ExpertCase("plain gelu with biases", 20, 64, 32, 4, 2, activation="gelu", bias=True)),
    Fp8Case(ExpertCase("plain relu", 20, 64, 32, 4, 2, activation="relu")),
]


@dataclass(frozen=True)
class Fp8Problem:
    """Activations and routing in a dtype, weights in FP8."""

    case: Fp8Case
    x_TH: torch.Tensor
    weights: QuantisedExperts
    ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor

    def routing(self, capacity: int | None = None) -> Routing:
        rows = reference.sort_routes_reference(self.ids_TK, self.case.experts.experts, capacity)
        return Routing(self.ids_TK, self.topk_weights_TK, *rows)

    def plain(self, dtype: torch.dtype) -> ExpertWeights:
        """The weights dequantised into a dtype."""
        w = self.weights
        up, down = (dequantise_reference(s.values_ENK, s.scales_EBC, dtype) for s in (w.up_EGH, w.down_EOI))
        biases = (None if bias is None else bias.to(dtype) for bias in (w.up_bias_EG, w.down_bias_EO))
        return ExpertWeights(up, down, None, next(biases), None, next(biases))

    def reference(self, dtype: torch.dtype) -> torch.Tensor:
        """The plain reference's output in a dtype; in float64 of exact weights, the truth."""
        routing = self.routing()
        if dtype == torch.float64:
            routing = Routing(routing.topk_ids_TK, routing.topk_weights_TK.double(), *list(vars(routing).values())[2:])
        return reference.experts_reference(
            self.x_TH.to(dtype), routing, self.plain(dtype), self.case.experts.activation
        )


def quantise(weight: torch.Tensor, block: tuple[int, int] | None, exponents: bool) -> QuantisedStack:
    """Weights in FP8 with the scale that brings each block's largest to the largest value, or below it."""
    experts, rows, columns = weight.shape
    n, k = block or (rows, columns)
    n, k = n if rows % n == 0 else rows, k if columns % k == 0 else columns
    tiles = weight.view(experts, rows // n, n, columns // k, k)
    scales = (tiles.abs().amax((2, 4)) / LARGEST).clamp(min=2.0**-100)
    if exponents:
        scales = scales.log2().ceil().exp2()
    values = (tiles / scales[:, :, None, :, None]).view(weight.shape).to(FP8)
    return QuantisedStack(values, scales.to(torch.float8_e8m0fnu) if exponents else scales)


def make_fp8_problem(case: Fp8Case, dtype: torch.dtype, device: str, seed: int = 0) -> Fp8Problem:
    """Random weights with every kind of value among them: zeros, subnormal ones, the largest."""
    generator = torch.Generator().manual_seed(seed)
    c = case.experts
    output_dim = c.output_dim or c.input_dim
    up_rows = c.hidden_dim * (2 if ACTIVATIONS[c.activation].gated else 1)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def stack(*shape: int) -> QuantisedStack:
        weight = randn(*shape, scale=shape[2] ** -0.5)
        weight *= torch.logspace(-2, 0, shape[1])[:, None]  # blocks of rows differ in scale
        weight *= torch.rand(shape, generator=generator) > 0.1
        found = quantise(weight.to(device), case.block, case.exponents)
        subnormal = torch.rand(shape, generator=generator) < 0.1
        return QuantisedStack(
            torch.where(subnormal.to(device), torch.full((), 2.0**-9, device=device), found.values_ENK.float()).to(FP8),
            found.scales_EBC,
        )

    def biased(*shape: int) -> torch.Tensor | None:
        return randn(*shape).to(dtype).to(device) if c.bias else None

    weights = QuantisedExperts(
        stack(c.experts, up_rows, c.input_dim),
        stack(c.experts, output_dim, c.hidden_dim),
        biased(c.experts, up_rows),
        biased(c.experts, output_dim),
    )
    ids = make_ids(c, generator).to(device)
    scores = torch.rand(c.tokens, c.top_k, generator=generator).to(device) + 0.1
    return Fp8Problem(case, randn(c.tokens, c.input_dim).to(dtype).to(device), weights, ids, scores)


def check_fp8(
    problem: Fp8Problem, run: Callable[[Fp8Problem], torch.Tensor], least_step: int = 32, name: str = "forward"
) -> None:
    """The output of `run` under STYLE's error rule, and that the weights are such as kernels read."""
    for stack in (problem.weights.up_EGH, problem.weights.down_EOI):
        assert step_depth(stack.values_ENK, stack.scales_EBC) >= least_step
    dtype = problem.x_TH.dtype
    truth = problem.reference(torch.float64)
    check_close(f"{problem.case.name}: {name}", run(problem), problem.reference(dtype), truth, dtype)
