"""The excitation, read backwards: gate <- layer <- activation <- layer <- squeeze of the map."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.fx import Node

from setriton.reference import ACTS

from .spelling import VIEWS, Op, axes, fake, is_full_slice, is_map, is_same, name_of, read, vector_size

_MAXIMA = ("adaptive_max_pool2d", "amax")
_POOLS = ("mean", "adaptive_avg_pool2d", "avg_pool2d", *_MAXIMA)
# Nodes between a gate and its squeeze: seven as most networks write it, three times as many as some do.
_REACH = 32


class Refused(Exception):
    """What looks like an SE block is none, or none that can be replaced; the message says why."""


@dataclass(frozen=True)
class Layer:
    """A linear layer: weight (out, in), (out, in, 1, 1) or, transposed, (in, out); bias of any shape, or None."""

    weight: Node
    bias: Node | None
    transposed: bool
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Excitation:
    """gate(fc2(act(fc1(squeezed))))."""

    fc1: Layer
    fc2: Layer
    act: str
    gate: str


def read_excitation(gate: Node, x: Node) -> tuple[Excitation, set[Node]]:
    """The excitation that ends in `gate` and squeezes x, and all its nodes.

    Raises:
        Refused: it is no SE block's.
    """
    reader = _Reader()
    excitation, squeezed = reader.read(gate)
    if squeezed is not x:
        raise Refused("the gate multiplies another map than the squeezed one")
    tensor, fc1, fc2 = fake(x), excitation.fc1, excitation.fc2
    channels = None if tensor is None else tensor.shape[1]
    if (fc1.inputs, fc1.outputs, fc2.outputs) != (channels, fc2.inputs, channels):
        sizes = f"{fc1.inputs} to {fc1.outputs} and {fc2.inputs} to {fc2.outputs} channels"
        raise Refused(f"layers of {sizes} for a map of {channels}")
    return excitation, reader.inner


def looks_squeezed(gate: Node) -> bool:
    """Whether a node's value is made of a pooled map by way of vectors alone, as in an attention over channels."""
    if vector_size(gate) is None and read(gate).name not in ("expand", "expand_as"):
        return False
    return any(_is_pool(node, _POOLS) for node in _behind(gate))


def _behind(gate: Node) -> Iterator[Node]:
    """The node and those that it is made of, back to the maps and the inputs."""
    todo, seen = [gate], {gate}
    while todo and len(seen) < _REACH:
        node = todo.pop()
        yield node
        if is_map(node) and vector_size(node) is None and node is not gate:
            continue
        parents = [parent for parent in node.all_input_nodes if parent.op.startswith("call") and parent not in seen]
        todo += parents
        seen.update(parents)


def _is_pool(node: Node, names: tuple[str, ...]) -> bool:
    op = read(node)
    return op.name in names and is_map(op["input"]) and vector_size(node) is not None


class _Reader:
    """Walks back from the gate, and keeps the nodes it passes."""

    def __init__(self) -> None:
        self.inner: set[Node] = set()

    def read(self, gate: Node) -> tuple[Excitation, Node]:
        node = self._strip(self._unexpanded(gate))
        gate_name, node = self._gate(node)
        fc2, node = self._layer(node, "no layer between squeeze and gate")
        act, node = self._act(node)
        fc1, node = self._layer(node, "one layer only")
        return Excitation(fc1, fc2, act, gate_name), self._squeezed(self._strip(node))

    def _take(self, *nodes: Node) -> None:
        self.inner.update(nodes)

    def _strip(self, node: Any) -> Any:
        """What is behind views of one and the same vector, and dropout that drops nothing."""
        while True:
            op, size = read(node), vector_size(node)
            if op.name in VIEWS:
                is_plain = op.name != "getitem" or is_full_slice(op["index"])
                passes = is_plain and size is not None and is_same(size, vector_size(op["input"]))
            else:
                passes = op.name == "dropout" and (op["training"] is False or op["p"] == 0)
            if not passes:
                return node
            self._take(node)
            node = op["input"]

    def _unexpanded(self, gate: Node) -> Node:
        op, tensor = read(gate), fake(gate)
        if op.name in ("expand", "expand_as") and vector_size(gate) is None and is_map(op["input"]):
            self._take(gate)
            gate, tensor = op["input"], fake(op["input"])
        if tensor is None or tensor.dim() != 4 or vector_size(gate) is None:
            raise Refused("the gate is not one number a channel")
        return gate

    def _gate(self, node: Any) -> tuple[str, Any]:
        op = read(node)
        if op.name in ("sigmoid", "hardsigmoid"):
            self._take(node)
            return op.name, op["input"]
        # relu6(z + 3) / 6
        clipped = read(op["input"])
        shifted = read(clipped["input"])
        is_over_6 = (op.name == "div" and op["other"] == 6) or (
            op.name == "mul" and isinstance(op["other"], float) and abs(6 * op["other"] - 1) < 1e-6
        )
        if is_over_6 and _clips_to_6(clipped) and shifted.name == "add" and shifted["other"] == 3:
            self._take(node, op["input"], clipped["input"])
            return "hardsigmoid", shifted["input"]
        raise Refused(f"the gate is {_told(node)}, not sigmoid or hardsigmoid")

    def _act(self, node: Any) -> tuple[str, Any]:
        node = self._strip(node)
        op = read(node)
        if op.name in ACTS and op["approximate"] in (None, "none"):
            self._take(node)
            return op.name, op["input"]
        if op.name == "mul":
            for z, s in ((op["input"], op["other"]), (op["other"], op["input"])):
                if read(s).name == "sigmoid" and read(s)["input"] is z:
                    self._take(node, s)
                    return "silu", z
        return "identity", node

    def _layer(self, node: Any, otherwise: str) -> tuple[Layer, Any]:
        """A layer, and the node of its input; `otherwise` says what is wrong if the squeeze comes first."""
        node = self._strip(node)
        bias, op = None, read(node)
        if op.name == "add":
            for product, added in ((op["input"], op["other"]), (op["other"], op["input"])):
                if _is_bias(added, node):
                    self._take(node)
                    node, bias = self._strip(product), added
                    break
            op = read(node)
        if op.name in _POOLS:
            raise Refused(otherwise)
        found, weight, of_layer, transposed = _operands(op, node)
        rows = fake(weight)
        if rows is None or vector_size(found) is None or vector_size(node) is None:
            raise Refused(f"{_told(node)} over other axes than the channels")
        if bias is not None and of_layer is not None:
            raise Refused("a layer with two biases")
        self._take(node)
        outputs, inputs = rows.shape[:2][::-1] if transposed else rows.shape[:2]
        return Layer(weight, of_layer if bias is None else bias, transposed, inputs, outputs), found

    def _squeezed(self, node: Any) -> Node:
        """The map that is squeezed, which has been one of vectors from here on."""
        op = read(node)
        if op.name in _MAXIMA:
            raise Refused("the map is squeezed to its maximum")
        if op.name == "avg_pool2d" and not _covers_map(op):
            raise Refused("avg_pool2d over a part of the map")
        if op.name in ("adaptive_avg_pool2d", "avg_pool2d"):
            return self._pooled(node, op["input"])
        if op.name != "mean":
            _refuse(node, "where a mean over height and width was expected")
        if op["dtype"] is not None:
            raise Refused(f"the mean is taken in {op['dtype']}")
        source, over = op["input"], axes(op["dim"], op["input"])
        if is_map(source) and over == {2, 3}:
            return self._pooled(node, source)
        tensor, before = fake(source), read(source)
        if (
            tensor is not None
            and over == {2}
            and tensor.dim() == 3
            and before.name in VIEWS
            and is_map(before["input"])
        ):
            # The mean of what was flattened to (N, C, HW).
            whole = fake(before["input"])
            if whole is not None and is_same(whole.shape[1], tensor.shape[1]):
                self._take(source)
                return self._pooled(node, before["input"])
        if before.name == "mean" and before["dtype"] is None and is_map(before["input"]):
            # One axis after the other.
            first = axes(before["dim"], before["input"])
            second = over if before["keepdim"] else {axis + (axis >= min(first)) for axis in over}
            if first | second == {2, 3} and len(first) == len(second) == 1:
                self._take(source)
                return self._pooled(node, before["input"])
        raise Refused("the mean is not over height and width")

    def _pooled(self, node: Node, source: Any) -> Node:
        if not is_map(source) or vector_size(node) is None:
            raise Refused(f"{_told(node)} to more than one pixel")
        self._take(node)
        return source


def _operands(op: Op, node: Any) -> tuple[Any, Any, Any, bool]:
    """Input, weight, bias, and whether the weight is (in, out)."""
    weight = fake(op["weight"])
    if op.name == "conv2d" and weight is not None:
        if op["groups"] not in (None, 1):
            raise Refused("a grouped convolution in the gate")
        if tuple(weight.shape[2:]) != (1, 1) or op["padding"] not in (None, 0, (0, 0), [0, 0], "valid", "same"):
            raise Refused("a spatial convolution in the gate")
        return op["input"], op["weight"], op["bias"], False
    if op.name == "linear" and _is_matrix(op["input"]):
        return op["input"], op["weight"], op["bias"], False
    if op.name == "matmul" and _is_matrix(op["input"]) and _is_matrix(op["other"]):
        return op["input"], op["other"], None, True
    if op.name == "addmm" and op["alpha"] in (None, 1) and op["beta"] in (None, 1):
        return op["mat1"], op["mat2"], op["input"], True
    if op.name == "einsum":
        return _operands_of_einsum(op)
    if op.name == "gelu":
        raise Refused(f"gelu with approximate={op['approximate']!r}")
    if "norm" in name_of(node):
        raise Refused("a normalization between the layers")
    _refuse(node, "between squeeze and gate")


def _operands_of_einsum(op: Op) -> tuple[Any, Any, Any, bool]:
    """Of nc,rc->nr and the like: letters of the weight are one of the input's and one of the output's."""
    equation = str(op["equation"]).replace(" ", "")
    terms, _, output = equation.partition("->")
    letters = terms.split(",")
    if len(letters) == 2 and output:
        for (found, of_input), (weight, of_weight) in (
            ((op["input"], letters[0]), (op["other"], letters[1])),
            ((op["other"], letters[1]), (op["input"], letters[0])),
        ):
            # The batch is the first letter of the input and of the output, channels are the second.
            if of_input[:1] != output[:1] or of_input[2:] != output[2:] or len(of_weight) != 2:
                continue
            if set(of_weight) == {of_input[1:2], output[1:2]} and of_input[0] not in of_weight:
                return found, weight, None, of_weight[1] == output[1]
    raise Refused(f"einsum {equation} in the gate")


def _is_bias(node: Any, layer: Any) -> bool:
    """Whether a tensor holds one number for each output of a layer, along the axis of channels."""
    bias, result, size = fake(node), fake(layer), vector_size(layer)
    if bias is None or result is None or size is None:
        return False
    shapes = ([size], [1, size]) if result.dim() == 2 else ([size, 1, 1], [1, size, 1, 1])
    return list(bias.shape) in shapes


def _is_matrix(node: Any) -> bool:
    tensor = fake(node)
    return tensor is not None and tensor.dim() == 2


def _clips_to_6(op: Op) -> bool:
    if op.name == "relu6":
        return True
    bounds = (op["min_val"], op["max_val"]) if op.name == "hardtanh" else (op["min"], op["max"])
    return op.name in ("hardtanh", "clamp") and bounds == (0, 6)


def _covers_map(op: Op) -> bool:
    """Whether the kernel of an average pool is as large as the map, and nothing is padded."""
    kernel, tensor = op["kernel_size"], fake(op["input"])
    if tensor is None or tensor.dim() != 4 or op["padding"] not in (None, 0, (0, 0), [0, 0]):
        return False
    sizes = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
    return op["divisor_override"] is None and all(map(is_same, sizes * (3 - len(sizes)), tensor.shape[2:]))


def _told(node: Any) -> str:
    return (name_of(node) or node.name) if isinstance(node, Node) else repr(node)


def _refuse(node: Any, where: str) -> NoReturn:
    if read(node).name == "add" and any(_is_pool(found, _MAXIMA) for found in _behind(node)):
        raise Refused("the map's maximum is added to its mean")
    raise Refused(f"{_told(node)} {where}")
