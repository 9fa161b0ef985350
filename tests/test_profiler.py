import json

import pytest
import torch

from moe_gpu import profiler as profiler_module
from moe_gpu.profiler import ExpertProfiler, RoutingTrace, TraceError


class Clock:
    """Stands in for time.monotonic in the profiler, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(profiler_module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def demand(*counts: int, invalid: int = 0) -> torch.Tensor:
    return torch.tensor([*counts, invalid], dtype=torch.int32)


def test_counts_add_up_over_steps_and_layers(clock):
    profiler = ExpertProfiler(3, num_layers=2)
    for _ in range(5):
        profiler.record(demand(4, 2, 0, invalid=1), layer=0)
        profiler.record(demand(0, 0, 6), layer=1)
    profiler.flush()
    assert profiler.counts_LE().tolist() == [[20, 10, 0], [0, 0, 30]]
    assert profiler.snapshot(0).invalid_routes == 5
    assert profiler.snapshot(1).invalid_routes == 0


def test_rates_are_of_the_rolling_window_and_the_clock(clock):
    profiler = ExpertProfiler(2, window_s=10.0, copy_interval_s=0.0)
    profiler.record(demand(0, 0))
    for _ in range(4):
        clock.now += 1.0
        profiler.record(demand(30, 10))
    profiler.flush()
    snapshot = profiler.snapshot()
    assert snapshot.window_s == pytest.approx(4.0)
    assert snapshot.tokens_per_s_E == pytest.approx([30.0, 10.0])
    assert snapshot.share_E == pytest.approx([0.75, 0.25])


def test_what_left_the_window_no_longer_counts(clock):
    profiler = ExpertProfiler(2, window_s=5.0, copy_interval_s=0.0)
    profiler.record(demand(1000, 0))
    for _ in range(20):
        clock.now += 1.0
        profiler.record(demand(0, 8))
    profiler.flush()
    snapshot = profiler.snapshot()
    assert snapshot.counts_E == [1000, 160]
    assert snapshot.share_E == pytest.approx([0.0, 1.0])
    assert snapshot.window_s <= 6.0


def test_hot_and_cold_experts(clock):
    profiler = ExpertProfiler(4, copy_interval_s=0.0)
    profiler.record(demand(0, 0, 0, 0))
    clock.now += 1.0
    profiler.record(demand(70, 14, 10, 6))
    profiler.flush()
    snapshot = profiler.snapshot()
    assert snapshot.hot == [0]
    assert snapshot.cold == [2, 3]


def test_nothing_known_is_none_and_not_zero(clock):
    profiler = ExpertProfiler(2)
    assert profiler.snapshot() is None
    assert profiler.counts_LE() is None
    profiler.attach("cpu")
    profiler.flush()
    snapshot = profiler.snapshot()
    assert (snapshot.tokens_per_s_E, snapshot.share_E, snapshot.window_s) == (None, None, None)


def test_copies_are_started_only_now_and_then(clock, monkeypatch):
    copies = []
    original = profiler_module.AsyncCopy
    monkeypatch.setattr(profiler_module, "AsyncCopy", lambda tensor: copies.append(1) or original(tensor))
    profiler = ExpertProfiler(2, copy_interval_s=0.25)
    for _ in range(1000):
        clock.now += 0.001
        profiler.record(demand(1, 1))
    assert 3 <= len(copies) <= 6


def test_a_reading_is_not_changed_by_later_steps(clock):
    profiler = ExpertProfiler(2, copy_interval_s=1e9)
    profiler.record(demand(1, 2))
    profiler.flush()
    before = profiler.counts_LE().clone()
    profiler.record(demand(5, 5))
    assert torch.equal(profiler.counts_LE(), before)


@pytest.mark.parametrize(
    "arguments", [dict(num_experts=0), dict(num_experts=2, num_layers=0), dict(num_experts=2, window_s=0)]
)
def test_sizes_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        ExpertProfiler(**arguments)


def test_a_histogram_or_layer_that_does_not_fit_is_refused():
    profiler = ExpertProfiler(4)
    with pytest.raises(ValueError, match="4 bins, expected num_experts \\+ 1 = 5"):
        profiler.record(torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="layer=1 is outside the profiler's 1 layers"):
        profiler.record(torch.zeros(5, dtype=torch.int32), layer=1)


def test_a_histogram_from_another_kind_of_device_is_refused():
    profiler = ExpertProfiler(4)
    profiler.attach("cpu")
    with pytest.raises(ValueError, match=r"counts on cpu and the layer runs on meta; call attach\('meta'\)"):
        profiler.record(torch.zeros(5, dtype=torch.int32, device="meta"))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_layer_is_counted_once(reentrant):
    from torch.utils.checkpoint import checkpoint

    profiler = ExpertProfiler(2)
    calls = []

    def layer(x):
        calls.append(1)
        profiler.record(demand(4, 2))
        return x * x

    x = torch.ones(3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    profiler.flush()
    assert len(calls) == 2
    assert profiler.counts_LE().tolist() == [[4, 2]]


@pytest.fixture
def trace():
    ids = torch.tensor([[[0, 1], [2, 1], [3, 0]], [[1, 0], [1, 2], [1, 3]]])
    return RoutingTrace.from_steps([[layer for layer in ids]], 4, "three tokens")  # noqa: C416


def test_a_trace_survives_its_file_and_replays_in_order(trace, tmp_path):
    trace.save(tmp_path / "trace.safetensors")
    loaded = RoutingTrace.load(tmp_path / "trace.safetensors")
    assert torch.equal(loaded.topk_ids_LTK, trace.topk_ids_LTK)
    assert (loaded.num_experts, loaded.source, loaded.num_layers, loaded.top_k) == (4, "three tokens", 2, 2)
    assert loaded.replay(3).tolist() == [[0, 1], [2, 1], [3, 0]]
    assert loaded.replay(3).dtype == torch.int32


def test_replay_wraps_and_starts_anywhere(trace):
    assert trace.replay(4, layer=1, start=2).tolist() == [[1, 3], [1, 0], [1, 2], [1, 3]]
    assert trace.replay(0).shape == (0, 2)


def test_trace_counts_and_summary(trace):
    assert trace.counts_LE().tolist() == [[2, 2, 1, 1], [1, 3, 1, 1]]
    assert json.loads(trace.summary())["max_share_per_layer"] == [0.3333, 0.5]


def test_counts_leave_out_invalid_routes():
    ids = torch.tensor([[-1, -1], [0, 1]])
    assert RoutingTrace.from_steps([[ids]], 2, "one bad token").counts_LE().tolist() == [[1, 1]]


def test_steps_are_joined_in_order():
    steps = [[torch.tensor([[0]])], [torch.tensor([[1], [2]])]]
    assert RoutingTrace.from_steps(steps, 3, "two steps").topk_ids_LTK.tolist() == [[[0], [1], [2]]]


def test_an_empty_trace_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        RoutingTrace.from_steps([], 4, "nothing")
    empty = RoutingTrace(torch.zeros(1, 0, 2, dtype=torch.int16), 4, "no tokens")
    with pytest.raises(ValueError, match="holds no tokens"):
        empty.replay(3)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "other"])
def test_a_file_that_is_no_trace_is_refused_by_name(damage, trace, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "trace.safetensors"
    trace.save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "text":
        path.write_text("not a trace")
    else:
        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(TraceError) as caught:
        RoutingTrace.load(path)
    assert str(path) in str(caught.value)
    assert "record" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_figures_of_a_window_follow_their_definitions(clock):
    profiler = ExpertProfiler(4, copy_interval_s=0.0)
    profiler.record(demand(0, 0, 0, 0))
    clock.now += 2.0
    for counts in ((40, 20, 4, 0), (64, 0, 0, 0)):
        profiler.record(demand(*counts))
    profiler.flush()
    snapshot = profiler.snapshot()
    assert snapshot.active_experts == 3
    assert snapshot.max_over_mean == pytest.approx(104 / 32)
    shares = torch.tensor([104, 20, 4]) / 128
    assert snapshot.normalised_entropy == pytest.approx(float(-(shares * shares.log()).sum() / torch.tensor(4.0).log()))
    assert snapshot.peak_rows == 64
    assert snapshot.rows_per_call_E == pytest.approx([value / snapshot.calls for value in (104, 20, 4, 0)])
    assert snapshot.padding_ratio(16) == pytest.approx(1 - 128 / (48 + 32 + 16 + 64))
    assert snapshot.padding_ratio(64) == pytest.approx(1 - 128 / 256)
    with pytest.raises(ValueError, match="tile=48 is not one of 16, 32, 64, 128"):
        snapshot.padding_ratio(48)


def test_a_peak_leaves_with_its_window(clock):
    profiler = ExpertProfiler(2, window_s=3.0, copy_interval_s=0.0)
    profiler.record(demand(500, 0))
    for _ in range(6):
        clock.now += 1.0
        profiler.record(demand(7, 2))
    profiler.flush()
    assert profiler.snapshot().peak_rows == 7


def test_the_moving_average_halves_in_its_half_life(clock):
    profiler = ExpertProfiler(2, copy_interval_s=1e9, ewma_half_life_s=4.0)
    profiler.record(demand(0, 0))
    for counts, seconds in [((100, 0), 10.0), ((0, 0), 4.0), ((0, 80), 8.0)]:
        profiler.record(demand(*counts))
        clock.now += seconds
        profiler.flush()
    assert profiler.snapshot().ewma_tokens_per_s_E == pytest.approx([10 / 8, 10 * 3 / 4])


def test_history_holds_every_window_up_to_its_length(clock):
    profiler = ExpertProfiler(2, num_layers=2, copy_interval_s=1e9, history=3)
    profiler.record(demand(0, 0))
    profiler.flush()
    for step in range(1, 6):
        profiler.record(demand(step, 0), layer=1)
        clock.now += 1.0
        profiler.flush()
    windows = profiler.history()
    assert [window.counts_LE.tolist() for window in windows] == [[[0, 0], [step, 0]] for step in (3, 4, 5)]
    assert all(window.end_s - window.begin_s == 1.0 for window in windows)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_does_not_count_twice(reentrant):
    from torch.utils.checkpoint import checkpoint

    from moe_gpu.model import AdvancedMoELayer

    profiler = ExpertProfiler(4)
    layer = AdvancedMoELayer(8, 8, 16, 4, top_k=2, profiler=profiler)
    x = torch.randn(10, 8, requires_grad=True)
    runs = []
    original = layer.ops.route
    layer.ops.route = lambda *arguments: runs.append(1) or original(*arguments)
    for _ in range(3):
        out = checkpoint(lambda x: layer(x)[0], x, use_reentrant=reentrant)
        out.square().sum().backward()
    profiler.flush()
    assert len(runs) == 6, "the forward pass was repeated"
    assert int(profiler.counts_LE().sum()) == 3 * 10 * 2
    assert profiler.snapshot().layer == 0


def test_a_trace_has_the_figures_of_its_calls_but_no_rates(trace):
    snapshot = trace.snapshot(tokens_per_call=2)
    assert snapshot.counts_E == [2, 2, 1, 1]
    assert (snapshot.tokens_per_s_E, snapshot.ewma_tokens_per_s_E, snapshot.window_s) == (None, None, None)
    assert (snapshot.calls, snapshot.peak_rows, snapshot.active_experts) == (2, 2, 4)
    assert snapshot.rows_per_call_E == [1.0, 1.0, 0.5, 0.5]
    assert snapshot.padding_ratio(16) == pytest.approx(1 - 6 / (5 * 16))
    assert trace.calls_LCE(2)[1].tolist() == [[1, 2, 1, 0], [0, 1, 0, 1]]
    assert torch.equal(trace.calls_LCE(1).sum(1), trace.counts_LE())
    with pytest.raises(ValueError, match="layer=2 is outside the trace's 2 layers"):
        trace.snapshot(2, layer=2)
    with pytest.raises(ValueError, match="tokens_per_call=0"):
        trace.snapshot(0)


def test_routes_out_of_range_are_no_load_of_a_trace():
    bad = RoutingTrace.from_steps([[torch.tensor([[-1, 0], [5, 1]])]], 2, "bad ids").snapshot(1)
    assert (bad.counts_E, bad.invalid_routes) == ([1, 1], 2)
