"""StreamManager and BatchScheduler without a GPU: order, choices, hysteresis, refusals; a layer under a scheduler."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_gpu.cuda_graph_manager import Arm, BatchScheduler, StreamManager
from moe_gpu.cuda_graph_manager.capture import graph_in_the_making
from moe_gpu.cuda_graph_manager.scheduler import IN_TURN, STREAMS, choose_arm, default_arms
from moe_gpu.model import AdvancedMoELayer
from moe_gpu.results import SliceRow, read_rows, select
from moe_gpu.slices.device import described_device

ROOT = Path(__file__).resolve().parent.parent
CTA = Arm("cta 96+36", True, "cta", (96, 36))


def timer_of(times: dict[Arm, float], failures: dict[Arm, str] | None = None):
    """A timer that calls every arm once and says what it is told to say."""

    def timer(calls, device, samples):
        for run in calls.values():
            run()
        return {arm: [times[arm]] * samples for arm in calls if arm in times}, dict(failures or {})

    return timer


def test_tasks_run_in_turn_without_a_gpu_and_the_reason_is_said():
    manager = StreamManager(3, "cpu")
    assert manager.run([lambda: 1, lambda: 2]) == [1, 2]
    assert manager.reason == "no streams on cpu: work runs in turn"
    assert manager.streams == ()
    manager.close()


@pytest.mark.parametrize(
    ("arguments", "message"), [((0,), "num_streams=0"), ((2, "cpu", (0,)), "1 priorities for num_streams=2")]
)
def test_wrong_streams_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StreamManager(*arguments)


def test_default_arms_fit_the_device():
    device = described_device("H200")
    arms = default_arms(device)
    assert [arm.name for arm in arms[:2]] == ["in turn", "streams"]
    sliced = arms[2:]
    assert {arm.backend for arm in sliced} == {"cta", "green_context"}
    for arm in sliced:
        smallest, step = device.limits(arm.backend)
        assert sum(arm.sms) <= device.num_sms
        assert all(size >= smallest and size % step == 0 for size in arm.sms)
    assert default_arms(None) == (IN_TURN,)


@pytest.mark.parametrize(
    ("times", "present", "chosen", "reason"),
    [
        ({IN_TURN: 1.0, STREAMS: 0.9}, IN_TURN, STREAMS, "streams is faster than in turn by 10.0%"),
        ({IN_TURN: 1.0, STREAMS: 0.99}, IN_TURN, IN_TURN, "within the margin of 2%: in turn stays"),
        ({IN_TURN: 1.0, STREAMS: 1.1}, IN_TURN, IN_TURN, "in turn is fastest of 2"),
        ({IN_TURN: 0.99, STREAMS: 1.0}, STREAMS, STREAMS, "streams stays"),
        ({IN_TURN: 0.5, STREAMS: 1.0}, STREAMS, IN_TURN, "in turn is faster than streams by 50.0%"),
    ],
)
def test_an_arm_is_left_only_for_a_gain_beyond_the_margin(times, present, chosen, reason):
    arm, why = choose_arm({arm: [value, value, 100 * value] for arm, value in times.items()}, present, 0.02)
    assert arm == chosen
    assert reason in why


def test_the_present_arm_must_have_been_timed():
    with pytest.raises(ValueError, match="'in turn' was not timed"):
        choose_arm({STREAMS: [1.0]}, IN_TURN, 0.02)


def test_a_key_is_measured_once_and_then_served_by_its_choice(caplog):
    calls: list[int | None] = []
    scheduler = BatchScheduler(
        StreamManager(1, "cpu"), (IN_TURN, STREAMS, CTA), timer=timer_of({IN_TURN: 1.0, STREAMS: 0.95, CTA: 0.8})
    )
    with caplog.at_level(logging.INFO, logger="moe_gpu"):
        for _ in range(3):
            assert scheduler.run(lambda sms: calls.append(sms) or "main", lambda sms: "side", key=16) == (
                "main",
                "side",
            )
    assert len(calls) == 3 + 3  # each arm once, then three calls
    assert [choice.arm for choice in scheduler.log] == [CTA]
    stats = scheduler.get_stats()["choices"][16]
    assert stats["times_ms"] == {"in turn": 1.0, "streams": 0.95, "cta 96+36": 0.8}
    assert len(caplog.records) == 1
    scheduler.run(lambda sms: None, lambda sms: None, key=64)
    assert set(scheduler.choices) == {16, 64}
    scheduler.close()
    assert not scheduler.choices


def test_measuring_again_keeps_the_choice_unless_it_is_beaten():
    times = {IN_TURN: 1.0, STREAMS: 0.9}
    scheduler = BatchScheduler(StreamManager(1, "cpu"), (IN_TURN, STREAMS), timer=lambda *args: timer_of(times)(*args))
    tasks = (lambda sms: None, lambda sms: None)
    scheduler.run(*tasks)
    times[IN_TURN] = 0.89
    assert scheduler.measure(*tasks).arm == STREAMS
    times[IN_TURN] = 0.7
    assert scheduler.measure(*tasks).arm == IN_TURN
    assert [choice.arm for choice in scheduler.log] == [STREAMS, STREAMS, IN_TURN]


def test_an_arm_that_fails_is_left_out_with_its_reason_and_in_turn_serves_where_nothing_was_timed():
    scheduler = BatchScheduler(
        StreamManager(1, "cpu"), (IN_TURN, STREAMS), timer=timer_of({IN_TURN: 1.0}, {STREAMS: "no streams"})
    )
    choice = scheduler.measure(lambda sms: None, lambda sms: None)
    assert (choice.arm, dict(choice.refused)) == (IN_TURN, {"streams": "no streams"})
    scheduler = BatchScheduler(StreamManager(1, "cpu"), (IN_TURN, STREAMS), timer=timer_of({}, {IN_TURN: "broken"}))
    choice = scheduler.measure(lambda sms: None, lambda sms: None)
    assert (choice.arm, choice.reason) == (IN_TURN, "nothing to compare with: broken")


def test_nothing_is_measured_while_a_graph_is_made_or_with_one_arm():
    def timer(*_):
        raise AssertionError("measured")

    scheduler = BatchScheduler(StreamManager(1, "cpu"), (IN_TURN, STREAMS), timer=timer)
    with graph_in_the_making():
        assert scheduler.run(lambda sms: sms, lambda sms: 1) == (None, 1)
    assert BatchScheduler(StreamManager(1, "cpu"), timer=timer).run(lambda sms: sms, lambda sms: 1) == (None, 1)
    assert not scheduler.choices


@pytest.mark.parametrize("changes", [dict(arms=(STREAMS,)), dict(samples=0), dict(margin=1.0)])
def test_wrong_schedulers_are_refused(changes):
    with pytest.raises(ValueError, match="must hold 'in turn', samples="):
        BatchScheduler(StreamManager(1, "cpu"), **changes)


def test_a_scheduled_layer_gives_the_same_output_gradients_and_statistics():
    torch.manual_seed(0)
    plain = AdvancedMoELayer(12, 12, 8, 5, 2, shared_hidden_dim=6).double()
    layer = copy.deepcopy(plain)
    scheduler = BatchScheduler(StreamManager(1, "cpu"), (IN_TURN, CTA), timer=timer_of({IN_TURN: 1.0, CTA: 0.5}))
    layer.use_scheduler(scheduler)
    x = torch.randn(7, 12, dtype=torch.float64)
    out, stats = layer(x)
    expected, expected_stats = plain(x)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(stats.counts_E, expected_stats.counts_E)
    for name, parameter in plain.named_parameters():
        assert torch.equal(layer.get_parameter(name).grad, parameter.grad), name
    assert list(scheduler.choices) == [(8, torch.float64)]
    assert copy.deepcopy(layer).scheduler is scheduler  # it holds streams, which cannot be copied
    layer.use_scheduler(None)
    assert torch.equal(layer(x)[0], expected)


def test_a_layer_without_a_shared_expert_takes_no_scheduler():
    with pytest.raises(ValueError, match="no shared expert"):
        AdvancedMoELayer(12, 12, 8, 5).use_scheduler(BatchScheduler(StreamManager(1, "cpu")))


def test_a_trial_of_the_benchmark_runs_every_table_and_measures_nothing(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "run_graphs.py", tmp_path / "rows.jsonl", "--trial"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = select(read_rows(tmp_path / "rows.jsonl"), SliceRow)
    assert {row.table for row in rows} == {"graphs", "beside", "divided"}
    assert {row.status for row in rows} == {"unavailable"}
    assert all((row.p50_ms, row.value) == (None, None) for row in rows)
