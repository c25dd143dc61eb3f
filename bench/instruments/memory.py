"""Memory check: kernels read nothing that nobody wrote, and programs that may run at once do not interfere.

Each element of a launch's tensors has a state: who stored it last, who has read it and who has changed it atomically
since. Two programs interfere where both touch an element, one of them by a plain store or one plainly and one
atomically, and no arrival orders them. That every access lies in its tensor is checked by `interpreter`.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .accesses import Access, Addresses, Argument, Atomic, Launch, MemoryFault, Watcher
from .happens_before import Order
from .interpreter import watched_by
from .unwritten import poisoned_empty, poisoned_lanes, set_unwritten, unwritten_bytes
from .waits import Waits


class Unwritten(MemoryFault):
    """A kernel reads what nobody wrote."""


class Race(MemoryFault):
    """Programs that nothing orders touch the same bytes, and one of them writes."""


@contextlib.contextmanager
def check_memory() -> Iterator[None]:
    """Check the launches within; what torch's `empty` functions return and masked loads leave undefined is poison.

    Raises:
        RuntimeError: the process does not interpret kernels.
        MemoryFault: in the launch, as the text of the interpreter's error: OutOfBounds, Unwritten or Race.
        Deadlock: likewise, where a program waits for one that comes later.
    """
    waits = Waits()
    with poisoned_empty(), poisoned_lanes(), watched_by(MemoryCheck(), waits), waits.comparing():
        yield


class MemoryCheck(Watcher):
    """States of the running launch's memory."""

    def begin(self, launch: Launch) -> None:
        self.order = Order()
        self.shadows: dict[int, _Shadow] = {}
        self.states = _States(self.order)
        for tensor in launch.tensors.values():
            self._shadow_of(tensor, [*launch.tensors.values()])
        self.of_argument: dict[int, _Shadow] = {}

    def load(self, access: Access) -> None:
        self._touch(access, "reads")

    def store(self, access: Access) -> None:
        if self._touch(access, "stores"):
            self.order.overwrite(access.addresses)

    def atomic(self, access: Atomic) -> None:
        if access.acquires:
            self.order.acquire(access.program, access.addresses)
        self._touch(access, "changes")
        if access.releases:
            self.order.release(access.program, access.addresses)

    def end(self, launch: Launch) -> None:
        for shadow in self.shadows.values():
            shadow.close(self.states)

    def _touch(self, access: Access, how: str) -> bool:
        """Check and note an access; whether there were atomics before it."""
        shadow = self._shadow(access.argument)
        index = shadow.index(access.addresses, access.size)
        found = shadow.state[index]
        first, event, had_atomics = int(found[0]), self.order.event(access.program), False
        alike = bool((found == first).all())
        for before in [first] if alike else np.unique(found).tolist():
            after = self.states.after(before, how, event, access)
            had_atomics |= self.states.all[before].atomics != 0
            if after != before:
                shadow.state[index if alike else index[found == before]] = after
        return had_atomics

    def _shadow(self, argument: Argument) -> "_Shadow":
        shadow = self.of_argument.get(id(argument))
        if shadow is None:
            # A descriptor's tensor is not among the launch's arguments.
            shadow = self.of_argument[id(argument)] = self._shadow_of(argument.tensor, [argument.tensor])
        return shadow

    def _shadow_of(self, tensor: torch.Tensor, tensors: list[torch.Tensor]) -> "_Shadow":
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self.shadows:
            sharing = [each for each in tensors if each.untyped_storage().data_ptr() == place]
            self.shadows[place] = _Shadow(storage, sharing)
        return self.shadows[place]


class _State(NamedTuple):
    """Of an element: whether it was ever written, and events: the last plain store, later reads, atomics since."""

    is_written: bool
    stored: int = 0
    read: int = 0
    atomics: int = 0


class _States:
    """All states that occur, by number, and what an access makes of each: elements of one tile share theirs."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.all = [_State(True), _State(False)]
        self.number = {state: number for number, state in enumerate(self.all)}
        # What was allowed once stays allowed: what is before an event never ceases to be.
        self.known: dict[tuple[int, str, int], int] = {}

    def after(self, before: int, how: str, event: int, access: Access) -> int:
        key = before, how, event
        if key not in self.known:
            state = self._checked(self.all[before], how, 1 << event, access)
            if state not in self.number:
                self.number[state] = len(self.all)
                self.all.append(state)
            self.known[key] = self.number[state]
        return self.known[key]

    def _checked(self, state: _State, how: str, event: int, access: Access) -> _State:
        if how != "stores" and not state.is_written:
            raise Unwritten(f"{access} {how} elements of {access.argument} that nobody wrote")
        against = {
            "reads": ("stored", "atomics"),
            "stores": ("stored", "read", "atomics"),
            "changes": ("stored", "read"),
        }
        for others in against[how]:
            events = self.order.not_before(access.program, getattr(state, others))
            if events:
                done = {"stored": "stored", "read": "read", "atomics": "changed atomically"}[others]
                programs = ", ".join(map(str, self.order.programs(events)[:8]))
                raise Race(
                    f"{access} {how} elements of {access.argument} that programs {programs} have {done}; "
                    "no arrival orders them"
                )
        if how == "reads":
            return state._replace(read=state.read | event)
        return _State(True, event) if how == "stores" else state._replace(atomics=state.atomics | event)


class _Shadow:
    """States of one storage's elements, of the smallest size that any of its tensors has."""

    def __init__(self, storage: torch.UntypedStorage, tensors: list[torch.Tensor]) -> None:
        self.storage, self.start = storage, storage.data_ptr()
        sizes = [t.element_size() for t in tensors] + [t.data_ptr() - self.start for t in tensors]
        self.size = math.gcd(*sizes, storage.nbytes())
        self.unwritten = unwritten_bytes(storage)
        self.state = np.zeros(storage.nbytes() // max(self.size, 1), np.int32)
        if self.unwritten is not None:
            # An element of which a byte is written is taken apart below.
            rows = self.unwritten.reshape(-1, self.size)
            if (rows.any(axis=1) != rows.all(axis=1)).any():
                self.size, self.state = 1, np.zeros(storage.nbytes(), np.int32)
                rows = self.unwritten.reshape(-1, 1)
            self.state[rows[:, 0]] = 1

    def index(self, addresses: Addresses, size: int) -> npt.NDArray[np.int64]:
        """Places of the elements of an access."""
        offsets = addresses.astype(np.int64) - self.start
        if self.size > 1 and (size % self.size or (offsets % self.size).any()):
            self.state, self.size = self.state.repeat(self.size), 1
        if size == self.size:
            return offsets // size if size > 1 else offsets
        return (offsets[:, None] // self.size + np.arange(size // self.size)).ravel()

    def close(self, states: _States) -> None:
        """Remember what is still unwritten."""
        if self.unwritten is not None:
            is_written = np.array([state.is_written for state in states.all])
            set_unwritten(self.storage, ~is_written[self.state].repeat(self.size))
