"""How an operation may be spelled in a graph: as a function, a method, an operator or an aten overload, read alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

# Parameters by position. Names are the functions', without the underscore of those that write in place.
_UNARY = ("input", "inplace")
_SIGNATURES: dict[str, tuple[str, ...]] = {
    "adaptive_avg_pool2d": ("input", "output_size"),
    "adaptive_max_pool2d": ("input", "output_size"),
    "add": ("input", "other"),
    "addcmul": ("input", "tensor1", "tensor2"),
    "addmm": ("input", "mat1", "mat2"),
    "amax": ("input", "dim", "keepdim"),
    "avg_pool2d": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "batch_norm": (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
    ),
    "clamp": ("input", "min", "max"),
    "clone": ("input",),
    "contiguous": ("input",),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "div": ("input", "other"),
    "dropout": ("input", "p", "training", "inplace"),
    "einsum": ("equation", "input", "other"),
    "expand": ("input",),
    "expand_as": ("input", "other"),
    "flatten": ("input", "start_dim", "end_dim"),
    "gelu": ("input",),
    "getitem": ("input", "index"),
    "hardsigmoid": _UNARY,
    "hardswish": _UNARY,
    "hardtanh": ("input", "min_val", "max_val", "inplace"),
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "other"),
    "mean": ("input", "dim", "keepdim"),
    "mul": ("input", "other"),
    "relu": _UNARY,
    "relu6": _UNARY,
    "reshape": ("input",),
    "sigmoid": ("input",),
    "silu": _UNARY,
    "squeeze": ("input", "dim"),
    "unsqueeze": ("input", "dim"),
    "view": ("input",),
}  # fmt: skip
# aten's batch_norm and torch.batch_norm have another order than F.batch_norm.
_ATEN_BATCH_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_SYNONYMS = {
    "clip": "clamp",
    "iadd": "add",
    "imul": "mul",
    "itruediv": "div",
    "mm": "matmul",
    "multiply": "mul",
    "truediv": "div",
    "view_as": "expand_as",
}
_OPERATORS_IN_PLACE = {"iadd", "imul", "itruediv", "isub", "imatmul", "setitem"}
VIEWS = {"clone", "contiguous", "expand", "expand_as", "flatten", "getitem", "reshape", "squeeze", "unsqueeze", "view"}
# Reading a tensor's sizes is not reading the tensor.
_OF_SHAPE = {"dim", "numel", "shape", "size", "stride", "sym_size", "sym_numel", "sym_stride"}
_MODES = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode"}


@dataclass(frozen=True)
class Op:
    """What a node does, by its plain name, and its arguments by name; what was left out is absent."""

    name: str
    arguments: Mapping[str, Any]

    def __getitem__(self, argument: str) -> Any:
        return self.arguments.get(argument)


def name_of(node: Node) -> str:
    """The name of a function or method as written: relu_, iadd, mean; "" for what is neither."""
    if node.op == "call_method":
        return cast(str, node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__ if node.target.namespace == "aten" else ""
    module = getattr(node.target, "__module__", None) or "torch"
    is_known = module.split(".")[0] in ("torch", "_operator", "builtins")
    return str(getattr(node.target, "__name__", "")) if is_known else ""


def read(node: Any) -> Op:
    """The operation of a node; its name is "" for what is no operation known here."""
    if not isinstance(node, Node):
        return Op("", {})
    name = name_of(node)
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    name = _SYNONYMS.get(name, name)
    signature = _SIGNATURES.get(name)
    if signature is None:
        return Op("", {})
    if name == "batch_norm" and node.target is not torch.nn.functional.batch_norm:
        signature = _ATEN_BATCH_NORM
    positional = node.args
    if name == "einsum" and len(positional) == 2 and isinstance(positional[1], tuple | list):
        positional = (positional[0], *positional[1])
    arguments = dict(zip(signature, positional, strict=False)) | node.kwargs
    if "axis" in arguments:
        arguments["dim"] = arguments.pop("axis")
    return Op(name, arguments)


def changes(node: Node, value: Node) -> bool:
    """Whether the node writes into `value`, as far as its spelling tells."""
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = zip(node.target._schema.arguments, node.args, strict=False)
        return any(found is value and a.alias_info is not None and a.alias_info.is_write for a, found in arguments)
    name = name_of(node)
    if node.kwargs.get("out") is value:
        return True
    if not node.args or node.args[0] is not value:
        return False
    is_named_so = name in _OPERATORS_IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return is_named_so or bool(node.kwargs.get("inplace")) or bool(read(node)["inplace"])


def reads_shape(node: Node) -> bool:
    """Whether the node reads no more of its input than its sizes."""
    name = name_of(node)
    return name in _OF_SHAPE or (name == "getattr" and node.args[1] in ("shape", "device", "dtype", "ndim"))


def changes_mode(node: Node) -> bool:
    """Whether what follows runs under another grad mode or autocast."""
    return name_of(node) in _MODES


def fake(node: Any) -> Tensor | None:
    """The tensor without data that stands for a node's value: what Dynamo or torch.export found out about it."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, Tensor) else None


def number(value: Any) -> float | None:
    """A number, or what a symbolic one stands for, which the graph is then specialized to."""
    if isinstance(value, Node):
        value = value.meta.get("example_value", value.meta.get("val"))
    if isinstance(value, int | float | torch.SymFloat | torch.SymInt) and not isinstance(value, bool):
        return float(value)
    return None


def is_same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same whatever the symbols in them stand for."""
    return a is not None and b is not None and statically_known_true(a == b)


def same_shape(a: Any, b: Any) -> bool:
    """Whether the values of two nodes have the same shape."""
    x, y = fake(a), fake(b)
    return x is not None and y is not None and x.dim() == y.dim() and all(map(is_same, x.shape, y.shape))


def axes(dim: Any, node: Any) -> set[int]:
    """The axes that a reduction of a node's value is over, counted from the first."""
    tensor = fake(node)
    if tensor is None:
        return set()
    dims = range(tensor.dim()) if dim is None else dim if isinstance(dim, tuple | list) else (dim,)
    return {axis % tensor.dim() for axis in dims if isinstance(axis, int)}


def is_map(node: Any) -> bool:
    """Whether a node's value has the four axes of a feature map."""
    tensor = fake(node)
    return tensor is not None and tensor.dim() == 4


def vector_size(node: Any) -> Any:
    """K of a value (N, K), (N, K, 1) or (N, K, 1, 1); None for other values."""
    tensor = fake(node)
    if tensor is None or not 2 <= tensor.dim() <= 4 or not all(is_same(size, 1) for size in tensor.shape[2:]):
        return None
    return tensor.shape[1]


def is_full_slice(index: Any) -> bool:
    """Whether indexing takes all elements in their order, and adds axes at most."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)
