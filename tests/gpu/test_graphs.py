"""Graphs, streams and scheduled work on a real GPU: the bits of eager calls, memory given back, slices kept to."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from moe_gpu.cuda_graph_manager import BatchScheduler, CUDAGraphManager, StreamManager
from moe_gpu.cuda_graph_manager.scheduler import IN_TURN
from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager
from moe_gpu.model import AdvancedMoELayer
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.slices.plan import BackendUnavailableError
from moe_gpu.slices.policies import SliceAllocationPolicy

capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not capable, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]

WIDTH, EXPERTS = 256, 16
SIZES = dict(input_dim=WIDTH, expert_dim=WIDTH, hidden_dim=192, num_experts=EXPERTS, top_k=4)
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pair(min_calls: int = 2, max_graphs: int = 16, **options) -> tuple[AdvancedMoELayer, AdvancedMoELayer]:
    """A layer under graphs, and the same one without."""
    torch.manual_seed(0)
    manager = CUDAGraphManager(min_calls, BUCKETS, max_graphs)
    layer = AdvancedMoELayer(**SIZES, use_cuda_graphs=manager, **options).to("cuda", torch.bfloat16).eval()
    plain = AdvancedMoELayer(**SIZES, use_cuda_graphs=False, **{**options, "profiler": None})
    plain = plain.to("cuda", torch.bfloat16).eval()
    plain.load_state_dict(layer.state_dict())
    return layer, plain


def tokens(count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, device="cuda", dtype=torch.bfloat16)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max()


@pytest.mark.parametrize("shared", [0, 96], ids=["routed", "shared"])
@pytest.mark.parametrize("count", [1, 4, 16, 128])
def test_a_full_bucket_has_the_bits_of_the_eager_layer(count, shared):
    layer, plain = pair(shared_hidden_dim=shared)
    for _ in range(6):
        x = tokens(count)
        out, stats = layer(x)
        expected, expected_stats = plain(x)
        assert torch.equal(out, expected)
        for name in ("topk_ids_TK", "topk_weights_TK", "demand_P", "offsets_P", "row_of_route_TK", "row_route_R"):
            assert torch.equal(getattr(stats.routing, name), getattr(expected_stats.routing, name)), name
    assert layer.graphs.get_stats()["hits"] == 4, layer.graphs.get_stats()


@pytest.mark.parametrize("count", [3, 5, 13, 100])
def test_an_odd_number_of_tokens_has_the_bits_of_the_padded_eager_layer(count):
    layer, plain = pair(shared_hidden_dim=96)
    bucket = 1 << (count - 1).bit_length()
    for number in range(6):
        x = tokens(count)
        if number % 2:
            x[0, 1] = float("nan")
        buffer = torch.full((bucket, WIDTH), float("nan"), device="cuda", dtype=torch.bfloat16)
        buffer[:count] = x
        out, stats = layer(buffer[:count])  # what lies behind it in the caller's buffer is NaN
        real = slice(number % 2, None)
        if number > 0:
            assert torch.equal(out[real], plain(buffer)[0][:count][real])
        expected, expected_stats = plain(x)
        assert_close(out[real], expected[real])
        assert torch.equal(stats.routing.demand_P, expected_stats.routing.demand_P)
        assert torch.equal(stats.routing.topk_ids_TK, expected_stats.routing.topk_ids_TK)
    assert layer.graphs.get_stats()["hits"] == 4, layer.graphs.get_stats()


def test_counts_of_tokens_in_any_order_share_graphs():
    layer, plain = pair()
    for count in [*range(1, 40), *range(40, 0, -1)] * 2:
        x = tokens(count)
        assert_close(layer(x)[0], plain(x)[0])
    stats = layer.graphs.get_stats()
    assert stats["captures"] == 7  # 1, 2, 4, ..., 64
    assert not stats["failures"]


def test_changed_weights_are_seen_in_place_and_where_they_moved():
    layer, plain = pair()
    x = tokens(16)
    for _ in range(3):
        layer(x)
    for changed in (layer, plain):
        changed.down_proj.mul_(0.5)
        changed.router_weight.neg_()  # other experts are chosen
    assert torch.equal(layer(x)[0], plain(x)[0])
    for changed in (layer, plain):
        changed.gate_up_proj = nn.Parameter(changed.gate_up_proj.detach() * 2)
    for _ in range(4):
        assert torch.equal(layer(x)[0], plain(x)[0])
    assert layer.graphs.get_stats()["moved_weights"] == 1
    assert layer.graphs.get_stats()["captures"] == 2


def test_the_profiler_counts_replays_as_eager_calls_and_no_padding():
    profiler = ExpertProfiler(EXPERTS, copy_interval_s=0.0)
    layer, plain = pair(profiler=profiler)
    expected = torch.zeros(EXPERTS + 1, dtype=torch.int64, device="cuda")
    for count in (3, 4, 3, 3, 4, 2, 1, 2):
        x = tokens(count)
        layer(x)
        expected += plain(x)[1].routing.demand_P
    profiler.flush()
    assert layer.graphs.get_stats()["hits"] >= 3
    assert torch.equal(profiler.state_LS[0, : EXPERTS + 1], expected)
    assert int(expected[-1]) == 0


def test_recaptures_and_evictions_give_memory_back():
    layer, plain = pair(min_calls=1, max_graphs=2)
    for count in (128, 64):  # workspaces of libraries, which stay
        layer(tokens(count))
    layer.graphs.clear()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for number in range(60):
        x = tokens(BUCKETS[number % len(BUCKETS)])
        out = layer(x)[0]
        assert torch.equal(out, plain(x)[0])
    stats = layer.graphs.get_stats()
    assert stats["evictions"] >= 50
    assert stats["graphs"] == 2
    assert stats["memory_bytes"] > 0
    del x, out
    layer.graphs.clear()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - allocated < 1 << 20
    assert torch.cuda.memory_reserved() - reserved < 64 << 20


def raises_in_capture(x: torch.Tensor) -> torch.Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("forced")
    return x * 2


def too_large_in_capture(x: torch.Tensor) -> torch.Tensor:
    if torch.cuda.is_current_stream_capturing():
        torch.empty(1 << 44, dtype=torch.uint8, device="cuda")
    return x * 2


def waits(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x[0, 0].item() == x[0, 0].item() else x


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (raises_in_capture, "capture: RuntimeError: forced"),
        (too_large_in_capture, "capture: OutOfMemoryError"),
        (waits, "rehearsal: RuntimeError"),
    ],
)
def test_what_cannot_be_captured_stays_eager_and_is_logged_once(function, reason, caplog):
    manager = CUDAGraphManager(2, BUCKETS)
    served = manager.wrap(function, watch=[])
    before = None
    with caplog.at_level(logging.WARNING, logger="moe_gpu"):
        for _ in range(20):
            x = tokens(16)
            assert torch.equal(served(x), 2 * x)
            torch.cuda.synchronize()
            before = before or torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() - before < 1 << 20
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    good = manager.wrap(lambda x: x + 1, watch=[])  # the device and the manager still work
    for _ in range(4):
        assert torch.equal(good(x), x + 1)
    assert manager.get_stats()["hits"] == 2


def test_results_are_kept_and_stay_right_over_streams():
    layer, plain = pair()
    other = torch.cuda.Stream()
    kept = []
    for number in range(12):
        x = tokens(16)
        if number % 2:
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                out = layer(x)[0]
            torch.cuda.current_stream().wait_stream(other)
        else:
            out = layer(x)[0]
        kept.append((out, plain(x)[0]))
    assert all(torch.equal(out, expected) for out, expected in kept)
    assert layer.graphs.get_stats()["captures"] == 2  # one a stream


@pytest.mark.parametrize("min_calls", [1, 2], ids=["captured inside", "captured outside"])
def test_inference_mode_and_a_capture_of_ones_own(min_calls):
    layer, plain = pair(min_calls)
    x = tokens(16)
    for _ in range(3):
        with torch.inference_mode():
            inside = layer(x)[0]
        assert torch.equal(inside, plain(x)[0])
        assert torch.equal(layer(x)[0], plain(x)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)[0]
    x.copy_(tokens(16))
    graph.replay()
    assert torch.equal(out, plain(x)[0])
    assert "inside another capture" in layer.graphs.get_stats()["eager_calls"]


def test_a_stack_of_layers_is_one_graph():
    first, plain_first = pair()
    second, plain_second = pair()
    manager = CUDAGraphManager(2, BUCKETS)
    served = manager.wrap(lambda x: second(x + first(x)[0])[0])
    for _ in range(5):
        x = tokens(13)
        assert_close(served(x), plain_second(x + plain_first(x)[0])[0])
    assert manager.get_stats()["hits"] == 3
    assert first.graphs.get_stats()["captures"] == 0


def test_a_graph_keeps_to_the_slice_that_it_was_captured_in():
    from moe_gpu.triton_kernels.sm_ids import record_sm_ids

    try:
        slices = AdvancedGPUSliceManager(4, SliceAllocationPolicy.STATIC, "cuda", "green_context")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    slices.allocate_slices(0, 2)
    slices.allocate_slices(1, 1)
    graphs = CUDAGraphManager(2, BUCKETS)
    seen_by = torch.full((8 * slices.device.num_sms,), -1, dtype=torch.int32, device="cuda")

    def function(x: torch.Tensor) -> torch.Tensor:
        record_sm_ids(seen_by)
        return x + 1

    served = graphs.wrap(function, watch=[seen_by])
    x = tokens(16)
    seen = []
    for tenant in (0, 1):
        with slices.enter(tenant) as run:
            for _ in range(3):
                seen_by.fill_(-1)
                assert torch.equal(served(x), x + 1)
        run.stream.synchronize()  # the device's synchronize does not wait for graphs replayed in a green context
        seen.append(set(seen_by.tolist()) - {-1})
    assert graphs.get_stats()["hits"] == 2, graphs.get_stats()
    assert [len(found) for found in seen] == [item.got_sms for item in slices.slices]
    assert not seen[0] & seen[1]
    layer, plain = pair()
    for item in slices.slices:
        layer.use_slice(item)
        with slices.enter(item.tenant):
            for _ in range(4):
                out = layer(x)[0]
        slices.join()
        assert_close(out, plain(x)[0])
    assert layer.graphs.get_stats()["hits"] == 4, layer.graphs.get_stats()
    layer.use_slice(None)
    assert_close(layer(x)[0], plain(x)[0])
    slices.close()
    for manager in (graphs, layer.graphs):
        manager.close()


# Streams and scheduled work


def products(count: int) -> list[torch.Tensor]:
    return [torch.randn(512, 512, device="cuda") for _ in range(count)]


def test_tasks_on_streams_give_the_same_and_join():
    manager = StreamManager(priorities=(-1, *(0,) * 7))
    inputs = products(11)
    for _ in range(20):
        results = manager.run([lambda a=a: (a @ a) @ a for a in inputs])
        for a, result in zip(inputs, results, strict=True):
            assert_close(result, (a @ a) @ a)
    manager.close()


def test_a_task_that_raises_leaves_the_streams_joined():
    manager = StreamManager(2)
    (a,) = products(1)
    out = torch.zeros_like(a)

    def slow() -> None:
        torch.cuda._sleep(50_000_000)
        out.add_(1)

    def broken() -> None:
        raise ValueError("the task's own")

    with pytest.raises(ValueError, match="the task's own"):
        manager.run([slow, broken])
    assert int(out.sum()) == out.numel()  # the current stream waited
    assert len(manager.run([lambda: a @ a, lambda: a + 1])) == 2


def test_forks_are_captured():
    manager = StreamManager(2)
    graphs = CUDAGraphManager(2, (8,))
    served = graphs.wrap(lambda x: sum(manager.run([lambda: x * 2, lambda: x * 3, lambda: x + 1])), watch=[])
    for _ in range(6):
        x = tokens(8)
        assert torch.equal(served(x), x * 2 + x * 3 + (x + 1))
    assert graphs.get_stats()["hits"] == 4, graphs.get_stats()


def test_every_arm_gives_the_same_and_the_choice_is_the_fastest_measured():
    layer, plain = pair(shared_hidden_dim=512)
    scheduler = BatchScheduler()
    layer.use_scheduler(scheduler)
    x = tokens(64)
    for _ in range(6):
        assert_close(layer(x)[0], plain(x)[0])
    assert layer.graphs.get_stats()["hits"] == 4, layer.graphs.get_stats()
    (choice,) = scheduler.choices.values()
    assert IN_TURN.name in choice.times_ms
    assert len(choice.times_ms) + len(choice.refused) == len(scheduler.arms)
    assert all("cta" not in name and name != "streams" for name in choice.refused), choice.refused
    least = min(choice.times_ms.values())
    assert choice.times_ms[choice.arm.name] <= max(least, choice.times_ms[IN_TURN.name])
    weights, expected = layer.expert_weights, plain(x)[0]
    for arm in scheduler.arms:
        if arm.name in choice.refused:
            continue
        (routed, _, _), shared = scheduler.run_arm(
            arm, lambda sms: layer._routed(x, x, weights, None, sms), lambda _: layer.shared_expert(x)
        )
        assert_close(routed + shared, expected)
    layer.graphs.clear()
    scheduler.close()
    assert_close(layer(x)[0], expected)


def test_a_scheduled_layer_has_the_same_gradients():
    layer, plain = pair(shared_hidden_dim=96)
    layer.use_scheduler(BatchScheduler())
    x = tokens(64)
    with torch.enable_grad():
        layer(x)[0].float().square().sum().backward()
        plain(x)[0].float().square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert_close(layer.get_parameter(name).grad, parameter.grad)
