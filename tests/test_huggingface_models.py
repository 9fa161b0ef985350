"""Kinds of experts that the ten models of huggingface_cases.py have not, and models that meet: on a CPU."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn

from moe_gpu import ExpertProfiler, disable, enable
from moe_gpu.huggingface import features, register
from tests.huggingface_cases import (
    ATTACHMENT,
    MODELS,
    VOCABULARY,
    Outcome,
    check_outcome,
    experts_of,
    make_config,
    make_model,
    prompt,
    routes,
    run,
)
from tests.training_cases import one_thread  # noqa: F401

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts interface")

_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
_DECODER = dict(_SIZES, head_dim=8, intermediate_size=24, num_experts_per_tok=2)
_LOCAL = dict(_DECODER, num_local_experts=6)
_SMALL = dict(_DECODER, num_experts=6, moe_intermediate_size=24)
_LAYERS = ["sliding_attention", "full_attention"]

# Name -> class of the model in its module of transformers, its sizes, and how its experts are served.
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "lfm2_moe": ("Lfm2MoeForCausalLM", dict(_SMALL, num_dense_layers=1, layer_types=["conv", _LAYERS[1]]), "fused"),
    "aria": ("AriaTextForCausalLM", dict(_SIZES, intermediate_size=24, moe_num_experts=6, moe_topk=2), "fused"),
    "gemma4": (
        "Gemma4ForCausalLM",
        dict(_SMALL, enable_moe_block=True, top_k_experts=2, global_head_dim=8, layer_types=_LAYERS)
        | dict(num_kv_shared_layers=0, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8),
        "fused",
    ),
    "jamba": (
        "JambaForCausalLM",
        dict(_SIZES, intermediate_size=24, num_experts=6, num_experts_per_tok=2, mamba_d_state=8, mamba_dt_rank=8)
        | dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
        "fused",
    ),
    "phimoe": ("PhimoeForCausalLM", _LOCAL, "fused"),
    "deepseek_v4": (
        "DeepseekV4ForCausalLM",
        dict(_LOCAL, n_routed_experts=6, moe_intermediate_size=24, q_lora_rank=16, o_lora_rank=16, o_groups=2)
        | dict(hc_mult=2, index_topk=8, index_n_heads=4, index_head_dim=16, sliding_window=16, qk_rope_head_dim=8),
        "own",
    ),
    "minimax_m3_vl": ("MiniMaxM3VLForCausalLM", dict(_LOCAL, index_topk=8, index_n_heads=4), "own"),
    "muse_spark": (
        "MuseSparkTextModel",
        dict(_LOCAL, moe_intermediate_size=24, moe_hidden_size=32, sliding_window=16),
        "own",
    ),
    "openai_privacy_filter": ("OpenAIPrivacyFilterForTokenClassification", dict(_LOCAL, sliding_window=16), "own"),
}


def make_kind(name: str) -> nn.Module:
    kind, sizes, _ = KINDS[name]
    try:
        found = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), kind)
    except (ImportError, AttributeError):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    model = found._from_config(found.config_class(**sizes), experts_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def run_kind(model: nn.Module) -> Outcome:
    """`run`, also of a model without a head."""
    out = model(prompt())
    logits = out.logits if hasattr(out, "logits") else out.last_hidden_state
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Outcome(logits.detach(), gradients)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_experts_computes_what_the_loop_computes(name):
    model = make_kind(name)
    expected = run_kind(model)
    report = enable(model)
    assert not report.not_covered
    how = "activation fused" if KINDS[name][2] == "fused" else "its own activation between grouped products"
    assert all(row.how.startswith(how) for row in report.covered)
    check_outcome(run_kind(model), expected)
    disable(model)
    check_outcome(run_kind(model), expected, tolerance=0)


def test_an_activation_that_is_a_function_is_fused_in_a_trace_too():
    model = make_kind("lfm2_moe")
    experts = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    enable(model)
    inputs = routes(experts)
    got = torch.compile(experts, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, experts(*inputs))


# Models and parts that share a configuration


def _two_of_one_configuration() -> list[nn.Module]:
    config = make_config("qwen3_moe")
    models = [transformers.AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    for model in models:
        model.config = models[0].config
        for experts in experts_of(model):
            experts.config = models[0].config
    models[0].set_experts_implementation("grouped_mm")
    return models


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first enabled first", "last enabled first"])
def test_disabling_two_models_of_one_configuration_restores_what_it_named(order):
    models = _two_of_one_configuration()
    expected = [run(model) for model in models]
    for model in models:
        enable(model)
    for model, outcome in zip(models, expected, strict=True):
        check_outcome(run(model), outcome)
    for index in order:
        disable(models[index])
    assert models[0].config._experts_implementation == "grouped_mm"
    assert not any(ATTACHMENT in vars(module) for model in models for module in model.modules())


def test_enabling_layer_by_layer_is_undone_at_once():
    model = make_model("qwen3_moe")
    for layer in model.model.layers:
        enable(layer)
    assert len(features(model)) == 2
    disable(model)
    assert model.config._experts_implementation == "eager"


def test_a_refused_module_keeps_its_implementation_where_another_model_is_enabled_already():
    first, second = _two_of_one_configuration()
    expected = run(second)
    enable(first)
    experts_of(second)[1].has_bias = True  # which the loop of transformers does not read
    enable(second)
    second_experts = experts_of(second)[1]
    assert second_experts.config._experts_implementation == "grouped_mm"
    second_experts.has_bias = False  # grouped_mm reads it
    check_outcome(run(second), expected)


def test_a_model_that_chose_us_by_name_keeps_that_choice():
    register()
    model = make_model("qwen3_moe")
    model.set_experts_implementation("moe_gpu")
    enable(model)
    disable(model)
    assert model.config._experts_implementation == "moe_gpu"


def test_a_copy_is_disabled_without_its_model():
    model = make_model("qwen3_moe")
    enable(model)
    other = copy.deepcopy(model)
    enable(other)
    disable(other)
    disable(model)
    assert (model.config._experts_implementation, other.config._experts_implementation) == ("eager", "eager")


# Shapes alone


@pytest.mark.parametrize("name", MODELS)
def test_an_enabled_model_on_the_meta_device_has_shapes_and_gradients(name):
    model = make_model(name)
    profiler = ExpertProfiler(experts_of(model)[0].num_experts, num_layers=2)
    enable(model, profiler)
    model.to("meta")
    logits = model(prompt("meta")).logits
    assert (logits.shape, logits.device.type) == ((2, 9, VOCABULARY), "meta")
    logits.sum().backward()
    experts = experts_of(model)[0]
    assert experts.down_proj.grad.shape == experts.down_proj.shape
    assert profiler.state_LS is None


def test_the_gradients_of_torch_func_are_those_of_the_loop():
    experts = experts_of(make_model("qwen3_moe"))[0]
    hidden, ids, weights = routes(experts)
    parameters = {name: parameter.detach() for name, parameter in experts.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(experts, parameters, (hidden, ids, weights)).square().sum()

    expected = torch.func.grad(loss)(parameters)
    enable(experts)
    got = torch.func.grad(loss)(parameters)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_of_either_kind_counts_once(use_reentrant):
    model = make_model("gpt_oss").train()
    expected = run(model)
    profiler = ExpertProfiler(6, num_layers=2)
    enable(model, profiler)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    check_outcome(run(model), expected)
    profiler.flush()
    assert [sum(profiler.snapshot(layer).counts_E) for layer in range(2)] == [36, 36]
