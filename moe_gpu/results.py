"""Result rows: what was run on what, one JSON object a line. The only way numbers reach a plot, a table or a page.

A file is a sequence of rows; `kind` says which: `machine` (once, first), `ceiling`, `benchmark`, `training`,
`expert_load`, `tile`, `slice`, `slice_series`, `expert_cache`, `energy`, `attribution`, `attribution_sum`, `finding`.
Unknown is None, never 0. Units stand in the names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from moe_gpu.files import write_atomically


@dataclass(frozen=True)
class Machine:
    """The machine and software of a run; `device` is the GPU's name, or the CPU's."""

    kind: ClassVar[str] = "machine"
    device: str
    device_type: str
    python: str
    torch: str
    os: str
    recorded_at: str
    commit: str | None = None
    commit_dirty: bool | None = None
    triton: str | None = None
    transformers: str | None = None
    cuda: str | None = None
    driver: str | None = None
    compute_capability: str | None = None
    num_sms: int | None = None
    num_threads: int | None = None
    memory_bytes: int | None = None
    l2_bytes: int | None = None


@dataclass(frozen=True)
class Ceiling:
    """A rate that this device reached on plain work: the 100 % that shares are quoted against."""

    kind: ClassVar[str] = "ceiling"
    name: str  # "matmul" (dense product) or "copy" (read + write)
    dtype: str
    value: float  # FLOP/s or bytes/s
    unit: str  # "FLOP/s" or "B/s"
    how: str


# The scope of rows whose "providers" are one layer with more or fewer of its parts.
ABLATION = "ablation"


@dataclass(frozen=True)
class BenchmarkRow:
    """One provider on one shape, routing, pass and launch mode.

    status: "ok", "unavailable" (not installed, no GPU), "failed" (raised) or "wrong" (failed the output check, so not
    timed); `reason` says why unless ok. Times are per call of the whole layer. `flops` and `min_bytes` are the least
    work of the pass; shares are of the ceilings measured in the same file.
    """

    kind: ClassVar[str] = "benchmark"
    provider: str
    status: str
    model: str
    num_tokens: int
    input_dim: int
    hidden_dim: int
    expert_dim: int
    num_experts: int
    top_k: int
    dtype: str
    routing: str  # "uniform", "zipf-1.2", "trace", ...
    mode: str  # "forward", "backward" or "forward+backward"
    launch: str = "eager"  # or "graph"; "compiled" by torch.compile
    scope: str = "layer"  # router included; "experts" from given ids; "4 decoder layers" of a whole model
    reason: str | None = None
    backend: str | None = None  # which backend served it, in the provider's words
    samples: int | None = None
    mean_ms: float | None = None
    std_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    p95_ms: float | None = None
    tokens_per_s: float | None = None
    flops: float | None = None
    min_bytes: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    flops_share: float | None = None  # of the matmul ceiling, 0 to 1
    bandwidth_share: float | None = None  # of the copy ceiling, 0 to 1
    peak_memory_bytes: int | None = None
    max_error: float | None = None  # largest |out - float64 truth|
    allowed_error: float | None = None
    energy_j_per_token: float | None = None
    energy_stderr_j_per_token: float | None = None
    energy_quality: str | None = None  # as in EnergyMeasurement, the worst of the windows
    gpu_util_pct: float | None = None  # share of the time in which a kernel ran, as the driver counts it
    mem_util_pct: float | None = None
    sm_clock_mhz: float | None = None
    power_w: float | None = None
    device: str | None = None  # from here on as in the Machine row, so that a row can stand alone
    driver: str | None = None
    torch: str | None = None
    triton: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class TrainingRow:
    """One logged step of a training run; losses in nats per token."""

    kind: ClassVar[str] = "training"
    run: str
    step: int
    loss: float
    tokens_seen: int
    elapsed_s: float
    tokens_per_s: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    load_balancing_loss: float | None = None
    max_expert_share: float | None = None  # of the busiest expert over layers; 1 / E when balanced
    normalised_entropy: float | None = None  # of the expert load, 1 when balanced; mean over layers
    backend: str | None = None
    eval_bits_per_byte: float | None = None  # of the held-out text, comparable between tokenizers
    router_z_loss: float | None = None
    grad_norm: float | None = None  # before clipping; mean over the steps since the last row
    active_expert_share: float | None = None  # of experts that had any route; the lowest over layers
    dead_experts: list[int] | None = None  # experts without any route, by layer
    mfu: float | None = None  # model FLOPs utilisation, 0 to 1; of a GPU whose peak is known
    peak_memory_bytes: int | None = None  # most GPU memory in use at once since the run began; None on a CPU


@dataclass(frozen=True)
class ExpertLoadRow:
    """Routes that asked for each expert of one layer during one window."""

    kind: ClassVar[str] = "expert_load"
    source: str  # which run: "training", "held-out trace", ...
    layer: int
    window: int
    num_tokens: int
    counts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class TileRow:
    """One tile of one kernel on one problem; `time_ms` is None where it could not run, and `error` says why."""

    kind: ClassVar[str] = "tile"
    kernel: str  # a kind in `tuning.TUNED`, or "mlp"
    problem: str
    config: dict[str, int | tuple[int, ...]]
    time_ms: float | None = None
    tflops: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class ExpertCacheRow:
    """One policy of the expert cache over one routing trace; `simulated` ones moved no weights and have no times.

    A request is one expert needed by one step of one layer; a copy is one expert brought to the device. status: "ok",
    "wrong" (the output differs from fully resident weights) or "failed"; `reason` says why unless ok.
    """

    kind: ClassVar[str] = "expert_cache"
    source: str  # the trace, in words
    policy: str  # of expert_cache.POLICIES; "optimal" knows the future; "resident" is the layer without a budget
    num_layers: int
    num_experts: int
    top_k: int
    slots_per_layer: int
    tokens_per_step: int
    simulated: bool
    status: str = "ok"
    reason: str | None = None
    steps: int | None = None  # of all layers
    hits: int | None = None
    misses: int | None = None
    hit_rate: float | None = None
    copies: int | None = None  # prefetches included
    copies_prefetched: int | None = None
    copies_wasted: int | None = None  # prefetched and evicted unused
    evictions: int | None = None
    expert_bytes: int | None = None
    bytes_copied: int | None = None
    prefetch: bool | None = None  # asked for
    serving: str | None = None  # the policy that serves at the end
    policy_switches: int | None = None
    bit_exact: bool | None = None  # with fully resident weights, over every step compared
    samples: int | None = None
    mean_ms: float | None = None  # a step of one layer
    p50_ms: float | None = None
    p95_ms: float | None = None


@dataclass(frozen=True)
class SliceRow:
    """One measurement of slices. status: "ok", "unavailable" or "failed"; `reason` says why unless ok."""

    kind: ClassVar[str] = "slice"
    table: str  # of `slices bench`: "rate", "isolation", "adaptive", ...; of others: "graphs", "beside", "divided"
    arm: str  # how the work was kept apart, or launched: "alone", "unsliced", "cta", "green_context", "replay", ...
    what: str  # the work that was timed
    status: str = "ok"
    reason: str | None = None
    asked_sms: int | None = None
    got_sms: int | None = None  # as read back from the device
    background_sms: int | None = None
    samples: int | None = None
    p50_ms: float | None = None  # of one call
    p99_ms: float | None = None
    max_ms: float | None = None
    value: float | None = None
    unit: str | None = (
        None  # of `value`: "FLOP/s", "B/s", "B", "ms", "background calls/s", "SMs", "changes", "splits", "ratio"
    )


@dataclass(frozen=True)
class SliceSeries:
    """What one policy did over a load that shifts, an entry a step. status: "ok", "unavailable" or "failed".

    Lists of steps are empty unless ok. rows: of each tenant, a call. sms: that each tenant got; None while not sliced.
    """

    kind: ClassVar[str] = "slice_series"
    scenario: str  # the load, in words
    policy: str  # "static", "dynamic", "proportional", "adaptive" or "not sliced"
    status: str = "ok"
    reason: str | None = None
    tenants: list[str] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    sms: list[list[int] | None] = field(default_factory=list)
    time_ms: list[float] = field(default_factory=list)  # median of the step's repeats, from start to join
    changes: list[str | None] = field(
        default_factory=list
    )  # why the plan is another than a step before; None: it is not


@dataclass(frozen=True)
class EnergyMeasurement:
    """The energy that a whole GPU took in one window; `energy_j` is None where it could not be measured.

    quality: "ok"; "short" (fewer than 20 ticks), "contaminated" (clocks held down, or other processes on the GPU), both
    joined by "+"; or "invalid", and `reason` says why. source: "counter", or "integrated" from power where the GPU has
    no counter. scope: "gpu", or "parent_gpu" where a MIG device's GPU was read. stderr_j is of the readings' scatter;
    the meter's own gain, up to 5 % a board, is not in it. net_energy_j is above the idle GPU's.
    """

    kind: ClassVar[str] = "energy"
    run_id: str
    window: str
    duration_s: float
    energy_j: float | None = None
    stderr_j: float | None = None
    idle_w: float | None = None
    net_energy_j: float | None = None
    tokens: int | None = None
    joules_per_token: float | None = None
    tokens_per_joule: float | None = None
    sm_count: int | None = None
    temp_start_c: float | None = None
    temp_end_c: float | None = None
    n_ticks: int = 0
    source: str | None = None
    scope: str | None = None
    quality: str = "invalid"
    driver: str | None = None
    reason: str | None = None
    calls: int | None = None
    failed_reads: int = 0
    gpu_util_pct: float | None = None
    mem_util_pct: float | None = None
    clocks_event_reasons: int | None = None  # every bit seen in the window
    gpu_uuid: str | None = None


@dataclass(frozen=True)
class AttributionRow:
    """What one expert of one layer is modelled to have taken of a window's energy; no meter sees it alone.

    dynamic_j: as the calibration predicts; rescaled_j: the same, scaled so that all parts sum to the measured energy.
    static_j: its share of what the GPU takes doing nothing, None where other work shared the window. Rows and FLOPs
    are those executed, padding included.
    """

    kind: ClassVar[str] = "attribution"
    run_id: str
    layer: int
    expert: int
    tokens: float
    padded_tokens: float
    flops: float
    hbm_bytes: float
    dynamic_j: float
    static_j: float | None
    stderr_j: float | None
    joules_per_token: float | None
    method: str
    calibration_id: str
    rescaled_j: float | None = None
    window: str | None = None  # the measurement's


@dataclass(frozen=True)
class AttributionSum:
    """The attribution of one window as a whole: measured_j = static_j + dynamic_j + shared_j + unattributed_j.

    shared_j: router and combine, which no expert owns. closure: |unattributed_j| / measured_j. held_out_error: the
    calibration's own, each workload predicted by a fit of the others.
    """

    kind: ClassVar[str] = "attribution_sum"
    run_id: str
    layer: int
    measured_j: float | None
    static_j: float
    dynamic_j: float
    shared_j: float
    unattributed_j: float | None
    rescaled_j: float | None  # of the experts
    rescaled_shared_j: float | None
    closure: float | None
    held_out_error: float | None
    calibration_id: str
    window: str | None = None  # the measurement's


@dataclass(frozen=True)
class Finding:
    """A quantity that an experiment set out to measure, with its 95 % interval; `value` None: `reason` says why not.

    verdict: what follows ("better", "worse", "inconclusive"; "met", "missed" where there is a goal), None without one.
    """

    kind: ClassVar[str] = "finding"
    name: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    samples: int | None = None
    verdict: str | None = None
    how: str | None = None
    reason: str | None = None


Row = (
    Machine
    | Ceiling
    | BenchmarkRow
    | TrainingRow
    | ExpertLoadRow
    | TileRow
    | SliceRow
    | SliceSeries
    | ExpertCacheRow
    | EnergyMeasurement
    | AttributionRow
    | AttributionSum
    | Finding
)
_KINDS: dict[str, Any] = {cls.kind: cls for cls in get_args(Row)}


class ResultsError(ValueError):
    """A results file cannot be read; the message names the file, the line and the remedy."""


def stamp(row: BenchmarkRow, machine: Machine) -> BenchmarkRow:
    """The row with its machine, versions and commit, so that it can stand alone."""
    names = ("device", "driver", "torch", "triton", "commit")
    return replace(row, **{name: getattr(machine, name) for name in names})


def to_json(row: Row) -> str:
    """The row as one JSON line, `kind` first."""
    return json.dumps({"kind": row.kind, **asdict(row)}, allow_nan=False)


def from_json(text: str) -> Row:
    """The inverse of `to_json`; ResultsError for fields this version does not know and values of another type."""
    try:
        values = json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ResultsError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ResultsError("not a result row: nested too deeply") from error
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str) or values["kind"] not in _KINDS:
        known = ", ".join(_KINDS)
        raise ResultsError(f"not a result row: 'kind' must be one of {known}")
    cls = _KINDS[values.pop("kind")]
    unknown = set(values) - {known.name for known in fields(cls)}
    if unknown:
        raise ResultsError(f"unknown field {sorted(unknown)[0]!r} in a {cls.kind} row")
    for name, value in values.items():
        if not _fits(value, _hints(cls)[name]):
            raise ResultsError(f"{name}={value!r} of a {cls.kind} row is no {_type_name(cls, name)}")
    if values.get("num_tokens", 1) < 1:
        raise ResultsError(f"num_tokens={values['num_tokens']} of a {cls.kind} row must be at least 1")
    try:
        return cls(**values)
    except TypeError as error:
        raise ResultsError(f"incomplete {cls.kind} row ({error})") from error


def _no_number(constant: str) -> float:
    raise ResultsError(f"{constant} is no number of a result row; what is not known is null")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _type_name(cls: type, name: str) -> str:
    hint = _hints(cls)[name]
    return hint.__name__ if hint in (int, float, str, bool) else str(hint)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value read from JSON is of a field's type; a whole number is a float too."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(one, get_args(hint)[0]) for one in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(one, get_args(hint)[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, get_args(hint)[1]) for one in value.values())
    if hint is NoneType:
        return value is None
    if hint in (int, float):
        return isinstance(value, int | hint)
    return isinstance(value, hint)


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write the rows to a temporary name in the same folder, then rename: a reader never sees half a file."""
    write_atomically(path, "".join(to_json(row) + "\n" for row in rows).encode())


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file; ResultsError in one line for a missing, empty, truncated or corrupt one."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot read results file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ResultsError(f"results file {path} is not text (byte {error.start}); give a .jsonl file") from error
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(from_json(line))
        except ResultsError as error:
            raise ResultsError(f"{path}:{number}: {error}; run the benchmark again or cut the file there") from error
    if not rows:
        raise ResultsError(f"results file {path} holds no rows; run the benchmark again")
    return rows


def select(rows: Iterable[Row], cls: type) -> list[Any]:
    """The rows of one class, in order."""
    return [row for row in rows if isinstance(row, cls)]


def percentile(samples: Sequence[float], share: float) -> float:
    """The `share` quantile (0 to 1) by linear interpolation between order statistics."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
