"""A program of a launch: groups of warps that take turns, and the copies under way beside them."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.emulator.memory import Barrier, Cell


class Fault(AssertionError):
    """What the hardware would answer with a wrong result, a hang or a crash."""


class _Abandoned(Exception):
    """Ends a group of warps after another one failed."""


@dataclass(eq=False)
class Copy:
    """A copy into shared memory, or the arrival that follows the copies of a thread."""

    carry_out: Callable[[], None]
    after: tuple[Copy, ...] = ()
    done: bool = False

    def ready(self) -> bool:
        return all(copy.done for copy in self.after)


@dataclass(eq=False)
class Group:
    """A group of warps: a thread that runs when it has the turn, and its asynchronous operations."""

    number: int
    warps: int
    weight: float = 1.0
    waiting: Callable[[], bool] | None = None
    place: str = ""
    stores: list[Callable[[], None]] = field(default_factory=list)
    products: list[Callable[[], None]] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    failure: BaseException | None = None
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None

    @property
    def unfinished(self) -> bool:
        return bool(self.stores or self.products or self.copies)


class Program:
    """One program of a launch: shared memory, and who goes on next."""

    def __init__(self, ids: tuple[int, ...], grid: tuple[int, ...], warps: int, draw: random.Random) -> None:
        self.ids, self.grid, self.draw = ids, grid, draw
        self.first = Group(0, warps)
        self.cells: list[Cell] = []
        self.barriers: list[Barrier] = []
        self.under_way: list[Copy] = []
        self.back = threading.Semaphore(0)
        self.abandoned = False
        # How often a group that can go on does so before a copy lands: rarely, or nearly always.
        self.patience = draw.choice((0.5, 0.97))

    def specialize(self, parts: Sequence[tuple[Callable, tuple]], worker_warps: Sequence[int]) -> None:
        warps = (self.first.warps, *worker_warps)
        groups = [Group(i, n, self.draw.choice((1, 1, 15))) for i, n in enumerate(warps)]
        for group, (function, arguments) in zip(groups, parts, strict=True):
            group.thread = threading.Thread(target=self._body, args=(group, function, arguments), daemon=True)
            group.thread.start()
        alive = list(groups)
        try:
            while alive:
                group = self._next(alive)
                if group is None:
                    continue
                now.group = group
                group.turn.release()
                self.back.acquire()
                if group.failure:
                    raise group.failure
                alive = [group for group in alive if group.thread]
        finally:
            self.abandoned = True
            for group in alive:
                group.turn.release()
            now.group = self.first
        if self.under_way:
            raise Fault("a program ends while copies into its shared memory are under way")

    def _next(self, alive: list[Group]) -> Group | None:
        """A group that goes on; or None after a copy has landed instead."""
        ready = [group for group in alive if group.waiting is None or group.waiting()]
        landing = [copy for copy in self.under_way if copy.ready()]
        if ready and (not landing or self.draw.random() < self.patience):
            return self.draw.choices(ready, [group.weight for group in ready])[0]
        if not landing:
            raise Fault("deadlock: " + ", ".join(f"group {group.number} in {group.place}" for group in alive))
        copy = self.draw.choice(landing)
        self.under_way.remove(copy)
        copy.carry_out()
        copy.done = True
        return None

    def _body(self, group: Group, function: Callable, arguments: tuple) -> None:
        group.turn.acquire()
        try:
            if not self.abandoned:
                function(*arguments)
                if group.unfinished:
                    raise Fault(f"group {group.number} ends with stores, products or copies not waited for")
        except _Abandoned:
            return
        except BaseException as error:  # noqa: BLE001 - it is raised where the program was started
            group.failure = error
        group.thread = None
        self.back.release()

    def pause(self, until: Callable[[], bool] | None = None) -> None:
        """Give the turn away, and go on when `until` holds."""
        group = now.group
        if group.thread is None:
            return
        group.waiting = until
        if until is not None:
            group.place = sys._getframe(3).f_code.co_name
        self.back.release()
        group.turn.acquire()
        if self.abandoned:
            raise _Abandoned


@dataclass
class Now:
    """Whose turn it is."""

    program: Any = None
    group: Any = None


now = Now()


def pause(until: Callable[[], bool] | None = None) -> None:
    now.program.pause(until)
