"""What scales or shifts a map by what was made of its own mean, and is no SE block: seen, so that it can be told."""

from torch.fx import Node

from .pools import behind, is_pool, is_spatial
from .shapes import is_same, rank, shape_of
from .spelling import name_of, read


def kin(node: Node, x: Node, gate: Node) -> str | None:
    """What a product, or a sum, of a map and something is, where that is made of a pooled map by way of vectors.

    Returns:
        Why it is no SE block; None where it has nothing to do with one.
    """
    op = read(gate)
    if op.name in ("expand", "expand_as") and isinstance(op["input"], Node):
        gate = op["input"]
    shape = shape_of(gate)
    if shape is None or not 3 <= rank(x) <= 5 or rank(x) != len(shape) or not is_spatial(x):
        return None
    pools, layers, contexts = _made_of(gate, x)
    is_vector = not is_spatial(gate)
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


def _made_of(gate: Node, x: Node) -> tuple[bool, bool, bool]:
    """Whether pooled maps, layers over channels, and sums weighted by attention are behind a gate."""
    pools = layers = contexts = False
    for node in behind(gate, x):
        name = name_of(node)
        is_product = name in ("matmul", "mm", "bmm", "addmm", "einsum")
        pools |= is_pool(node)
        layers |= not is_spatial(node) and ("conv" in name or "linear" in name or is_product)
        contexts |= is_product and rank(node) > 2
    return pools, layers, contexts
