"""The warp-specialised kernels on a Hopper GPU: every edge of a ragged problem, forward and gradients."""

from __future__ import annotations

import pytest
import torch

from moe_gpu.triton_kernels import tile_table, tuning
from moe_gpu.triton_kernels.ops import TritonExpertOps
from moe_gpu.triton_kernels.products import Products
from moe_gpu.triton_kernels.tuning import KINDS, HopperConfig
from tests.kernel_cases import ExpertCase, check_experts, make_problem

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hopper, reason="needs a GPU of compute capability 9.0")]

CASES = [
    ExpertCase("one tile of columns less than full", 400, 64, 64, 4, 1),
    ExpertCase("remainders of every size", 1700, 256, 192, 13, 4),
    ExpertCase("empty experts", 600, 128, 320, 8, 2, routing="few"),
    ExpertCase("all tokens to one expert", 1000, 192, 128, 4, 1, routing="one"),
    ExpertCase("ids out of range and -1", 700, 128, 192, 4, 2, routing="out of range"),
    ExpertCase("capacity drops routes", 1000, 256, 128, 8, 2, routing="few", capacity=130),
    ExpertCase("another output width", 500, 128, 192, 4, 2, output_dim=448),
    ExpertCase("k = E, prime E", 150, 192, 64, 7, 7),
    ExpertCase("geglu with biases", 600, 320, 192, 5, 2, activation="geglu", bias=True),
    ExpertCase("tanh geglu", 600, 128, 192, 5, 2, activation="geglu_tanh"),
    ExpertCase("plain relu with biases", 600, 128, 320, 5, 2, activation="relu", bias=True),
    ExpertCase("three linear layers with biases", 600, 128, 320, 4, 2, activation="gelu", depth=2, bias=True),
    ExpertCase("three linear layers, silu", 600, 192, 128, 4, 2, activation="silu", depth=2),
    ExpertCase("weights stored transposed", 900, 256, 320, 4, 2, strided=True),
    ExpertCase("weights stored transposed, not gated", 900, 256, 320, 4, 2, activation="silu", strided=True),
    ExpertCase("gpt-oss widths", 300, 2880, 2880, 4, 2, bias=True),
    ExpertCase("Qwen3 widths", 1500, 2048, 768, 16, 4),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_experts(case, dtype):
    problem = make_problem(case, dtype, "cuda")
    w = problem.weights
    weights = tuple(tensor for tensor in (w.up_EGH, w.mid_EII, w.down_EOI) if tensor is not None)
    offsets = torch.empty(case.experts + 1, dtype=torch.int32, device="cuda")
    products = Products.of((problem.x_TH,), weights, offsets, case.tokens * case.top_k)
    assert all(isinstance(products.tile(kind), HopperConfig) for kind in KINDS), "another path serves"
    torch.full((50_000_000,), float("nan"), device="cuda", dtype=dtype)  # what the allocator hands out next
    check_experts(case, dtype, "cuda")


@pytest.fixture
def tall_tiles(monkeypatch):
    """What `moe-gpu tune` may choose instead of the rules' tiles: 192 rows, claimed from a counter."""
    tall = HopperConfig(3, width=128, slots=1, rows=192, claimed=True)
    monkeypatch.setattr(tuning, "_HOPPER", tuning._HOPPER | dict.fromkeys(("up", "down", "grad_x"), tall))
    tile_table.forget_tables()
    yield
    monkeypatch.undo()
    tile_table.forget_tables()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_experts_by_tall_tiles(case, tall_tiles):
    problem = make_problem(case, torch.bfloat16, "cuda")
    w = problem.weights
    offsets = torch.empty(case.experts + 1, dtype=torch.int32, device="cuda")
    products = Products.of((problem.x_TH,), (w.up_EGH, w.down_EOI), offsets, case.tokens * case.top_k)
    assert products.tile("down").rows == 192, "another tile serves"
    check_experts(case, torch.bfloat16, "cuda")


def test_tall_tiles_give_the_same_bits_a_hundred_times_and_on_any_budget(tall_tiles):
    problem = make_problem(ExpertCase("repeat", 3000, 256, 192, 5, 2), torch.bfloat16, "cuda")
    expected = None
    for repeat in range(100):
        ops = TritonExpertOps("cuda", sm_budget=(None, 1, 7, 66)[repeat % 4])
        with torch.no_grad():
            routing = ops.sort_routes(problem.ids_TK, problem.topk_weights_TK, 5)
            out = ops.experts(problem.x_TH, routing, problem.weights)
        expected = out if expected is None else expected
        assert torch.equal(out, expected)


@pytest.mark.parametrize("sm_budget", [1, 7, 66, 1000])
def test_any_sm_budget_gives_the_same_bits(sm_budget):
    problem = make_problem(ExpertCase("budget", 900, 256, 192, 5, 2), torch.bfloat16, "cuda")

    def run(ops: TritonExpertOps) -> list[torch.Tensor]:
        x, routing_weights, weights, leaves = problem.leaves(torch.bfloat16)
        out = ops.experts(x, ops.sort_routes(problem.ids_TK, routing_weights, 5), weights)
        return [out, *torch.autograd.grad(out, leaves, problem.grad_TO)]

    expected = run(TritonExpertOps("cuda"))
    got = run(TritonExpertOps("cuda", sm_budget=sm_budget))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
