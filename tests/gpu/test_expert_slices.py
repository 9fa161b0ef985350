"""Divided experts on a GPU: the results, and that each group's kernels ran on the SMs of its slice."""

from __future__ import annotations

import pytest
import torch

from moe_gpu.cuda_graph_manager import CUDAGraphManager
from moe_gpu.slices.plan import BackendUnavailableError
from moe_gpu.slices.policies import SliceAllocationPolicy
from moe_gpu.triton_kernels.ops import TritonExpertOps
from tests.divided_cases import manager_of, twins

serves = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not serves, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]
SIZES = dict(input_dim=256, expert_dim=256, hidden_dim=128, num_experts=32, top_k=4)
GROUPS = {0: tuple(range(16)), 16: tuple(range(16, 28))}  # the last four belong to nobody


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max()


def sliced(backend: str, policy: SliceAllocationPolicy = SliceAllocationPolicy.PROPORTIONAL, groups=GROUPS):
    try:
        return manager_of(groups, policy, "cuda", backend)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("tokens", [1, 8, 64, 600, 4096])
@pytest.mark.parametrize("backend", ["cta", "green_context"])
def test_divided_layers_give_the_output_of_undivided_ones(backend, tokens, graphs):
    manager = sliced(backend)
    used = CUDAGraphManager(2, (tokens,)) if graphs else False
    layer, plain = (each.cuda() for each in twins(torch.bfloat16, **SIZES, use_cuda_graphs=used))
    layer.divide_experts(manager)
    assert layer.features["slices"].active, layer.features["slices"]
    for loads in ([9.0] * 16 + [1.0] * 16, [1.0] * 16 + [9.0] * 16):
        manager.optimize_allocations(loads)
        for _ in range(4):
            x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
            out, stats = layer(x)
            expected, wanted = plain(x)
            assert_close(out, expected)
            assert torch.equal(stats.counts_E, wanted.counts_E)
    if graphs:
        assert layer.graphs.get_stats()["hits"] == 4, layer.graphs.get_stats()
        layer.graphs.close()
    manager.close()


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_groups_work_runs_on_the_sms_of_its_slice(graph, monkeypatch):
    """Beside each part of the experts a kernel records the SMs that its slice lets it use."""
    from moe_gpu.triton_kernels.sm_ids import record_sm_ids

    groups = {0: tuple(range(16)), 16: tuple(range(16, 32))}  # work of nobody's slice might keep SMs busy
    manager = sliced("green_context", groups=groups)
    layer, _ = (each.cuda() for each in twins(torch.bfloat16, **SIZES))
    layer.divide_experts(manager)
    seen = {first: torch.full((8 * manager.device.num_sms,), -1, dtype=torch.int32, device="cuda") for first in groups}
    original = TritonExpertOps.expert_rows

    def expert_rows(self, x_TH, routing, weights, activation, first_bin, num_experts, out_RO=None):
        if first_bin in seen:
            record_sm_ids(seen[first_bin])
        return original(self, x_TH, routing, weights, activation, first_bin, num_experts, out_RO)

    monkeypatch.setattr(TritonExpertOps, "expert_rows", expert_rows)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            layer(x)
        for record in seen.values():
            record.fill_(-1)
        captured.replay()
    torch.cuda.current_stream().synchronize()
    found = {first: set(record.tolist()) - {-1} for first, record in seen.items()}
    assert [len(sms) for sms in found.values()] == [item.got_sms for item in manager.slices]
    assert not found[0] & found[16]
    manager.close()


def test_dynamic_learns_from_the_device_how_busy_slices_are():
    manager = sliced("cta", SliceAllocationPolicy.DYNAMIC)
    layer, _ = (each.cuda() for each in twins(torch.bfloat16, **SIZES))
    layer.divide_experts(manager)
    x = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        layer.divided._timed_at = -float("inf")
        layer(x)
        torch.cuda.synchronize()
        layer.divided.report()
    used = [item["utilization"] for item in manager.get_stats()["slices"]]
    assert all(value is not None and 0 < value <= 1 for value in used), used
    manager.close()
