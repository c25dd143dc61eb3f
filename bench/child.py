"""Functions called in a process of their own, which has no state of this one's."""

import importlib
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def in_child(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a function of a module; what it raises is raised here."""
    with one_child() as child:
        return child.submit(function, *arguments).result()


def one_child() -> ProcessPoolExecutor:
    """A process that starts when it is first asked for something."""
    # A checkout that nobody installed is found by hubconf's import hook, which a child does not inherit.
    hook: dict[str, Any] = {"initializer": importlib.import_module, "initargs": ("hubconf",)}
    return ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), **(hook if "hubconf" in sys.modules else {})
    )  # fmt: skip
