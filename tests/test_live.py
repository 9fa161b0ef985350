"""publish and its file: what it holds, that it costs the device nothing, jobs that end, files that are damaged."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_gpu import AdvancedGPUSliceManager, ExpertProfiler, Progress, publish
from moe_gpu.live import publisher as publishing
from moe_gpu.live.figures import load_figures, tokens_of
from moe_gpu.live.gpu import read_gpu
from moe_gpu.live.status import LayerLoad, find_jobs, read_status
from moe_gpu.nvml import SLOWED, GpuLostError, NotSupportedError, Sample
from moe_gpu.slices.plan import GPUSlice
from tests.energy_cases import with_fake_nvml
from tests.live_cases import (
    EXPERTS,
    TOP_K,
    a_status,
    folder_of_jobs,  # noqa: F401 a fixture
    make_model,
    step,
    wait_while,
)
from tests.training_cases import ROOT


def test_a_model_is_published_where_top_looks_and_says_what_its_profiler_counted(own_folder):
    model = make_model()
    step(model)
    with publish(model, name="a job", progress=lambda: Progress(3, 10, 1.5), graphs=lambda: (90, 10)) as publisher:
        assert publisher.path == own_folder / f"{os.getpid()}.json"
        (job,), remarks = find_jobs()
        assert remarks == []
        assert (job.state, job.name, job.pid) == ("running", "a job", os.getpid())
        assert job.progress == Progress(3, 10, 1.5)
        assert (job.graphs.replays, job.graphs.eager_calls) == (90, 10)
        assert [layer.name for layer in job.layers] == ["0", "1"]
        counts_LE = model[0].profiler.counts_LE()
        assert [layer.counts_E for layer in job.layers] == counts_LE.tolist()
        assert tokens_of(job.layers) == 5 * 10
        assert job.gpu is None
        assert "CPU" in job.gpu_reason
    assert read_status(publisher.path).state == "ended"


def test_the_figures_are_those_of_the_profiler():
    model = make_model()
    step(model, calls=7, tokens=5)
    with publish(model) as publisher:
        layer = publisher.status.layers[1]
        figures, snapshot = load_figures(layer.window_E), model[0].profiler.snapshot(1)
    assert figures.load_E == pytest.approx([share * EXPERTS for share in snapshot.share_E])
    assert figures.max_over_mean == pytest.approx(snapshot.max_over_mean)
    assert figures.normalised_entropy == pytest.approx(snapshot.normalised_entropy)
    assert (figures.active_experts, figures.hot, figures.cold) == (snapshot.active_experts, snapshot.hot, snapshot.cold)
    assert layer.calls == snapshot.calls == 7
    assert load_figures([0, 0]) is None
    assert load_figures([4]).normalised_entropy is None


def test_the_thread_writes_what_happens_later_and_says_what_it_costs():
    model = make_model()
    with publish(model, interval_s=0.05) as publisher:
        assert publisher.status.layers[0].reason == "no step has been counted yet"
        step(model)
        wait_while(lambda: sum(read_status(publisher.path).layers[0].counts_E or ()) != 5 * 10 * TOP_K)
        wait_while(lambda: publisher.status.cost is None)
        cost = publisher.status.cost
        assert 0 < cost.cpu_s < cost.seconds
        assert cost.writes >= 1


def test_publishing_starts_nothing_on_the_device(monkeypatch):
    model = make_model()
    step(model)
    profiler = model[0].profiler
    for name in ("poll", "flush", "_start_copy", "snapshot", "counts_LE"):
        monkeypatch.setattr(profiler, name, lambda *_: pytest.fail("the publisher started a copy"))
    with publish(model, interval_s=0.05) as publisher:
        writes = publisher._writes
        wait_while(lambda: publisher._writes < writes + 2)
        assert publisher.status.layers[0].counts_E is not None


def test_a_layer_without_a_profiler_is_listed_as_not_measured():
    with publish(make_model(profiled=False)) as publisher:
        layers = publisher.status.layers
    assert [layer.counts_E for layer in layers] == [None, None]
    assert all("profiler" in layer.reason for layer in layers)
    assert tokens_of(layers) is None


def test_a_profiler_alone_is_published_without_tokens():
    profiler = ExpertProfiler(4, 2, copy_interval_s=0)
    profiler.record(torch.tensor([1, 2, 3, 4, 0]), 1)
    profiler.flush()
    with publish(profiler) as publisher:
        assert publisher.status.layers[1].counts_E == [1, 2, 3, 4]
        assert tokens_of(publisher.status.layers) is None


def test_slices_of_a_manager_and_of_layers():
    manager = AdvancedGPUSliceManager(8, device="NVIDIA H200", carry_out=False)
    manager.allocate_slices(0, 3, experts=range(4))
    model = make_model()
    with publish(model, slices=manager) as publisher:
        (item,) = publisher.status.slices
        assert (item.holder, item.got_sms, item.enforced) == ("experts 0-3", None, False)
        assert item.asked_sms == manager.slices[0].asked_sms
    with publish(model) as publisher:
        assert publisher.status.slices is None
    model[1].use_slice(manager.slices[0])
    with publish(model) as publisher:
        assert [item.holder for item in publisher.status.slices] == ["1"]
    model[0].divide_experts(2)
    with publish(model) as publisher:
        assert [item.holder for item in publisher.status.slices] == ["0: experts 0-3", "0: experts 4-7", "1"]


def test_experts_of_a_slice_are_named_in_short(tmp_path):
    for experts, name in (((5,), "expert 5"), ((6, 2, 4), "experts 2, 4, 6"), (range(1, 11, 2), "experts 1, 3, 5 +2")):
        manager = AdvancedGPUSliceManager(8, device="NVIDIA H200", carry_out=False)
        manager.allocate_slices(experts[0], 3, experts=experts)
        with publish(make_model(), tmp_path / "live.json", slices=manager) as publisher:
            assert [item.holder for item in publisher.status.slices] == [name]


def test_an_expert_cache_is_counted_once_however_many_layers_share_it():
    from moe_gpu import set_hbm_budget

    model = make_model().eval()
    cache = set_hbm_budget(model, "50%")
    with torch.no_grad():
        step(model, calls=3)
    with publish(model) as publisher:
        status = publisher.status.expert_cache
    counts = cache.stats().counts
    assert (status.hits, status.misses) == (counts.hits, counts.misses)
    assert status.hits + status.misses > 0
    assert status.used_bytes == cache.stats().used_bytes


def test_graph_hits_are_those_of_the_layers_managers():
    model = make_model().eval()
    with torch.no_grad():
        step(model, calls=3)
    model[1].graphs._hits = 5
    with publish(model) as publisher:
        graphs = publisher.status.graphs
    eager = sum(sum(layer.graphs.get_stats()["eager_calls"].values()) for layer in model)
    assert (graphs.replays, graphs.eager_calls) == (5, eager)
    with publish(make_model(use_cuda_graphs=False)) as publisher:
        assert publisher.status.graphs is None


def test_a_transformers_model_is_published():
    pytest.importorskip("transformers.integrations.moe", reason="transformers has no experts interface here")
    import moe_gpu
    from tests import huggingface_cases

    model = huggingface_cases.make_model("qwen3_moe")
    served = [row for row in moe_gpu.enable(model).modules if row.covered]
    num_experts = huggingface_cases.experts_of(model)[0].num_experts
    profiler = ExpertProfiler(num_experts, len(served), copy_interval_s=0)
    moe_gpu.enable(model, profiler)
    model(torch.arange(6)[None])
    profiler.flush()
    with publish(model) as publisher:
        layers = publisher.status.layers
    assert tokens_of(layers) == 6
    assert [layer.name for layer in layers] == [row.module for row in served]


def test_the_flags_of_a_transformers_model_are_published():
    pytest.importorskip("transformers.integrations.moe", reason="transformers has no experts interface here")
    import moe_gpu
    from moe_gpu.huggingface import use_slice
    from tests import huggingface_cases

    model = huggingface_cases.make_model("qwen3_moe")
    moe_gpu.enable(model, use_cuda_graphs=True, hbm_budget="50%")
    use_slice(model, GPUSlice(0, 0, 24, "cta", got_sms=24))
    with torch.no_grad():
        model(torch.arange(6)[None])
    with publish(model) as publisher:
        status = publisher.status
        assert (status.graphs.replays, status.graphs.eager_calls) == (0, 2)
        assert [(item.holder, item.got_sms) for item in status.slices] == [
            (f"model.layers.{layer}.mlp.experts", 24) for layer in range(2)
        ]
        assert status.expert_cache.misses > 0
        assert status.expert_cache.used_bytes > 0
        assert [layer.backend for layer in status.layers] == ["reference"] * 2
        moe_gpu.disable(model)
        status = publisher._look()
        assert (status.graphs, status.slices, status.expert_cache) == (None, None, None)


def test_a_function_of_the_job_that_fails_is_left_out_and_warned_of_once(caplog):
    def broken():
        raise RuntimeError("no such thing")

    model = make_model()
    with publish(model, interval_s=0.05, progress=broken) as publisher:
        wait_while(lambda: publisher._writes < 3)
        assert publisher.status.progress is None
    assert [record.getMessage() for record in caplog.records] == [
        "publish: progress() raised RuntimeError: no such thing; it is left out"
    ]


def test_it_ends_with_its_model_and_keeps_it_from_nobody():
    publisher = publish(make_model(), interval_s=0.05)
    gc.collect()
    wait_while(lambda: publisher.path in publishing._PUBLISHERS)  # it leaves the list after its last word
    assert read_status(publisher.path).ended


def test_a_second_publisher_of_a_path_ends_the_first():
    model = make_model()
    first = publish(model)
    with publish(model, name="second") as second:
        assert second.path == first.path
        assert first._ended
        assert read_status(second.path).name == "second"
        assert read_status(second.path).state == "running"


PROGRAM = """
import os, sys, moe_gpu
model = moe_gpu.AdvancedMoELayer(16, 16, 32, 4)
publisher = moe_gpu.publish(model)
print(publisher.path, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
if sys.argv[1] == "forked" and os.fork() == 0:
    sys.exit()
if sys.argv[1] == "forked":
    os.wait()
    from moe_gpu.live.status import read_status
    assert read_status(publisher.path).state == "running"
"""


@pytest.mark.parametrize("how", ["returned", "killed", "forked"])
def test_a_job_that_is_over_is_said_to_have_ended(how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    status = read_status(done.stdout.strip())
    assert status.state == "ended"
    assert status.ended == (how != "killed")


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (torch.nn.Linear(2, 2), {}, "Linear has no MoE layer"),
        (ExpertProfiler(2), {"interval_s": 0.0}, "interval_s=0.0 must lie between"),
        (ExpertProfiler(2), {"path": f"{__file__}/x.json"}, "cannot write .*Not a directory"),
    ],
)
def test_what_cannot_be_published_is_refused(source, options, said):
    with pytest.raises(ValueError, match=said):
        publish(source, **options)


def test_a_disk_that_fills_up_is_warned_of_once_and_the_job_goes_on(monkeypatch, caplog):
    def full(path, content):
        raise OSError(28, "No space left on device")

    model = make_model()
    with publish(model, interval_s=0.05) as publisher:
        monkeypatch.setattr(publishing, "write_atomically", full)
        writes = publisher._writes
        wait_while(lambda: publisher._writes < writes + 3)
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]


class Meter:
    """A GPU that says what it is told."""

    uuid, name, scope = "GPU-1", "Invented GPU", "gpu"

    def __init__(self, **values) -> None:
        self.values, self.counter = values, 1000

    def sample(self, timestamp_ns: int) -> Sample:
        if self.values.get("lost"):
            raise GpuLostError("GPU_IS_LOST", "power")
        return Sample(timestamp_ns, self.uuid, self.scope, energy_counter_mj=self.counter, clocks_event_reasons=SLOWED)

    def memory_bytes(self) -> tuple[int, int]:
        raise NotSupportedError("NOT_SUPPORTED", "memory")


def test_a_gpu_reading_has_none_for_what_the_driver_does_not_say():
    reading = read_gpu(Meter())
    assert (reading.power_w, reading.memory_used_bytes, reading.slowed) == (None, None, True)
    assert "GPU_IS_LOST" in read_gpu(Meter(lost=True)).error


def test_the_driver_is_read_through_nvml():
    done = with_fake_nvml(
        "from dataclasses import asdict\nfrom moe_gpu.live.gpu import read_gpu\n"
        "print(json.dumps(asdict(read_gpu(nvml.Device()))))"
    )
    reading = json.loads(done.stdout)
    assert (reading["power_w"], reading["gpu_util_pct"], reading["sm_clock_mhz"]) == (300.0, 97, 1980)
    assert (reading["memory_used_bytes"], reading["memory_total_bytes"]) == (20 << 30, 80 << 30)
    assert reading["slowed"] is False


def test_energy_counts_from_the_first_reading_and_with_the_tokens_since(monkeypatch):
    model = make_model()
    step(model, calls=2)
    meter = Meter()
    monkeypatch.setattr(publishing, "SHORT_S", 0.0)
    with publish(model, interval_s=3600.0) as publisher:
        publisher._device, publisher._meter, publisher._meter_asked = torch.device("cuda"), meter, True
        monkeypatch.setattr(publisher, "_memory", lambda: None)
        publisher._write()
        assert publisher.status.energy.energy_j == 0
        step(model, calls=3)
        meter.counter += 6000
        publisher._write()
        energy = publisher.status.energy
        assert (energy.energy_j, energy.tokens) == (6.0, 3 * 10)
        assert energy.j_per_1000_tokens == 200
        meter.counter = 5  # the driver was loaded again
        publisher._write()
        assert publisher.status.energy.energy_j == 0


def test_a_monitor_starts_without_torch():
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, moe_gpu.top, moe_gpu.live.figures; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert loaded.stdout.strip() == "False"


def test_a_training_publishes_while_it_runs(tmp_path, monkeypatch):
    from moe_gpu.training import TrainConfig, train

    seen = []
    config = TrainConfig(steps=3, batch_size=2, context=16, model_dim=16, hidden_dim=16, num_heads=2, num_experts=4)
    train(config, tmp_path / "run", publish=True, on_step=lambda step, row: seen.extend(find_jobs()[0]))
    assert [job.name for job in seen] == ["moe-gpu train"] * 3
    assert [job.state for job in find_jobs()[0]] == ["ended"]
    assert find_jobs()[0][0].progress.step == 3
    assert Path(publishing.live_directory()).is_dir()


# Prometheus and TensorBoard


def test_prometheus_serves_a_job(own_folder):
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    import urllib.request

    from moe_gpu.metrics import JobCollector, MetricsServer

    model = make_model()
    step(model)
    with publish(model, graphs=lambda: (3, 1)) as publisher:
        server = MetricsServer([JobCollector(lambda: publisher.status)], port=0)
        text = urllib.request.urlopen(server.url).read().decode()
        server.close()
        labelled = list(JobCollector(lambda: publisher.status, expert_labels=True).collect())
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['moe_gpu_routes_total{layer="1"}']) == 5 * 10 * TOP_K
    assert float(lines["moe_gpu_job_tokens_total"]) == 50
    assert float(lines['moe_gpu_layer_calls_total{by="graph"}']) == 3
    assert 0 < float(lines['moe_gpu_load_entropy{layer="0"}']) <= 1
    assert not [line for line in lines if "expert_cache" in line], "unknown is left out"
    routes = next(metric for metric in labelled if metric.name == "moe_gpu_routes")
    counts = {sample.labels["expert"]: sample.value for sample in routes.samples if sample.labels["layer"] == "0"}
    assert list(counts.values()) == publisher.status.layers[0].counts_E
    assert list(JobCollector(lambda: None).collect()) == []
    unknown = a_status(layers=[LayerLoad("b", reason="none")])
    assert [sample for metric in JobCollector(lambda: unknown).collect() for sample in metric.samples] == []


def test_tensorboard_gets_a_job_and_leaves_out_what_is_not_known():
    from moe_gpu.metrics import add_job_scalars

    class Writer:
        def __init__(self) -> None:
            self.values: dict[str, float] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert step == 7
            self.values[name] = value

    known = LayerLoad("a", 2, 1, "triton", [3, 1], [3, 1], 2.0, 4, 0, 0.1)
    writer = Writer()
    add_job_scalars(writer, a_status(layers=[known, LayerLoad("b", reason="none")]), 7)
    assert writer.values["experts/layer_00/max_over_mean"] == 1.5
    assert writer.values["experts/layer_00/active_experts"] == 2
    assert writer.values["speed/job_tokens_per_s"] == 2
    assert not [name for name in writer.values if "layer_01" in name or "hits" in name]
