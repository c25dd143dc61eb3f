"""Modules read by symbolic tracing: which are SE blocks, and which are plain functions."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node, Tracer
from torch.nn.parameter import is_lazy

from .compile.report import Match
from .compile.rewrite import rewrite
from .compile.spelling import read
from .convert_code import require_own
from .convert_copy import twin
from .convert_fused import fuse
from .convert_proof import require_same
from .convert_state import Left, Read, Unread, reads_of
from .functional import squeeze_excite
from .modules import SqueezeExcite
from .reference import ACTS
from .stock import why_called

_NAMED_SE = re.compile(r"^SE$|SE(Block|Layer|Module|Unit)$|Squeeze(And)?Exc")
# Two weights, two biases, and those of a normalization for each layer.
_MOST_PARAMETERS = 8


@dataclass
class Plan:
    """What a module is to become.

    Attributes:
        graph: its new forward, of the parameters and children at their paths in it.
        reads: what that takes for granted.
        kinds: of a block: the names of SE modules whose tails are in the graph, and what their tails are.
        left: of a block: the names of others, and why theirs are not.
    """

    graph: Graph
    reads: tuple[Read, ...]
    kinds: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def call(self) -> Node:
        """Of an SE module: the call of `squeeze_excite`."""
        return cast(Node, self.graph.output_node().args[0])


class BlockTracer(Tracer):
    """Inlines the children at the paths given, or all of them; without their hooks, which are not to see proxies."""

    def __init__(self, inlined: Collection[str] | None = None) -> None:
        super().__init__()
        # Else tracing would run what a forward does to its buffers.
        self.proxy_buffer_attributes = True
        self.inlined = inlined

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if self.inlined is None and isinstance(m, nn.modules.batchnorm._BatchNorm):
            # Its own forward cannot be traced: it looks at the number of axes.
            return F.batch_norm(args[0], m.running_mean, m.running_var, m.weight, m.bias, training=True)
        if self.inlined is None or path in self.inlined:
            return m.forward(*args, **kwargs)
        return self.create_proxy("call_module", path, args, kwargs)


def plain_function(module: nn.Module) -> str | None:
    """The name of the one function that a module applies, "identity" for none; None if it does anything else."""
    if next(module.parameters(), None) is not None:
        return None
    try:
        graph = _trace(module).graph
    except Left:
        return None
    if len(graph.nodes) == 2 and graph.output_node().args[0] is next(iter(graph.nodes)):
        return "identity"
    return read(graph.output_node().args[0]).name or None if len(graph.nodes) == 3 else None


def looks_like_se(module: nn.Module) -> bool:
    """Whether it is worth reading a module: by its name, or two layers the second of which undoes the first's shape."""
    if isinstance(module, torch.jit.ScriptModule | GraphModule) or any(map(is_lazy, module.parameters())):
        return False
    return is_named_se(module) or _has_two_layers(module)


def read_squeeze_excite(module: nn.Module) -> Plan:
    """What a module amounts to: a call of `squeeze_excite`, proved to do what the module does.

    Args:
        module: `looks_like_se`.

    Raises:
        Unread: it cannot be read, or is another thing.
        Left: it is one, and cannot be replaced.
    """
    if isinstance(module, SqueezeExcite) and type(module).forward is SqueezeExcite.forward:
        return Plan(_graph_of_ours(module), reads_of(module, ()))
    require_own(module)
    graph = _graph(_trace(module))
    if graph is None:
        raise Unread("not recognized as an SE block")
    if "forward" in vars(module):
        raise Left("it has a forward of its own")
    require_not_called((path, child) for path, child in module.named_modules() if path)
    plan = Plan(graph, reads_of(module, ()))
    require_same(lambda seed: twin(module, seed), lambda copied: fuse(copied, graph, None), _widths(module), True)
    return plan


def require_not_called(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Left where one of the modules, which a fused forward does not call, has to be called."""
    for path, module in modules:
        if (reason := why_called(module, type(module))) is not None:
            raise Left(
                f"{path} {reason.replace('with', 'has', 1)}" if reason.startswith("with ") else f"{path}: {reason}"
            )


def first_line(error: Exception) -> str:
    """Of an error's message, without what torch.fx adds below."""
    return str(error).partition("\n")[0]


def _trace(module: nn.Module) -> GraphModule:
    """A module with all its children inlined, if it is the same in training and in evaluation; a copy is traced."""
    traced = []
    for training in (True, False):
        copied = twin(module).train(training)
        before = [(path, child, dict(vars(child))) for path, child in copied.named_modules()]
        try:
            graph = BlockTracer().trace(copied)
        except Exception as error:
            raise Unread(f"cannot be traced: {first_line(error)}") from error
        for _, child, saved in before:
            has = vars(child)
            if names := [name for name in {**saved, **has} if saved.get(name, before) is not has.get(name, before)]:
                raise Unread(f"its forward sets {', '.join(names)}")
        traced.append((copied, graph))
    if str(traced[0][1]) != str(traced[1][1]):
        raise Unread("not the same in training and in evaluation")
    return GraphModule(*traced[1])


def is_named_se(module: nn.Module) -> bool:
    """Whether a module bears the name of an SE block."""
    return any(_NAMED_SE.search(kind.__name__) for kind in type(module).__mro__)


def _has_two_layers(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    if len(parameters) > _MOST_PARAMETERS:
        return False
    shapes = [p.shape[:2] for p in parameters if p.dim() >= 2 and p.shape[2:].numel() == 1]
    return any(w1 == w2[::-1] for i, w1 in enumerate(shapes) for w2 in shapes[i + 1 :])


def _graph(module: GraphModule) -> Graph | None:
    """The graph of nothing but a call of `squeeze_excite` that a whole graph is rewritten to.

    Raises:
        Left: what looks like an SE block in it is none.
    """
    found: list[Match] = []
    for width in _widths(module):
        if _propagate(module, width):
            found = rewrite(module)
            break
    for match in found:
        if match.reason is not None:
            raise Left(match.reason)
    graph = module.graph
    graph.eliminate_dead_code()
    result = graph.output_node().args[0]
    if not isinstance(result, Node) or result.target is not squeeze_excite:
        return None
    x, *weights = result.args
    is_whole = [node for node in graph.nodes if node.op == "placeholder"] == [x] and all(map(_is_parameter, weights))
    return graph if is_whole and result.kwargs["act"] in ACTS else None


def _widths(module: nn.Module) -> list[int]:
    """C, if the first weight is the reducing one as a convolution holds it, or transposed."""
    weights = [p for p in module.parameters() if p.dim() >= 2]
    return [weights[0].shape[1], weights[0].shape[0]] if weights else []


class _Shapes(Interpreter):
    """Runs a graph on tensors without data, and notes each node's."""

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value

    def run_node(self, n: Node) -> Any:
        n.meta["val"] = value = super().run_node(n)
        return value


def _propagate(graph_module: GraphModule, channels: int) -> bool:
    """Whether a graph takes maps of so many channels; then its nodes know the shapes of their values."""
    try:
        with torch.no_grad():
            # No two sizes are the same, and none is 1.
            x = torch.empty(3, channels, 5, 7, dtype=next(graph_module.parameters()).dtype, device="meta")
            _Shapes(graph_module).run(x)
    except Exception:
        return False
    return True


def _is_parameter(value: Any) -> bool:
    """Whether a value is a parameter, a view of one, or None."""
    if not isinstance(value, Node):
        return value is None
    return value.op == "get_attr" or (len(value.all_input_nodes) == 1 and _is_parameter(value.all_input_nodes[0]))


def _graph_of_ours(module: SqueezeExcite) -> Graph:
    graph, found = Graph(), dict(module.named_parameters())
    x = graph.placeholder("x")
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    weights = [graph.get_attr(name) if name in found else None for name in names]
    graph.output(graph.call_function(squeeze_excite, (x, *weights), {"act": module.act, "gate": module.gate}))
    return graph
