"""How an operation may be spelled in a graph: as a function, a method, an operator or an aten overload, read alike.

An operation is known by the function that it is, not by its name, and only if each of its arguments is known too.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

_ZERO = (0, (0, 0), [0, 0])


@dataclass(frozen=True)
class _Signature:
    """Parameters by position, then those by name alone, and the only values that some may have.

    Names are the functions', without the underscore of those that write in place.
    """

    names: tuple[str, ...]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    by_name: tuple[str, ...] = ()
    takes_more: bool = False


def _of(names: str, by_name: str = "", takes_more: bool = False, **fixed: tuple[Any, ...]) -> _Signature:
    return _Signature(tuple(names.split()), fixed, tuple(by_name.split()), takes_more)


_UNARY = _of("input inplace")
_REDUCTION = _of("input dim keepdim", by_name="dtype")
_SIGNATURES: dict[str, _Signature] = {
    "adaptive_avg_pool1d": _of("input output_size"),
    "adaptive_avg_pool2d": _of("input output_size"),
    "adaptive_avg_pool3d": _of("input output_size"),
    "adaptive_max_pool2d": _of("input output_size return_indices", return_indices=(False,)),
    "add": _of("input other", by_name="alpha", alpha=(1,)),
    "addcmul": _of("input tensor1 tensor2", by_name="value", value=(1,)),
    "addmm": _of("input mat1 mat2", by_name="alpha beta", alpha=(1,), beta=(1,)),
    "amax": _of("input dim keepdim"),
    "avg_pool2d": _of("input kernel_size stride padding ceil_mode count_include_pad divisor_override",
                      padding=_ZERO, divisor_override=(None,)),
    "batch_norm": _of("input running_mean running_var weight bias training momentum eps"),
    "clamp": _of("input min max"),
    "clone": _of("input", by_name="memory_format"),
    "contiguous": _of("input", by_name="memory_format"),
    "conv2d": _of("input weight bias stride padding dilation groups"),
    "div": _of("input other", by_name="rounding_mode", rounding_mode=(None,)),
    "dropout": _of("input p training inplace"),
    "einsum": _of("equation input other"),
    "expand": _of("input", by_name="implicit", takes_more=True),
    "expand_as": _of("input other"),
    "flatten": _of("input start_dim end_dim"),
    "gelu": _of("input approximate"),
    "getitem": _of("input index"),
    "hardsigmoid": _UNARY,
    "hardswish": _UNARY,
    "hardtanh": _of("input min_val max_val inplace"),
    "linear": _of("input weight bias"),
    "matmul": _of("input other"),
    "mean": _REDUCTION,
    "mul": _of("input other"),
    "relu": _UNARY,
    "relu6": _UNARY,
    "reshape": _of("input", by_name="shape", takes_more=True),
    "sigmoid": _of("input"),
    "silu": _UNARY,
    "squeeze": _of("input dim"),
    "sum": _REDUCTION,
    "unsqueeze": _of("input dim"),
    "view": _of("input", by_name="size", takes_more=True),
}  # fmt: skip
# aten's batch_norm and torch.batch_norm have another order than F.batch_norm; the last says which library computes.
_ATEN_BATCH_NORM = _of("input weight bias running_mean running_var training momentum eps cudnn_enabled")
_SYNONYMS = {
    "clip": "clamp",
    "divide": "div",
    "iadd": "add",
    "imul": "mul",
    "itruediv": "div",
    "mm": "matmul",
    "multiply": "mul",
    "true_divide": "div",
    "truediv": "div",
    "view_as": "expand_as",
}
_ALIASES = {"axis": "dim", "self": "input", "end_dim": "end_dim", "train": "training"}
_LIBRARIES = (torch, F, torch.Tensor, operator, torch._C._nn)
_OPERATORS_IN_PLACE = {"iadd", "imul", "itruediv", "isub", "imatmul", "setitem"}
VIEWS = {"clone", "contiguous", "expand", "expand_as", "flatten", "getitem", "reshape", "squeeze", "unsqueeze", "view"}
# Views and copies that hold as many elements as their input, in the same order.
FLATTENED = {"flatten", "reshape", "view"}
# Reading a tensor's sizes is not reading the tensor.
_OF_SHAPE = {"dim", "numel", "shape", "size", "sym_size", "sym_numel"}


@dataclass(frozen=True)
class Op:
    """What a node does, by its plain name, and its arguments by name; what was left out is absent."""

    name: str
    arguments: Mapping[str, Any]

    def __getitem__(self, argument: str) -> Any:
        return self.arguments.get(argument)


_UNKNOWN = Op("", {})


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
    """The operation of a node; its name is "" for what is no operation known here, or has an argument unknown here."""
    if not isinstance(node, Node) or not _is_the_function(node, written := name_of(node)):
        return _UNKNOWN
    name = written[:-1] if written.endswith("_") and not written.endswith("__") else written
    name = _SYNONYMS.get(name, name)
    signature = _SIGNATURES.get(name)
    if name == "batch_norm" and node.target is not F.batch_norm:
        signature = _ATEN_BATCH_NORM
    positional = node.args
    if name == "einsum" and len(positional) == 2 and isinstance(positional[1], tuple | list):
        positional = (positional[0], *positional[1])
    if signature is None or (len(positional) > len(signature.names) and not signature.takes_more):
        return _UNKNOWN
    arguments = dict(zip(signature.names, positional, strict=False))
    arguments |= {_ALIASES.get(key, key): value for key, value in node.kwargs.items()}
    if not arguments.keys() <= {*signature.names, *signature.by_name}:
        return _UNKNOWN
    for key, values in signature.fixed.items():
        if key in arguments and not _is_one_of(arguments[key], values):
            return _UNKNOWN
    return Op(name, arguments)


def changes(node: Node, value: Node) -> bool:
    """Whether the node writes into `value`, as far as its spelling tells: where no values are known."""
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
    """Whether the node reads no more of its input than its sizes, or its dtype and device."""
    name = name_of(node)
    return name in _OF_SHAPE or (name == "getattr" and node.args[1] in ("shape", "device", "dtype", "ndim"))


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


def is_full_slice(index: Any) -> bool:
    """Whether indexing takes all elements in their order, and adds axes at most."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or (isinstance(part, slice) and part == slice(None)) for part in parts)


def _is_the_function(node: Node, name: str) -> bool:
    if node.op == "call_method" or isinstance(node.target, torch._ops.OpOverload):
        return True
    return bool(name) and any(getattr(library, name, None) is node.target for library in _LIBRARIES)


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    return any(value is other or (type(value) in (int, float, tuple, list) and value == other) for other in values)
