"""Squeeze-and-Excitation blocks in a graph: found from the product of map and gate, read backwards to the squeeze."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch.fx import Node

from setriton.reference import BN_ACTS

from .block import BatchNorm, Block
from .effects import Effects
from .excitation import read_excitation
from .hazards import hazard
from .kin import kin
from .layers import Refused
from .shapes import is_map, same_shape
from .spelling import fake, number, read, reads_shape


def match(node: Node, effects: Callable[[], Effects]) -> Block | None:
    """The block whose map and gate `node` multiplies, with the longest tail.

    Args:
        node: of a graph.
        effects: gives those of the graph; called only where there may be a block.

    Returns:
        None where it looks like no SE block; a block with a reason where it must be left alone.
    """
    refused: Block | None = None
    for x, gate, residual in _products(node):
        try:
            if is_map(x):
                return _read_block(node, x, gate, residual, effects)
        except Refused as error:
            if refused is None and kin(node, x, gate) is not None:
                refused = Block(x, node, node, reason=str(error))
    if refused is None:
        refused = _of_kin(node)
    return refused


def _of_kin(node: Node) -> Block | None:
    """What is no SE block, but does to maps what one does."""
    op = read(node)
    if op.name not in ("mul", "add"):
        return None
    for x, gate in ((op["input"], op["other"]), (op["other"], op["input"])):
        if isinstance(x, Node) and isinstance(gate, Node) and (reason := kin(node, x, gate)) is not None:
            return Block(x, node, node, reason=reason)
    return None


def _products(node: Node) -> Iterator[tuple[Node, Node, Node | None]]:
    """(map, gate, what is added) of a product, either operand of which may be the map."""
    op = read(node)
    if op.name == "mul":
        pairs, residual = (op["input"], op["other"]), None
    elif op.name == "addcmul":
        pairs, residual = (op["tensor1"], op["tensor2"]), op["input"]
    else:
        return
    for x, gate in (pairs, pairs[::-1]):
        if isinstance(x, Node) and isinstance(gate, Node):
            yield x, gate, residual


def _read_block(node: Node, x: Node, gate: Node, residual: Node | None, effects: Callable[[], Effects]) -> Block:
    excitation, inner = read_excitation(gate, x)
    block = Block(x, node, node, inner, excitation, residual=residual)
    tensor, result = fake(x), fake(node)
    assert tensor is not None
    if not tensor.is_floating_point():
        raise Refused(f"dtype {tensor.dtype}")
    if result is None or result.dtype != tensor.dtype:
        raise Refused(f"the map is {tensor.dtype}, its product with the gate is not")
    if not same_shape(node, x):
        raise Refused("the product has not the map's shape")
    if residual is not None and (reason := _unlike_x(block, residual)) is not None:
        raise Refused(reason)
    _absorb_sizes(block)
    _require_unshared(block)
    known = effects()
    _absorb_batch_norm(block, known)
    if (reason := hazard(block, known)) is not None:
        raise Refused(reason)
    if residual is None:
        _absorb_residual(block, known)
    _absorb_relu(block, known)
    return block


def _absorb_sizes(block: Block) -> None:
    """Take the sizes that only the block's own views ask for."""
    for node in reversed(list(block.span())):
        is_own = bool(node.users) and all(user in block.nodes for user in node.users)
        if is_own and node not in block.nodes and fake(node) is None and _is_of_sizes(node):
            block.inner.add(node)


def _is_of_sizes(node: Node) -> bool:
    """Whether a node is a size of an operand, or computed of such sizes."""
    if not node.op.startswith("call"):
        return False
    return reads_shape(node) or all(fake(parent) is None for parent in node.all_input_nodes)


def _require_unshared(block: Block) -> None:
    for node in block.inner:
        for user in node.users:
            if user not in block.nodes:
                raise Refused(f"{node.name} is read elsewhere, by {user.name}")


def _absorb_batch_norm(block: Block, effects: Effects) -> None:
    """Take BN and the activation before the map, where nothing but the block reads them."""
    act, norm = block.x, block.x
    if (op := read(act)).name in BN_ACTS:
        norm = op["input"]
    if (op := read(norm)).name != "batch_norm":
        return
    absorbed = {act, norm}
    users = {user for node in absorbed for user in node.users if not reads_shape(user)}
    if not users <= block.nodes | absorbed or block.residual in absorbed:
        block.note = "BN's output is read elsewhere"
        return
    bn = _read_batch_norm(norm)
    if isinstance(bn, str):
        block.note = bn
        return
    name = "identity" if act is norm else read(act).name
    _extend(block, effects, x=op["input"], bn=bn, bn_act=name, inner=block.inner | absorbed)


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
    if training and not eps > 0:
        return "BN's eps is 0"
    if (statistics[0] is None) != (statistics[1] is None):
        return "BN has one running statistic"
    if training and any(len(s.users) > 1 for s in statistics if s is not None):
        return "BN's running statistics are read elsewhere"
    return BatchNorm(op["weight"], op["bias"], *statistics, training, momentum, eps)


def _absorb_residual(block: Block, effects: Effects) -> None:
    user = _only_user(block.output)
    op = read(user)
    if user is None or op.name != "add":
        return
    residual = op["other"] if op["input"] is block.output else op["input"]
    if not isinstance(residual, Node) or residual is block.output or not _is_like_x(block, user):
        return
    if (reason := _unlike_x(block, residual)) is not None:
        block.note = reason
    else:
        _extend(block, effects, output=user, inner=block.nodes, residual=residual)


def _unlike_x(block: Block, residual: Node) -> str | None:
    """Why a tensor cannot be the residual."""
    tensor = fake(residual)
    if tensor is None or not same_shape(residual, block.x) or not tensor.is_floating_point():
        return "what is added has not the map's shape"
    return None


def _absorb_relu(block: Block, effects: Effects) -> None:
    user = _only_user(block.output)
    if user is not None and read(user).name == "relu" and _is_like_x(block, user):
        _extend(block, effects, output=user, inner=block.nodes, out_act="relu")


def _only_user(node: Node) -> Node | None:
    users = [user for user in node.users if not reads_shape(user)]
    return users[0] if len(users) == 1 else None


def _is_like_x(block: Block, node: Node) -> bool:
    """A block's result has the dtype and the shape of its map."""
    x, y = fake(block.x), fake(node)
    return x is not None and y is not None and x.dtype == y.dtype and same_shape(block.x, node)


def _extend(block: Block, effects: Effects, **more: Any) -> None:
    """Let the block have more of its tail, unless something stands in the way."""
    longer = dataclasses.replace(block, **more)
    block.note = hazard(longer, effects)
    if block.note is None:
        vars(block).update(vars(longer))
