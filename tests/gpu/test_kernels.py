"""The kernels on a real GPU: the interpreter's cases, real widths, graphs, repeatability, no synchronisation."""

from __future__ import annotations

import pytest
import torch

from moe_gpu.config import MoEConfig
from moe_gpu.model import AdvancedMoELayer, MoELayer
from moe_gpu.profiler import ExpertProfiler
from tests import operator_cases as cases
from tests.kernel_cases import EXPERT_CASES, ExpertCase, check_experts

capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not capable, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]

REAL_CASES = [
    ExpertCase("one token of a wide layer", 1, 2048, 768, 128, 8),
    ExpertCase("few rows an expert", 64, 2048, 768, 128, 8),
    ExpertCase("16 to 32 rows an expert", 400, 1024, 768, 128, 8),
    ExpertCase("33 to 96 rows an expert", 1100, 1024, 512, 128, 8),
    ExpertCase("full tiles and remainders", 3000, 1024, 768, 16, 4),
    ExpertCase("skewed", 2000, 512, 384, 16, 4, routing="few"),
    ExpertCase("all tokens to one expert", 1500, 512, 384, 8, 1, routing="one"),
    ExpertCase("width not a multiple of the tile", 700, 1000, 328, 8, 2),
    ExpertCase("odd widths", 333, 771, 515, 7, 3),
    ExpertCase("biases, wide", 900, 720, 720, 8, 4, bias=True),
    ExpertCase("three linear layers, wide", 900, 512, 384, 8, 2, activation="gelu", depth=2, bias=True),
    ExpertCase("capacity", 2000, 512, 384, 8, 2, routing="few", capacity=100),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*EXPERT_CASES, *REAL_CASES], ids=lambda case: case.name)
def test_experts(case, dtype):
    check_experts(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("router", cases.ROUTERS)
@pytest.mark.parametrize(
    "shape", [*cases.ROUTE_SHAPES.values(), (5000, 128, 8), (3000, 256, 8), (64, 512, 10)], ids=str
)
def test_route(shape, router, biased, dtype):
    cases.check_route(shape, cases.ROUTERS[router], biased, dtype, "cuda")


@pytest.mark.parametrize("num_tokens", [1, 50, 400, 30000])
def test_given_ids(num_tokens):
    cases.check_given_ids(num_tokens, 11, 3, "cuda")


def test_row_operators():
    cases.check_public_row_operators("cuda")


def test_opcheck():
    cases.run_opcheck("cuda")


def test_whole_layer_traces_without_a_break():
    cases.check_fullgraph("cuda", torch.float32)


def make_layer(dtype: torch.dtype = torch.bfloat16, **changes) -> AdvancedMoELayer:
    torch.manual_seed(0)
    config = MoEConfig(256, 256, 192, 16, 4).with_(**changes)
    return AdvancedMoELayer.from_config(config).to("cuda", dtype)


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 256, 3000])
def test_whole_layer_in_a_graph_replays_with_other_routing(num_tokens):
    layer = make_layer()
    layer.profiler = ExpertProfiler(16)
    layer.profiler.attach("cuda")
    static = torch.randn(num_tokens, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                layer(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, stats = layer(static)
        for seed in range(5):
            generator = torch.Generator(device="cuda").manual_seed(seed)
            static.copy_(torch.randn(static.shape, generator=generator, device="cuda") * 3)
            graph.replay()
            expected, expected_stats = layer(static)
            assert torch.equal(stats.counts_E, expected_stats.counts_E)
            assert torch.equal(out, expected)
        static.fill_(float("nan"))
        graph.replay()
        assert int(stats.invalid_routes) == num_tokens * 4
        assert (out == 0).all()


@pytest.mark.parametrize("num_tokens", [5, 700])
def test_repeats_are_bitwise_equal(num_tokens):
    layer = make_layer()
    x = torch.randn(num_tokens, 256, device="cuda", dtype=torch.bfloat16)
    first = None
    for _ in range(100):
        leaf = x.clone().requires_grad_()
        out, _ = layer(leaf)
        results = [out, *torch.autograd.grad(out.float().square().sum(), [leaf, *layer.parameters()])]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


@pytest.mark.parametrize("num_tokens", [1, 64, 2000])
def test_no_host_synchronisation(num_tokens):
    layer = make_layer(shared_hidden_dim=64, capacity_factor=1.25)
    x = torch.randn(num_tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        out, stats = layer(x)
        (out.float().sum() + stats.load_balancing_loss + stats.router_z_loss).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        with torch.no_grad():
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_both_layers_agree():
    config = MoEConfig(256, 256, 192, 16, 4, shared_hidden_dim=64)
    torch.manual_seed(0)
    plain = MoELayer(config).cuda()
    fast = AdvancedMoELayer.from_config(config).cuda()
    fast.load_state_dict(plain.state_dict())
    assert fast.features["triton"].active
    x = torch.randn(2, 300, 256, device="cuda")
    torch.testing.assert_close(fast(x)[0], plain(x), atol=1e-5, rtol=1e-4)


def test_autocast_with_float32_weights():
    layer = make_layer(torch.float32)
    x = torch.randn(40, 256, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        out, _ = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.gate_up_proj.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(x)[0], atol=0.05, rtol=0.05)
