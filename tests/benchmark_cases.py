"""Layers and helpers that the tests of the benchmark share."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_gpu.benchmark.check import Checker
from moe_gpu.benchmark.problem import Problem
from moe_gpu.config import MoEConfig, RouterConfig
from moe_gpu.profiler import RoutingTrace

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALL = MoEConfig(24, 24, 32, 8, 2)
GROUPED = RouterConfig("sigmoid", routed_scaling_factor=2.5, n_group=4, topk_group=2)
CONFIGS = {
    "swiglu": SMALL,
    "every expert chosen": SMALL.with_(num_experts=3, top_k=3),
    "one choice": SMALL.with_(top_k=1, router=RouterConfig(norm_topk_prob=False)),
    "one renormalised choice": SMALL.with_(top_k=1),
    "biases, softmax after top-k": SMALL.with_(bias=True, router=RouterConfig(softmax_after_topk=True)),
    "sigmoid, groups, selection bias": SMALL.with_(num_experts=16, top_k=3, router=GROUPED, selection_bias=True),
    "three linear layers, odd sizes": MoEConfig(17, 9, 13, 5, 2, activation="gelu", depth=2, bias=True),
    "plain relu": SMALL.with_(activation="relu"),
}
ALIGNED = [name for name in CONFIGS if "odd" not in name]  # torch's grouped_mm wants rows of 16 bytes
DTYPES = (torch.float32, torch.bfloat16)
PEERS = ("scattermoe", "sonicmoe", "triton_kernels")


def sets(ids_TK: torch.Tensor) -> torch.Tensor:
    return ids_TK.long().sort(-1).values


def trace_of(ids_TK: list[list[int]], num_experts: int) -> RoutingTrace:
    return RoutingTrace(torch.tensor([ids_TK], dtype=torch.int16), num_experts, "test")


def provider_gradients(problem: Problem, checker: Checker, out_TO: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = problem.leaves
    return dict(zip(leaves, torch.autograd.grad(out_TO, list(leaves.values()), checker.grad_out()), strict=True))
