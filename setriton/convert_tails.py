"""Tails of blocks, BN -> act -> SE -> + residual -> ReLU, found in the calls of modules and replaced by one call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .compile.spelling import changes, read
from .convert_code import require_own
from .convert_copy import cheap_to_replace, twin
from .convert_fused import fuse
from .convert_proof import require_same
from .convert_state import Left, reads_of
from .convert_trace import BlockTracer, Plan, first_line, plain_function, require_not_called
from .modules import SqueezeExcite, bn_se_forward
from .reference import BN_ACTS
from .stock import BatchNorm2d, SyncBatchNorm, why_called

# Classes whose forward calls the same children in the same order, whatever the input and the mode.
_BLOCKS = {
    "torch.nn.modules.container.Sequential",  # torchvision's blocks are made of nothing else
    "timm.layers.conv_bn_act.ConvNormAct",
    "timm.models._efficientnet_blocks.CondConvResidual",
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv",
    "timm.models._efficientnet_blocks.EdgeResidual",
    "timm.models._efficientnet_blocks.InvertedResidual",
    "timm.models.byobnet.BasicBlock",
    "timm.models.byobnet.BottleneckBlock",
    "timm.models.byobnet.DarkBlock",
    "timm.models.byobnet.EdgeBlock",
    "timm.models.cspnet.BottleneckBlock",
    "timm.models.cspnet.DarkBlock",
    "timm.models.cspnet.EdgeBlock",
    "timm.models.ghostnet.GhostBottleneck",
    "timm.models.regnet.Bottleneck",
    "timm.models.resnet.BasicBlock",
    "timm.models.resnet.Bottleneck",
    "timm.models.senet.Bottleneck",
    "timm.models.senet.SEResNetBlock",
    "timm.models.tresnet.BasicBlock",
    "timm.models.tresnet.Bottleneck",
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetBlock",
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetDepthwiseLayer",
    "transformers.models.regnet.modeling_regnet.RegNetConvLayer",
}
_BATCH_NORMS = {
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.batchnorm.SyncBatchNorm",
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
}


class _Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None


class _Excitation(NamedTuple):
    """What `bn_se_forward` reads of a SqueezeExcite."""

    fc1: _Layer
    fc2: _Layer
    act: str
    gate: str

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return *self.fc1, *self.fc2


def tail(
    bn: nn.BatchNorm2d,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    *,
    act: str,
    gate: str,
    bn_act: str,
    out_act: str,
) -> Tensor:
    """What a fused block calls: `bn_se_forward` with the parameters of any SE module."""
    se = _Excitation(_Layer(w1, b1), _Layer(w2, b2), act, gate)
    return bn_se_forward(bn, cast(SqueezeExcite, se), x, residual, bn_act=bn_act, out_act=out_act)


@dataclass
class Tail:
    """The nodes from BN to the last, each read by the next alone, and what they amount to."""

    nodes: list[Node]
    bn_act: str
    residual: Node | None = None
    out_act: str = "identity"

    @property
    def kind(self) -> str:
        """ "bn_se" or "bn_act_se", then "+add" and "+relu"."""
        base = "bn_se" if self.bn_act == "identity" else "bn_act_se"
        return base + "+add" * (self.residual is not None) + "+relu" * (self.out_act == "relu")


def read_tails(block: nn.Module, plans: Mapping[str, Plan]) -> Plan:
    """A block with the tails of its SE children as one call each, proved to do what the block does.

    Args:
        block: the module, `is_known`.
        plans: its SE children by name, as `read_squeeze_excite` reads them.

    Raises:
        Left: there can be no such block.
    """
    require_own(block)
    reader = BlockReader(block, {name: plan.call for name, plan in plans.items()})
    kinds, left = {}, {}
    for name in plans:
        try:
            found = reader.find(name)
        except Left as reason:
            left[name] = str(reason)
        else:
            if found is not None:
                reader.replace(found, name)
                kinds[name] = found.kind
    called = {str(node.target) for node in reader.graph.nodes if node.op == "call_module"}
    plan = Plan(reader.graph, reads_of(block, called), kinds, left)
    if kinds:
        _prove(block, plan, called)
    return plan


def _prove(block: nn.Module, plan: Plan, called: set[str]) -> None:
    """Left unless the block does what the plan does; of what both call, convolutions do not matter."""
    convolutions = [
        child
        for path, child in block.named_modules()
        if cheap_to_replace(child) and any(f"{path}.".startswith(f"{name}.") for name in called)
    ]
    widths = [getattr(child, "in_channels", getattr(child, "num_features", None)) for child in block.modules()]
    channels = dict.fromkeys(width for width in widths if isinstance(width, int))
    require_same(
        lambda seed: twin(block, seed, convolutions), lambda copied: fuse(copied, plan.graph, None), channels, False
    )


class BlockReader:
    """The calls of a block's children as a graph, in which tails are found and replaced.

    Args:
        block: the module, `is_known`; a copy is traced.
        calls: its SE children by name, as calls of `squeeze_excite`.
    """

    def __init__(self, block: nn.Module, calls: Mapping[str, Node]) -> None:
        self.modules = dict(block.named_modules())
        self.calls = calls
        self.functions: dict[nn.Module, str | None] = {}
        self.graph = self._trace(twin(block, stand_ins=[child for child in block.modules() if cheap_to_replace(child)]))

    def find(self, name: str) -> Tail | None:
        """The tail of the SE child `name`; None where there is no BN before it.

        Raises:
            Left: there is one, and it cannot be fused.
        """
        calls = [node for node in self.graph.nodes if node.op == "call_module" and node.target == name]
        found = self._look_back(calls[0]) if len(calls) == 1 else None
        if found is None:
            return None
        while self._look_ahead(found):
            pass
        for node in found.nodes:
            if node.op == "call_module":
                require_not_called(self.modules[str(node.target)].named_modules(prefix=str(node.target)))
        return found

    def replace(self, found: Tail, name: str) -> None:
        """Put one call in the place of what `find` has found."""
        norm, last, call = found.nodes[0], found.nodes[-1], self.calls[name]
        with self.graph.inserting_before(last):
            bn = self.graph.create_node("get_attr", norm.target)
            weights = [self._copied(weight, name) for weight in call.args[1:]]
            options = {**call.kwargs, "bn_act": found.bn_act, "out_act": found.out_act}
            new = self.graph.call_function(tail, (bn, norm.args[0], *weights, found.residual), options)
        last.replace_all_uses_with(new)
        for node in reversed(found.nodes):
            self.graph.erase_node(node)

    def _trace(self, block: nn.Module) -> Graph:
        """Inlines, of the containers among the children, those whose result goes into an SE."""
        inlined: set[str] = set()
        while True:
            try:
                graph = BlockTracer(inlined).trace(block)
            except Exception as error:
                raise Left(f"{type(block).__name__} cannot be traced: {first_line(error)}") from error
            sources = [self._behind_functions(node)[-1] for node in graph.nodes if node.target in self.calls]
            containers = {
                str(node.target)
                for node in sources
                if (module := self._container(node)) is not None and why_called(module, type(module)) is None
            }
            if not containers:
                return graph
            inlined |= containers

    def _look_back(self, call: Node) -> Tail | None:
        norm, *between = reversed(self._behind_functions(call))
        if not self._is_batch_norm(norm):
            self._explain(norm)
            return None
        acts = [
            self._plain_function(child) or type(child).__name__ for child in self.modules[str(norm.target)].children()
        ]
        acts += [found[0] for node in between if (found := self._function(node)) is not None]
        acts = [name for name in acts if name != "identity"] or ["identity"]
        if len(acts) > 1 or acts[0] not in BN_ACTS:
            raise Left(f"{', '.join(acts)} between BN and SE")
        if any(len(node.users) != 1 for node in (norm, *between)):
            raise Left("BN's output is read elsewhere")
        return Tail([norm, *between, call], acts[0])

    def _look_ahead(self, found: Tail) -> bool:
        """Take the residual's sum or the ReLU into the tail, if they are next."""
        nodes = found.nodes[-1:]
        while (node := _only_user(nodes[-1])) is not None and self._is_identity(node):
            nodes.append(node)
        if node is None or found.out_act != "identity":
            return False
        op, last = read(node), nodes[-1]
        residual = op["other"] if op["input"] is last else op["input"]
        is_sum = op.name == "add" and op["alpha"] in (None, 1) and residual is not last and not changes(node, residual)
        if is_sum and isinstance(residual, Node) and found.residual is None:
            found.residual = residual
        elif (function := self._function(node)) is not None and function[0] == "relu":
            found.out_act = "relu"
        else:
            return False
        found.nodes += [*nodes[1:], node]
        return True

    def _behind_functions(self, node: Node) -> list[Node]:
        """The plain functions in front of a module, from the last back, and what is before them."""
        found: list[Node] = []
        source = node.args[0]
        while isinstance(source, Node):
            found.append(source)
            function = self._function(source)
            source = None if function is None else function[1]
        return found

    def _function(self, node: Node) -> tuple[str, Node] | None:
        """Name and input of a function that is applied as a module or plainly."""
        module = self._module(node)
        name = read(node).name if module is None else self._plain_function(module)
        is_plain = module is not None or name in BN_ACTS
        source = node.args[0] if node.args else None
        return (name, source) if name and is_plain and isinstance(source, Node) else None

    def _plain_function(self, module: nn.Module) -> str | None:
        if module not in self.functions:
            self.functions[module] = plain_function(module)
        return self.functions[module]

    def _module(self, node: Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _is_batch_norm(self, node: Node) -> bool:
        module = self._module(node)
        return isinstance(module, BatchNorm2d | SyncBatchNorm) and _forward_name(module) in _BATCH_NORMS

    def _is_identity(self, node: Node) -> bool:
        function = self._function(node)
        return function is not None and function[0] == "identity"

    def _container(self, node: Node) -> nn.Module | None:
        module = self._module(node)
        return module if module is not None and is_known(module) else None

    def _explain(self, node: Node) -> None:
        """Left where a BN is behind `node` and out of reach."""
        module = self._module(node)
        if (container := self._container(node)) is not None:
            require_not_called([(str(node.target), container)])
        elif module is not None and self._is_batch_norm(node.all_input_nodes[0]) and not list(module.parameters()):
            raise Left(f"{type(module).__name__} between BN and SE")

    def _copied(self, value: Any, path: str) -> Any:
        """A parameter of the SE child, or its view, in the block's graph."""
        if not isinstance(value, Node):
            return value
        if value.op == "get_attr":
            return self.graph.get_attr(f"{path}.{value.target}")
        arguments = map_arg((value.args, value.kwargs), lambda node: self._copied(node, path))
        return self.graph.create_node(value.op, value.target, *arguments)


def is_known(block: nn.Module) -> bool:
    """Whether tails can be looked for in a module."""
    return _forward_name(block) in _BLOCKS


def _forward_name(module: nn.Module) -> str:
    function = type(module).forward
    return f"{function.__module__}.{function.__qualname__}".removesuffix(".forward")


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
