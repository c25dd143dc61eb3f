"""What orders programs that run at once: an arrival that releases, and a wait for it that acquires.

All that a program does between two of its releases is one event. An event is before a program's next access where a
chain of releases and acquires of the same counter leads there (Lamport, 1978); sets of events are bits of a number.
"""

from collections import defaultdict

import numpy as np

from .accesses import Addresses


class Order:
    """Of one launch: which events are before what each program does next."""

    def __init__(self) -> None:
        self.program_of: list[int] = []
        self._before: defaultdict[int, int] = defaultdict(int)
        self._current: dict[int, int] = {}
        # By a counter's address: the events before whoever acquires it.
        self._released: defaultdict[int, int] = defaultdict(int)

    def event(self, program: int) -> int:
        """The event that a program's next access belongs to."""
        if program not in self._current:
            self._current[program] = len(self.program_of)
            self._before[program] |= 1 << len(self.program_of)
            self.program_of.append(program)
        return self._current[program]

    def not_before(self, program: int, events: int) -> int:
        """Those of a set of events that nothing orders before the program's next access."""
        return events & ~self._before[program]

    def programs(self, events: int) -> list[int]:
        """The programs of a set of events."""
        return sorted({p for event, p in enumerate(self.program_of) if events >> event & 1})

    def acquire(self, program: int, addresses: Addresses) -> None:
        for address in np.unique(addresses).tolist():
            self._before[program] |= self._released[address]

    def release(self, program: int, addresses: Addresses) -> None:
        self.event(program)
        for address in np.unique(addresses).tolist():
            # Atomics that only add on keep what others released before.
            self._released[address] |= self._before[program]
        del self._current[program]

    def overwrite(self, addresses: Addresses) -> None:
        """Plain stores to counters: whoever reads them acquires nothing."""
        for address in np.unique(addresses).tolist():
            self._released.pop(address, None)
