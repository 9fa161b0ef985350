"""Models of transformers on a GPU: the kernels serve, half precision, compiled static-cache decoding, no waiting."""

from __future__ import annotations

import gc

import pytest
import torch

from moe_gpu import AdvancedGPUSliceManager, CUDAGraphManager, ExpertCache, ExpertProfiler, disable, enable
from moe_gpu.huggingface import features, get_performance_stats, register, use_slice
from moe_gpu.slices.plan import BackendUnavailableError
from moe_gpu.slices.policies import SliceAllocationPolicy

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


# The flags


WIDE = dict(hidden_size=256, moe_intermediate_size=192, num_experts=16, num_experts_per_tok=4, std=0.06)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "qwen3_next"])
def test_generated_tokens_are_those_of_eager_with_graphs(name):
    """In float32, where padding and another tile change no token."""
    model = make_model(name, "cuda")
    options = dict(max_new_tokens=24, do_sample=False)
    expected = model.generate(prompt("cuda"), **options)
    manager, profiler = CUDAGraphManager(min_calls=2), ExpertProfiler(6, num_layers=2)
    report = enable(model, profiler, use_cuda_graphs=manager)
    assert all(row.features["cuda_graphs"].active for row in report.covered)
    for _ in range(2):
        assert torch.equal(model.generate(prompt("cuda"), **options), expected)
    stats = manager.get_stats()
    assert stats["failures"] == []
    assert stats["hits"] >= 2 * (2 * 23 - 3)
    profiler.flush()
    assert profiler.counts_LE().sum(1).tolist() == [2 * 2 * 2 * (9 + 23)] * 2
    disable(model)
    assert manager.get_stats()["graphs"] == 0


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("count", [1, 4, 7, 16])
def test_a_replay_has_the_bits_of_the_padded_eager_call(name, count):
    model = make_model(name, "cuda").to(torch.bfloat16)
    manager = CUDAGraphManager(min_calls=2, buckets=(1, 4, 8, 16))
    bucket = next(rows for rows in manager.buckets if rows >= count)
    enable(model, use_cuda_graphs=manager)
    experts = experts_of(model)[0]
    with torch.no_grad():
        for step in range(5):
            hidden, ids, weights = routes(experts, bucket, "cuda")
            hidden, weights = (hidden * (1 + step)).bfloat16(), weights.bfloat16()
            ids = (ids + step) % 7  # 6 is no expert
            got = experts(hidden[:count], ids[:count], weights[:count])
            padded = hidden.clone(), ids.clone(), weights
            padded[0][count:] = torch.nan
            padded[1][count:] = -1
            if step:  # the first call is eager and not padded
                assert torch.equal(got, serve_without_flags(experts, *padded)[:count])
    assert manager.get_stats()["hits"] == 3


def serve_without_flags(experts, *arguments):
    attachment = vars(experts).pop("_moe_gpu")
    try:
        return serve(experts, *arguments)
    finally:
        experts._moe_gpu = attachment


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("slots", [1, 3, 8, 16])
def test_logits_from_slots_have_the_bits_of_resident_weights(slots, dtype):
    plain, model = (make_model("qwen3_moe", "cuda", **WIDE).to(dtype) for _ in range(2))
    enable(plain)
    expert_bytes = sum(p[0].nbytes for p in experts_of(model)[0].parameters())
    cache = ExpertCache(slots * 2 * expert_bytes)
    gc.collect()  # what tests before left in cycles is not of this one
    before = torch.cuda.memory_allocated()
    report = enable(model, hbm_budget=cache)
    assert torch.cuda.memory_allocated() == before - 2 * 16 * expert_bytes
    assert all("host memory pinned" in row.features["expert_cache"].reason or slots == 16 for row in report.covered)
    weights = [p for experts in experts_of(model) for p in experts.parameters()]
    assert all(p.device.type == "cpu" and p.is_pinned() for p in weights)
    tokens = torch.randint(2, 96, (4, 48), generator=torch.Generator().manual_seed(5)).cuda()
    with torch.no_grad():
        for rows, length in ((1, 1), (2, 1), (4, 48), (1, 9), (4, 1), (1, 1)):
            ids = tokens[:rows, :length]
            assert torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    stats = cache.stats()
    assert stats.used_bytes == slots * 2 * expert_bytes
    assert stats.host_memory == "pinned"
    model.to("cuda")  # takes nothing along that is there already, and the experts not at all
    assert all(p.device.type == "cpu" for p in weights)
    disable(model)
    assert all(p.is_cuda and p.requires_grad for p in weights)
    enable(model)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_a_model_under_a_budget_moves_to_the_gpu_without_its_experts():
    model = make_model("qwen3_moe", **WIDE)
    expert_bytes = sum(p[0].nbytes for p in experts_of(model)[0].parameters())
    rest = sum(p.nbytes for name, p in model.named_parameters() if ".experts." not in name)
    before = torch.cuda.memory_allocated()
    enable(model, hbm_budget="25%")
    model.to("cuda")
    assert torch.cuda.memory_allocated() - before < rest + 16 * expert_bytes
    assert experts_of(model)[0].down_proj.device.type == "cpu"
    plain = make_model("qwen3_moe", "cuda", **WIDE)
    enable(plain)
    options = dict(max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(prompt("cuda"), **options), plain.generate(prompt("cuda"), **options))
    disable(model)
    assert experts_of(model)[0].down_proj.is_cuda


def test_a_static_cache_compiles_around_experts_under_a_budget():
    model = make_model("qwen3_moe", "cuda")
    options = dict(max_new_tokens=8, do_sample=False)
    expected = model.generate(prompt("cuda"), **options)
    enable(model, hbm_budget="50%")
    torch._dynamo.reset()
    assert torch.equal(model.generate(prompt("cuda"), **options, cache_implementation="static"), expected)


@pytest.mark.parametrize("backend", ["cta", "green_context"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_model_in_a_slice_gives_the_same(backend, graphs):
    try:
        slices = AdvancedGPUSliceManager(4, SliceAllocationPolicy.STATIC, "cuda", backend)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    model = make_model("gpt_oss", "cuda")
    options = dict(max_new_tokens=12, do_sample=False)
    expected = model.generate(prompt("cuda"), **options)
    manager = CUDAGraphManager(min_calls=2)
    enable(model, use_cuda_graphs=manager if graphs else False)
    slices.allocate_slices(0, 2)
    (held,) = [item for item in slices.slices if item.tenant == 0]
    use_slice(model, held)
    found = features(model)["model.layers.0.mlp.experts"]["slices"]
    assert found.active
    assert f"at most {held.got_sms} SMs" in found.reason
    with slices.enter(0) as run:
        got = model.generate(prompt("cuda"), **options)
    run.stream.synchronize()
    assert torch.equal(got, expected)
    if graphs:
        stats = get_performance_stats(model)["model.layers.0.mlp.experts"]["cuda_graphs"]
        assert stats["failures"] == []
        assert stats["hits"] > 0
        manager.close()
    slices.close()


def test_energy_of_an_enabled_model():
    """Joules of the GPU since the last call, where the driver tells them, the same for every module."""
    model = make_model("qwen3_moe", "cuda")
    report = enable(model, ExpertProfiler(6, num_layers=2))
    feature = report.covered[0].features["energy"]
    if not feature.active:
        pytest.skip(feature.reason)
    get_performance_stats(model)
    end = torch.cuda.Event(enable_timing=True)
    begin = torch.cuda.Event(enable_timing=True)
    begin.record()
    while True:
        model(prompt("cuda"))
        end.record()
        end.synchronize()
        if begin.elapsed_time(end) > 1000:  # ten ticks of the counter
            break
    first, second = (stats["energy"] for stats in get_performance_stats(model).values())
    assert first.measurement is second.measurement
    assert first.measurement.energy_j > 0
