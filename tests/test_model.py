"""The layers on the reference backend: both agree with the written definition, in every variant and at every edge."""

import itertools
import logging
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from moe_gpu import reference
from moe_gpu.config import MoEConfig, RouterConfig
from moe_gpu.model import _ANNOUNCED, AdvancedMoELayer, SliceAllocationPolicy, slice_feature
from moe_gpu.moe_layer import Expert, MoELayer
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.slices.plan import GPUSlice
from moe_gpu.triton_kernels import ops
from moe_gpu.triton_kernels.ops import TritonExpertOps
from tests.operator_cases import check_fullgraph

SIZES = dict(input_dim=12, expert_dim=12, hidden_dim=20, num_experts=5, top_k=2)
VARIANTS = {
    "swiglu": {},
    "renormalised off": dict(router=RouterConfig(norm_topk_prob=False)),
    "softmax after top-k": dict(router=RouterConfig(softmax_after_topk=True)),
    "sigmoid, biased, grouped": dict(
        num_experts=6,
        router=RouterConfig("sigmoid", n_group=3, topk_group=2, routed_scaling_factor=2.5),
        selection_bias=True,
    ),
    "geglu": dict(activation="geglu"),
    "geglu_tanh with biases": dict(activation="geglu_tanh", bias=True),
    "reglu": dict(activation="reglu"),
    "plain relu": dict(activation="relu"),
    "three linear layers": dict(activation="gelu", depth=2, bias=True),
    "narrower output": dict(expert_dim=7),
    "shared expert": dict(shared_hidden_dim=9),
    "K = 1": dict(top_k=1),
    "K = E": dict(top_k=5),
    "one expert": dict(num_experts=1, top_k=1),
    "prime E, odd H and I": dict(input_dim=13, hidden_dim=17, num_experts=7, top_k=3),
    "capacity 1": dict(capacity_factor=1.0),
    "capacity 0.5": dict(capacity_factor=0.5),
}


def build(dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    config = MoEConfig(**{**SIZES, **changes})
    baseline = MoELayer(config).to(dtype)
    advanced = AdvancedMoELayer.from_config(config).to(dtype)
    advanced.load_state_dict(baseline.state_dict())
    return config, baseline, advanced


def by_definition(layer, x_TH):
    """The layer as its definition reads, one token and one expert at a time."""
    c = layer.config
    logits_TE = x_TH @ layer.router_weight.T
    ids_TK, weights_TK = reference.topk_reference(logits_TE, c.top_k, c.router, layer.selection_bias_E)
    rows_of = [0] * c.num_experts
    capacity = c.capacity(x_TH.shape[0])
    out_TO = x_TH.new_zeros(x_TH.shape[0], c.expert_dim)
    for token, k in itertools.product(range(x_TH.shape[0]), range(c.top_k)):
        e = int(ids_TK[token, k])
        rows_of[e] += 1
        if capacity is not None and rows_of[e] > capacity:
            continue
        expert = Expert(c.input_dim, c.expert_dim, c.hidden_dim, c.activation, c.depth, c.bias).to(x_TH.dtype)
        linears = [(expert.up, layer.gate_up_proj, layer.gate_up_bias), (expert.down, layer.down_proj, layer.down_bias)]
        if c.depth == 2:
            linears.append((expert.mid, layer.mid_proj, layer.mid_bias))
        for linear, weight, bias in linears:
            linear.weight.data = weight[e].detach()
            if bias is not None:
                linear.bias.data = bias[e].detach()
        out_TO[token] += weights_TK[token, k] * expert(x_TH[token]).detach()
    if layer.shared_expert is not None:
        out_TO += layer.shared_expert(x_TH)
    return out_TO


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_layers_compute_the_definition(variant):
    _, baseline, advanced = build(**VARIANTS[variant])
    x = torch.randn(11, baseline.config.input_dim, dtype=torch.float64)
    if advanced.selection_bias_E is not None:
        bias = torch.linspace(-0.3, 0.3, baseline.config.num_experts)
        baseline.selection_bias_E.copy_(bias)
        advanced.selection_bias_E.copy_(bias)
    with torch.no_grad():
        expected = by_definition(baseline, x)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(baseline(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(advanced(x)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_layers_have_the_same_gradients(variant):
    _, baseline, advanced = build(**VARIANTS[variant])
    x = torch.randn(11, baseline.config.input_dim, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(11, baseline.config.expert_dim, dtype=torch.float64)
    baseline(x1).backward(grad)
    advanced(x2)[0].backward(grad)
    torch.testing.assert_close(x2.grad, x1.grad, rtol=1e-10, atol=1e-12)
    assert x1.grad.abs().max() > 1e-3
    theirs = dict(advanced.named_parameters())
    for name, parameter in baseline.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_gradients_are_right_by_finite_differences():
    _, _, layer = build(input_dim=3, expert_dim=3, hidden_dim=4, num_experts=3)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = [layer.router_weight, layer.gate_up_proj, layer.down_proj]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x)[0], (x, *weights))


@pytest.mark.parametrize("variant", ["swiglu", "shared expert", "capacity 1", "three linear layers"])
def test_no_tokens(variant):
    _, baseline, advanced = build(**VARIANTS[variant])
    x = torch.zeros(0, 12, dtype=torch.float64, requires_grad=True)
    out, stats = advanced(x)
    assert out.shape == baseline(x).shape == (0, 12)
    assert stats.counts_E.tolist() == [0] * 5
    out.sum().backward()
    assert advanced.gate_up_proj.grad.abs().max() == 0
    assert stats.load_balancing_loss == 0
    assert stats.router_z_loss == 0


def test_leading_axes_are_kept_and_strides_do_not_matter():
    _, baseline, advanced = build()
    x = torch.randn(12, 3, 4, dtype=torch.float64).permute(1, 2, 0)
    assert not x.is_contiguous()
    out, _ = advanced(x)
    assert out.shape == (3, 4, 12)
    torch.testing.assert_close(out, baseline(x.contiguous()))
    torch.testing.assert_close(out[1, 2], advanced(x[1, 2].unsqueeze(0))[0][0])


def test_a_token_of_nan_logits_contributes_zero_and_is_counted():
    _, _, advanced = build()
    x = torch.randn(4, 12, dtype=torch.float64)
    logits = torch.randn(4, 5, dtype=torch.float64)
    clean, _ = advanced(x, logits)
    logits[2, 1] = float("nan")
    out, stats = advanced(x, logits)
    assert out[2].abs().max() == 0
    torch.testing.assert_close(out[[0, 1, 3]], clean[[0, 1, 3]])
    assert int(stats.invalid_routes) == 2
    assert int(stats.dropped_tokens) == 0


def test_a_token_of_nan_logits_poisons_no_gradient():
    _, _, layer = build()
    logits = torch.randn(4, 5, dtype=torch.float64)
    logits[2] = float("nan")
    logits.requires_grad_()
    layer(torch.randn(4, 12, dtype=torch.float64), logits)[0].sum().backward()
    assert torch.isfinite(layer.gate_up_proj.grad).all()
    assert torch.isfinite(logits.grad[[0, 1, 3]]).all()
    assert logits.grad[0].abs().max() > 0


def test_debug_raises_for_nan_logits():
    layer = AdvancedMoELayer(**SIZES, debug=True)
    logits = torch.full((1, 5), float("nan"))
    with pytest.raises(ValueError, match="2 routes have NaN router logits"):
        layer(torch.randn(1, 12), logits)


def test_capacity_counts_what_it_drops():
    _, _, layer = build(capacity_factor=1.0, num_experts=4, top_k=1)
    logits = torch.full((8, 4), 0.0, dtype=torch.float64)
    logits[:6, 3] = 5.0
    logits[6:, 1] = 5.0
    out, stats = layer(torch.randn(8, 12, dtype=torch.float64), logits)
    assert stats.counts_E.tolist() == [0, 2, 0, 2]
    assert stats.routing.demand_E.tolist() == [0, 2, 0, 6]
    assert int(stats.dropped_tokens) == 4
    assert out[2:6].abs().max() == 0
    assert out[:2].abs().min() > 0


def test_losses_for_training():
    _, _, layer = build(num_experts=4, top_k=2)
    x = torch.randn(16, 12, dtype=torch.float64)
    balanced = torch.tensor([[9.0, 9, 0, 0], [0, 0, 9, 9]], dtype=torch.float64).repeat(8, 1)
    collapsed = torch.tensor([[9.0, 9, -9, -9]], dtype=torch.float64).repeat(16, 1).requires_grad_()
    even, skewed = layer(x, balanced)[1], layer(x, collapsed)[1]
    assert float(even.load_balancing_loss) == pytest.approx(1.0, abs=1e-6)
    assert float(skewed.load_balancing_loss.detach()) == pytest.approx(2.0, abs=1e-3)
    assert float(skewed.router_z_loss.detach()) == pytest.approx(
        torch.logsumexp(collapsed[0].detach(), 0).item() ** 2, rel=1e-5
    )
    (skewed.load_balancing_loss + skewed.router_z_loss).backward()
    assert collapsed.grad.abs().max() > 0


def test_selection_bias_evens_out_the_load():
    _, _, layer = build(num_experts=4, top_k=1, selection_bias=True, router=RouterConfig("sigmoid"))
    x = torch.randn(64, 12, dtype=torch.float64)
    logits = 0.3 * torch.randn(64, 4, dtype=torch.float64)
    logits[:, 0] += 2.0
    first = int(layer(x, logits)[1].counts_E.max())
    for _ in range(300):
        layer.update_selection_bias(layer(x, logits)[1], step_size=0.005)
    assert first > 55
    assert int(layer(x, logits)[1].counts_E.max()) <= 24
    with pytest.raises(ValueError, match="selection_bias=True"):
        AdvancedMoELayer(**SIZES).update_selection_bias(layer(x, logits)[1])


@pytest.mark.parametrize("layer_type", ["baseline", "advanced"])
def test_wrong_inputs_are_refused(layer_type):
    _, baseline, advanced = build(torch.float32)
    layer = baseline if layer_type == "baseline" else advanced
    with pytest.raises(ValueError, match=r"x has shape \(3, 11\); expected \(\.\.\., input_dim=12\)"):
        layer(torch.randn(3, 11))
    with pytest.raises(ValueError, match="x has shape"):
        layer(torch.randn(12))
    with pytest.raises(ValueError, match=r"x is torch\.float64 and the layer is torch\.float32"):
        layer(torch.randn(3, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"router logits have shape \(3, 4\); expected \(3, 5\)"):
        layer(torch.randn(3, 12), torch.randn(3, 4))
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"x is torch\.float64 and the layer is torch\.float32"):
        layer(torch.randn(3, 12, dtype=torch.float64))  # autocast leaves float64 as it is


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacities_without_a_row_are_refused(capacity):
    operations = TritonExpertOps("cpu")
    with pytest.raises(ValueError, match=f"capacity={capacity} must be at least 1"):
        operations.route(torch.zeros(3, 4), 2, RouterConfig(), capacity=capacity)
    with pytest.raises(ValueError, match=f"capacity={capacity} must be at least 1"):
        operations.sort_routes(torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2), 4, capacity)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(top_k=9), "top_k=9 exceeds num_experts=5"),
        (dict(total_slices=0), "total_slices=0"),
        (dict(allocation_policy="dynamic"), "must be a SliceAllocationPolicy, one of STATIC, DYNAMIC"),
        (dict(capacity_factor=-1.0), "capacity_factor=-1.0"),
        (dict(activation="swish"), "activation='swish'"),
        (dict(profiler=ExpertProfiler(4)), "counts 4 experts in each of 1 layers; this layer has num_experts=5"),
        (dict(profiler=ExpertProfiler(5, 2), layer_index=2), "each of 2 layers; .* layer_index=2"),
    ],
)
def test_wrong_constructions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AdvancedMoELayer(**{**SIZES, **changes})


def test_flags_without_a_subsystem_say_so_and_are_not_pretended(caplog):
    _ANNOUNCED.clear()
    with caplog.at_level(logging.INFO, logger="moe_gpu"):
        layer = AdvancedMoELayer(**SIZES, allocation_policy=SliceAllocationPolicy.ADAPTIVE)
        AdvancedMoELayer(**SIZES)
    for name, feature in layer.features.items():
        assert not feature.active, name
        assert feature.reason, name
    for flag in ("cuda_graphs", "slices", "energy"):
        assert layer.features[flag].asked
        assert sum(flag in record.getMessage() for record in caplog.records) == 1
    quiet = AdvancedMoELayer(**SIZES, use_cuda_graphs=False, enable_energy_monitoring=False, total_slices=1)
    assert not any(quiet.features[flag].asked for flag in ("cuda_graphs", "slices", "energy"))


def test_state_dicts_are_those_of_transformers_and_move_between_layers():
    _, baseline, advanced = build(**VARIANTS["three linear layers"], shared_hidden_dim=9)
    assert set(baseline.state_dict()) == set(advanced.state_dict())
    assert {"router_weight", "gate_up_proj", "down_proj", "mid_proj", "shared_expert.up.weight"} <= set(
        baseline.state_dict()
    )
    assert AdvancedMoELayer(**SIZES).gate_up_proj.shape == (5, 40, 12)
    assert AdvancedMoELayer(**SIZES).down_proj.shape == (5, 12, 20)


def test_autocast_computes_in_the_cast_dtype():
    _, _, layer = build(torch.float32)
    x = torch.randn(9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = layer(x)
    assert out.dtype == torch.bfloat16
    full = layer(x)[0]
    error = (out.float() - full).abs().max()
    assert 0 < error < 0.05 * full.abs().max()


def test_the_profiler_sees_every_route():
    profiler = ExpertProfiler(5)
    layer = AdvancedMoELayer(**SIZES, profiler=profiler)
    total = torch.zeros(5, dtype=torch.int64)
    for _ in range(3):
        _, stats = layer(torch.randn(7, 12))
        total += stats.routing.demand_E
    profiler.flush()
    assert profiler.counts_LE()[0].tolist() == total.tolist()
    assert int(total.sum()) == 3 * 7 * 2
    assert layer.get_performance_stats()["experts"].counts_E == total.tolist()


@pytest.mark.parametrize(
    ("arguments", "linears"),
    [
        (dict(), dict(up=(40, 12), down=(12, 20))),
        (dict(activation="relu"), dict(up=(20, 12), down=(12, 20))),
        (dict(depth=2), dict(up=(20, 12), mid=(20, 20), down=(12, 20))),
    ],
)
def test_an_expert_has_the_layers_of_its_depth(arguments, linears):
    expert = Expert(12, 12, 20, **arguments)
    assert {name: tuple(linear.weight.shape) for name, linear in expert.named_children()} == linears
    assert (expert.up.bias is not None) == (arguments.get("depth") == 2)


def test_an_expert_computes_swiglu_gate_first():
    expert = Expert(3, 3, 4)
    x = torch.randn(2, 3)
    gate, up = (x @ expert.up.weight.T).split(4, dim=-1)
    torch.testing.assert_close(expert(x), (F.silu(gate) * up) @ expert.down.weight.T)


def test_an_expert_of_two_hidden_layers_cannot_be_gated():
    with pytest.raises(ValueError, match="depth=2 needs a plain activation"):
        Expert(3, 3, 4, activation="swiglu", depth=2)


def test_counts_travel_to_the_host_on_request():
    layer = AdvancedMoELayer(8, 8, 8, num_experts=4, top_k=2)
    _, stats = layer(torch.randn(10, 8))
    copy = stats.copy_counts()
    assert copy.ready()
    assert torch.equal(copy.result(), stats.counts_E)
    assert copy.result().sum() == 20


# Rows of one expert alone, and numbers enough for several threads: where activations round by the place of a number.
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "geglu_tanh", "reglu", "silu"])
@pytest.mark.parametrize(("tokens", "hidden_dim", "skew"), [(40, 32, 0), (40, 32, 50), (2, 64, 0), (171, 80, 0)])
def test_all_experts_at_once_on_a_cpu_have_the_bits_of_one_after_another(
    tokens, hidden_dim, skew, activation, monkeypatch
):
    assert ops._has_grouped_mm()  # known from here on: a call of its own is not counted below
    calls = mock.Mock(side_effect=ops._grouped_mm)
    monkeypatch.setattr(ops, "_grouped_mm", calls)
    torch.manual_seed(0)
    layer = AdvancedMoELayer(64, 48, hidden_dim, 6, 3, use_cuda_graphs=False, activation=activation)
    logits = torch.randn(tokens, 6)
    logits[:, :3] += skew  # then three experts are empty
    results = []
    for most in (1 << 20, 0):
        monkeypatch.setattr(ops, "_MOST_AT_ONCE", most)
        x = torch.linspace(-1, 1, tokens * 64).view(tokens, 64).requires_grad_()
        out = layer(x, logits)[0]
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, layer.gate_up_proj, layer.down_proj])])
    assert calls.call_count == 2
    for at_once, in_turn in zip(*results, strict=True):
        assert torch.equal(at_once, in_turn)


@pytest.mark.parametrize("expert_dim", [1, 7, 20])
def test_gradients_of_outputs_narrower_than_their_alignment(expert_dim):
    layer = AdvancedMoELayer(16, expert_dim, 16, 4, 2, use_cuda_graphs=False)
    wide = AdvancedMoELayer.from_config(layer.config, use_cuda_graphs=False).double()
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(9, 16)
    layer(x)[0].sum().backward()
    wide(x.double())[0].sum().backward()
    torch.testing.assert_close(layer.down_proj.grad.double(), wide.down_proj.grad, rtol=1e-4, atol=1e-5)


def test_derivatives_by_torch_func_and_forward_ones():
    layer = AdvancedMoELayer(16, 16, 16, 4, 2, use_cuda_graphs=False)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x, tangent = torch.randn(9, 16), torch.randn(9, 16)

    def total(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))[0].sum()

    x.requires_grad_()
    expected = torch.autograd.grad(total(dict(layer.named_parameters()), x), [layer.down_proj, x])
    torch.testing.assert_close(torch.func.grad(total)(parameters, x)["down_proj"], expected[0])
    with forward_ad.dual_level():
        along = forward_ad.unpack_dual(total(parameters, forward_ad.make_dual(x.detach(), tangent))).tangent
    torch.testing.assert_close(along, (expected[1] * tangent).sum())


def test_given_experts_under_autocast_compute_in_its_dtype_whatever_their_number(monkeypatch):
    layer = AdvancedMoELayer(16, 16, 16, 4, 2, use_cuda_graphs=False)
    x = torch.randn(9, 16)
    routing = layer(x)[1].routing
    results = []
    for most in (1 << 20, 0):
        monkeypatch.setattr(ops, "_MOST_AT_ONCE", most)
        with torch.autocast("cpu"):
            results.append(layer.ops.experts(x, routing, layer.expert_weights))
    assert torch.equal(*results)


@pytest.mark.parametrize("changes", [{"bias": True}, {"hidden_dim": 40}, {"capacity_factor": 0.5}, {"nan": True}])
def test_experts_are_computed_in_turn_where_bits_or_dropped_rows_ask_for_it(changes, monkeypatch):
    monkeypatch.setattr(ops, "_grouped_mm", mock.Mock(side_effect=AssertionError("not here")))
    monkeypatch.setattr(ops, "_has_grouped_mm", lambda: True)
    nan = changes.get("nan", False)
    given = {"hidden_dim": 32, **{name: value for name, value in changes.items() if name != "nan"}}
    layer = AdvancedMoELayer(64, 48, num_experts=6, top_k=2, use_cuda_graphs=False, **given)
    logits = torch.randn(40, 6)
    logits[:, 0] = 50  # more than its capacity
    logits[3] = float("nan") if nan else logits[3]
    assert layer(torch.randn(40, 64), logits)[0].isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"shared_hidden_dim": 16}, {"depth": 2, "activation": "gelu", "bias": True}], ids=str
)
def test_a_layer_tells_its_shapes_on_the_meta_device(options):
    with torch.device("meta"):
        layer = AdvancedMoELayer(16, 24, 32, 4, **options).to(torch.bfloat16)
    x = torch.empty(3, 5, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out, stats = layer(x)
    assert (out.shape, out.device.type, out.dtype) == ((3, 5, 24), "meta", torch.bfloat16)
    assert stats.counts_E.shape == (4,)
    (out.float().sum() + stats.load_balancing_loss).backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        assert layer.eval()(x)[0].shape == out.shape


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_experts_tell_their_shapes_on_the_meta_device(activation):
    x = torch.empty(900, 64, device="meta", requires_grad=True)
    routing = reference.route_reference(torch.empty(900, 6, device="meta"), 2, RouterConfig())
    weights = reference.ExpertWeights(*(torch.empty(6, *shape, device="meta") for shape in ((256, 64), (48, 128))))
    out = TritonExpertOps("meta").experts(x, routing, weights, activation)
    assert out.shape == (900, 48)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_wild_ids_are_dropped_whatever_their_width():
    ids = torch.tensor([[0, 2**32 + 1], [-(2**40), 3], [1, 4]])
    routing = TritonExpertOps("cpu").sort_routes(ids, torch.ones(3, 2), num_experts=4)
    assert routing.demand_P.tolist() == [1, 1, 0, 1, 3]
    assert routing.row_of_route_TK.tolist() == [[0, -1], [-1, 2], [1, -1]]
    with pytest.raises(ValueError, match="give integers"):
        TritonExpertOps("cpu").sort_routes(ids.float(), torch.ones(3, 2), num_experts=4)


def test_a_slice_is_said_to_do_only_what_it_does():
    layer = AdvancedMoELayer(**SIZES)
    assert "no slice is held" in layer.features["slices"].reason
    layer.use_slice(GPUSlice(0, 3, 32, "cta", got_sms=32))
    feature = layer.features["slices"]
    assert (feature.asked, feature.active) == (True, False)
    assert "a slice of 32 SMs is held; plain PyTorch serves and keeps to no budget" in feature.reason
    assert layer.ops.sm_budget == 32
    layer.to(torch.float64)
    assert layer.ops.sm_budget == 32, "a move keeps the slice"
    green = slice_feature(GPUSlice(0, 3, 32, "green_context", 0, 32, True), "triton")
    assert green.active
    assert "the green_context enforces it" in green.reason
    budget = slice_feature(GPUSlice(0, 3, 32, "cta", got_sms=32), "triton")
    assert "nothing keeps other kernels off them" in budget.reason
    layer.use_slice(None)
    assert layer.ops.sm_budget is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_backend_traces_without_a_break(dtype):
    check_fullgraph("cpu", dtype)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_the_traced_grouped_product_is_a_correct_operator(biased):
    """The rows of an empty expert and of none: shapes, gradients and aliasing as PyTorch checks them."""
    TritonExpertOps("cpu")  # registers it
    a, w = torch.randn(7, 3, requires_grad=True), torch.randn(4, 5, 3, requires_grad=True)
    bias = torch.randn(4, 5, requires_grad=True) if biased else None
    offsets = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)
    operator = torch.ops.moe_gpu.grouped_gemm_reference
    torch.library.opcheck(operator.default, (a, w, offsets, bias))
    leaves = [a, w] if bias is None else [a, w, bias]
    results = [call(a, w, offsets, bias) for call in (operator, reference.grouped_gemm_reference)]
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in results]
    for got, expected in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
        assert torch.equal(got, expected)
