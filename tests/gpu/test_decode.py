"""The decode kernels on a GPU that they serve: the interpreter's cases, real widths, graphs, and that they do serve."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moe_gpu.reference import Routing
from moe_gpu.triton_kernels.decode import MIN_CAPABILITY, decode_config
from moe_gpu.triton_kernels.grouped_gemm import shared_bytes
from moe_gpu.triton_kernels.ops import TritonExpertOps
from moe_gpu.triton_kernels.tuning import HOPPER_SHARED_BYTES
from tests.decode_cases import DECODE_CASES, check_decode
from tests.kernel_cases import ExpertCase, ExpertProblem, check_close, make_problem, reference_run

serves = (
    torch.cuda.is_available()
    and torch.cuda.get_device_capability() >= MIN_CAPABILITY
    and shared_bytes(torch.device("cuda")) >= HOPPER_SHARED_BYTES
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not serves, reason="needs a GPU that the decode kernels serve")]

REAL_CASES = [
    ExpertCase(f"Qwen3, {tokens} tokens", tokens, 2048, 768, 128, 8, bias=tokens == 2) for tokens in (1, 2, 4, 8, 16)
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*DECODE_CASES, *REAL_CASES], ids=lambda case: case.name)
def test_decode(case, dtype):
    torch.full((50_000_000,), float("nan"), device="cuda", dtype=dtype)  # what the allocator hands out next
    check_decode(case, decode_config(case.tokens * case.top_k), dtype, "cuda")


@pytest.mark.parametrize("num_rows", [16, 32, 64, 128])
def test_every_tile(num_rows):
    for case in DECODE_CASES:
        check_decode(case, decode_config(num_rows), torch.bfloat16, "cuda")


def kernels_of(ops: TritonExpertOps, problem: ExpertProblem, inference: bool) -> set[str]:
    """Names of the expert kernels that serve a problem, `_decode_up_kernel` for one."""
    x, routing_weights, weights, _ = problem.leaves(torch.bfloat16)
    routing = ops.sort_routes(problem.ids_TK, routing_weights, problem.case.experts)
    with torch.set_grad_enabled(not inference), profile(activities=[ProfilerActivity.CUDA]) as trace:
        ops.experts(x, routing, weights)
        torch.cuda.synchronize()
    return {event.key for event in trace.key_averages()}


PLAIN, GLUON = {"_decode_up_kernel", "_decode_down_kernel"}, {"_decode_hopper_kernel"}


@pytest.mark.parametrize(
    ("tokens", "width", "inference", "sm_budget", "expected"),
    [
        (1, 256, True, None, GLUON),
        (128, 256, True, 8, GLUON),
        (768, 256, True, None, GLUON),
        (769, 256, True, None, None),
        (1, 256, False, None, None),
        (1, 252, True, None, PLAIN),
        (16, 252, True, None, PLAIN),
        (17, 252, True, None, None),
        (1, 252, True, 8, None),
    ],
)
def test_decode_serves_inference_with_few_rows(tokens, width, inference, sm_budget, expected):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Gluon's kernel for few rows needs compute capability 9.0")
    problem = make_problem(ExpertCase("few", tokens, width, 128, 32, 2), torch.bfloat16, "cuda")
    names = kernels_of(TritonExpertOps("cuda", sm_budget=sm_budget), problem, inference)
    assert names & (PLAIN | GLUON) == (expected or set()), names


def test_graph_replays_with_other_routing():
    case = ExpertCase("graph", 8, 512, 256, 64, 8)
    ops = TritonExpertOps("cuda")
    first, second = (make_problem(case, torch.bfloat16, "cuda", seed) for seed in (0, 1))
    second.weights = first.weights
    ids, routing_weights, x = (tensor.clone() for tensor in (first.ids_TK, first.topk_weights_TK, first.x_TH))

    def run() -> torch.Tensor:
        routing: Routing = ops.sort_routes(ids, routing_weights, case.experts)
        return ops.experts(x, routing, first.weights)

    with torch.no_grad():
        run()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        for problem in (second, first):
            ids.copy_(problem.ids_TK)
            routing_weights.copy_(problem.topk_weights_TK)
            x.copy_(problem.x_TH)
            graph.replay()
            with torch.enable_grad():
                truth, same = (reference_run(problem, dtype)[0] for dtype in (torch.float64, torch.bfloat16))
            check_close("replay", out, same, truth, torch.bfloat16)
