"""Energy on a real GPU: the counter ticks, the load shows, the sampler costs nothing that is seen, Zeus agrees."""

from __future__ import annotations

import time

import pytest
import torch

from moe_gpu import AdvancedMoELayer, ExpertProfiler
from moe_gpu.energy import standard_workloads
from moe_gpu.energy_model import EnergyModel
from moe_gpu.energy_monitor import EnergyMonitor, EnergyUnavailableError, PowerSampler, measure_energy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture
def monitor():
    try:
        with EnergyMonitor("cuda") as opened:
            yield opened
    except EnergyUnavailableError as error:
        pytest.skip(f"no energy to read: {error}")


def product(n=4096):
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def test_a_loaded_gpu_takes_more_than_an_idle_one(monitor):
    idle = monitor.measure_idle(2.5)
    trials = measure_energy(product(), 2.5, trials=2, cooldown_s=0, monitor=monitor)
    if idle.energy_j is None:
        pytest.skip(f"this GPU's energy cannot be read: {idle.reason}")
    assert trials.joules_per_call > 0
    loaded = trials.total()
    assert loaded.energy_j / loaded.duration_s > 1.3 * idle.energy_j / idle.duration_s
    assert loaded.n_ticks >= 30
    assert loaded.stderr_j < 0.05 * loaded.energy_j


def test_the_sampler_agrees_with_the_counter(monitor):
    call = product()
    with PowerSampler("cuda", hz=20) as sampler, monitor.window("work") as window:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            call()
    m = window.measurement
    watts = [s.power_instant_w for s in sampler.timeline() if s.power_instant_w is not None]
    if m.energy_j is None or not watts:
        pytest.skip(f"this GPU's energy or power cannot be read: {m.reason}")
    assert len(watts) > 60
    steady = sorted(watts)[len(watts) // 2]
    assert m.energy_j / m.duration_s == pytest.approx(steady, rel=0.1)


def test_a_layer_tells_its_energy_and_by_expert_once_calibrated(monitor, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_GPU_CACHE", str(tmp_path))
    workloads = standard_workloads(torch.device("cuda", 0), torch.bfloat16, rows_per_expert=(16, 256))
    model = EnergyModel.calibrate(workloads, "bfloat16", monitor=monitor, min_duration_s=2.0, trials=2)
    model.save()
    assert model.static_w > 10
    assert model.j_per_flop > 0
    profiler = ExpertProfiler(64)
    layer = AdvancedMoELayer(2048, 2048, 768, 64, 8, profiler=profiler).to("cuda", torch.bfloat16)
    assert layer.features["energy"].active
    x = torch.randn(256, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        profiler.flush()
        layer.get_performance_stats()
        end = time.monotonic() + 4
        while time.monotonic() < end:
            layer(x)
        profiler.flush()
    energy = layer.get_performance_stats()["energy"]
    assert energy.reason is None
    assert energy.measurement.energy_j > 0
    assert sum(row.dynamic_j for row in energy.experts.experts) > 0
    total = energy.experts.total
    assert total.closure is None, "other work may have run in the window too"
    predicted = total.static_j + total.dynamic_j + total.shared_j
    assert predicted == pytest.approx(energy.measurement.energy_j, rel=0.5), "a short calibration, and host gaps"


def test_zeus_agrees(monitor):
    zeus = pytest.importorskip("zeus.monitor", reason="zeus is not installed: pip install 'moe-gpu[energy]'")
    call = product()
    other = zeus.ZeusMonitor(gpu_indices=[torch.cuda.current_device()])
    other.begin_window("work")
    with monitor.window("work") as window:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            call()
    theirs = other.end_window("work")
    ours = window.measurement
    assert ours.energy_j / ours.duration_s == pytest.approx(theirs.total_energy / theirs.time, rel=0.01)
