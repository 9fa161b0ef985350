"""BatchScheduler: one task beside another, on streams or in slices, where that measures faster than in turn."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from moe_gpu.cuda_graph_manager.capture import Captured, CudaCapturer, graph_in_the_making, making_a_graph
from moe_gpu.cuda_graph_manager.streams import StreamManager
from moe_gpu.slices.backends import SliceBackend, make_backend
from moe_gpu.slices.device import DeviceDescription, present_device
from moe_gpu.slices.plan import ExpertAllocation, plan_of

logger = logging.getLogger("moe_gpu")

Task = Callable[["int | None"], Any]
"""Work that keeps to the SMs given to it (`TritonExpertOps(device, sm_budget=...)`), or to none; it can be repeated."""


@dataclass(frozen=True)
class Arm:
    """One way to run a main and a side task. sms: of each, where slices keep them apart.

    backend: "cta" (a budget for kernels that keep to one) or "green_context" (partitions); None: no slices.
    """

    name: str
    beside: bool = True
    backend: str | None = None
    sms: tuple[int, int] | None = None


IN_TURN = Arm("in turn", beside=False)
STREAMS = Arm("streams")


@dataclass(frozen=True)
class Choice:
    """Which arm serves calls of a key, and why. times_ms: median of each arm; refused: why others could not be had."""

    at_s: float
    key: Hashable
    arm: Arm
    reason: str
    times_ms: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def default_arms(device: DeviceDescription | None) -> tuple[Arm, ...]:
    """In turn, plain streams, and both kinds of slices with an eighth and a quarter of the SMs for the side task."""
    if device is None:
        return (IN_TURN,)
    arms = [IN_TURN, STREAMS]
    for backend in ("cta", "green_context"):
        smallest, step = device.limits(backend)
        usable = device.usable_sms(backend)
        for share in (8, 4):
            side = max(smallest, usable // share // step * step)
            if usable - side >= smallest:
                arms.append(Arm(f"{backend} {usable - side}+{side}", True, backend, (usable - side, side)))
    return tuple(dict.fromkeys(arms))


def choose_arm(times_ms: Mapping[Arm, Sequence[float]], present: Arm, margin: float) -> tuple[Arm, str]:
    """The arm of the least median, if it beats the present one by more than a margin; and why.

    Raises ValueError where the present one was not timed.
    """
    if present not in times_ms:
        raise ValueError(f"{present.name!r} was not timed")
    medians = {arm: statistics.median(times) for arm, times in times_ms.items()}
    best = min(medians, key=medians.__getitem__)
    gain = 1 - medians[best] / medians[present]
    if best == present:
        return present, f"{present.name} is fastest of {len(medians)}"
    if gain <= margin:
        return present, f"{best.name} is faster by {gain:.1%}, within the margin of {margin:.0%}: {present.name} stays"
    return best, f"{best.name} is faster than {present.name} by {gain:.1%}"


def time_graphs(
    calls: Mapping[Arm, Callable[[], Any]], device: torch.device, samples: int, replays: int = 5
) -> tuple[dict[Arm, list[float]], dict[Arm, str]]:
    """Milliseconds of each call as a graph, by events, the arms in turn (A B C A B C ...); reasons of those that fail.

    As a graph, since launches from the host would hide what the device can do at once. Waits for the device.
    """
    capturer = CudaCapturer()
    graphs: dict[Arm, Captured] = {}
    failures: dict[Arm, str] = {}
    events: dict[Arm, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {arm: [] for arm in calls}
    try:
        for arm, call in calls.items():
            try:
                with torch.no_grad(), graph_in_the_making():
                    capturer.rehearse(call, device)
                    graphs[arm] = capturer.capture(call, device)
            except Exception as error:  # noqa: BLE001 an arm that this device or work cannot have is left out
                failures[arm] = f"{type(error).__name__}: {error}"[:300]
        for round_number in range(samples + 1):
            for arm, graph in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(replays):
                    graph.replay()
                end.record()
                if round_number:  # the first warms up
                    events[arm].append((start, end))
        for pairs in events.values():
            for _, end in pairs:
                end.synchronize()
    finally:
        for graph in graphs.values():
            graph.release()
        capturer.free()
    return {arm: [start.elapsed_time(end) / replays for start, end in events[arm]] for arm in graphs}, failures


Timer = Callable[[Mapping[Arm, Callable[[], Any]], torch.device, int], tuple[dict[Arm, list[float]], dict[Arm, str]]]


class BatchScheduler:
    """Runs a main and a side task, such as routed experts and the shared one, in the way that is measured fastest.

    The first call of a key (say a number of tokens) times every arm, which waits for the device and repeats both tasks;
    later ones use what it found. In turn serves until then inside a capture, on a CPU, and unless another arm is faster
    by more than `margin`; `measure` times again, and leaves the choice only for a gain beyond it. `log` keeps choices
    with their times. Raises ValueError for arms without "in turn" and for samples below 1.
    """

    def __init__(
        self,
        streams: StreamManager | None = None,
        arms: Sequence[Arm] | None = None,
        samples: int = 7,
        margin: float = 0.02,
        timer: Timer = time_graphs,
    ) -> None:
        self.streams = streams or StreamManager(1)
        on_gpu = self.streams.on_gpu
        self._device = present_device(self.streams.device.index) if on_gpu else None
        self.arms = tuple(arms) if arms is not None else default_arms(self._device)
        if IN_TURN not in self.arms or samples < 1 or not 0 <= margin < 1:
            raise ValueError(
                f"arms={[arm.name for arm in self.arms]} must hold 'in turn', samples={samples} must be at least 1 and "
                f"margin={margin} between 0 and 1"
            )
        self.samples, self.margin, self._timer = samples, margin, timer
        self.choices: dict[Hashable, Choice] = {}
        self.log: deque[Choice] = deque(maxlen=256)
        self._backends: dict[Arm, tuple[SliceBackend, tuple[int, int]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchScheduler:
        return self  # copied layers share it, as they share the device and its streams

    def run(self, main: Task, side: Task, key: Hashable = None) -> tuple[Any, Any]:
        """Both results, safe to use on the current stream."""
        choice = self.choices.get(key)
        if choice is None:
            if len(self.arms) > 1 and self._can_measure():
                choice = self.measure(main, side, key)
            else:
                return self.run_arm(IN_TURN, main, side)
        return self.run_arm(choice.arm, main, side)

    def _can_measure(self) -> bool:
        if making_a_graph() or torch.compiler.is_compiling():
            return False
        return not (self.streams.on_gpu and torch.cuda.is_current_stream_capturing())

    def measure(self, main: Task, side: Task, key: Hashable = None) -> Choice:
        """Time every arm now, choose, and note it in the log. Waits for the device; both tasks run several times."""
        calls = {arm: partial(self.run_arm, arm, main, side) for arm in self.arms}
        refused: dict[Arm, str] = {}
        for arm in list(calls):
            try:
                self._budgets(arm)
            except ValueError as error:  # SliceError: no such slices here
                refused[arm] = str(error)
                del calls[arm]
        times, failures = self._timer(calls, self.streams.device, self.samples)
        refused |= failures
        known = self.choices.get(key)
        present = IN_TURN if known is None or known.arm not in times else known.arm
        if present in times:
            arm, reason = choose_arm(times, present, self.margin)
        else:
            arm, reason = IN_TURN, f"nothing to compare with: {refused.get(IN_TURN)}"
        medians = {timed.name: statistics.median(values) for timed, values in times.items()}
        choice = Choice(
            time.monotonic(), key, arm, reason, medians, {left_out.name: why for left_out, why in refused.items()}
        )
        self.choices[key] = choice
        self.log.append(choice)
        logger.info("BatchScheduler: %s for %r: %s", arm.name, key, reason)
        return choice

    def run_arm(self, arm: Arm, main: Task, side: Task) -> tuple[Any, Any]:
        """Both results by a given arm."""
        if not arm.beside or not self.streams.on_gpu:
            return main(None), side(None)
        main_sms, side_sms = self._budgets(arm)
        lanes: tuple[torch.cuda.Stream | None, ...] = (None, self.streams.streams[0])
        if arm in self._backends:
            backend, _ = self._backends[arm]
            lanes = (backend.stream(0), backend.stream(1))
        first, second = self.streams.run([partial(main, main_sms), partial(side, side_sms)], lanes)
        return first, second

    def _budgets(self, arm: Arm) -> tuple[int | None, int | None]:
        """SMs of both tasks as the device gave them; makes a green context's partitions when first asked for."""
        if arm.sms is None:
            return None, None
        if arm.backend != "green_context":
            return arm.sms
        if arm not in self._backends:
            assert self._device is not None
            backend = make_backend(arm.backend, self._device)
            tenants = [ExpertAllocation(number, 1, 0, ()) for number in range(2)]
            plan = plan_of(self._device, arm.backend, "beside", tenants, arm.sms, arm.name)
            main, side = (item.got_sms or item.asked_sms for item in backend.carry_out(plan))
            self._backends[arm] = backend, (main, side)
        return self._backends[arm][1]

    def get_stats(self) -> dict[str, Any]:
        """By key: the arm that serves, why, each arm's median milliseconds, and why others could not be had."""
        return {
            "arms": [arm.name for arm in self.arms],
            "choices": {
                key: {"arm": c.arm.name, "reason": c.reason, "times_ms": dict(c.times_ms), "refused": dict(c.refused)}
                for key, c in self.choices.items()
            },
        }

    def close(self) -> None:
        """Forget the choices and give partitions and streams back; drop graphs that were captured with them before."""
        self.choices.clear()
        for backend, _ in self._backends.values():
            backend.close()
        self._backends.clear()
        self.streams.close()
