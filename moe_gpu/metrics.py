"""Energy and expert loads for Prometheus, pulled from 127.0.0.1, and for TensorBoard: what is already on the host.

What is not known is left out of the answer, never 0. Needs the extra `moe-gpu[metrics]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from moe_gpu.energy_model import EnergyReport
from moe_gpu.energy_monitor import EnergyMonitor, PowerSampler
from moe_gpu.extras import MissingExtraError
from moe_gpu.live.figures import LoadFigures, figures_of, job_tokens_per_s, tokens_of, tokens_per_s
from moe_gpu.live.status import JobStatus
from moe_gpu.nvml import Sample

ADDRESS = "127.0.0.1"


class EnergyCollector:
    """The metrics of one GPU, one monitor's tokens, and what was attributed by layer and component.

    A component is `experts`, `shared` (router and combine), `static` or, with expert_labels, `expert-7`: one time
    series an expert of every layer, so only on request.
    """

    def __init__(
        self, sampler: PowerSampler, monitor: EnergyMonitor | None = None, *, expert_labels: bool = False
    ) -> None:
        self.sampler, self.monitor, self.expert_labels = sampler, monitor, expert_labels
        self._attributed: dict[tuple[str, str], float] = {}

    def add_report(self, report: EnergyReport) -> None:
        """Count an attribution; of a window with energy its rescaled joules, else nothing."""
        total = report.total
        if total.rescaled_j is None or total.rescaled_shared_j is None:
            return
        parts = {"shared": total.rescaled_shared_j, "static": total.static_j}
        if self.expert_labels:
            parts |= {f"expert-{row.expert}": row.rescaled_j or 0.0 for row in report.experts}
        else:
            parts["experts"] = total.rescaled_j
        for component, joules in parts.items():
            key = (str(total.layer), component)
            self._attributed[key] = self._attributed.get(key, 0.0) + joules

    def collect(self) -> Iterator[Any]:
        """What Prometheus asks for, of the newest sample."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        sample = self.sampler.latest
        names = ["gpu", "scope"]

        def family(kind: Any, name: str, text: str, value: Callable[[Sample], float | None]) -> Iterator[Any]:
            found = None if sample is None else value(sample)
            if sample is not None and found is not None:
                metric = kind(name, text, labels=names)
                metric.add_metric([sample.gpu_uuid, sample.scope], found)
                yield metric

        def joules(s: Sample) -> float | None:
            return None if s.energy_counter_mj is None else s.energy_counter_mj / 1000

        text = "Energy of the GPU since its driver was loaded."
        yield from family(CounterMetricFamily, "moe_gpu_energy_joules", text, joules)
        yield from family(GaugeMetricFamily, "moe_gpu_power_watts", "Power of the GPU.", lambda s: s.power_instant_w)
        text = "Temperature of the GPU."
        yield from family(GaugeMetricFamily, "moe_gpu_temperature_celsius", text, lambda s: s.temperature_c)
        tokens = None if self.monitor is None else self.monitor.tokens_total
        if tokens is not None:
            yield CounterMetricFamily("moe_gpu_tokens", "Tokens of ended windows.", value=tokens)
        if self._attributed:
            attributed = CounterMetricFamily(
                "moe_gpu_attributed_energy_joules", "Energy as modelled, not metered.", labels=["layer", "component"]
            )
            for labels, value in sorted(self._attributed.items()):
                attributed.add_metric(list(labels), value)
            yield attributed


class JobCollector:
    """The metrics of a job's layers, expert cache and graphs.

    read: a function that gives the JobStatus to show, as `lambda: publisher.status`, or None. With expert_labels there
    is one time series an expert of every layer, so only on request.
    """

    def __init__(self, read: Callable[[], JobStatus | None], *, expert_labels: bool = False) -> None:
        self.read, self.expert_labels = read, expert_labels

    def collect(self) -> Iterator[Any]:
        """What Prometheus asks for, of the status of now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = self.read()
        if status is None:
            return

        def family(kind: Any, name: str, text: str, labels: list[str], rows: Iterable[tuple[list[str], Any]]) -> Any:
            metric = kind(f"moe_gpu_{name}", text, labels=labels)
            for values, number in rows:
                if number is not None:  # what is not known is left out
                    metric.add_metric(values, number)
            return metric

        layers = [(layer, figures_of(layer)) for layer in status.layers]
        gauges: list[tuple[str, str, Callable[[LoadFigures], float | None]]] = [
            ("active_experts", "Experts with any route in the window.", lambda found: found.active_experts),
            ("load_max_over_mean", "The busiest expert's routes over the mean.", lambda found: found.max_over_mean),
            ("load_entropy", "Entropy of the load, 1 when even.", lambda found: found.normalised_entropy),
        ]
        for name, text, value in gauges:
            rows = [([layer.name], None if found is None else value(found)) for layer, found in layers]
            yield family(GaugeMetricFamily, name, text, ["layer"], rows)
        speeds = [([layer.name], tokens_per_s(layer)) for layer in status.layers]
        yield family(GaugeMetricFamily, "layer_tokens_per_second", "Tokens a second of a layer.", ["layer"], speeds)
        invalid = [([layer.name], layer.invalid_routes) for layer in status.layers]
        yield family(CounterMetricFamily, "invalid_routes", "Routes without a usable expert.", ["layer"], invalid)
        counted = [layer for layer in status.layers if layer.counts_E is not None]
        labels, routes = ["layer"], [([layer.name], sum(layer.counts_E or ())) for layer in counted]
        if self.expert_labels:
            labels = ["layer", "expert"]
            routes = [([one.name, str(e)], count) for one in counted for e, count in enumerate(one.counts_E or ())]
        yield family(CounterMetricFamily, "routes", "Routes since counting began.", labels, routes)
        yield family(
            CounterMetricFamily, "job_tokens", "Tokens since counting began.", [], [([], tokens_of(status.layers))]
        )
        cache, graphs = status.expert_cache, status.graphs
        requests = [(["hit"], cache.hits), (["miss"], cache.misses)] if cache else []
        text = "Experts needed by steps, by whether they were in device memory."
        yield family(CounterMetricFamily, "expert_cache_requests", text, ["result"], requests)
        calls = [(["graph"], graphs.replays), (["eager"], graphs.eager_calls)] if graphs else []
        yield family(CounterMetricFamily, "layer_calls", "Calls by what served them.", ["by"], calls)


def add_job_scalars(writer: Any, status: JobStatus, step: int) -> None:
    """Write a job's figures to a SummaryWriter of TensorBoard; by layer only what does not grow with the experts."""
    values: dict[str, float | None] = {"speed/job_tokens_per_s": job_tokens_per_s(status)}
    for index, layer in enumerate(status.layers):
        found, place = figures_of(layer), f"experts/layer_{index:02d}"
        values[f"{place}/tokens_per_s"] = tokens_per_s(layer)
        values[f"{place}/invalid_routes"] = layer.invalid_routes
        values[f"{place}/active_experts"] = None if found is None else found.active_experts
        values[f"{place}/max_over_mean"] = None if found is None else found.max_over_mean
        values[f"{place}/entropy"] = None if found is None else found.normalised_entropy
    cache, graphs = status.expert_cache, status.graphs
    if cache is not None and cache.hits + cache.misses:
        values["hits/expert_cache"] = cache.hits / (cache.hits + cache.misses)
    if graphs is not None and graphs.replays + graphs.eager_calls:
        values["hits/graphs"] = graphs.replays / (graphs.replays + graphs.eager_calls)
    for name, value in values.items():
        if value is not None:  # what was not measured is left out
            writer.add_scalar(name, value, step)


class MetricsServer:
    """Serves collectors at http://127.0.0.1:port/metrics until `close`; port 0 takes a free one.

    Raises MissingExtraError without prometheus-client and OSError for a port that is taken.
    """

    def __init__(self, collectors: Sequence[EnergyCollector | JobCollector], port: int = 9400) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise MissingExtraError(
                "the endpoint needs prometheus-client, which is not installed: pip install 'moe-gpu[metrics]'"
            ) from error
        registry = CollectorRegistry(auto_describe=False)
        for collector in collectors:
            registry.register(collector)
        self._server, self._thread = start_http_server(port, addr=ADDRESS, registry=registry)

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.port}/metrics"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2)
