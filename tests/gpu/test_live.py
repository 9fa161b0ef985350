"""Publishing beside a GPU's work: what it reads there, that it never waits for the device, and captures beside it."""

from __future__ import annotations

import os
import time

import pytest
import torch

from moe_gpu import AdvancedMoELayer, ExpertProfiler, publish
from moe_gpu.live.figures import tokens_of

serves = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not serves, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]
TOKENS = 64


@pytest.fixture
def layer(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    profiler = ExpertProfiler(16, copy_interval_s=0.05)
    made = AdvancedMoELayer(256, 256, 128, 16, 4, profiler=profiler).cuda().bfloat16().eval()
    with torch.no_grad():
        yield made


def x_TH() -> torch.Tensor:
    return torch.randn(TOKENS, 256, device="cuda", dtype=torch.bfloat16)


def wait_for_writes(publisher, writes: int) -> None:
    end, until = time.monotonic() + 60, publisher._writes + writes
    while publisher._writes < until:
        assert time.monotonic() < end, "the publishing thread has stopped"
        time.sleep(0.02)


def test_it_says_what_the_gpu_and_the_allocator_say(layer):
    x = x_TH()
    with publish(layer, interval_s=0.1) as publisher:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            layer(x)
        layer.profiler.flush()
        wait_for_writes(publisher, 2)
        status = publisher.status
    assert status.gpu is not None, status.gpu_reason
    assert status.gpu.name in torch.cuda.get_device_name()
    assert 0 < status.gpu.memory_used_bytes <= status.gpu.memory_total_bytes
    assert status.memory.allocated_bytes == pytest.approx(torch.cuda.memory_allocated(), rel=0.5)
    assert status.layers[0].backend == "triton"
    assert tokens_of(status.layers) % TOKENS == 0
    assert status.graphs.replays > 0, "a layer in eval mode replays its own graphs"
    if status.energy is None:
        pytest.skip(f"no energy here: {status.energy_reason}")
    assert status.energy.energy_j > 0
    assert status.energy.j_per_1000_tokens > 0


def test_the_thread_never_waits_for_the_device(layer):
    """PyTorch refuses every synchronising call of any thread meanwhile, and any other wait would outlast a sleep."""
    x = x_TH()
    layer(x)
    layer.profiler.flush()
    with publish(layer, interval_s=0.05) as publisher:
        wait_for_writes(publisher, 1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(3_000_000_000)  # over a second
            busy = torch.cuda.Event()
            busy.record()
            wait_for_writes(publisher, 3)
            assert not busy.query(), "the writes came while the device was busy"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert publisher.status.gpu is not None


def test_a_layer_is_captured_and_replayed_beside_it_and_its_counts_go_on(layer):
    layer.graphs = None  # the graph is the test's own
    x = x_TH()
    for _ in range(3):
        layer(x)
    torch.cuda.synchronize()
    replays = [0]
    with publish(layer, interval_s=0.05, graphs=lambda: (replays[0], 3)) as publisher:
        for _ in range(5):  # so that a write falls into a capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = layer(x)[0]
                time.sleep(0.1)
        layer.profiler.flush()
        before = sum(layer.profiler.latest().counts_LE[0].tolist())
        for _ in range(100):
            graph.replay()
            replays[0] += 1
            layer.profiler.poll()
        layer.profiler.flush()
        wait_for_writes(publisher, 2)
        counted = sum(publisher.status.layers[0].counts_E)
        assert publisher.status.graphs.replays == 100
    assert counted - before == 100 * TOKENS * 4
    assert torch.isfinite(out.float()).all()
    assert os.path.exists(publisher.path)
