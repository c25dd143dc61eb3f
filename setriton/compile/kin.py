"""What scales or shifts a map by what was made of its own mean, and is no SE block: seen, so that it can be told."""

from collections.abc import Iterator

from torch.fx import Node

from .excitation import POOLS
from .shapes import is_same, rank, shape_of
from .spelling import name_of, read

_POOLS = (*POOLS, "adaptive_avg_pool1d", "adaptive_avg_pool3d")
# Nodes between a gate and its squeeze: seven as most networks write it, three times as many as some do.
_REACH = 32


def kin(node: Node, x: Node, gate: Node) -> str | None:
    """What a product, or a sum, of a map and something is, where that is made of a pooled map by way of vectors.

    Returns:
        Why it is no SE block; None where it has nothing to do with one.
    """
    op = read(gate)
    if op.name in ("expand", "expand_as") and isinstance(op["input"], Node):
        gate = op["input"]
    shape = shape_of(gate)
    if shape is None or not 3 <= rank(x) <= 5 or rank(x) != len(shape) or not _is_spatial(x):
        return None
    pools, layers, contexts = _made_of(gate)
    is_vector = not _is_spatial(gate)
    if read(node).name == "add":
        return "what is made of the map's context is added to it" if is_vector and layers and contexts else None
    if rank(x) == 4:
        return "the gate is another than an SE block's" if is_vector and (pools or (layers and contexts)) else None
    if not (pools and layers):
        return None
    if is_vector:
        return f"a map of {rank(x)} axes, not 4"
    if rank(x) == 5 and all(is_same(size, 1) for size in shape[3:]):
        return "a gate for each of several branches"
    return None


def _made_of(gate: Node) -> tuple[bool, bool, bool]:
    """Whether pooled maps, layers over channels, and sums weighted by attention are behind a gate."""
    pools = layers = contexts = False
    for node in _behind(gate):
        name = name_of(node)
        is_product = name in ("matmul", "mm", "bmm", "addmm", "einsum")
        is_pool = read(node).name in _POOLS and "norm" not in name
        pools |= is_pool and _is_spatial(node.args[0]) and not _is_spatial(node)
        layers |= not _is_spatial(node) and ("conv" in name or "linear" in name or is_product)
        contexts |= is_product and rank(node) > 2
    return pools, layers, contexts


def _behind(gate: Node) -> Iterator[Node]:
    """The node and those that it is made of, back to the maps and the inputs."""
    todo, seen = [gate], {gate}
    while todo and len(seen) < _REACH:
        node = todo.pop()
        yield node
        if _is_spatial(node) and node is not gate:
            continue
        parents = [parent for parent in node.all_input_nodes if parent.op.startswith("call") and parent not in seen]
        todo += parents
        seen.update(parents)


def _is_spatial(node: object) -> bool:
    """Whether a value has more axes than images and channels."""
    shape = shape_of(node)
    return shape is not None and not all(is_same(size, 1) for size in shape[2:])
