"""An enabled transformers model has what AdvancedMoELayer has: graphs, slices, energy, features, one word for each."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from moe_gpu import (
    AdvancedGPUSliceManager,
    AdvancedMoELayer,
    CUDAGraphManager,
    ExpertProfiler,
    disable,
    enable,
    layer_energy,
)
from moe_gpu.energy_model import EnergyModel
from moe_gpu.model import Feature
from moe_gpu.slices.device import described_device
from moe_gpu.slices.plan import GPUSlice
from moe_gpu.slices.policies import SliceAllocationPolicy
from tests.energy_cases import UUID, moved_monitor, points
from tests.graph_cases import StandIn
from tests.training_cases import one_thread  # noqa: F401

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts interface")

from moe_gpu.huggingface import features, flags, forward, get_performance_stats, use_slice  # noqa: E402 they need it
from tests.huggingface_cases import (  # noqa: E402
    attachment_of,
    check_outcome,
    expert_bytes,
    experts_of,
    make_fp8,
    make_model,
    prompt,
    routes,
    run,
    state_of,
)

FLAGS = {"triton", "profiler", "expert_cache", "cuda_graphs", "slices", "energy"}


# CUDA graphs


@pytest.fixture
def manager():
    return CUDAGraphManager(min_calls=2, buckets=(1, 2, 8, 32), capturer=StandIn())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_replayed_experts_give_the_logits_and_counts_of_eager_calls(name, manager):
    plain, model = make_model(name), make_model(name)
    modules, experts = len(experts_of(model)), experts_of(model)[0].num_experts
    twins = [ExpertProfiler(experts, modules), ExpertProfiler(experts, modules)]
    twins[1].attach("cpu")
    manager._capturer.untouched = [twins[1].state_LS]
    enable(plain, twins[0])
    enable(model, twins[1], use_cuda_graphs=manager)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for length in (9, 4, 1, 1, 9, 3, 1, 2, 9):  # 2 sequences: 18, 8, 2, 2, 18, 6, 2, 4, 18 rows
            tokens = torch.randint(2, 96, (2, length), generator=generator)
            got, expected = (each(tokens, use_cache=False).logits for each in (model, plain))
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    stats = manager.get_stats()
    assert stats["hits"] == 3 * modules
    assert stats["captures"] == 3 * modules
    for profiler in twins:
        profiler.flush()
    assert torch.equal(twins[0].counts_LE(), twins[1].counts_LE())
    assert torch.equal(twins[0].state_LS[:, experts], twins[1].state_LS[:, experts]), "padding counts as invalid"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "qwen3_next"])
def test_generated_tokens_are_those_of_eager_with_graphs(name, manager):
    model = make_model(name)
    options = dict(max_new_tokens=8, do_sample=False)
    expected = model.generate(prompt(), **options)
    enable(model, use_cuda_graphs=manager)
    assert torch.equal(model.generate(prompt(), **options), expected)
    assert manager.get_stats()["hits"] == 2 * (7 - 2)


def test_routes_of_no_expert_and_half_precision_in_a_replay(manager):
    """As expert parallelism hands them over: ids E and -1."""
    model = make_model("mixtral").bfloat16()
    enable(model, use_cuda_graphs=manager)
    experts = experts_of(model)[0]
    for count in (5, 7, 8, 1, 3):
        hidden, ids, weights = routes(experts, count)
        ids[0, 0], ids[-1, 1] = 6, -1
        inputs = hidden.bfloat16(), ids, weights.bfloat16()
        with torch.no_grad():
            got = experts(*inputs)
        attachment_of(experts).graphs, kept = None, attachment_of(experts).graphs
        with torch.no_grad():
            assert torch.equal(got, experts(*inputs))
        attachment_of(experts).graphs = kept
    assert manager.get_stats()["hits"] == 2


def test_gradients_training_and_traces_are_left_alone(manager):
    model = make_model("qwen3_moe")
    expected = run(model)
    enable(model, use_cuda_graphs=manager)
    for _ in range(3):
        check_outcome(run(model), expected)
    assert manager.get_stats()["eager_calls"] == {"gradients are enabled: call under torch.no_grad()": 6}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(prompt()).logits, expected.logits, atol=1e-5, rtol=1e-5)
        model.train()(prompt())
    assert manager.get_stats()["eager_calls"]["in training mode: call .eval()"] == 2
    assert sum(manager.get_stats()["eager_calls"].values()) == 8  # traces ask nothing of it


def test_a_slice_makes_other_graphs_and_a_budget_none(manager):
    model = make_model("qwen3_moe")
    enable(model, use_cuda_graphs=manager)
    with torch.no_grad():
        for held in (None, GPUSlice(0, 0, 16, "cta", got_sms=16), None):
            use_slice(model, held)
            for _ in range(3):
                model(prompt())
        assert manager.get_stats()["captures"] == 4
        enable(model, use_cuda_graphs=manager, hbm_budget="50%")
        model(prompt())
    reason = "an hbm_budget decides on the host which experts to load"
    assert manager.get_stats()["eager_calls"][reason] == 2


def test_weights_that_move_drop_the_graph_and_disable_gives_them_back(manager):
    model = make_model("qwen3_moe")
    enable(model, use_cuda_graphs=manager)
    with torch.no_grad():
        for _ in range(3):
            model(prompt())
        experts = experts_of(model)[0]
        experts.down_proj = nn.Parameter(experts.down_proj * 2)
        moved = model(prompt()).logits
    assert manager.get_stats()["moved_weights"] == 1
    disable(model)
    assert manager.get_stats()["graphs"] == 0
    enable(model)
    torch.testing.assert_close(moved, model(prompt()).logits)


def test_fp8_experts_and_shards_stay_out_of_graphs(manager):
    model, twin = make_fp8()
    report = enable(model, use_cuda_graphs=manager)
    assert "float8 and dequantised: each graph would keep memory" in report.covered[0].features[
        "cuda_graphs"
    ].reason or (report.covered[0].features["cuda_graphs"].reason.startswith("CUDA graphs need"))
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(model(prompt()).logits, twin(prompt()).logits, atol=1e-5, rtol=1e-5)
    assert manager.get_stats()["captures"] == 0
    assert attachment_of(experts_of(model)[0]).why_no_graph.startswith("gate_up_proj is float8")


def test_a_manager_with_too_few_graphs_for_the_model_is_refused():
    model = make_model("qwen3_moe")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"max_graphs=1 and the model has 2 modules .* give at least 2"):
        enable(model, use_cuda_graphs=CUDAGraphManager(max_graphs=1))
    assert state_of(model) == before
    enable(model, use_cuda_graphs=True)
    first, second = (attachment_of(experts).graphs for experts in experts_of(model))
    assert first is second
    assert first.max_graphs == 32


def test_copies_of_a_model_have_graphs_of_their_own_and_pickles_none(manager):
    model = make_model("qwen3_moe")
    enable(model, use_cuda_graphs=manager)
    twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    own, same = (attachment_of(experts).graphs for experts in experts_of(twin))
    assert own is same is not manager
    assert own.buckets == manager.buckets
    assert {attachment_of(m).graph_owner for m in experts_of(model)}.isdisjoint(
        {attachment_of(m).graph_owner for m in experts_of(twin)}
    )
    assert attachment_of(experts_of(pickled)[0]).graphs is None
    assert torch.equal(twin(prompt()).logits, pickled(prompt()).logits)


# Slices


def test_a_slice_of_a_plan_sets_the_budget_of_the_products():
    manager = AdvancedGPUSliceManager(8, SliceAllocationPolicy.STATIC, described_device("H200"))
    manager.allocate_slices(5, 2)
    model = make_model("gpt_oss")
    report = enable(model)
    assert not report.covered[0].features["slices"].asked
    expected = run(model)
    (held,) = manager.slices
    use_slice(model, held)
    with manager.enter(5) as entered:
        check_outcome(run(model), expected)
    assert ("cpu", None, entered.sm_budget) in forward._OPS
    assert forward.operations(torch.device("cpu"), entered.sm_budget).sm_budget == entered.sm_budget == held.asked_sms
    assert attachment_of(experts_of(copy.deepcopy(model))[0]).sm_budget == held.asked_sms
    (feature,) = {flags["slices"] for flags in features(model).values()}
    assert feature == Feature(
        True, False, f"a slice of {held.asked_sms} SMs is held; plain PyTorch serves and keeps to no budget"
    )
    use_slice(model, None)
    assert not features(model)["model.layers.0.mlp.experts"]["slices"].asked
    with pytest.raises(ValueError, match=r"Linear has no module that moe_gpu\.enable serves"):
        use_slice(nn.Linear(2, 2), held)


def test_a_traced_model_takes_the_budget_of_its_slice(monkeypatch):
    model = make_model("qwen3_moe")
    enable(model)
    asked = []
    prepare = forward._prepare

    def spy(device_type, device_index, sm_budget):
        asked.append(sm_budget)
        return prepare(device_type, device_index, sm_budget)

    monkeypatch.setattr(forward, "_prepare", torch.compiler.assume_constant_result(spy))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for sms in (None, 24, 40):
            use_slice(model, None if sms is None else GPUSlice(0, 0, sms, "cta", got_sms=sms))
            torch.testing.assert_close(compiled(prompt()).logits, model(prompt()).logits, atol=1e-5, rtol=1e-5)
            assert asked[0] == sms, "the traced call did not ask for the slice's operations"
            asked.clear()


# Energy, and what is said


@pytest.fixture
def metered(monkeypatch, tmp_path):
    """Energy is read from an invented meter, by a clock that the test moves; no calibration is there yet."""
    monkeypatch.setenv("MOE_GPU_CACHE", str(tmp_path))
    time, meter, _ = moved_monitor(400.0)
    for module in (layer_energy, flags):
        monkeypatch.setattr(module, "meter_of", lambda device: (meter, "an invented meter"))
    monkeypatch.setattr(layer_energy.time, "monotonic_ns", lambda: time.now_ns)
    return time, meter


def energies(model: nn.Module) -> list[layer_energy.LayerEnergyStats]:
    return [stats["energy"] for stats in get_performance_stats(model).values()]


def test_energy_is_told_by_module_and_expert_and_read_once(metered, monkeypatch):
    time, meter = metered
    model, profiler = make_model("qwen3_moe"), ExpertProfiler(6, 2, copy_interval_s=0.0)
    report = enable(model, profiler)
    assert "no calibration of" in report.covered[0].features["energy"].reason
    EnergyModel.fit(points(), "float32", UUID, "999.99").save()
    assert features(model)["model.layers.0.mlp.experts"]["energy"] == Feature(True, True, "an invented meter")
    reads: list[int] = []
    read = meter.energy_mj
    monkeypatch.setattr(meter, "energy_mj", lambda: reads.append(1) or read())

    def step() -> None:
        for _ in range(4):
            model(prompt())
        profiler.flush()

    step()
    assert "first reading" in energies(model)[0].reason
    assert len(reads) == 1
    time.pass_s(5.0)
    before = profiler.counts_LE().clone()
    step()
    reads.clear()  # the invented clock reads the meter too
    first, second = energies(model)
    assert len(reads) == 1
    assert first.measurement is second.measurement
    assert first.measurement.energy_j == pytest.approx(2000, abs=40)
    served = profiler.counts_LE() - before
    for layer, stats in enumerate((first, second)):
        assert stats.reason is None
        assert [row.tokens for row in stats.experts.experts] == pytest.approx(served[layer].tolist())
        assert stats.experts.total.measured_j is None
    time.pass_s(5.0)
    assert "no eager call" in energies(model)[0].reason


def test_what_an_own_gate_and_fp8_take_is_not_modelled(metered):
    for model, said in (
        (make_model("gpt_oss"), "its own gate, activation or norm"),
        (make_fp8()[0], "dequantising its weights"),
    ):
        enable(model, ExpertProfiler(6, 2))
        assert "no eager call of the module has been counted yet" in energies(model)[0].reason
        model(prompt())
        assert said in energies(model)[0].reason
        assert energies(model)[0].experts is None
    enable(model, enable_energy_monitoring=False)
    assert energies(model) == [None, None]
    assert not features(model)["model.layers.0.mlp.experts"]["energy"].asked


def test_statistics_have_the_layers_keys_and_the_features_its_names():
    model, profiler = make_model("qwen3_moe"), ExpertProfiler(6, 2, copy_interval_s=0.0)
    report = enable(model, profiler, use_cuda_graphs=True, hbm_budget="50%")
    with torch.no_grad():
        model(prompt())
    profiler.flush()
    layer, found = AdvancedMoELayer(8, 8, 16, 4), get_performance_stats(model)
    assert list(found) == [row.module for row in report.covered] == list(features(model))
    for index, stats in enumerate(found.values()):
        assert stats.keys() == layer.get_performance_stats().keys()
        assert stats["features"].keys() == layer.features.keys() == FLAGS
        assert stats["experts"].counts_E == profiler.counts_LE()[index].tolist()
        assert stats["expert_cache"].slots_by_layer == [3, 3]
        assert stats["cuda_graphs"]["hits"] == 0
        assert stats["energy"].reason == "energy is read from the NVIDIA driver, and the layer is on cpu"
    active = {name for name, feature in stats["features"].items() if feature.active}
    assert active == {"profiler", "expert_cache"}
    with pytest.raises(ValueError, match=r"has no module that moe_gpu.enable serves; call moe_gpu\.enable"):
        get_performance_stats(make_model("qwen3_moe"))


def test_the_report_says_what_is_active_and_why_not():
    model = make_model("qwen3_moe")
    plain = str(enable(model)).splitlines()
    energy = "energy: not on in 2 of 2: energy is read from the NVIDIA driver, and the layer is on cpu"
    assert plain[3:] == [energy, "2 of 2 modules with experts are served"]
    report = enable(model, ExpertProfiler(6, 2), use_cuda_graphs=True, hbm_budget="50%", enable_energy_monitoring=False)
    lines = str(report).splitlines()[3:]
    assert lines == [
        "profiler: on in 2 of 2",
        f"expert_cache: on in 2 of 2: 3 of 6 experts have slots of {expert_bytes(model)} bytes, policy auto (lru now); "
        "host memory not pinned: no GPU is used",
        "cuda_graphs: not on in 2 of 2: CUDA graphs need an NVIDIA GPU, and the experts are on cpu",
        "2 of 2 modules with experts are served",
    ]
    assert {row.features["cuda_graphs"].active for row in report.covered} == {False}
    assert report.to_dict()["modules"][0]["features"]["expert_cache"]["active"]


def test_a_model_that_was_switched_away_says_so():
    model = make_model("qwen3_moe")
    enable(model, ExpertProfiler(6, 2))
    model.set_experts_implementation("grouped_mm")
    feature = features(model)["model.layers.0.mlp.experts"]["profiler"]
    assert feature == Feature(True, False, "the model's configuration names grouped_mm: call moe_gpu.enable again")


def test_a_refused_module_has_no_flags():
    model = make_model("mixtral")
    experts_of(model)[1].has_bias = True
    report = enable(model, use_cuda_graphs=True)
    assert report.not_covered[0].features == {}
    assert list(features(model)) == ["model.layers.0.mlp.experts"]
    enable(model, hbm_budget="50%")  # for those that are served
    assert len(attachment_of(experts_of(model)[0]).expert_cache.layers) == 1
