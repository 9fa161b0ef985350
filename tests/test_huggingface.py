"""moe_gpu in models of transformers: every layout against transformers' own loop over experts, and what refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_gpu import ExpertProfiler, enable
from tests.training_cases import one_thread  # noqa: F401

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts interface")

from tests.huggingface_cases import (  # noqa: E402
    FUSED,
    MODELS,
    check_error_rule,
    check_outcome,
    experts_of,
    make_model,
    prompt,
    routes,
    run,
    serve,
    zeros_forward,
)

ROOT = Path(__file__).resolve().parent.parent


# The same numbers as transformers' own loop


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_eager(name, monkeypatch):
    model = make_model(name)
    expected = run(model)
    report = enable(model)
    assert len(report.covered) == MODELS[name][2]
    assert not report.not_covered
    check_outcome(run(model), expected)
    # The control: an implementation that computes nothing must not pass.
    monkeypatch.setitem(transformers.integrations.moe.ExpertsInterface._global_mapping, "moe_gpu", zeros_forward)
    zeros = run(model)
    with pytest.raises(AssertionError, match="logits are off"):
        check_outcome(zeros, expected)
    with pytest.raises(AssertionError, match=r"gradient of .* is off"):
        check_outcome(type(zeros)(expected.logits, zeros.gradients), expected)


@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_are_those_of_eager(name):
    model = make_model(name)
    options = dict(max_new_tokens=6, do_sample=False)
    expected = model.generate(prompt(), **options)
    enable(model)
    assert torch.equal(model.generate(prompt(), **options), expected)
    assert torch.equal(model.generate(prompt(), **options, cache_implementation="static"), expected)
    assert model.config._experts_implementation == "moe_gpu"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_static_cache_decodes_in_one_graph(name):
    """Compiled decoding with fullgraph: nothing reads a tensor on the host; the profiler counts in the graph too."""
    from transformers.generation.configuration_utils import CompileConfig

    model = make_model(name)
    options = dict(max_new_tokens=5, do_sample=False)
    expected = model.generate(prompt(), **options)
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True  # transformers compiles on GPUs alone unless told so
    profiler = ExpertProfiler(6, num_layers=2)
    enable(model, profiler)
    torch._dynamo.reset()
    got = model.generate(prompt(), **options, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    profiler.flush()
    tokens = 2 * 9 + 2 * 4  # the prompt, then one token a sequence and step but the last
    assert profiler.counts_LE().sum(1).tolist() == [tokens * 2] * 2


@pytest.mark.parametrize("name", sorted(FUSED))
def test_what_is_fused_is_fused_in_a_trace_too(name, monkeypatch):
    from moe_gpu.huggingface import forward

    model = make_model(name)
    enable(model)
    monkeypatch.setattr(forward, "_experts_with_own_gate", lambda *_: 1 / 0)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(experts_of(model)[0], fullgraph=True, backend="eager")(*routes(experts_of(model)[0]))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_training_step_traces_into_one_graph(name):
    model = make_model(name)
    enable(model)
    expected = run(model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    check_outcome(run(model), expected)


def test_by_name_alone_a_compiled_model_takes_any_length(monkeypatch):
    """The first call of all is a traced one: nothing was prepared by `enable` or by an eager call."""
    from moe_gpu.huggingface import forward, register

    register()
    monkeypatch.setattr(forward, "_OPS", {})
    model = make_model("gpt_oss", num_hidden_layers=1)
    model.set_experts_implementation("moe_gpu")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for length in (9, 4):
            got = compiled(prompt()[:, :length], use_cache=False).logits
            assert torch.equal(got, model(prompt()[:, :length], use_cache=False).logits)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_twice_eager(name, dtype):
    experts = experts_of(make_model(name))[0]
    check_error_rule(experts, dtype, serve)
    with pytest.raises(AssertionError):
        check_error_rule(experts, dtype, zeros_forward)


def test_float64_is_float64_throughout():
    experts = experts_of(make_model("mixtral"))[0].double()
    hidden, ids, weights = (t.double() if t.is_floating_point() else t for t in routes(experts))
    truth = type(experts).forward(experts, hidden, ids, weights)
    torch.testing.assert_close(serve(experts, hidden, ids, weights), truth, atol=1e-14, rtol=1e-13)


# Layouts, activations and gates


ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "relu": "reglu",
    "gelu_new": "own gate",
    "quick_gelu": "own gate",
    "relu2": "own gate",
}


@pytest.mark.parametrize(("function", "served_as"), ACTIVATIONS.items())
def test_known_activations_are_fused_and_others_called(function, served_as):
    model = make_model("mixtral", hidden_act=function, num_hidden_layers=1)
    expected = run(model)
    (row,) = enable(model).modules
    assert row.layout.endswith(served_as)
    check_outcome(run(model), expected)


def test_fusing_is_reported():
    for name in MODELS:
        report = enable(make_model(name))
        assert {"activation fused" in row.how for row in report.covered} == {name in FUSED}


def test_a_plain_activation_is_fused_without_a_gate():
    model = make_model("nemotron_h", mlp_hidden_act="silu")
    expected = run(model)
    assert enable(model).covered[0].layout == "E=6 H=32 I=24 float32, no gate, silu"
    check_outcome(run(model), expected)


def test_a_gate_of_the_modules_own_is_called():
    experts = experts_of(make_model("mixtral"))[0]
    arguments = routes(experts)

    def clamped(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=0.1)) * (up + 1)

    experts._apply_gate = clamped
    hidden, ids, weights = arguments
    expected = torch.zeros_like(hidden)
    for k in range(2):
        for token, expert in enumerate(ids[:, k].tolist()):
            h = experts.down_proj[expert] @ clamped(experts.gate_up_proj[expert] @ hidden[token])
            expected[token] += weights[token, k] * h
    torch.testing.assert_close(serve(experts, *arguments), expected, atol=1e-5, rtol=1e-5)


def test_a_norm_after_each_expert_comes_before_the_weights():
    experts = experts_of(make_model("mixtral"))[0]
    arguments = routes(experts)
    without = serve(experts, *arguments)
    experts.has_post_expert_norm, experts.post_expert_norm = True, nn.LayerNorm(32)
    hidden, ids, weights = arguments
    expected = torch.zeros_like(hidden)
    for k in range(2):
        for token, expert in enumerate(ids[:, k].tolist()):
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            y = experts.down_proj[expert] @ (F.silu(gate) * up)
            expected[token] += weights[token, k] * experts.post_expert_norm(y)
    got = serve(experts, *arguments)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, without, atol=1e-2)


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("has_post_expert_norm", "there is no post_expert_norm"),
        ("has_shared_scale", "has_shared_scale is set, which this version of moe_gpu does not know"),
    ],
)
def test_what_a_later_transformers_may_add_is_refused_and_not_left_out(flag, reason):
    model = make_model("mixtral")
    for experts in experts_of(model):
        setattr(experts, flag, True)
    with pytest.raises(ValueError, match=reason):
        enable(model)
    with pytest.raises(ValueError, match=reason):
        serve(experts, *routes(experts))


OWN_GATES = {
    "deepseek_v4": "DeepseekV4Experts",
    "glm5_next": "Glm5NextTextExperts",
    "hy_v4": "HYV4Experts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "muse_spark": "MuseSparkExperts",  # and a norm after each expert
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
}


@pytest.mark.parametrize(("model", "experts_class"), OWN_GATES.items(), ids=OWN_GATES)
def test_every_gate_that_transformers_has_is_called(model, experts_class):
    """The experts classes with a gate of their own that no model above has; the limit is low, so that it clamps."""
    module = f"transformers.models.{model}.modeling_{model}"
    classes = pytest.importorskip(module, reason=f"this transformers has no {model}")
    config = SimpleNamespace(
        _experts_implementation="eager",
        num_local_experts=6,
        num_experts=6,
        hidden_size=32,
        intermediate_size=24,
        moe_intermediate_size=24,
        hidden_act="silu",
        swiglu_limit=0.5,
        swiglu_alpha=1.702,
        moe_hidden_size=32,
        post_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    experts = getattr(classes, experts_class)(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    expected = experts(*routes(experts))
    torch.testing.assert_close(serve(experts, *routes(experts)), expected, atol=1e-5, rtol=1e-5)


def test_an_activation_that_somebody_watches_is_called():
    experts = experts_of(make_model("mixtral"))[0]
    seen = []
    experts.act_fn.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    expected = type(experts).forward(experts, *routes(experts))
    seen.clear()
    torch.testing.assert_close(serve(experts, *routes(experts)), expected, atol=1e-5, rtol=1e-5)
    assert seen == [(80, 24)]


# Ids and shards of parallel runs


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_routes_outside_the_experts_contribute_nothing(name):
    """Expert parallelism of transformers hands over ids E (or -1) for other ranks' experts."""
    experts = experts_of(make_model(name))[0]
    hidden, ids, weights = routes(experts)
    outside = torch.zeros_like(ids, dtype=torch.bool)
    outside[::3, 0] = True
    outside[4] = True
    expected_weights = weights.masked_fill(outside, 0).requires_grad_()
    expected = type(experts).forward(experts, hidden, ids, expected_weights)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, [expected_weights, *experts.parameters()], grad)
    for sentinel in (6, -1, 10**12):
        leaf = weights.clone().requires_grad_()  # not zero: the id alone decides
        got = serve(experts, hidden, ids.masked_fill(outside, sentinel), leaf)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        grads = torch.autograd.grad(got, [leaf, *experts.parameters()], grad)
        assert (grads[0][outside] == 0).all()
        for mine, theirs in zip(grads[1:], expected_grads[1:], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    nothing = serve(experts, hidden, torch.full_like(ids, 6), weights)
    assert (nothing == 0).all()


def shard(experts: nn.Module, **tensors: torch.Tensor) -> nn.Module:
    """The module with other weights and every size that its class wrote down left as it was."""
    part = copy.deepcopy(experts)
    for name, tensor in tensors.items():
        setattr(part, name, nn.Parameter(tensor.detach().clone()))
    return part


def test_shards_of_the_inner_width_add_up_to_the_whole():
    experts = experts_of(make_model("mixtral"))[0]
    arguments = routes(experts)
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    parts = [
        shard(experts, gate_up_proj=torch.cat([gate[:, s], up[:, s]], 1), down_proj=experts.down_proj[:, :, s])
        for s in (slice(0, 8), slice(8, 24))
    ]
    total = sum(serve(part, *arguments) for part in parts)
    torch.testing.assert_close(total, type(experts).forward(experts, *arguments), atol=1e-5, rtol=1e-5)


def test_shards_of_the_experts_add_up_to_the_whole():
    experts = experts_of(make_model("mixtral"))[0]
    hidden, ids, weights = routes(experts)
    total = torch.zeros_like(hidden)
    for first, last in ((0, 2), (2, 6)):
        part = shard(experts, gate_up_proj=experts.gate_up_proj[first:last], down_proj=experts.down_proj[first:last])
        local = (ids >= first) & (ids < last)
        total += serve(part, hidden, torch.where(local, ids - first, last - first), weights * local)
    torch.testing.assert_close(total, type(experts).forward(experts, hidden, ids, weights), atol=1e-5, rtol=1e-5)
