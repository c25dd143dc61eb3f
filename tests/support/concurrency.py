"""Kernels in Triton's interpreter with their programs side by side: as threads that pass a baton at every atomic.

The interpreter runs programs one after another, so a program that waits for a later one would wait for ever, and one
that waits for an earlier one would never be seen to wait. Here the order is random, and a deadlock is an error.
"""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from triton.runtime import interpreter

Program = tuple[tuple[int, int, int], dict[str, Any]]


class Deadlock(RuntimeError):
    """Programs wait for something that no running program will do."""


@contextlib.contextmanager
def side_by_side(
    seed: int, resident: int | None = None, in_order: bool = False, patience: int = 5000
) -> Iterator[None]:
    """Run the programs of each launch concurrently.

    Args:
        seed: of the random order in which programs take turns.
        resident: how many may be running at once, as on a GPU that is too small for all; None is all of them.
        in_order: start programs in the order of their numbers; else in a random one.
        patience: turns without any program ending after which all of them are held to be waiting.

    Raises:
        Deadlock: in the launch, when no program gets anywhere.
    """
    builder, world = interpreter.interpreter_builder, _World(random.Random(seed), resident, in_order, patience)
    original_call, original_dim = interpreter.GridExecutor.__call__, builder.set_grid_dim

    def call(executor: Any, *arguments: Any, **options: Any) -> None:
        function = executor.fn

        def set_grid_dim(*grid: int) -> None:
            # From here on the executor only loops over the grid: collect its programs, and run them at the last.
            original_dim(*grid)
            programs: list[Program] = []

            def collect(**values: Any) -> None:
                programs.append((tuple(builder.grid_idx), values))
                if len(programs) == grid[0] * grid[1] * grid[2]:
                    world.run(function, programs, builder)

            executor.fn = collect

        with mock.patch.object(builder, "set_grid_dim", set_grid_dim):
            original_call(executor, *arguments, **options)

    def atomic(name: str) -> Callable[..., Any]:
        original = getattr(interpreter.InterpreterBuilder, name)

        def wrapped(*arguments: Any) -> Any:
            result = original(*arguments)
            world.pass_on()
            return result

        return wrapped

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", call),
        mock.patch.object(interpreter.InterpreterBuilder, "create_atomic_rmw", atomic("create_atomic_rmw")),
        mock.patch.object(interpreter.InterpreterBuilder, "create_atomic_cas", atomic("create_atomic_cas")),
    ):
        yield


class _World:
    """Who runs: one thread at a time, the one whose number is `turn`."""

    def __init__(self, order: random.Random, resident: int | None, in_order: bool, patience: int) -> None:
        self.order, self.resident, self.in_order, self.patience = order, resident, in_order, patience
        self.baton = threading.Condition()
        self.here = threading.local()
        self.error: BaseException | None = None

    def run(self, function: Callable[..., None], programs: list[Program], builder: Any) -> None:
        waiting = list(range(len(programs)))
        if not self.in_order:
            self.order.shuffle(waiting)
        self.waiting, self.turns, self.error = waiting, 0, None
        self.running: list[int] = []
        self.builder, self.programs, self.function = builder, programs, function
        threads = [threading.Thread(target=self._live, args=(number,), daemon=True) for number in range(len(programs))]
        for thread in threads:
            thread.start()
        with self.baton:
            self._next()
        for thread in threads:
            thread.join()
        self.here.number = None
        if self.error is not None:
            raise self.error

    def pass_on(self) -> None:
        """Let another program take a turn."""
        number = getattr(self.here, "number", None)
        if number is None:
            return
        with self.baton:
            self.turns += 1
            if self.turns > self.patience and self.error is None:
                left = len(self.waiting)
                self.error = Deadlock(f"{len(self.running)} programs run and get nowhere, {left} have not started")
            self._next()
            self._wait(number)

    def _live(self, number: int) -> None:
        self.here.number = number
        try:
            with self.baton:
                self._wait(number)
            self.function(**self.programs[number][1])
        except SystemExit:
            return
        except BaseException as error:
            with self.baton:
                self.error = self.error or error
                self.baton.notify_all()
            return
        with self.baton:
            self.running.remove(number)
            self.turns = 0
            self._next()

    def _next(self) -> None:
        while self.waiting and (self.resident is None or len(self.running) < self.resident):
            self.running.append(self.waiting.pop(0))
        self.turn = self.order.choice(self.running) if self.running else None
        self.baton.notify_all()

    def _wait(self, number: int) -> None:
        while getattr(self, "turn", None) != number and self.error is None:
            self.baton.wait()
        if self.error is not None:
            raise SystemExit
        self.builder.set_grid_idx(*self.programs[number][0])
