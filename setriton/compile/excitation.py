"""The excitation, read backwards: gate <- layer <- activation <- layer <- squeeze of the map."""

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from setriton.reference import ACTS

from .effects import value_of
from .layers import Layer, Refused, read_layer, refuse, told
from .pools import MAXIMA, POOLS, behind, is_pool
from .shapes import are_same, axes, is_map, is_vector_of, rank, same_dtype, same_shape, shape_of, vector
from .spelling import FLATTENED, VIEWS, Op, fake, is_full_slice, read


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
    reader = _Reader(x)
    excitation, squeezed = reader.read(gate)
    if squeezed is not x:
        raise Refused("the gate multiplies another map than the squeezed one")
    shape, fc1, fc2 = shape_of(x), excitation.fc1, excitation.fc2
    channels = None if shape is None else shape[1]
    if not are_same((fc1.inputs, fc1.outputs, fc2.outputs), (channels, fc2.inputs, channels)):
        sizes = f"{fc1.inputs} to {fc1.outputs} and {fc2.inputs} to {fc2.outputs} channels"
        raise Refused(f"layers of {sizes} for a map of {channels}")
    return excitation, reader.inner


class _Reader:
    """Walks back from the gate, and keeps the nodes it passes."""

    def __init__(self, x: Node) -> None:
        self.x = x
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
            op = read(node)
            if op.name in VIEWS:
                is_plain = op.name != "getitem" or is_full_slice(op["index"])
                passes = is_plain and are_same(vector(node), vector(op["input"])) and same_dtype(node, op["input"])
            else:
                passes = op.name == "dropout" and (op["training"] is False or op["p"] == 0)
            if not passes:
                return node
            self._take(node)
            node = op["input"]

    def _unexpanded(self, gate: Node) -> Node:
        op = read(gate)
        if op.name in ("expand", "expand_as") and same_shape(gate, self.x) and is_map(op["input"]):
            self._take(gate)
            gate = op["input"]
        if rank(gate) != 4 or vector(gate) is None:
            raise Refused("the gate is not one number a channel")
        if not is_vector_of(gate, self.x):
            raise Refused("the gate is not one number a channel of each image")
        return gate

    def _gate(self, node: Any) -> tuple[str, Any]:
        op = read(node)
        if op.name in ("sigmoid", "hardsigmoid"):
            self._take(node)
            return op.name, op["input"]
        # relu6(z + 3) / 6
        if (clipped_node := _divided(op)) is not None:
            clipped = read(clipped_node)
            shifted = read(clipped["input"])
            z = _other_operand(shifted, 3)
            if _clips_to_6(clipped) and shifted.name == "add" and z is not None:
                self._take(node, clipped_node, clipped["input"])
                return "hardsigmoid", z
        raise Refused(f"the gate is {told(node)}, not sigmoid or hardsigmoid")

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
        if read(node).name in POOLS:
            raise Refused(otherwise)
        try:
            layer, found, taken = read_layer(node, self._strip)
        except Refused:
            if read(node).name == "add":
                _refuse_sum(node, self.x)
            raise
        self._take(*taken)
        return layer, found

    def _squeezed(self, node: Any) -> Node:
        """The map that is squeezed, which has been one of vectors from here on."""
        op = read(node)
        if op.name in MAXIMA:
            raise Refused("the map is squeezed to its maximum")
        if op.name == "avg_pool2d" and not _covers_map(op):
            raise Refused("avg_pool2d over a part of the map")
        if op.name in ("adaptive_avg_pool2d", "avg_pool2d"):
            return self._pooled(node, op["input"])
        if op.name != "mean":
            if op.name == "add":
                _refuse_sum(node, self.x)
            refuse(node, "where a mean over height and width was expected")
        if op["dtype"] is not None:
            raise Refused(f"the mean is taken in {op['dtype']}")
        source, over = op["input"], axes(op["dim"], op["input"])
        if is_map(source) and over == {2, 3}:
            return self._pooled(node, source)
        before = read(source)
        whole, shape = shape_of(before["input"]), shape_of(source)
        if shape is None or whole is None or len(whole) != 4 or not same_dtype(source, before["input"]):
            raise Refused("the mean is not over height and width")
        if over == {2} and len(shape) == 3 and before.name in FLATTENED and are_same(whole[:2], shape[:2]):
            # The mean of what was flattened to (N, C, HW).
            self._take(source)
            return self._pooled(node, before["input"])
        if before.name == "mean" and before["dtype"] is None:
            # One axis after the other.
            first = axes(before["dim"], before["input"])
            second = over if before["keepdim"] else {axis + (axis >= min(first, default=0)) for axis in over}
            if first | second == {2, 3} and len(first) == len(second) == 1:
                self._take(source)
                return self._pooled(node, before["input"])
        raise Refused("the mean is not over height and width")

    def _pooled(self, node: Node, source: Any) -> Node:
        if not is_map(source) or vector(node) is None:
            raise Refused(f"{told(node)} to more than one pixel")
        if not is_vector_of(node, source):
            raise Refused(f"{told(node)} is not one number a channel of each image")
        self._take(node)
        return source


def _divided(op: Op) -> Node | None:
    """What is divided by 6."""
    if op.name == "div" and op["other"] == 6 and isinstance(op["input"], Node):
        return op["input"]
    if op.name == "mul":
        for node, factor in ((op["input"], op["other"]), (op["other"], op["input"])):
            if isinstance(node, Node) and isinstance(factor, float) and _is_a_sixth(factor, fake(node)):
                return node
    return None


def _is_a_sixth(factor: float, tensor: Tensor | None) -> bool:
    """Whether a product with the factor is one with 1 / 6: computed in float64, or in float32."""
    if tensor is None or tensor.dtype == torch.float64:
        return factor == 1 / 6
    return ctypes.c_float(factor).value == ctypes.c_float(1 / 6).value


def _other_operand(op: Op, number: float) -> Node | None:
    """The operand of a sum that is not the number."""
    for node, other in ((op["input"], op["other"]), (op["other"], op["input"])):
        if isinstance(node, Node) and type(other) in (int, float) and other == number:
            return node
    return None


def _clips_to_6(op: Op) -> bool:
    if op.name == "relu6":
        return True
    bounds = (op["min_val"], op["max_val"]) if op.name == "hardtanh" else (op["min"], op["max"])
    are_numbers = all(type(bound) in (int, float) for bound in bounds)
    is_clip = op.name == "hardtanh" or (op.name == "clamp" and _clamp_stops_at_bounds())
    return is_clip and are_numbers and bounds == (0, 6)


@functools.cache
def _clamp_stops_at_bounds() -> bool:
    """Whether clamp has gradient 0 at its bounds as relu6 has; torch 2.11 has 1, and a gate may start at a bound."""
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        z = torch.tensor([0.0, 6.0], requires_grad=True)
        return not torch.autograd.grad(z.clamp(0, 6).sum(), z)[0].any()


def _covers_map(op: Op) -> bool:
    """Whether the kernel of an average pool is as large as the map."""
    kernel, shape = value_of(op["kernel_size"]), shape_of(op["input"])
    if shape is None or len(shape) != 4 or kernel is None:
        return False
    sizes = tuple(kernel) if isinstance(kernel, tuple | list) else (kernel, kernel)
    return are_same(sizes * (3 - len(sizes)), shape[2:])


def _refuse_sum(node: Node, x: Node) -> None:
    """Name the kin of SE that add a second squeeze, or its excitation, to the first."""
    if any(is_pool(found, MAXIMA) for found in behind(node, x)):
        raise Refused("the map's maximum is added to its mean")
