"""What the code of a forward reaches outside its module: read before it is run, so that a trial run changes nothing.

A copy of a module holds copies of all that the module holds. What its code reaches otherwise, by a global, a closure,
a default argument or a class, is the user's own, and would be read once where the module reads it at each call.
"""

import builtins
import dis
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from .convert_state import Left

# Modules that hold nothing which a forward could change, or which could be changed between two calls.
_PURE_MODULES = {"math", "operator", "typing", "collections", "functools", "itertools"}
_PURE_BUILTINS = {
    "abs", "all", "any", "bool", "callable", "complex", "dict", "divmod", "enumerate", "filter", "float", "frozenset",
    "getattr", "hasattr", "int", "isinstance", "issubclass", "len", "list", "map", "max", "min", "pow", "range", "repr",
    "reversed", "round", "set", "slice", "sorted", "str", "sum", "super", "tuple", "type", "zip", "property",
    "NotImplemented", "Ellipsis", "__debug__",
}  # fmt: skip
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__", "__setattr__")


def require_own(module: nn.Module) -> None:
    """Left where running the module, or a descendant, could read or change what is not the module's own."""
    for path, child in module.named_modules():
        reader = _Reader()
        try:
            for name in _CALLS:
                method = getattr(type(child), name)
                if method is not getattr(nn.Module, name) and not _is_of_torch(method):
                    raise Left(f"has a {name} of its own")
            reader.read_method(child, "forward")
            for name, value in vars(child).items():
                if getattr(value, "__self__", None) is child:
                    value = value.__func__
                if isinstance(value, types.FunctionType) or name == "forward":
                    reader.judge(child, name, value)
        except Left as reason:
            raise Left(f"{path or 'it'} {reason}") from None


class _Reader:
    """Follows the functions that a forward calls, as far as names tell; torch's are trusted."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def read_method(self, module: nn.Module, name: str) -> None:
        for kind in type(module).__mro__:
            if name in vars(kind) and kind.__module__.partition(".")[0] not in ("torch", "builtins"):
                self._read_attribute(module, name, vars(kind)[name])

    def judge(self, module: nn.Module, name: str, value: Any, names: frozenset[str] = frozenset()) -> None:
        """Left unless a value that is reached from outside can neither change nor be changed."""
        if isinstance(value, types.ModuleType):
            self._judge_module(module, value, names)
        elif isinstance(value, types.FunctionType):
            self._read_function(module, value)
        elif isinstance(value, types.MethodType):
            if not _is_of_torch(value):
                raise Left(f"calls {name} of an object that is not its own")
        elif isinstance(value, type):
            for attribute in names & vars(value).keys() if not _is_of_torch(value) else ():
                if not callable(vars(value)[attribute]):
                    raise Left(f"reads {name}.{attribute}")
        elif not (_is_of_torch(value) or _is_builtin(value)):
            raise Left(f"reads {name}, a {type(value).__name__} that is not its own")

    def _read_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        value = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(value, types.FunctionType):
            self._read_function(module, value)
        elif not isinstance(value, type):
            raise Left(f"reads {name}, which its class holds")

    def _read_function(self, module: nn.Module, function: types.FunctionType) -> None:
        if _is_of_torch(function) or id(function) in self.seen:
            return
        self.seen.add(id(function))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not isinstance(value, bool | int | float | str | tuple | type | types.NoneType):
                self.judge(module, "a default argument", value)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for code in _codes(function.__code__):
            instructions = list(dis.get_instructions(code))
            names = frozenset(i.argval for i in instructions if "ATTR" in i.opname or "METHOD" in i.opname)
            for name in names:
                if isinstance(name, str):
                    self.read_method(module, name)
            before = None
            for instruction in instructions:
                self._read_instruction(module, function, cells, instruction, before, names)
                before = instruction

    def _read_instruction(
        self,
        module: nn.Module,
        function: types.FunctionType,
        cells: dict[str, types.CellType],
        instruction: dis.Instruction,
        before: dis.Instruction | None,
        names: frozenset[str],
    ) -> None:
        op, name = instruction.opname, instruction.argval
        if op in ("STORE_GLOBAL", "DELETE_GLOBAL") or (op in ("STORE_DEREF", "DELETE_DEREF") and name in cells):
            raise Left(f"sets {name}, which is not its own")
        if op in ("STORE_ATTR", "DELETE_ATTR") and not _loads_self(before):
            raise Left(f"sets {name} of an object")
        if op == "IMPORT_NAME" and not _is_pure(name):
            raise Left(f"imports {name}")
        if op in ("LOAD_GLOBAL", "LOAD_NAME"):
            scope = function.__globals__
            if name in scope or hasattr(builtins, name):
                self.judge(module, name, scope.get(name, getattr(builtins, name, None)), names)
        elif "DEREF" in op and name in cells and name != "__class__":
            self.judge(module, name, cells[name].cell_contents, names)

    def _judge_module(self, module: nn.Module, found: types.ModuleType, names: frozenset[str]) -> None:
        if _is_pure(found.__name__):
            if "distributed" in names or found.__name__.startswith("torch.distributed"):
                raise Left("asks torch.distributed")
            return
        if found.__name__ in vars(builtins) or hasattr(found, "__file__") is False:
            raise Left(f"uses {found.__name__}")
        for name in names & vars(found).keys():
            self.judge(module, f"{found.__name__}.{name}", vars(found)[name], names)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_pure(name: str) -> bool:
    return name.partition(".")[0] in _PURE_MODULES | {"torch"} and not name.startswith("torch.distributed")


def _is_of_torch(value: Any) -> bool:
    """Whether a function, or the class of a value, is written in torch; wrappers carry the name of what they wrap."""
    if isinstance(value, types.MethodType):
        return _is_of_torch(type(value.__self__))
    module = value.__globals__["__name__"] if isinstance(value, types.FunctionType) else None
    if module is None:
        module = getattr(value if isinstance(value, type) else type(value), "__module__", None) or ""
        if isinstance(value, types.BuiltinFunctionType):
            module = value.__module__ or type(value.__self__).__module__
    return str(module).partition(".")[0] in ("torch", "torch_C") or str(module).startswith("torch.")


def _is_builtin(value: Any) -> bool:
    if isinstance(value, types.BuiltinFunctionType):
        module = value.__module__ or ""
        return value.__name__ in _PURE_BUILTINS if module == "builtins" else module in _PURE_MODULES | {"_operator"}
    return value is NotImplemented or value is Ellipsis


def _loads_self(instruction: dis.Instruction | None) -> bool:
    if instruction is None or "LOAD_FAST" not in instruction.opname:
        return False
    name = instruction.argval
    return (name[-1] if isinstance(name, tuple) else name) == "self"
