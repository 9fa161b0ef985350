import math
import re

import pytest

from moe_gpu.config import ACTIVATIONS, PRESETS, MoEConfig, RouterConfig, validate_expert


def config(**changes):
    return MoEConfig(**{**dict(input_dim=8, expert_dim=8, hidden_dim=16, num_experts=4, top_k=2), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(top_k=5), "top_k=5 exceeds num_experts=4"),
        (dict(top_k=0), "top_k=0 must be an integer of at least 1"),
        (dict(num_experts=0), "num_experts=0"),
        (dict(input_dim=-3), "input_dim=-3"),
        (dict(hidden_dim=2.5), "hidden_dim=2.5"),
        (dict(num_experts=True), "num_experts=True"),
        (dict(activation="tanh"), "activation='tanh' is not one of swiglu"),
        (dict(depth=3), "depth=3 is not supported: 1 or 2"),
        (dict(depth=2), "depth=2 needs a plain activation"),
        (dict(capacity_factor=0.0), "capacity_factor=0.0 must be positive"),
        (dict(capacity_factor=math.nan), "capacity_factor=nan"),
        (dict(shared_hidden_dim=-1), "shared_hidden_dim=-1"),
        (dict(router=RouterConfig(n_group=3)), "num_experts=4 is not a multiple of n_group=3"),
        (dict(router=RouterConfig(n_group=4, topk_group=4)), "fewer than 2 of num_experts=4"),
        (dict(top_k=3, router=RouterConfig(n_group=2, topk_group=1)), "top_k=3 exceeds the 2 experts"),
    ],
)
def test_wrong_layers_are_refused_with_the_value_and_the_limit(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(score_function="tanh"), "score_function='tanh' is not one of softmax, sigmoid"),
        (dict(score_function="sigmoid", softmax_after_topk=True), "needs score_function='softmax'"),
        (dict(n_group=0), "n_group=0"),
        (dict(n_group=2, topk_group=3), "topk_group=3 exceeds n_group=2"),
        (dict(routed_scaling_factor=math.inf), "routed_scaling_factor=inf"),
    ],
)
def test_wrong_routers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RouterConfig(**arguments)


def test_capacity_rounds_up_and_is_at_least_one_row():
    assert config().capacity(100) is None
    assert config(capacity_factor=1.0).capacity(100) == 50
    assert config(capacity_factor=1.25).capacity(10) == math.ceil(10 * 2 / 4 * 1.25) == 7
    assert config(capacity_factor=0.01).capacity(1) == 1
    assert config(capacity_factor=1.0).capacity(0) == 1


def test_sizes_and_flops_of_a_gated_expert():
    gated = config()
    assert gated.up_rows == 32
    assert gated.parameters_per_expert == 32 * 8 + 16 * 8
    assert gated.forward_flops(10) == 2 * 10 * (32 * 8 + 16 * 8)
    assert config(bias=True).parameters_per_expert == gated.parameters_per_expert + 32 + 8


def test_sizes_of_a_plain_three_layer_expert():
    plain = config(activation="gelu", depth=2, bias=True)
    assert plain.up_rows == 16
    assert plain.parameters_per_expert == (16 * 8 + 16) + (16 * 16 + 16) + (8 * 16 + 8)


def test_a_layer_has_as_many_parameters_as_its_configuration_says():
    from moe_gpu.moe_layer import MoELayer

    for changes in (dict(), dict(bias=True), dict(activation="relu", depth=2, bias=True), dict(expert_dim=12)):
        c = config(**changes)
        experts = sum(p.numel() for name, p in MoELayer(c).named_parameters() if name != "router_weight")
        assert experts == c.num_experts * c.parameters_per_expert


def test_with_revalidates():
    assert config().with_(top_k=4).top_k == 4
    with pytest.raises(ValueError, match="top_k=9"):
        config().with_(top_k=9)


def test_activations_and_their_depths():
    for name, activation in ACTIVATIONS.items():
        assert validate_expert(name, 1) is activation
        if not activation.gated:
            assert validate_expert(name, 2) is activation


@pytest.mark.parametrize(
    ("name", "experts", "top_k", "hidden", "intermediate"),
    [
        ("small", 8, 2, 512, 1024),
        ("medium", 16, 2, 1024, 2048),
        ("large", 32, 2, 2048, 4096),
        ("qwen3-30b-a3b", 128, 8, 2048, 768),
        ("mixtral-8x7b", 8, 2, 4096, 14336),
        ("olmoe-1b-7b", 64, 8, 2048, 1024),
        ("deepseek-v3", 256, 8, 7168, 2048),
        ("gpt-oss-20b", 32, 4, 2880, 2880),
    ],
)
def test_presets_have_the_published_sizes(name, experts, top_k, hidden, intermediate):
    c = PRESETS[name]
    assert (c.num_experts, c.top_k, c.input_dim, c.expert_dim, c.hidden_dim) == (
        experts,
        top_k,
        hidden,
        hidden,
        intermediate,
    )


def test_configurations_and_presets_cannot_be_changed():
    with pytest.raises(AttributeError):
        config().top_k = 1
    with pytest.raises(TypeError):
        PRESETS["small"] = config()
