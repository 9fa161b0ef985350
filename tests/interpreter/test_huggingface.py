"""Tiny models of transformers through the real kernels on the interpreter: logits, gradients, one graph."""

from __future__ import annotations

import pytest
import torch

from moe_gpu import ExpertProfiler, enable, reference
from moe_gpu.huggingface import use_slice
from moe_gpu.slices.plan import GPUSlice
from moe_gpu.triton_kernels import custom_ops, products

pytest.importorskip("transformers.integrations.moe", reason="transformers with its experts interface is not installed")

from tests.huggingface_cases import (
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
)

# The interpreter is slow: one layer with experts each.
SMALLER = {
    "qwen3_moe": dict(num_hidden_layers=1),
    "gpt_oss": dict(num_hidden_layers=1),
    "nemotron_h": dict(layers_block_type=["moe", "attention"]),
}


@pytest.mark.parametrize("name", SMALLER)
def test_logits_and_gradients_are_those_of_eager(name):
    model = make_model(name, **SMALLER[name])
    expected = run(model)
    profiler = ExpertProfiler(6)
    report = enable(model, profiler)
    assert {row.backend for row in report.covered} == {"triton"}
    check_outcome(run(model), expected)
    profiler.flush()
    assert profiler.counts_LE().sum(1).tolist() == [2 * 9 * 2]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_bfloat16_is_no_worse_than_twice_eager(name):
    check_error_rule(experts_of(make_model(name))[0], torch.bfloat16, serve)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_routes_outside_the_experts_contribute_nothing(name):
    experts = experts_of(make_model(name))[0]
    hidden, ids, weights = routes(experts, 12)
    outside = torch.zeros_like(ids, dtype=torch.bool)
    outside[::3, 0] = True
    outside[4] = True
    expected = type(experts).forward(experts, hidden, ids, weights.masked_fill(outside, 0))
    got = serve(experts, hidden, ids.masked_fill(outside, 6), weights)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got[4] == 0).all()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_decoding_traces_into_one_graph(name):
    model = make_model(name, **SMALLER[name])
    enable(model)
    expected = model(prompt(), use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(prompt(), use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slots", [1, 4, 6])
def test_slots_through_the_kernels_have_the_bits_of_resident_weights(slots):
    plain, model = (make_model("qwen3_moe", **SMALLER["qwen3_moe"]) for _ in range(2))
    enable(plain)
    expert_bytes = sum(p[0].nbytes for p in experts_of(model)[0].parameters())
    enable(model, hbm_budget=slots * expert_bytes)
    with torch.no_grad():
        for length in (9, 1, 1):
            tokens = prompt()[:, :length]
            assert torch.equal(model(tokens, use_cache=False).logits, plain(tokens, use_cache=False).logits)


@pytest.mark.parametrize("name", SMALLER)
def test_every_product_keeps_to_the_slice(name, monkeypatch):
    """Those around a module's own gate too, forward and backward; what comes out is the same."""
    from moe_gpu.triton_kernels import grouped_gemm, grouped_gemm_grad

    model = make_model(name, **SMALLER[name])
    expected = run(model)
    enable(model)
    use_slice(model, GPUSlice(0, 0, 1, "cta", got_sms=1))
    budgets = []
    for module in (grouped_gemm, grouped_gemm_grad):
        programs = module.num_programs

        def spy(device, config, num_tiles, sm_budget=None, programs=programs):
            budgets.append(sm_budget)
            return programs(device, config, num_tiles, sm_budget)

        monkeypatch.setattr(module, "num_programs", spy)
    check_outcome(run(model), expected)
    assert len(budgets) >= 4
    assert set(budgets) == {1}


def test_a_fused_training_step_traces_into_one_graph():
    model = make_model("qwen3_moe", **SMALLER["qwen3_moe"])
    enable(model)
    expected = run(model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    check_outcome(run(model), expected)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fp8_experts_are_read_as_they_are(scale_fmt, monkeypatch):
    model, twin = make_fp8(scale_fmt, **READ_AS_FP8)
    assert "weights read as FP8 by inference in 16 bits" in enable(model).modules[0].how

    def wider(*arguments):
        raise AssertionError("weights were dequantised")

    for module, name in ((products, "dequantise"), (custom_ops, "dequantise"), (reference, "dequantise_reference")):
        monkeypatch.setattr(module, name, wider)
    for dtype in (torch.bfloat16, torch.float16):
        check_fp8_error_rule(model, twin, dtype)
    own = experts_of(model)[0]
    own.limit = 1e9  # its own gate between grouped products, and the same numbers
    check_fp8_error_rule(model, twin, torch.bfloat16)
    hidden, ids, weights = routes(own, 5)
    with pytest.raises(AssertionError, match="dequantised"), torch.no_grad():
        serve(own, hidden, ids, weights)  # float32


def test_shallow_blocks_of_fp8_say_that_they_are_dequantised():
    model, twin = make_fp8()
    report = enable(model)
    assert "weights dequantised on every call (kernels read FP8 in steps of 32" in report.modules[0].how
    check_fp8_error_rule(model, twin, torch.bfloat16)


def test_a_gradient_of_the_hidden_states_reaches_through_fp8_experts():
    model, twin = make_fp8(**READ_AS_FP8, num_hidden_layers=1)
    expected = run(twin)
    enable(model)
    of_the_rest = {name: grad for name, grad in expected.gradients.items() if ".experts." not in name}
    check_outcome(run(model), type(expected)(expected.logits, of_the_rest))


@pytest.mark.parametrize(("name", "operator"), [("qwen3_moe", "experts"), ("fp8", "experts_quantised")])
def test_a_traced_graph_has_the_fused_operator(name, operator):
    model = make_fp8(**READ_AS_FP8)[0] if name == "fp8" else make_model(name).bfloat16()
    enable(model)
    experts = experts_of(model)[0]
    hidden, ids, weights = routes(experts, 7)
    hidden = hidden.bfloat16()
    called = []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        expected = serve(experts, hidden, ids, weights)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(experts, fullgraph=True, backend=backend)(hidden, ids, weights), expected)
        assert torch.equal(torch.compile(experts, fullgraph=True, backend="aot_eager")(hidden, ids, weights), expected)
    assert f"moe_gpu.{operator}" in called
    assert "moe_gpu.grouped_gemm" not in called
