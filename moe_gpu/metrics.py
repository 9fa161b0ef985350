"""Energy for Prometheus: pulled from 127.0.0.1, taken from what a sampler and a monitor already hold.

What is not known is left out of the answer, never 0. Needs the extra `moe-gpu[metrics]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moe_gpu.energy_model import EnergyReport
from moe_gpu.energy_monitor import EnergyMonitor, PowerSampler
from moe_gpu.extras import MissingExtraError
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


class MetricsServer:
    """Serves collectors at http://127.0.0.1:port/metrics until `close`; port 0 takes a free one.

    Raises MissingExtraError without prometheus-client and OSError for a port that is taken.
    """

    def __init__(self, collectors: Sequence[EnergyCollector], port: int = 9400) -> None:
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
