"""What was found in a graph: an SE block, the tail around it, and the nodes that they are made of."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_map_only

from .excitation import Excitation


@dataclass(frozen=True)
class BatchNorm:
    """The arguments of F.batch_norm: nodes, None, and numbers."""

    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    training: bool
    momentum: float
    eps: float

    @property
    def statistics(self) -> list[Node]:
        """The nodes of the running statistics that there are."""
        return [node for node in (self.running_mean, self.running_var) if node is not None]


@dataclass
class Block:
    """An SE block and the tail around it: output = out_act(SE(bn_act(BN(x))) + residual).

    Attributes:
        x: the map that goes in.
        product: the node that multiplies map and gate.
        output: the node whose place a replacement takes.
        inner: the other nodes of the block, in no order; nothing else reads them.
        excitation: its two layers; None where the block is refused.
        bn, bn_act, residual, out_act: the tail.
        layout: what x must be brought to, so that the result has the strides it has as written; None to leave it.
        reason: why the block cannot be replaced; None where it can.
        note: why the tail ends where it does, where more might have belonged to it.
    """

    x: Node
    product: Node
    output: Node
    inner: set[Node] = field(default_factory=set)
    excitation: Excitation | None = None
    bn: BatchNorm | None = None
    bn_act: str = "identity"
    residual: Node | None = None
    out_act: str = "identity"
    layout: torch.memory_format | None = None
    reason: str | None = None
    note: str | None = None

    @property
    def kind(self) -> str:
        """ "se", "bn_se" or "bn_act_se", then "+add" and "+relu"."""
        base = "se" if self.bn is None else "bn_se" if self.bn_act == "identity" else "bn_act_se"
        return base + "+add" * (self.residual is not None) + "+relu" * (self.out_act == "relu")

    @property
    def nodes(self) -> set[Node]:
        """All its nodes."""
        return self.inner | {self.output}

    @property
    def inputs(self) -> list[Node]:
        """The nodes whose values the replacement takes."""
        return [*self.operands, *(self.bn.statistics if self.bn is not None else ())]

    @property
    def operands(self) -> list[Node]:
        """Those that it takes and never writes: all but running statistics."""
        excitation, bn = self.excitation, self.bn
        assert excitation is not None
        fc1, fc2 = excitation.fc1, excitation.fc2
        found = [self.x, self.residual, fc1.weight, fc1.bias, fc2.weight, fc2.bias]
        if bn is not None:
            found += [bn.weight, bn.bias]
        return [node for node in found if node is not None]

    def span(self) -> Iterator[Node]:
        """The nodes of the graph from the block's first to its last, its own and others."""
        missing, node, found = set(self.inner), self.output, [self.output]
        while missing - {self.output}:
            node = node.prev
            missing.discard(node)
            found.append(node)
        yield from reversed(found)

    def translated(self, copies: Mapping[Node, Node]) -> "Block":
        """The same block of the copies of its nodes; nodes without one stay."""
        found = _translated(self, copies)
        assert isinstance(found, Block)
        return found


def _translated(value: Any, copies: Mapping[Node, Node]) -> Any:
    if isinstance(value, Node):
        return copies.get(value, value)
    if isinstance(value, set):
        return {_translated(item, copies) for item in value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _translated(getattr(value, f.name), copies) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changed)
    return tree_map_only(Node, lambda node: copies.get(node, node), value)
