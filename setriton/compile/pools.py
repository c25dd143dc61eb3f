"""What squeezes a map to one number a channel, and what is made of that."""

from collections.abc import Iterator

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .shapes import is_same, shape_of
from .spelling import fake, name_of, read

MAXIMA = ("adaptive_max_pool2d", "amax")
POOLS = ("mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool2d", *MAXIMA)
# Nodes between a gate and its squeeze: seven as most networks write it, three times as many as some do.
_REACH = 32


def is_spatial(node: object) -> bool:
    """Whether a value has more axes than images and channels."""
    shape = shape_of(node)
    return shape is not None and not all(is_same(size, 1) for size in shape[2:])


def is_as_large(node: Node, x: Node) -> bool:
    """Whether a value has at least the elements of another."""
    tensor, whole = fake(node), fake(x)
    return tensor is not None and whole is not None and statically_known_true(tensor.numel() >= whole.numel())


def is_pool(node: Node, names: tuple[str, ...] = POOLS) -> bool:
    """Whether a node's value is a map's mean or maximum over its pixels."""
    op = read(node)
    return op.name in names and "norm" not in name_of(node) and is_spatial(op["input"]) and not is_spatial(node)


def behind(gate: Node, x: Node) -> Iterator[Node]:
    """The node and those that it is made of, back to inputs and to what has as many elements as x."""
    todo, seen = [gate], {gate}
    while todo and len(seen) < _REACH:
        node = todo.pop()
        yield node
        if node is not gate and is_as_large(node, x):
            continue
        parents = [parent for parent in node.all_input_nodes if parent.op.startswith("call") and parent not in seen]
        todo += parents
        seen.update(parents)
