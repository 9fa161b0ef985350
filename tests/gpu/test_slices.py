"""Slices on a real GPU: disjoint by the hardware's own word, right results in them, refusals harmless."""

from __future__ import annotations

import pytest
import torch

from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager, GPUSliceOptimizer
from moe_gpu.model import AdvancedMoELayer
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.reference import count_load_reference, load_state_size
from moe_gpu.results import SliceRow, SliceSeries, select
from moe_gpu.slice_bench.adaptive import measure_adaptive
from moe_gpu.slice_bench.bench import Sizes, SliceBench
from moe_gpu.slices.costs import CostPoint, CostTable
from moe_gpu.slices.device import present_device
from moe_gpu.slices.green import GreenPartitions
from moe_gpu.slices.plan import BackendUnavailableError, SliceError
from moe_gpu.slices.policies import SliceAllocationPolicy

capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not capable, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]


@pytest.fixture
def green():
    """A manager of green contexts, where the driver has them."""
    try:
        manager = AdvancedGPUSliceManager(4, SliceAllocationPolicy.STATIC, "cuda", "green_context")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    yield manager
    manager.close()


def sms_seen(manager: AdvancedGPUSliceManager, tenant: int, graph: bool) -> set[int]:
    """SMs that blocks launched in a tenant's slice ran on, in a replayed graph or eager."""
    from moe_gpu.triton_kernels.sm_ids import record_sm_ids

    out = torch.full((8 * manager.device.num_sms,), -1, dtype=torch.int32, device="cuda")
    record_sm_ids(out)  # compiled before any capture
    torch.cuda.synchronize()
    with manager.enter(tenant) as run:
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=run.stream):
                record_sm_ids(out)
            out.fill_(-1)
            captured.replay()
        else:
            out.fill_(-1)
            record_sm_ids(out)
    assert run.stream is not None
    run.stream.synchronize()  # the device's synchronize does not wait for graphs replayed in a green context
    seen = set(out.tolist())
    assert -1 not in seen
    return seen


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_slices_are_disjoint_and_as_large_as_they_say(green, graph):
    green.allocate_slices(0, 2)
    green.allocate_slices(1, 1)
    first, second = (sms_seen(green, tenant, graph) for tenant in (0, 1))
    got = [item.got_sms for item in green.slices]
    assert all(item.enforced and item.got_sms >= item.asked_sms for item in green.slices)
    assert [len(first), len(second)] == got
    assert not first & second


def test_a_refused_plan_leaves_the_old_slices_working(green):
    green.allocate_slices(0, 2)
    before = (green.plan, green.allocations)
    with pytest.raises(SliceError):
        green.allocate_slices(1, 4)
    with pytest.raises(BackendUnavailableError):
        GreenPartitions(0, (green.device.num_sms + 8,))
    assert (green.plan, green.allocations) == before
    assert len(sms_seen(green, 0, False)) == green.slices[0].got_sms


def test_many_changes_of_plan_give_everything_back(green):
    green.allocate_slices(0, 1)
    for _ in range(5):
        green.release_slices(0)
        green.allocate_slices(0, 1)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(50):
        green.release_slices(0)
        green.allocate_slices(0, 1)
    torch.cuda.synchronize()
    assert before - torch.cuda.mem_get_info()[0] < 8 << 20


@pytest.mark.parametrize("backend", ["cta", "green_context"])
@pytest.mark.parametrize("num_tokens", [16, 700])
def test_layers_compute_the_same_in_a_slice(backend, num_tokens):
    try:
        manager = AdvancedGPUSliceManager(4, SliceAllocationPolicy.STATIC, "cuda", backend)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    manager.allocate_slices(0, 1)
    manager.allocate_slices(1, 2)
    torch.manual_seed(0)
    layer = AdvancedMoELayer(256, 256, 192, 16, 4).to("cuda", torch.bfloat16)
    x = torch.randn(num_tokens, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        whole = layer(x)[0].float()
        for item in manager.slices:
            layer.use_slice(item)
            with manager.enter(item.tenant) as run:
                out = layer(x)[0]
            manager.join()
            assert run.sm_budget == item.got_sms == layer.ops.sm_budget
            assert layer.features["slices"].active
            assert (out.float() - whole).abs().max() <= 0.02 * whole.abs().max()
    manager.close()


def test_the_present_gpu_is_described_as_it_is():
    device = present_device()
    assert device.num_sms == torch.cuda.get_device_properties(0).multi_processor_count
    assert device.present
    with pytest.raises(ValueError, match="does not exist"):
        present_device(99)


@pytest.mark.parametrize("num_experts", [8, 127, 128, 256])
def test_loads_are_counted_as_the_reference_does(num_experts):
    profiler = ExpertProfiler(num_experts, copy_interval_s=1e9)
    expected = torch.zeros(load_state_size(num_experts), dtype=torch.int64)
    for call in range(5):
        demand = torch.randint(0, 4000, (num_experts + 1,), dtype=torch.int32)
        demand[call] = 0
        profiler.record(demand.cuda())
        count_load_reference(expected, demand)
        if call == 0:
            first = profiler._state_LS.clone()
    assert first[0, -1] == 1
    assert torch.equal(profiler._state_LS[0].cpu(), expected)


def test_replays_of_a_graph_are_counted_and_drive_the_optimiser():
    profiler = ExpertProfiler(16, copy_interval_s=0.0)
    profiler.attach("cuda")
    layer = AdvancedMoELayer(256, 256, 192, 16, 4, profiler=profiler).to("cuda", torch.bfloat16)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer(x)
        profiler.flush()
        before = int(profiler.counts_LE().sum())
        for _ in range(10):
            graph.replay()
        profiler.flush()
    assert int(profiler.counts_LE().sum()) - before == 10 * 64 * 4
    manager = AdvancedGPUSliceManager(4, SliceAllocationPolicy.PROPORTIONAL, "cuda", "cta")
    for tenant in range(4):
        manager.allocate_slices(tenant, 1, experts=range(4 * tenant, 4 * tenant + 4))
    decision = GPUSliceOptimizer(manager, profiler).step()
    assert sum(decision.sms) == manager.device.num_sms
    manager.close()


def test_every_policy_really_runs_in_its_slices_over_a_load_that_shifts(green):
    device = present_device()
    sizes = sorted({8, 32, 64, 128, device.num_sms})
    grid = ((experts, rows, sms) for experts in (1, 128) for rows in (8, 65536) for sms in sizes)
    points = tuple(CostPoint(experts, rows, sms, float(experts)) for experts, rows, sms in grid)  # slices pay
    bench = SliceBench("qwen3-30b-a3b", Sizes.tiny(), torch.device("cuda", 0), 600.0, None)
    bench.costs = CostTable(bench.machine, bench.preset, "bfloat16", "green_context", points, 1.0, 0.0)
    measure_adaptive(bench)
    series = select(bench.rows, SliceSeries)
    assert len(series) == 10
    for one in series:
        assert one.status == "ok"
        assert len(one.sms) == len(one.rows)
        assert min(one.time_ms) > 0
        for sms in one.sms:
            assert sms is None or (min(sms) >= device.min_slice_sms and sum(sms) <= device.num_sms)
    assert {one.policy: None in one.sms for one in series[:5]}["proportional"] is False
    assert any(one.sms[0] is not None for one in series if one.policy == "adaptive"), "by these costs slices pay"
    totals = [row for row in select(bench.rows, SliceRow) if row.table == "adaptive" and row.unit == "ms"]
    assert [row.value for row in totals] == pytest.approx([sum(one.time_ms) for one in series])
