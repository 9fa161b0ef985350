"""Providers: right on every layer they claim, and plain about those they do not."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moe_gpu.benchmark.check import Checker
from moe_gpu.benchmark.problem import Problem, make_problem
from moe_gpu.benchmark.providers import PROVIDERS, route_by_torch
from moe_gpu.reference import topk_reference
from tests.benchmark_cases import ALIGNED, CONFIGS, DTYPES, PEERS, SMALL, provider_gradients

# Providers


def check_provider(name: str, problem: Problem) -> None:
    checker = Checker(problem, gradients=True)
    out = PROVIDERS[name].build(problem).run()
    assert checker.check_output(out).sensitive
    for leaf, result in checker.check_gradients(provider_gradients(problem, checker, out)).items():
        if result.scale > 0:
            assert result.sensitive, leaf


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("provider", ["torch_loop", "moe_gpu", "torch_grouped_mm"])
def test_providers_are_right(provider, name, dtype):
    if provider == "torch_grouped_mm" and name not in ALIGNED:
        pytest.skip("torch's grouped_mm wants rows of a multiple of 16 bytes")
    check_provider(provider, make_problem(CONFIGS[name], 40, "zipf-1.2", dtype))


@pytest.mark.parametrize("name", [name for name in ALIGNED if CONFIGS[name].depth == 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_is_right(name, dtype):
    pytest.importorskip("transformers.integrations.moe", reason="transformers>=5.7 is not installed")
    check_provider("transformers_grouped_mm", make_problem(CONFIGS[name], 40, "zipf-1.2", dtype))


@pytest.mark.parametrize("provider", ["torch_loop", "moe_gpu"])
def test_our_layers_drop_tokens_over_capacity_rightly(provider):
    check_provider(provider, make_problem(SMALL.with_(capacity_factor=0.6), 80, "zipf-1.2"))


@pytest.mark.parametrize("name", CONFIGS)
def test_routing_as_models_write_it_equals_the_reference(name):
    config = CONFIGS[name]
    problem = make_problem(config, 30)
    args = (problem.logits().detach(), config.top_k, config.router, problem.selection_bias_E)
    (ids, weights), (expected_ids, expected) = route_by_torch(*args), topk_reference(*args)
    assert torch.equal(ids, expected_ids.long())
    assert torch.allclose(weights, expected, atol=1e-6)


def test_a_model_with_a_shared_expert_is_timed_without_it():
    problem = make_problem(SMALL.with_(shared_hidden_dim=16), 4)
    assert problem.config.shared_hidden_dim == 0
    check_provider("moe_gpu", problem)


def test_backends_and_reasons_are_in_words():
    problem = make_problem(SMALL.with_(capacity_factor=1.0), 4)
    if not torch.cuda.is_available():
        assert PROVIDERS["moe_gpu"].build(problem).backend.startswith("reference: ")
    assert "capacity_factor=1.0" in PROVIDERS["torch_grouped_mm"].unavailable(problem, "forward")
    assert PROVIDERS["torch_loop"].unavailable(problem, "backward") is None


@pytest.mark.parametrize("provider", PEERS)
def test_a_peer_that_is_not_installed_says_so(provider, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "is not installed" in PROVIDERS[provider].unavailable(make_problem(SMALL, 4), "forward")


def test_the_unrelated_package_of_the_same_name_is_not_mistaken_for_triton_kernels(monkeypatch, tmp_path):
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), config=SMALL)
    reason = PROVIDERS["triton_kernels"].unavailable(on_a_gpu, "forward")
    assert "this triton_kernels has no triton_kernels.matmul.matmul" in reason
    sys.modules.pop("triton_kernels")


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """A module, and the packages above it, that exists for one test."""
    module = ModuleType(name)
    vars(module).update(contents)
    parent, _, child = name.rpartition(".")
    if parent and parent not in sys.modules:
        install(monkeypatch, parent)
    if parent:
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    monkeypatch.setitem(sys.modules, name, module)


def grouped_product(rows: torch.Tensor, w_EKN: torch.Tensor, ends: list[int]) -> torch.Tensor:
    parts = zip([0, *ends[:-1]], ends, strict=True)
    return torch.cat([rows[a:b] @ w_EKN[e] for e, (a, b) in enumerate(parts)])


def test_the_scattermoe_adapter_against_its_interface_in_plain_torch(monkeypatch):
    def flatten_sort_count(ids, num_experts):
        experts, order = ids.flatten().sort()
        return experts, order, torch.bincount(experts, minlength=num_experts).cumsum(0)

    def parallel_linear(x, w_EKN, k, experts, order, ends, gates=None, grouped_in=False, grouped_out=False):
        rows = x if grouped_in else x[order // k]
        y = grouped_product(rows, w_EKN, ends.tolist())
        if not grouped_out:
            y = torch.empty_like(y).index_copy(0, order, y)
        return y if gates is None else (gates.unsqueeze(1) @ y.view(*gates.shape, -1)).squeeze(1)

    contents = dict(flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)
    install(monkeypatch, "scattermoe.parallel_experts", **contents)
    for config in (SMALL, SMALL.with_(activation="gelu", depth=2)):
        check_provider("scattermoe", make_problem(config, 30))


@pytest.mark.parametrize("flag", ["concat_layout", "is_concatenated_gate_up"])
def test_the_sonicmoe_adapter_against_its_interface_in_plain_torch(monkeypatch, flag):
    def entry(
        x, scores, token, expert, w1, b1, w2, b2, E, stream_id, activation_type, is_inference_mode_enabled, flags
    ):
        assert activation_type == "SWIGLU"
        assert flags == {flag: True}
        assert b1 is None
        assert b2 is None
        assert (token.diff() >= 0).all()
        assert token.dtype == expert.dtype == torch.int32
        out = x.new_zeros(x.shape)
        for route in range(token.numel()):
            e, t = expert[route], token[route].long()
            gate, up = (w1[:, :, e] @ x[t]).chunk(2)
            out = out.index_add(
                0, t[None], (scores[route] * (w2[:, :, e] @ (torch.nn.functional.silu(gate) * up)))[None]
            )
        return out, None

    if flag == "concat_layout":

        def general(*args, concat_layout, **named):
            return entry(*args, flags={"concat_layout": concat_layout}, **named)
    else:

        def general(*args, is_concatenated_gate_up, **named):
            return entry(*args, flags={"is_concatenated_gate_up": is_concatenated_gate_up}, **named)

    install(monkeypatch, "sonicmoe", moe_general_routing_inputs=general)
    install(monkeypatch, "sonicmoe.enums", ActivationType=SimpleNamespace(SWIGLU="SWIGLU"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    check_provider("sonicmoe", make_problem(SMALL, 12))


def test_the_triton_kernels_adapter_against_its_interface_in_plain_torch(monkeypatch):
    def matmul(a, b_EKN, bias, a_ragged_metadata=None, gather_indx=None, scatter_indx=None):
        counts = a_ragged_metadata.tolist()
        assert b_EKN.stride(1) == 1
        assert a_ragged_metadata.dtype == torch.int32
        rows = a if gather_indx is None else a[gather_indx.long()]
        y = grouped_product(rows, b_EKN, torch.tensor(counts).cumsum(0).tolist())
        if bias is not None:
            y = y + bias.repeat_interleave(a_ragged_metadata.long(), 0)
        return y if scatter_indx is None else torch.empty_like(y).index_copy(0, scatter_indx.long(), y)

    def make_ragged_tensor_metadata(slice_sizes, total):
        assert slice_sizes.sum() == total
        return slice_sizes

    install(monkeypatch, "triton_kernels.matmul", matmul=matmul)
    install(monkeypatch, "triton_kernels.tensor", make_ragged_tensor_metadata=make_ragged_tensor_metadata)
    for config in (SMALL, SMALL.with_(bias=True)):
        problem = make_problem(config, 30)
        with torch.no_grad():
            assert Checker(problem).check_output(PROVIDERS["triton_kernels"].build(problem).run()).sensitive
