"""Experts of transformers whose weights are computed, of another dtype, or quantised."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from moe_gpu import disable, enable
from moe_gpu.huggingface.layout import fp8_gate_of
from tests.training_cases import one_thread  # noqa: F401

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts interface")

from moe_gpu.huggingface import features  # noqa: E402 they need transformers
from tests.huggingface_cases import (  # noqa: E402
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


class LowRank(nn.Module):
    """What PEFT puts before an experts' weight: the frozen weight plus a product of two small matrices."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(weight.shape[0], weight.shape[1], 2, generator=generator) * 0.1)
        self.b = nn.Parameter(torch.randn(weight.shape[0], 2, weight.shape[2], generator=generator) * 0.1)
        self.reads = 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.reads += 1
        return weight + self.a @ self.b


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_parametrised_weights_are_read_once_a_forward_and_never_kept(name):
    model = make_model(name)
    adapters = []
    for experts in experts_of(model):
        for weight in ("gate_up_proj", "down_proj"):
            adapter = LowRank(getattr(experts, weight))
            parametrize.register_parametrization(experts, weight, adapter)
            experts.parametrizations[weight].original.requires_grad_(False)
            adapters.append(adapter)
    expected = run(model)
    assert any("parametrizations.down_proj.0.b" in parameter for parameter in expected.gradients)
    assert len(enable(model).covered) == 2
    for adapter in adapters:
        adapter.reads = 0
    features(model)  # asks for the stored weights alone, as `moe-gpu top` does from its thread
    assert [adapter.reads for adapter in adapters] == [0] * 4
    check_outcome(run(model), expected)
    assert [adapter.reads for adapter in adapters] == [1] * 4
    with torch.no_grad():
        for adapter in adapters:
            adapter.b.mul_(-3)
    moved = run(model)
    disable(model)
    check_outcome(moved, run(model))
    with pytest.raises(AssertionError, match="logits are off"):
        check_outcome(moved, expected)


def test_float32_weights_in_a_bfloat16_model_compute_in_float32():
    """As transformers' grouped_mm: in the weights' dtype; the result has the hidden states' dtype."""
    experts = experts_of(make_model("mixtral"))[0]
    hidden, ids, weights = routes(experts)
    got = serve(experts, hidden.bfloat16(), ids, weights.bfloat16())
    assert got.dtype == torch.bfloat16
    expected = type(experts).forward(experts, hidden.bfloat16().float(), ids, weights.bfloat16().float())
    assert torch.equal(got, expected.bfloat16())
    with pytest.raises(RuntimeError):  # the loop over experts refuses the mix
        type(experts).forward(experts, hidden.bfloat16(), ids, weights.bfloat16())
    theirs = transformers.integrations.moe.grouped_mm_experts_forward(experts, hidden.bfloat16(), ids, weights)
    assert theirs.dtype == torch.bfloat16
    torch.testing.assert_close(got, theirs, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_autocast_computes_in_its_dtype_and_returns_that_of_the_hidden_states(name):
    experts = experts_of(make_model(name))[0]
    hidden, ids, weights = routes(experts)
    exact = type(experts).forward(experts, hidden, ids, weights)
    with torch.autocast("cpu", torch.bfloat16):
        eager = type(experts).forward(experts, hidden, ids, weights)
        got = serve(experts, hidden, ids, weights)
    assert got.dtype == eager.dtype == torch.float32
    eager_error = (eager - exact).abs().max()
    assert eager_error > 1e-4  # so that computing in float32 would show
    assert 1e-4 < (got - exact).abs().max() <= 2 * eager_error
    got.sum().backward()
    assert experts.down_proj.grad.dtype == torch.float32


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [(16, 8), None], ids=["blocks", "whole halves"])
def test_fp8_experts_are_served_by_dequantised_weights(scale_fmt, block):
    model, twin = make_fp8(scale_fmt, block)
    expected = run(twin)
    report = enable(model)
    assert len(report.covered) == 2
    assert "float8_e4m3fn" in report.covered[0].layout
    assert "dequantised on every call" in report.covered[0].how
    got = run(model)
    of_the_rest = {name: grad for name, grad in expected.gradients.items() if ".experts." not in name}
    check_outcome(got, type(got)(expected.logits, of_the_rest))
    assert torch.equal(
        model.generate(prompt(), max_new_tokens=4, do_sample=False),
        twin.generate(prompt(), max_new_tokens=4, do_sample=False),
    )


@pytest.mark.parametrize("switches", [{}, {"limit": 0.05}, {"swiglu_alpha": 1.7, "swiglu_limit": 0.05}], ids=str)
def test_the_gate_of_fp8_experts_is_fused_where_it_is_the_default_one(switches):
    model, twin = make_fp8()
    experts, plain = experts_of(model)[0], experts_of(twin)[0]
    for name, value in switches.items():
        setattr(experts, name, value)
    report = enable(model)
    assert report.modules[0].layout.endswith("own gate" if switches else "swiglu")
    hidden, ids, weights = routes(experts)
    expected = torch.zeros_like(hidden)
    for k in range(ids.shape[1]):
        for token, expert in enumerate(ids[:, k].tolist()):
            a = experts._apply_gate((plain.gate_up_proj[expert] @ hidden[token])[None])[0]
            expected[token] += weights[token, k] * (plain.down_proj[expert] @ a)
    with torch.no_grad():
        torch.testing.assert_close(serve(experts, hidden, ids, weights), expected, atol=1e-5, rtol=1e-5)
    experts_of(model)[0].limit = 0.05  # noticed without enabling anew
    with torch.no_grad():
        same = torch.equal(serve(experts, hidden, ids, weights), expected)
    assert not same


def test_a_gate_of_fp8_experts_is_the_default_one_only_if_it_does_the_same():
    class Needs:
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate + self.offset) * up

    class Other:
        def _apply_gate(self, gate_up):
            up, gate = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate) * up

    class Switched:  # by what no version has yet
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            if self.new_softcap is not None:
                gate = (gate.float() / self.new_softcap).tanh().to(gate.dtype)
            return self.act_fn(gate) * up

    for experts in (Needs, Other, object):
        assert fp8_gate_of(experts) == (None, ())
    gate, switches = fp8_gate_of(Switched)
    assert gate is Switched._apply_gate
    assert "new_softcap" in switches
    assert not {"act_fn", "float", "to"} & set(switches), "what every module has, or may have, switches nothing"


def test_fp8_experts_in_bfloat16_are_no_worse_than_twice_eager():
    check_fp8_error_rule(*make_fp8(), torch.bfloat16)


def test_transposed_or_mixed_fp8_weights_are_dequantised():
    model, twin = make_fp8(block=(8, 8))
    experts, plain = experts_of(model)[0], experts_of(twin)[0]
    hidden, ids, weights = routes(plain)
    expected = serve(plain, hidden, ids, weights)
    experts.down_proj = plain.down_proj
    assert "only one of its weights is FP8" in enable(model).modules[0].how
    torch.testing.assert_close(serve(experts, hidden, ids, weights), expected, atol=1e-5, rtol=1e-5)
    experts = experts_of(make_fp8(block=(8, 8))[0])[0]
    for name in ("gate_up_proj", "down_proj"):
        for stack in (name, f"{name}_scale_inv"):
            turned = getattr(experts, stack).data.transpose(1, 2).contiguous()
            setattr(experts, stack, nn.Parameter(turned, requires_grad=False))
    experts.is_transposed = True
    torch.testing.assert_close(serve(experts, hidden, ids, weights), expected, atol=1e-5, rtol=1e-5)


def test_fp8_experts_take_the_implementation_by_name():
    from moe_gpu.huggingface import register

    register()
    model, twin = make_fp8()
    model.set_experts_implementation("moe_gpu")
    check = run(model).logits
    torch.testing.assert_close(check, run(twin).logits, atol=1e-5, rtol=1e-5)
