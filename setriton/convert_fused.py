"""Fused modules: the module it was, of another class: one derived from its own, with another forward."""

import functools
import linecache
import logging
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.fx import Graph

from .convert_state import Read, is_as_read, methods_of, why_changed
from .stock import declare_stock

_Functions = frozenset[tuple[str, Callable[..., Any]]]
_log = logging.getLogger("setriton")


class Fused:
    """Mixed into the class of a module to give it a fused forward.

    Where anything that the fused forward does without is no longer as it was when it was made, such as an activation
    or a hook, the module's own forward runs instead.

    Attributes:
        recipe: what the class is made of: the class before, and the other arguments of `_fused_class`.
    """

    recipe: ClassVar[tuple[type, str, _Functions, tuple[Read, ...] | None]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What is made from here, such as a slice of an nn.Sequential, has not the children that this forward calls.
        module = cast(Any, self)
        module.__class__ = type(self).recipe[0]
        module.__init__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, type(self).recipe, self.__getstate__()


def fuse(module: nn.Module, graph: Graph, reads: tuple[Read, ...] | None) -> None:
    """Give a module the forward that a graph of its parameters and children is.

    Args:
        module: its class is exchanged.
        graph: the forward.
        reads: what it takes for granted, asked at each call; None for nothing.
    """
    for node in graph.nodes:
        node.type = None  # an annotation's name would have to be found again when a pickle is read
    code = graph.python_code("self")
    known = _fx_globals()
    functions = frozenset((name, value) for name, value in code.globals.items() if name not in known)
    original: Any = type(module)
    module.__class__ = _fused_class(original, code.src, functions, reads)


@functools.cache
def _fused_class(original: Any, source: str, functions: _Functions, reads: tuple[Read, ...] | None) -> type:
    """`original` with the forward in `source`, which calls `functions`; one class for all modules with the same."""
    name = f"Fused{original.__name__}"
    filename = f"<setriton {name} {len(linecache.cache)}>"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    # Without a __name__: Dynamo of torch 2.11 would look for these globals in the module of that name.
    scope = {**_fx_globals(), **dict(functions)}
    exec(compile(source, filename, "exec"), scope)
    forward = scope["forward"] if reads is None else _checked(original, scope["forward"], reads)
    members = {
        "forward": forward,
        "recipe": (original, source, functions, reads),
        "__module__": original.__module__,
    }
    fused = type(name, (Fused, original), members)
    declare_stock(fused, original)
    return fused


def _checked(original: Any, fused: Callable[..., Any], reads: tuple[Read, ...]) -> Callable[..., Any]:
    """The fused forward where all is as `reads` says and no class was changed since, else that of `original`."""

    kinds = {original, *(read.kind for read in reads)}
    methods = [(vars(base), name, method) for kind in kinds for (base, name), method in methods_of(kind).items()]

    def is_changed() -> bool:
        return any(own.get(name) is not method for own, name, method in methods)

    cast(Any, is_changed)._dynamo_marked_constant = True

    @functools.wraps(fused)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if is_as_read(self, reads, x) and not is_changed():
            return fused(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            _report(type(self).__name__, why_changed(self, reads, x))
        return original.forward(self, *args, **kwargs)

    return forward


@functools.cache
def _report(name: str, reason: str) -> None:
    _log.warning("%s calls its layers one after the other, as before it was accelerated: %s", name, reason)


def _rebuild(*recipe: Any) -> object:
    """A module of a fused class, without its state."""
    fused: Any = _fused_class(*recipe)
    return fused.__new__(fused)


def _fx_globals() -> dict[str, Any]:
    """What every generated forward may name: torch and a few constants."""
    return Graph().python_code("self").globals
