"""Squeeze-and-Excitation blocks in a graph: found from the product of map and gate, read backwards to the squeeze."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from setriton.reference import BN_ACTS

from .excitation import Excitation, Refused, looks_squeezed, read_excitation
from .spelling import changes, changes_mode, fake, is_map, number, read, reads_shape, same_shape


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
    reason: str | None = None
    note: str | None = None

    @property
    def kind(self) -> str:
        """ "se", "bn_se" or "bn_act_se", then "+add" and "+relu"."""
        base = "se" if self.bn is None else "bn_se" if self.bn_act == "identity" else "bn_act_se"
        return base + "+add" * (self.residual is not None) + "+relu" * (self.out_act == "relu")


def match(node: Node) -> Block | None:
    """The block whose map and gate `node` multiplies, with the longest tail; None where it looks like no SE block."""
    refused: Block | None = None
    for x, gate, residual in _products(node):
        if not is_map(x):
            continue
        try:
            block = _read_block(node, x, gate, residual)
        except Refused as error:
            if refused is None and looks_squeezed(gate):
                refused = Block(x, node, node, reason=str(error))
        else:
            return block
    return refused


def _products(node: Node) -> Iterator[tuple[Node, Node, Node | None]]:
    """(map, gate, what is added) of a product, either operand of which may be the map."""
    op = read(node)
    if op.name == "mul":
        pairs, residual = (op["input"], op["other"]), None
    elif op.name == "addcmul" and op["value"] in (None, 1):
        pairs, residual = (op["tensor1"], op["tensor2"]), op["input"]
    else:
        return
    for x, gate in (pairs, pairs[::-1]):
        if isinstance(x, Node) and isinstance(gate, Node):
            yield x, gate, residual


def _read_block(node: Node, x: Node, gate: Node, residual: Node | None) -> Block:
    excitation, inner = read_excitation(gate, x)
    block = Block(x, node, node, inner, excitation)
    tensor, result = fake(x), fake(node)
    assert tensor is not None
    if not tensor.is_floating_point():
        raise Refused(f"dtype {tensor.dtype}")
    if result is None or result.dtype != tensor.dtype:
        raise Refused(f"the map is {tensor.dtype}, its product with the gate is not")
    _require_unshared(block)
    _absorb_batch_norm(block)
    if changes(node, block.x) and (block.x.op == "placeholder" or _later_uses(block.x, node)):
        raise Refused("in place on a map that is read elsewhere")
    if residual is not None:
        _require_residual(block, residual)
        block.residual = residual
    if (disturbed := _disturbance(block)) is not None:
        raise Refused(disturbed)
    if residual is None:
        _absorb_residual(block)
    _absorb_relu(block)
    return block


def _require_unshared(block: Block) -> None:
    for node in block.inner:
        for user in node.users:
            if user is not block.output and user not in block.inner:
                raise Refused(f"{node.name} is read elsewhere, by {user.name}")


def _absorb_batch_norm(block: Block) -> None:
    """Take BN and the activation before the map, where nothing but the block reads them."""
    act, norm = block.x, block.x
    if (op := read(act)).name in BN_ACTS:
        norm = op["input"]
    if (op := read(norm)).name != "batch_norm":
        return
    absorbed = {act, norm}
    if any(user not in block.inner | absorbed | {block.output} and not reads_shape(user)
           for node in absorbed for user in node.users):  # fmt: skip
        block.note = "BN's output is read elsewhere"
        return
    bn = _read_batch_norm(norm)
    if isinstance(bn, str):
        block.note = bn
        return
    block.x, block.bn, block.bn_act = op["input"], bn, "identity" if act is norm else read(act).name
    block.inner |= absorbed


def _read_batch_norm(node: Node) -> BatchNorm | str:
    """Its arguments, or why the block cannot have it."""
    op = read(node)
    x, y = fake(op["input"]), fake(node)
    momentum = 0.1 if "momentum" not in op.arguments else number(op["momentum"])
    eps = 1e-5 if "eps" not in op.arguments else number(op["eps"])
    training = bool(op["training"])
    statistics = op["running_mean"], op["running_var"]
    if x is None or y is None or x.dtype != y.dtype:
        return "BN changes the dtype"
    if momentum is None or eps is None:
        return "BN's momentum is computed"
    if (statistics[0] is None) != (statistics[1] is None):
        return "BN has one running statistic"
    if training and any(len(s.users) > 1 for s in statistics if s is not None):
        return "BN's running statistics are read elsewhere"
    return BatchNorm(op["weight"], op["bias"], *statistics, training, momentum, eps)


def _absorb_residual(block: Block) -> None:
    user = _only_user(block.output)
    op = read(user)
    if user is None or op.name != "add" or op["alpha"] not in (None, 1):
        return
    residual = op["other"] if op["input"] is block.output else op["input"]
    if not isinstance(residual, Node) or residual is block.output or not _is_like_x(block, user):
        return
    if changes(user, residual):
        block.note = "the residual is added in place"
        return
    try:
        _require_residual(block, residual)
    except Refused as error:
        block.note = str(error)
        return
    _extend(block, user, residual=residual)


def _require_residual(block: Block, residual: Node) -> None:
    tensor = fake(residual)
    if tensor is None or not same_shape(residual, block.x) or not tensor.is_floating_point():
        raise Refused("what is added has not the map's shape")


def _absorb_relu(block: Block) -> None:
    user = _only_user(block.output)
    if user is not None and read(user).name == "relu" and _is_like_x(block, user):
        _extend(block, user, out_act="relu")


def _only_user(node: Node) -> Node | None:
    users = [user for user in node.users if not reads_shape(user)]
    return users[0] if len(users) == 1 else None


def _is_like_x(block: Block, node: Node) -> bool:
    """A block's result has the dtype and the shape of its map."""
    x, y = fake(block.x), fake(node)
    return x is not None and y is not None and x.dtype == y.dtype and same_shape(block.x, node)


def _extend(block: Block, output: Node, **tail: Any) -> None:
    """Let the block end later, with more of its tail, unless something stands in the way."""
    longer = dataclasses.replace(block, output=output, inner=block.inner | {block.output}, **tail)
    block.note = _disturbance(longer)
    if block.note is None:
        vars(block).update(vars(longer))


def _disturbance(block: Block) -> str | None:
    """What on the way to the block's end, where its work is to be done, changes its inputs or the mode it runs in."""
    inputs = [node for node in _inputs(block) if node is not None]
    for node in _from_first_to(block.output, block.inner):
        if node in block.inner or node is block.output:
            continue
        if changes_mode(node):
            return "autocast or grad mode changes inside"
        if any(changes(node, value) for value in inputs):
            return f"{node.name} changes an input of the block in place"
    return None


def _inputs(block: Block) -> Iterable[Node | None]:
    excitation, bn = block.excitation, block.bn
    assert excitation is not None
    yield from (block.x, block.residual, excitation.fc1.weight, excitation.fc1.bias)
    yield from (excitation.fc2.weight, excitation.fc2.bias)
    if bn is not None:
        yield from (bn.weight, bn.bias, bn.running_mean, bn.running_var)


def _from_first_to(last: Node, inner: set[Node]) -> Iterator[Node]:
    """Nodes from the first of `inner` to `last`."""
    node, missing = last, set(inner)
    while missing:
        node = node.prev
        missing.discard(node)
        yield node


def _later_uses(value: Node, node: Node) -> bool:
    """Whether a node after `node` reads `value`."""
    return any(user is not node and node < user for user in value.users)
