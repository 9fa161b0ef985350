"""Models of transformers on a GPU: the kernels serve, half precision, compiled static-cache decoding, no waiting."""

from __future__ import annotations

import pytest
import torch

from moe_gpu import ExpertProfiler, disable, enable
from moe_gpu.huggingface import register

pytest.importorskip("transformers.integrations.moe", reason="transformers with its experts interface is not installed")

from tests.huggingface_cases import (
    MODELS,
    READ_AS_FP8,
    check_error_rule,
    check_fp8_error_rule,
    check_outcome,
    experts_of,
    make_fp8,
    make_model,
    prompt,
    routes,
    run,
    serve,
    zeros_forward,
)

capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not capable, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]


@pytest.fixture(autouse=True)
def float32_products():
    """transformers' loop must not round its float32 products to TF32 while it is the truth."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_eager(name):
    model = make_model(name, "cuda")
    expected = run(model)
    report = enable(model)
    assert {row.backend for row in report.covered} == {"triton"}
    check_outcome(run(model), expected, tolerance=2e-5)


@pytest.mark.parametrize("sizes", [{}, dict(hidden_size=256, intermediate_size=192)], ids=["tiny", "multiples of 64"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_twice_eager(name, dtype, sizes):
    """At widths of multiples of 64 and enough rows the kernels for Hopper serve."""
    if sizes:
        sizes = {**sizes, "moe_intermediate_size": 192, "std": 0.06}  # as 0.2 is to a width of 32
    experts = experts_of(make_model(name, **sizes))[0]
    check_error_rule(experts, dtype, serve, "cuda", num_tokens=1500 if sizes else 40)
    with pytest.raises(AssertionError):
        check_error_rule(experts, dtype, zeros_forward, "cuda")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "qwen3_next"])
def test_generated_tokens_are_those_of_eager(name):
    """Static-cache generation compiles itself on a GPU (reduce-overhead: CUDA graphs), and counts in the graphs too."""
    model = make_model(name, "cuda")
    options = dict(max_new_tokens=12, do_sample=False)
    expected = model.generate(prompt("cuda"), **options)
    profiler = ExpertProfiler(6, num_layers=2)
    enable(model, profiler)
    assert torch.equal(model.generate(prompt("cuda"), **options), expected)
    profiler.flush()
    counted = profiler.counts_LE().sum(1)
    torch._dynamo.reset()
    got = model.generate(prompt("cuda"), **options, cache_implementation="static")
    assert torch.equal(got, expected)
    profiler.flush()
    assert torch.equal(profiler.counts_LE().sum(1), 2 * counted)
    assert model.config._experts_implementation == "moe_gpu"
    disable(model)


@pytest.mark.skipif(
    capable and torch.cuda.get_device_capability() < (8, 9), reason="kernels read FP8 from compute capability 8.9 on"
)
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp8_experts_are_read_as_they_are(scale_fmt, dtype):
    model, twin = (one.to("cuda") for one in make_fp8(scale_fmt, **READ_AS_FP8))
    assert "weights read as FP8" in enable(model).modules[0].how
    for num_tokens in (2, 40):
        check_fp8_error_rule(model, twin, dtype, num_tokens)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fp8_experts_are_served_by_dequantised_weights(scale_fmt):
    model, twin = (one.to("cuda") for one in make_fp8(scale_fmt))
    expected = run(twin).logits
    enable(model)
    torch.testing.assert_close(run(model).logits, expected, atol=2e-5, rtol=0)


def test_a_forward_pass_never_waits_for_the_device():
    model = make_model("qwen3_moe", "cuda")
    enable(model, ExpertProfiler(6, num_layers=2))
    experts = experts_of(model)[0]
    arguments = routes(experts, device="cuda")
    call = [experts, *arguments]
    serve(*call).sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        serve(*call).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_in_a_graph_replay_with_other_routing(name):
    register()
    experts = experts_of(make_model(name, "cuda"))[0].to(torch.bfloat16)
    hidden, ids, weights = routes(experts, device="cuda")
    hidden, weights = hidden.bfloat16(), weights.bfloat16()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                serve(experts, hidden, ids, weights)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = serve(experts, hidden, ids, weights)
        for shift in range(4):
            ids.copy_((ids + shift) % 7)  # 6 is no expert
            graph.replay()
            assert torch.equal(out, serve(experts, hidden, ids, weights))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_training_step_compiles_by_inductor_into_one_graph(name):
    model = make_model(name, "cuda")
    enable(model)
    expected = run(model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True)
    check_outcome(run(model), expected, tolerance=5e-5)
