"""The two layers of an excitation: which are linear over channels, and what their weights and biases are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.fx import Node

from .shapes import are_same, is_same, rank, shape_of, vector
from .spelling import Op, name_of, read

# Paddings that leave a 1x1 convolution of one pixel as it is.
_NO_PADDING = (None, 0, (0, 0), [0, 0], (0,), [0], "valid", "same")


class Refused(Exception):
    """What looks like an SE block is none, or none that can be replaced; the message says why."""


@dataclass(frozen=True)
class Layer:
    """A linear layer: weight (out, in), (out, in, 1, 1) or, transposed, (in, out); bias of any shape, or None."""

    weight: Node
    bias: Node | None
    transposed: bool
    inputs: Any
    outputs: Any


def read_layer(node: Any, strip: Callable[[Any], Any]) -> tuple[Layer, Node, list[Node]]:
    """The layer that ends in a node, the node of its input, and its nodes.

    Args:
        node: what may be a layer's result, or its sum with a bias.
        strip: finds what is behind views of a vector.

    Raises:
        Refused: it is none.
    """
    taken, bias, op = [node], None, read(node)
    if op.name == "add":
        for product, added in ((op["input"], op["other"]), (op["other"], op["input"])):
            if _is_bias(added, node) and vector(product) is not None:
                taken, bias, node = [node], added, strip(product)
                break
        op = read(node)
    if not isinstance(node, Node):
        refuse(node, "between squeeze and gate")
    found, weight, of_layer, transposed = _operands(op, node)
    before, after, rows = vector(found), vector(node), shape_of(weight)
    if rows is None or before is None or after is None or not is_same(before[0], after[0]):
        raise Refused(f"{told(node)} over other axes than the channels")
    if bias is not None and of_layer is not None:
        raise Refused("a layer with two biases")
    outputs, inputs = rows[:2][::-1] if transposed else rows[:2]
    if not (is_same(inputs, before[1]) and is_same(outputs, after[1])):
        raise Refused(f"{told(node)} over other axes than the channels")
    if of_layer is not None and not _has_shape(of_layer, [(outputs,), (1, outputs)]):
        raise Refused(f"{told(node)} adds another tensor than a bias")
    layer = Layer(weight, of_layer if bias is None else bias, transposed, inputs, outputs)
    return layer, found, [*taken, node]


def told(node: Any) -> str:
    """What a node does, in a word."""
    return (name_of(node) or node.name) if isinstance(node, Node) else repr(node)


def refuse(node: Any, where: str) -> NoReturn:
    """Raise Refused for a node that is not expected there."""
    raise Refused(f"{told(node)} {where}")


def _operands(op: Op, node: Node) -> tuple[Any, Any, Any, bool]:
    """Input, weight, bias, and whether the weight is (in, out)."""
    if op.name == "conv2d" and rank(op["weight"]) == 4:
        if op["groups"] not in (None, 1):
            raise Refused("a grouped convolution in the gate")
        shape = shape_of(op["weight"])
        if shape is None or not are_same(shape[2:], (1, 1)) or op["padding"] not in _NO_PADDING:
            raise Refused("a spatial convolution in the gate")
        if rank(op["input"]) == 4:
            return op["input"], op["weight"], op["bias"], False
    if op.name == "linear" and rank(op["input"]) == rank(op["weight"]) == 2:
        return op["input"], op["weight"], op["bias"], False
    if op.name == "matmul" and rank(op["input"]) == rank(op["other"]) == 2:
        return op["input"], op["other"], None, True
    if op.name == "addmm" and rank(op["mat1"]) == rank(op["mat2"]) == 2:
        return op["mat1"], op["mat2"], op["input"], True
    if op.name == "einsum":
        return _operands_of_einsum(op)
    if op.name == "gelu":
        raise Refused(f"gelu with approximate={op['approximate']!r}")
    if "norm" in name_of(node):
        raise Refused("a normalization between the layers")
    refuse(node, "between squeeze and gate")


def _operands_of_einsum(op: Op) -> tuple[Any, Any, Any, bool]:
    """Of nc,rc->nr and the like: letters of the weight are one of the input's and one of the output's."""
    equation = str(op["equation"]).replace(" ", "")
    terms, _, output = equation.partition("->")
    letters = terms.split(",")
    if len(letters) == 2 and output and "." not in equation:
        for (found, of_input), (weight, of_weight) in (
            ((op["input"], letters[0]), (op["other"], letters[1])),
            ((op["other"], letters[1]), (op["input"], letters[0])),
        ):
            # The batch is the first letter of the input and of the output, channels are the second.
            if of_input[:1] != output[:1] or of_input[2:] != output[2:] or len(of_weight) != 2:
                continue
            if len(set(of_input + output[1:2])) != len(of_input) + 1:
                continue
            if set(of_weight) == {of_input[1:2], output[1:2]}:
                return found, weight, None, of_weight[1] == output[1]
    raise Refused(f"einsum {equation} in the gate")


def _is_bias(node: Any, layer: Any) -> bool:
    """Whether a tensor holds one number for each output of a layer, along the axis of channels."""
    sizes = vector(layer)
    if sizes is None or not isinstance(node, Node) or rank(layer) == 3:
        return False
    ones = (1,) * (rank(layer) - 2)
    shapes = [(sizes[1], *ones), (1, sizes[1], *ones)]
    return _has_shape(node, shapes)


def _has_shape(node: Any, shapes: list[tuple[Any, ...]]) -> bool:
    return any(are_same(shape_of(node), shape) for shape in shapes)
