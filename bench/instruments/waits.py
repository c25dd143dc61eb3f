"""Who waits for whom: counters that programs poll, what they see there and want, and who has arrived."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .accesses import Access, Atomic, Launch, Watcher, kernel_line
from .interpreter import wrapped

# Of one element by one program, with nothing else between: nobody but who waits does that.
MOST_LOADS = 10_000


class Deadlock(RuntimeError):
    """Programs wait for something that no running program will do."""


@dataclass
class Wait:
    """A counter that a program has asked twice in a row without anything having changed."""

    counter: str
    address: int
    found: int | float | None  # None for a plain load, of which nobody looks at the value
    line: str
    result: Any
    wanted: int | float | None = None
    polls: int = 1


@dataclass
class Waits(Watcher):
    """Of the running launch: what each program polls, and who changed which counter."""

    # Polls of one program in a row that find the same: where programs run one after another, it waits for ever.
    limit: int = 1000
    polled: dict[int, Wait] = field(default_factory=dict)
    arrived: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def begin(self, launch: Launch) -> None:
        self.polled.clear()
        self.arrived.clear()

    def load(self, access: Access) -> None:
        """A plain load may poll as well, and even where it is no race, nothing would ever end it."""
        last, address = self.polled.get(access.program), int(access.addresses[0])
        if access.addresses.size > 1 or (last is not None and last.address != address):
            self.polled.pop(access.program, None)
        elif last is None:
            self.polled[access.program] = self._wait(access, None, None)
        else:
            last.polls += 1
            self._held(access, last)

    def store(self, access: Access) -> None:
        self.polled.pop(access.program, None)

    def atomic(self, access: Atomic) -> None:
        address, last = int(access.addresses[0]), self.polled.get(access.program)
        if access.is_changed:
            self.polled.pop(access.program, None)
            self.arrived[address].append(access.program)
        elif last is not None and (last.address, last.found) == (address, access.found):
            last.polls, last.result = last.polls + 1, access.result
            self._held(access, last)
        else:
            self.polled[access.program] = self._wait(access, access.found, access.result)

    def _wait(self, access: Access, found: int | float | None, result: Any) -> Wait:
        address = int(access.addresses[0])
        index = (address - access.argument.start) // access.size
        return Wait(f"{access.argument.name}[{index}]", address, found, kernel_line(), result)

    def _held(self, access: Access, wait: Wait) -> None:
        if wait.polls > (MOST_LOADS if wait.found is None else self.limit):
            raise Deadlock(f"{access.launch.kernel}: {self.told(access.program)}, and nobody else runs")

    def compared(self, original: Callable[..., Any], builder: Any, left: Any, right: Any) -> Any:
        """Notice what a counter that was just read is compared with."""
        for wait in self.polled.values():
            if wait.result is not None and wait.result is left.data:
                wait.wanted = right.data.flat[0].item()
        return original(builder, left, right)

    @contextlib.contextmanager
    def comparing(self) -> Iterator[None]:
        """Within, comparisons of counters are noticed."""
        from triton.runtime.interpreter import InterpreterBuilder

        with contextlib.ExitStack() as stack:
            for name in dir(InterpreterBuilder):
                if name.startswith("create_icmp"):
                    stack.enter_context(wrapped(InterpreterBuilder, name, self.compared))
            yield

    def told(self, program: int) -> str:
        """What a program waits for, in words."""
        wait = self.polled[program]
        sees = "the same" if wait.found is None else wait.found
        wanted = "" if wait.wanted is None else f", compares it with {wait.wanted}"
        arrived = listed(self.arrived[wait.address])
        who = f"changed by {arrived}" if arrived else "changed by nobody"
        return f"program {program} at {wait.line} waits for {wait.counter}: sees {sees}{wanted}; {who}"


def listed(programs: list[int], most: int = 12) -> str:
    """Numbers of programs, once each, the first few."""
    numbers = sorted(set(programs))
    shown = ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
    return f"program{'s' * (len(numbers) > 1)} {shown}" if numbers else ""
