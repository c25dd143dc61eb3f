"""`accelerate` and `restore`: SE blocks of an existing network replaced by fused ones in place, for eager PyTorch.

A fused module is the module it was, of another class: one derived from its own, with another forward. Parameters,
buffers, children, hooks and attributes are not touched, and `restore` gives the class back.
"""

import functools
import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import nn
from torch.fx import Graph, Node

from .compile.report import table
from .convert_tails import BlockReader, is_known
from .convert_trace import Left, read_squeeze_excite
from .modules import SqueezeExcite

_Functions = frozenset[tuple[str, Callable[..., Any]]]


@dataclass
class Report:
    """What `accelerate` did with each SE block of a model.

    Attributes:
        replaced: path of the SE module -> what is one call now: "se", "bn_se" or "bn_act_se", the latter with "+add"
            and "+relu" where the residual's sum and the ReLU belong to it.
        left: path of an SE module -> why it is not replaced; of one that is in `replaced` too, why its tail is not.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A table with a line for each SE module."""
        untouched = len(self.left.keys() - self.replaced.keys())
        lines = [f"SE blocks: {len(self.replaced)} replaced, {untouched} left"]
        paths = [*self.replaced, *(path for path in self.left if path not in self.replaced)]
        rows = [(path or "the model", self.replaced.get(path, "-"), self.left.get(path, "")) for path in paths]
        return "\n".join([*lines, *(f"  {line}" for line in table(rows))])


def accelerate(model: nn.Module) -> Report:
    """Replace the SE blocks of a network by fused ones, in place.

    An SE module is known by what it computes, read by symbolic tracing: timm's, torchvision's and transformers', and
    others written alike. Where the block around it is of a class known here (timm's and transformers' blocks, and
    nn.Sequential, of which torchvision's are made), its whole tail becomes one call: BN, activation, SE, the sum with
    the residual, ReLU. In other classes SE alone does, and the report says so.

    Modules, parameters and the state dict stay what and where they are; some modules get a class derived from their
    own, so that an optimizer made before goes on and copies and pickles of the model are fused as well. The children
    that a fused forward does without are no longer called: what has hooks is left and reported, but hooks registered
    later do not run, and an activation exchanged later is not noticed. `restore` first, then change the model.

    Args:
        model: the network. A block that is already fused stays so.

    Returns:
        What was replaced, what was left, and why.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    _check_model(model)
    report = Report()
    modules = dict(model.named_modules())
    calls = _find_se(modules, report)
    tails = _fuse_tails(modules, calls, report)
    for path, call in calls.items():
        if not isinstance(modules[path], SqueezeExcite):
            _fuse(modules[path], call.graph)
            tails.setdefault(path, "se")
    report.replaced = {path: tails[path] for path in modules if path in tails}
    report.left = {path: report.left[path] for path in modules if path in report.left}
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every fused module gets its class back, and keeps all it has learned meanwhile.

    Args:
        model: the network; one that was never accelerated is left as it is.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: a fused module has since been given another class, as fully_shard does; none is changed then.
    """
    _check_model(model)
    fused = [(path, module) for path, module in model.named_modules() if isinstance(module, Fused)]
    for path, module in fused:
        if "recipe" not in vars(type(module)):
            name = type(module).__name__
            raise ValueError(f"model must have its fused modules as accelerate left them; got {path} of class {name}")
    for _, module in fused:
        cast(Any, module).__class__ = type(module).recipe[0]


class Fused:
    """Mixed into the class of a module to give it a fused forward.

    Attributes:
        recipe: what the class is made of: the class before, and the other arguments of `_fused_class`.
    """

    recipe: ClassVar[tuple[type, str, _Functions]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What is made from here, such as a slice of an nn.Sequential, has not the children that this forward calls.
        module = cast(Any, self)
        module.__class__ = type(self).recipe[0]
        module.__init__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, type(self).recipe, self.__getstate__()


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")


def _find_se(modules: dict[str, nn.Module], report: Report) -> dict[str, Node]:
    """The SE modules by path, as calls of `squeeze_excite`; what looks like one is noted as left."""
    found: dict[str, Node] = {}
    around: set[str] = set()
    for path, module in reversed(modules.items()):
        if path in around:
            continue
        try:
            if isinstance(module, Fused):
                raise Left("already accelerated")
            call = read_squeeze_excite(module)
        except Left as reason:
            report.left[path] = str(reason)
        else:
            if call is None:
                continue
            found[path] = call
        parts = path.split(".")
        around |= {".".join(parts[:count]) for count in range(len(parts))}
    return found


def _fuse_tails(modules: dict[str, nn.Module], calls: dict[str, Node], report: Report) -> dict[str, str]:
    """Fuse the blocks around SE modules; the kinds of their tails by path."""
    children: dict[str, list[str]] = {}
    for path in calls:
        if path:
            parent, _, name = path.rpartition(".")
            children.setdefault(parent, []).append(name)
    kinds: dict[str, str] = {}
    for parent, names in children.items():
        block, paths = modules[parent], {name: f"{parent}.{name}".strip(".") for name in names}
        if not is_known(block):
            note = f"no tail is looked for in {type(block).__name__}: torch.compile(backend='setriton') does"
            report.left |= {path: note for path in paths.values() if not isinstance(modules[path], SqueezeExcite)}
            continue
        try:
            if "forward" in vars(block):
                raise Left(f"{parent or 'the model'} has a forward of its own")
            reader = BlockReader(block, {name: calls[path] for name, path in paths.items()})
        except Left as reason:
            report.left |= dict.fromkeys(paths.values(), str(reason))
            continue
        for name, path in paths.items():
            try:
                tail = reader.find(name)
            except Left as reason:
                report.left[path] = str(reason)
            else:
                if tail is not None:
                    reader.replace(tail, name)
                    kinds[path] = tail.kind
        if kinds.keys() & paths.values():
            _fuse(block, reader.graph)
    return kinds


def _fuse(module: nn.Module, graph: Graph) -> None:
    """Give a module the forward that a graph of its parameters and children is."""
    for node in graph.nodes:
        node.type = None  # an annotation's name would have to be found again when a pickle is read
    code = graph.python_code("self")
    known = _fx_globals()
    functions = frozenset((name, value) for name, value in code.globals.items() if name not in known)
    original: Any = type(module)
    module.__class__ = _fused_class(original, code.src, functions)


@functools.cache
def _fused_class(original: type, source: str, functions: _Functions) -> type:
    """`original` with the forward in `source`, which calls `functions`; one class for all modules with the same."""
    name = f"Fused{original.__name__}"
    filename = f"<setriton {name} {len(linecache.cache)}>"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    # Without a __name__: Dynamo of torch 2.11 would look for these globals in the module of that name.
    scope = {**_fx_globals(), **dict(functions)}
    exec(compile(source, filename, "exec"), scope)
    members = {"forward": scope["forward"], "recipe": (original, source, functions), "__module__": original.__module__}
    return type(name, (Fused, original), members)


def _rebuild(*recipe: Any) -> object:
    """A module of a fused class, without its state."""
    fused: Any = _fused_class(*recipe)
    return fused.__new__(fused)


def _fx_globals() -> dict[str, Any]:
    """What every generated forward may name: torch and a few constants."""
    return Graph().python_code("self").globals
