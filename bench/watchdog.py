"""An object in a child process under a watchdog: what hangs is killed, what dies is noticed, and the next call goes on.

A kernel that never ends, an illegal access, after which a process can do nothing more on its GPU, or a compiler that
aborts would otherwise end the work with it.
"""

import contextlib
import mmap
import multiprocessing
import os
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from .child import one_child

# Steps taken, and what the last one was of; -1 where nothing in particular.
_MARK = struct.Struct("qq")
# Seconds between two looks at a child that is at work, and for a child to start: it imports torch.
LOOK, START = 0.1, 120.0


class Lost(RuntimeError):
    """The child is gone: `kind` is hang or crash, `step` what it had said it was at, or None."""

    def __init__(self, kind: str, message: str, step: int | None) -> None:
        super().__init__(message)
        self.kind, self.step = kind, step


class Mark:
    """Where a child says what it is at: two numbers in a file that both processes have in memory."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), _MARK.size)

    def at(self, step: int) -> None:
        """Say it, in well under a microsecond: it stands beside what is timed."""
        _MARK.pack_into(self.memory, 0, _MARK.unpack_from(self.memory)[0] + 1, step)

    def read(self) -> tuple[int, int]:
        """Steps taken, and the last."""
        steps, step = _MARK.unpack_from(self.memory)
        return steps, step


class Watched:
    """The object that `make(mark)` returns, in a child: `make` is a function of a module, with its first arguments.

    Args:
        make: called once in each child, with a `Mark` behind its own arguments.
        arguments: of make.
        patience: seconds that may pass between two steps that the object marks, or until a call returns.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, patience: float) -> None:
        self.make, self.arguments, self.patience = make, arguments, patience
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "mark")
        self.child: ProcessPoolExecutor | None = None
        self.pid = 0
        self.children = 0

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of a method; what it raises is raised here.

        Raises:
            Lost: the child hung and was killed, or died. The next call starts another.
        """
        child = self.child or self._start()
        self.mark.at(-1)
        return self._result(child.submit(_call, method, *arguments), self.patience)

    def close(self) -> None:
        """End the child, whatever it is at."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.child.shutdown(wait=True, cancel_futures=True)
            self.child = None

    def _start(self) -> ProcessPoolExecutor:
        self.path.write_bytes(_MARK.pack(0, -1))
        self.mark = Mark(self.path)
        child = self.child = one_child()
        self.children += 1
        self.pid = child.submit(os.getpid).result()
        self._result(child.submit(_make, self.path, self.make, *self.arguments), max(START, self.patience))
        return child

    def _result(self, future: "Future[Any]", patience: float) -> Any:
        steps, since = self.mark.read()[0], time.monotonic()
        while True:
            try:
                return future.result(timeout=min(LOOK, patience))
            except BrokenProcessPool:
                self._lose("crash", "its process died")
            except TimeoutError:
                if future.done():  # the call's own
                    raise
            except KeyboardInterrupt:
                self.close()
                raise
            now = self.mark.read()[0]
            if now != steps:
                steps, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                self._lose("hang", f"nothing happened for {patience:g} seconds")

    def _lose(self, kind: str, message: str) -> None:
        step = self.mark.read()[1]
        self.close()
        raise Lost(kind, message, None if step < 0 else step)


_here: Any = None


def _make(path: Path, make: Callable[..., Any], *arguments: Any) -> None:
    global _here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the parent, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _here = make(*arguments, Mark(path))


def _end_with_parent() -> None:
    """Who was killed closes nothing: its child, which may be at a kernel that never ends, must not outlive it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_here, method)(*arguments)
