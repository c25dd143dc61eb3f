"""An end for what hangs where no signal reaches it: a process that waits for a kernel that never ends."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def time_limit(seconds: float, say: Callable[[str], object], name: str) -> Iterator[None]:
    """End the process, saying so, where what is within is not done in time."""

    def end() -> None:
        say(f"{name} has not ended in {seconds:g} seconds; neither does this process go on")
        sys.stdout.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
