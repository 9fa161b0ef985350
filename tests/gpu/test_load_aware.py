"""Load-aware tiles on a GPU: what the interpreter checks, at real widths, in graphs, with the same bits each time."""

from __future__ import annotations

import pytest
import torch

from moe_gpu.benchmark.timing import capture
from moe_gpu.triton_kernels import tuning
from moe_gpu.triton_kernels.grouped_gemm import shared_bytes
from moe_gpu.triton_kernels.ops import TritonExpertOps
from moe_gpu.triton_kernels.products import Products, given_tiles
from tests.gpu.test_kernels import REAL_CASES
from tests.kernel_cases import EXPERT_CASES, ExpertCase, check_experts, make_problem
from tests.load_aware_cases import CLASSES, COUNTS, check_products, check_tiles

capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not capable, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]


@pytest.mark.parametrize("classes", CLASSES, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_row_is_in_one_tile_of_its_class(counts, classes):
    check_tiles(counts, *classes, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", CLASSES[::2], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products(counts, classes, dtype):
    check_products(counts, *classes, dtype, "cuda")
    if dtype != torch.float32:
        check_products(counts, *classes, dtype, "cuda", widths=(512, 384), blocks=(64, 64))


@pytest.fixture(params=[0, -1], ids=["for few rows", "for many rows"])
def load_aware(request):
    """The tuner's load-aware tiles serve `up`, `down` and `grad_x` at any load; the Gluon kernels do not."""
    limit = shared_bytes(torch.device("cuda"))
    tiles = {}
    for kind in ("up", "down", "grad_x"):
        fitting = [tile for tile in tuning.load_aware_tiles(kind) if tuning.operand_bytes(kind, tile) < limit]
        if not fitting:
            pytest.skip(f"no load-aware tile fits {limit} bytes of shared memory")
        tiles[kind] = fitting[request.param]
    with given_tiles(tiles):
        yield


@pytest.mark.parametrize("case", [*EXPERT_CASES, *REAL_CASES], ids=lambda case: case.name)
def test_experts(case, load_aware):
    problem = make_problem(case, torch.bfloat16, "cuda")
    w = problem.weights
    offsets = torch.empty(case.experts + 1, dtype=torch.int32, device="cuda")
    products = Products.of((problem.x_TH,), (w.up_EGH, w.down_EOI), offsets, case.tokens * case.top_k)
    assert products.tile("up").smaller_ms, "another tile serves"
    assert products.tile("down").smaller_ms, "another tile serves"
    check_experts(case, torch.bfloat16, "cuda")


def test_a_graph_replays_other_loads_and_the_bits_do_not_depend_on_the_budget(load_aware):
    problem = make_problem(ExpertCase("skewed", 600, 512, 384, 16, 4, routing="few"), torch.bfloat16, "cuda")
    ids = problem.ids_TK.clone()

    def run(sm_budget: int | None = None) -> torch.Tensor:
        ops = TritonExpertOps("cuda", sm_budget=sm_budget)
        routing = ops.sort_routes(ids, problem.topk_weights_TK, 16)
        return ops.experts(problem.x_TH, routing, problem.weights)

    with torch.no_grad():
        captured = capture(run, torch.device("cuda"))
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            scores = torch.rand(600, 16, generator=generator)
            scores[: 100 * seed, :4] += 1  # hotter and hotter
            ids.copy_(scores.topk(4).indices)
            out = captured.replay().clone()
            assert all(torch.equal(out, run(budget)) for budget in (None, 1, 7))
