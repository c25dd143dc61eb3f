"""What is known of shapes, whatever the symbols in them stand for."""

from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .spelling import fake


def is_same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same whatever the symbols in them stand for."""
    return a is not None and b is not None and statically_known_true(a == b)


def are_same(a: Any, b: Any) -> bool:
    """Whether two sequences of sizes are the same."""
    return a is not None and b is not None and len(a) == len(b) and all(map(is_same, a, b))


def same_shape(a: Any, b: Any) -> bool:
    """Whether the values of two nodes have the same shape."""
    return are_same(shape_of(a), shape_of(b))


def same_dtype(a: Any, b: Any) -> bool:
    """Whether the values of two nodes have the same dtype."""
    x, y = fake(a), fake(b)
    return x is not None and y is not None and x.dtype == y.dtype


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """Of a node's value; None where it is no tensor."""
    tensor = fake(node)
    return None if tensor is None else tuple(tensor.shape)


def rank(node: Any) -> int:
    """The number of axes of a node's value; -1 where it is no tensor."""
    tensor = fake(node)
    return -1 if tensor is None else tensor.dim()


def axes(dim: Any, node: Any) -> set[int]:
    """The axes that a reduction of a node's value is over, counted from the first."""
    n_axes = rank(node)
    dims = range(n_axes) if dim is None else dim if isinstance(dim, tuple | list) else (dim,)
    if n_axes < 1 or not all(type(axis) is int for axis in dims):
        return set()
    return {axis % n_axes for axis in dims}


def is_map(node: Any) -> bool:
    """Whether a node's value has the four axes of a feature map."""
    return rank(node) == 4


def vector(node: Any) -> tuple[Any, Any] | None:
    """(N, K) of a value (N, K), (N, K, 1) or (N, K, 1, 1); None for other values."""
    shape = shape_of(node)
    if shape is None or not 2 <= len(shape) <= 4 or not all(is_same(size, 1) for size in shape[2:]):
        return None
    return shape[0], shape[1]


def is_vector_of(node: Node, x: Node) -> bool:
    """Whether a node's value is one number for each image and channel of a map."""
    shape = shape_of(x)
    return shape is not None and are_same(vector(node), shape[:2])
