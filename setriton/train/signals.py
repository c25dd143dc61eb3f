"""Requests to stop: schedulers and people send them as signals."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """Set once SIGTERM, SIGINT or SIGUSR1 has arrived while `listening`.

    The handler only takes a note: a collective started inside one would meet the other ranks' at an arbitrary point.
    A second Ctrl-C does not wait for the note to be read.
    """

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals, and give the previous handlers back; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        previous = {number: signal.signal(number, self._receive) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = True
