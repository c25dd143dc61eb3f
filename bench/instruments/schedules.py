"""Kernels in Triton's interpreter with their programs side by side: as threads that pass a baton at every atomic.

The interpreter runs programs one after another, so a program that waits for a later one would wait for ever, and one
that waits for an earlier one would never be seen to wait. Here the order is random, and a deadlock is an error that
says who waits for whom.
"""

import contextlib
import math
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from .accesses import Access, Atomic, Watcher
from .interpreter import watched_by, wrapped
from .waits import Deadlock, Waits, listed

Program = tuple[tuple[int, int, int], dict[str, Any]]
# Turns that each program is given, all of them polling, before they are held to be waiting for ever.
TURNS = 3


@contextlib.contextmanager
def side_by_side(seed: int, resident: int | None = None, in_order: bool = False) -> Iterator[None]:
    """Run the programs of each launch concurrently.

    Args:
        seed: of the random order in which programs take turns.
        resident: how many may be running at once, as on a GPU that is too small for all; None is all of them.
        in_order: start programs in the order of their numbers; else in a random one.

    Raises:
        Deadlock: in the launch, as the text of the interpreter's error, when no program gets anywhere.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    schedule = _Schedule(random.Random(seed), resident, in_order, builder)
    with (
        watched_by(schedule.waits, schedule),
        schedule.waits.comparing(),
        wrapped(interpreter.GridExecutor, "__call__", schedule.call),
    ):
        yield


class _Schedule(Watcher):
    """Who runs: one thread at a time, the one whose baton is free."""

    is_last = True

    def __init__(self, order: random.Random, resident: int | None, in_order: bool, builder: Any) -> None:
        self.order, self.resident, self.in_order, self.builder = order, resident, in_order, builder
        self.waits = Waits(limit=2**31)
        self.here = threading.local()

    def call(self, original: Callable[..., Any], executor: Any, *arguments: Any, **options: Any) -> None:
        """A launch: the executor only loops over the grid, which collects its programs; the last one runs them."""
        function, set_grid_dim, programs = executor.fn, self.builder.set_grid_dim, list[Program]()

        def collect(**values: Any) -> None:
            programs.append((tuple(self.builder.grid_idx), values))
            if len(programs) == math.prod(self.builder.grid_dim):
                self.run(function, programs)

        def start(*grid: int) -> None:
            set_grid_dim(*grid)
            executor.fn = collect

        with mock.patch.object(self.builder, "set_grid_dim", start):
            original(executor, *arguments, **options)

    def run(self, function: Callable[..., None], programs: list[Program]) -> None:
        """Run all programs, and raise what one of them raises."""
        self.function, self.programs = function, programs
        self.waiting = list(range(len(programs)))
        if not self.in_order:
            self.order.shuffle(self.waiting)
        self.running: list[int] = []
        self.parked: dict[int, None] = {}
        self.batons = [threading.Semaphore(0) for _ in programs]
        self.threads: list[threading.Thread] = []
        self.turns = 0
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._hand_on()
        self.done.wait()
        for thread in self.threads:
            thread.join()
        self.here.number = None
        if self.error is not None:
            raise self.error

    def store(self, access: Access) -> None:
        self._wake(access)

    def atomic(self, access: Atomic) -> None:
        """Let another program take a turn."""
        number = getattr(self.here, "number", None)
        if number is None:
            return
        if access.is_changed:
            self._wake(access)
        elif self.waits.polled[number].polls > 1:
            self.parked[number] = None
        self._hand_on()
        self._take(number)

    def _wake(self, access: Access) -> None:
        """Programs that poll what has changed are worth a turn again."""
        self.turns = 0
        if self.parked:
            changed = set(np.unique(access.addresses).tolist())
            for number in [number for number in self.parked if self.waits.polled[number].address in changed]:
                del self.parked[number]

    def _hand_on(self) -> None:
        """Start as many programs as may be resident, and free the baton of one, of one that does not poll if any."""
        while self.waiting and (self.resident is None or len(self.running) < self.resident):
            number = self.waiting.pop(0)
            self.running.append(number)
            self.threads.append(threading.Thread(target=self._live, args=(number,), daemon=True))
            self.threads[-1].start()
        if not self.running:
            self.done.set()
            return
        free = [number for number in self.running if number not in self.parked]
        if not free:
            self.turns += 1
            if self.turns > TURNS * len(self.running):
                self._stop(Deadlock(self._told()))
                return
            free = [next(iter(self.parked))]  # in turn: who polls in vain is parked again, as the last
            del self.parked[free[0]]
        self.batons[self.order.choice(free)].release()

    def _take(self, number: int) -> None:
        self.batons[number].acquire()
        if self.error is not None:
            raise SystemExit
        self.builder.set_grid_idx(*self.programs[number][0])

    def _live(self, number: int) -> None:
        self.here.number = number
        try:
            self._take(number)
            self.function(**self.programs[number][1])
            self.running.remove(number)
            self.turns = 0
            self._hand_on()
        except SystemExit:
            return
        except BaseException as error:
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        self.error = error
        for baton in self.batons:
            baton.release()
        self.done.set()

    def _told(self) -> str:
        ended = len(self.programs) - len(self.running) - len(self.waiting)
        lines = [f"{len(self.running)} programs run and get nowhere, {len(self.waiting)} have not started"]
        lines += [self.waits.told(number) for number in sorted(self.running)[:12]]
        if self.waiting:
            lines.append(f"{listed(self.waiting)} could arrive, but {len(self.running)} at once is all that run")
        else:
            lines.append(f"nobody is left who could arrive: the other {ended} programs have ended")
        return "; ".join(lines)
