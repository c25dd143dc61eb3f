"""`accelerate` and `restore`: SE blocks of an existing network replaced by fused ones in place, for eager PyTorch.

A fused module is the module it was, of another class: one derived from its own, with another forward. Parameters,
buffers, children, hooks and attributes are not touched, and `restore` gives the class back.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from .compile.report import table
from .convert_copy import undisturbed
from .convert_fused import Fused, fuse
from .convert_state import Left, Unread, fingerprint
from .convert_tails import is_known, read_tails
from .convert_trace import Plan, is_named_se, looks_like_se, read_squeeze_excite
from .modules import SqueezeExcite


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

    An SE module is known by what it computes: timm's, torchvision's and transformers', and others written alike. Where
    the block around it is of a class known here (timm's and transformers' blocks, and nn.Sequential, of which
    torchvision's are made), its whole tail becomes one call: BN, activation, SE, the sum with the residual, ReLU. In
    other classes SE alone does, and the report says so.

    The model is not run. Copies of each module and of its replacement are, on small random inputs, and where they
    differ in anything (outputs, inputs afterwards, gradients, buffers, attributes, random numbers) the module is left.

    Modules, parameters and the state dict stay what and where they are; some modules get a class derived from their
    own, so that an optimizer made before goes on and copies and pickles of the model are fused as well. What is done
    later to a layer that a fused forward does without (a hook, pruning, an adapter, another activation) takes effect:
    the module's own forward runs then, which is said once.

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
    with undisturbed():
        reader = _Reader(modules, report)
        calls = reader.find_se()
        tails = reader.find_tails(calls)
    kinds = {f"{path}.{name}".strip("."): kind for path, plan in tails.items() for name, kind in plan.kinds.items()}
    for path, plan in (*calls.items(), *tails.items()):
        if not isinstance(modules[path], SqueezeExcite):
            fuse(modules[path], plan.graph, plan.reads)
            if path in calls:
                kinds.setdefault(path, "se")
    report.replaced = {path: kinds[path] for path in modules if path in kinds}
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


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")


class _Reader:
    """Finds what can be fused; modules of equal fingerprints are read and proved once."""

    def __init__(self, modules: dict[str, nn.Module], report: Report) -> None:
        self.modules = modules
        self.report = report
        self.known: dict[Any, Plan | Left] = {}

    def find_se(self) -> dict[str, Plan]:
        """The SE modules by path, as calls of `squeeze_excite`; what looks like one is noted as left."""
        found: dict[str, Plan] = {}
        around: set[str] = set()
        for path, module in reversed(self.modules.items()):
            if path in around:
                continue
            try:
                if isinstance(module, Fused):
                    raise Left("already accelerated")
                if not looks_like_se(module):
                    continue
                plan = self._once(module, "se", functools.partial(read_squeeze_excite, module))
            except Left as reason:
                if isinstance(reason, Unread) and not is_named_se(module):
                    continue  # nothing says that it is one
                self.report.left[path] = str(reason)
            else:
                found[path] = plan
            parts = path.split(".")
            around |= {".".join(parts[:count]) for count in range(len(parts))}
        return found

    def find_tails(self, calls: dict[str, Plan]) -> dict[str, Plan]:
        """The blocks around SE modules whose tails can be fused."""
        children: dict[str, list[str]] = {}
        for path in calls:
            if path:
                parent, _, name = path.rpartition(".")
                children.setdefault(parent, []).append(name)
        found: dict[str, Plan] = {}
        for parent, names in children.items():
            block, paths = self.modules[parent], {name: f"{parent}.{name}".strip(".") for name in names}
            if not is_known(block):
                note = f"no tail is looked for in {type(block).__name__}: torch.compile(backend='setriton') does"
                self._leave(paths.values(), note)
                continue
            try:
                if "forward" in vars(block):
                    raise Left(f"{parent or 'the model'} has a forward of its own")
                inner = {name: calls[path] for name, path in paths.items()}
                plan = self._once(block, "tail", functools.partial(read_tails, block, inner))
            except Left as reason:
                self.report.left |= dict.fromkeys(paths.values(), str(reason))
                continue
            self.report.left |= {paths[name]: reason for name, reason in plan.left.items()}
            if plan.kinds:
                found[parent] = plan
        return found

    def _leave(self, paths: Iterable[str], note: str) -> None:
        self.report.left |= {path: note for path in paths if not isinstance(self.modules[path], SqueezeExcite)}

    def _once(self, module: nn.Module, what: str, read: Callable[[], Plan]) -> Plan:
        """What `read` finds out about a module, or did about one like it."""
        key = what, fingerprint(module)
        if key not in self.known:
            try:
                self.known[key] = read()
            except Left as reason:
                self.known[key] = reason
        found = self.known[key]
        if isinstance(found, Left):
            raise found
        return found
