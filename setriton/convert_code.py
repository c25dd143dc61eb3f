"""What the code of a forward reaches outside its module: read before it is run, so that a trial run changes nothing.

A copy of a module holds copies of all that the module holds. What its code reaches otherwise, by a global, a closure,
a default argument or a class, is the user's own, and would be read once where the module reads it at each call.
"""

import builtins
import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch.overrides
from torch import nn
from torch._jit_internal import is_scripting

from .convert_state import OF_MODULE, Left, Unread

# Modules that hold nothing which a forward could change, or which could be changed between two calls.
_PURE_MODULES = {"math", "operator", "typing", "collections", "functools", "itertools"}
_PURE_BUILTINS = {
    "abs", "all", "any", "bool", "callable", "complex", "dict", "divmod", "enumerate", "filter", "float", "frozenset",
    "getattr", "hasattr", "int", "isinstance", "issubclass", "len", "list", "map", "max", "min", "pow", "range", "repr",
    "reversed", "round", "set", "slice", "sorted", "str", "sum", "super", "tuple", "type", "zip", "property",
    "NotImplemented", "Ellipsis", "__debug__",
}  # fmt: skip
# What calls, copies or reads a module, and could be code of a user's.
_SPECIAL = (
    "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__", "__setattr__", "__delattr__",
    "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__", "__del__", "train",
    "named_modules", "named_parameters", "named_buffers", "parameters", "modules", "zero_grad", "_apply",
)  # fmt: skip
# What they hand out is the module's own tensors and children as they are, which a copy's are not: all in float64, each
# with a gradient.
_ALL_OF_MODULE = {
    "parameters", "named_parameters", "buffers", "named_buffers", "children", "named_children", "modules",
    "named_modules", "state_dict", "__dict__", "_parameters", "_buffers", "_modules",
}  # fmt: skip
_TRUSTED = {"torch", "setriton"}
# Modules of torch that hold nothing but functions, classes and constants.
_FUNCTIONAL = {"torch", "torch.nn", "torch.nn.functional", "torch.linalg", "torch.special", "torch.jit", "torch.amp"}
# Take no tensor, and answer always alike while a module runs.
_CONSTANT_FUNCTIONS = (torch._assert, torch.is_tensor, is_scripting)
_CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def require_own(module: nn.Module) -> None:
    """Unread where running the module, or a descendant, could read or change what is not the module's own."""
    for path, child in module.named_modules():
        reader = _Reader()
        try:
            for name in _SPECIAL:
                method = getattr(type(child), name, None)
                if method is not getattr(nn.Module, name, None) and not _is_of_torch(method):
                    raise Left(f"has a {name} of its own")
            for name in _implicit(type(child)):
                reader.read_method(child, name)
            for name, value in vars(child).items():
                if name in OF_MODULE:
                    continue  # such as hooks, which copies have not
                for function in _functions(child, value):
                    reader.judge(child, name, function)
        except Left as reason:
            raise Unread(f"{path or 'it'} {reason}") from None


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
            raise Left(f"calls {name} of an object that is not its own")
        elif isinstance(value, type):
            for attribute in names & vars(value).keys() if not _is_of_torch(value) else ():
                if not callable(vars(value)[attribute]):
                    raise Left(f"reads {name}.{attribute}")
        elif not (isinstance(value, _CONSTANTS) or _is_builtin(value)):
            raise Left(f"reads {name}, a {type(value).__name__} that is not its own")

    def _judge_of_torch(self, name: str, value: Any) -> None:
        """Left where a function of torch may answer otherwise than it did, as those do that ask for modes."""
        if isinstance(value, types.ModuleType):
            if value.__name__ not in _FUNCTIONAL:
                raise Left(f"asks {value.__name__}")
        elif callable(value) and not isinstance(value, type) and id(value) not in _functions_of_tensors():
            raise Left(f"calls {name}, whose answer may change")

    def _read_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        value = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(value, types.FunctionType):
            self._read_function(module, value)
        elif not isinstance(value, type):
            raise Left(f"reads {name}, which its class holds")

    def _read_function(self, module: nn.Module, function: types.FunctionType) -> None:
        if id(function) in self.seen:
            return
        self.seen.add(id(function))
        if _is_of_torch(function):
            # Such as torch.no_grad() around a function of another's.
            wrapped = getattr(function, "__wrapped__", None)
            if isinstance(wrapped, types.FunctionType):
                self._read_function(module, wrapped)
            elif function.__globals__["__name__"].partition(".")[0] == "torch" and "." not in function.__qualname__:
                self._judge_of_torch(function.__name__, function)
            return
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not isinstance(value, bool | int | float | str | tuple | type | types.NoneType):
                self.judge(module, "a default argument", value)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for code in _codes(function.__code__):
            instructions = list(dis.get_instructions(code))
            names = frozenset(i.argval for i in instructions if "ATTR" in i.opname or "METHOD" in i.opname)
            for i, instruction in enumerate(instructions):
                if instruction.opname == "LOAD_GLOBAL" and instruction.argval == "getattr":
                    names |= _named(instructions[i + 1 : i + 3])
            if asked := sorted(_ALL_OF_MODULE & names):
                raise Left(f"asks for all its {asked[0]}")
            for name in names:
                if isinstance(name, str):
                    self.read_method(module, name)
            for before, instruction in zip([None, *instructions], instructions, strict=False):
                self._read_instruction(module, function, cells, instruction, before, names)

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
            if found.__name__.partition(".")[0] == "torch":
                self._judge_of_torch(found.__name__, found)
                for name in names & vars(found).keys():
                    self._judge_of_torch(f"{found.__name__}.{name}", vars(found)[name])
                    if isinstance(vars(found)[name], types.ModuleType):
                        self._judge_module(module, vars(found)[name], names - {name})
            return
        if found.__name__ in vars(builtins) or hasattr(found, "__file__") is False:
            raise Left(f"uses {found.__name__}")
        for name in names & vars(found).keys():
            self.judge(module, f"{found.__name__}.{name}", vars(found)[name], names)


@functools.cache
def _functions_of_tensors() -> frozenset[int]:
    """Identities of torch's functions that answer by their arguments: it knows those that take tensors."""
    overridable = torch.overrides.get_overridable_functions().values()
    stateless = (f for f in vars(F).values() if callable(f))
    return frozenset(map(id, (*(f for found in overridable for f in found), *stateless, *_CONSTANT_FUNCTIONS)))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _named(arguments: list[dis.Instruction]) -> set[str]:
    """The name that getattr is given.

    Raises:
        Left: it is computed.
    """
    name = arguments[-1].argval if arguments and arguments[-1].opname == "LOAD_CONST" else None
    if not isinstance(name, str):
        raise Left("computes the name of an attribute")
    return {name}


def _is_pure(name: str) -> bool:
    return name.partition(".")[0] in _PURE_MODULES | {"torch"} and not name.startswith("torch.distributed")


def _implicit(kind: type) -> Iterator[str]:
    """The methods that a call of a module may come to without naming them: forward, __getitem__, __iter__."""
    unused = ("__init__", "__repr__", "__str__", "__module__", "__doc__", "__dict__", "__weakref__", "__annotations__")
    names = {name for base in kind.__mro__ for name, value in vars(base).items() if callable(value)}
    yield from (name for name in names if name == "forward" or (name.startswith("__") and name not in unused))


def _functions(module: nn.Module, value: Any) -> Iterator[Any]:
    """The functions in an attribute of a module, such as its own forward or a list of them."""
    if isinstance(value, types.MethodType):
        yield value.__func__ if value.__self__ is module else value
    elif isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, tuple | list | set | frozenset | dict):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            if not isinstance(item, nn.Module):
                yield from _functions(module, item)


def _is_of_torch(value: Any) -> bool:
    """Whether a function or class is written in torch, or here; wrappers carry the name of what they wrap."""
    if isinstance(value, types.FunctionType):
        home = value.__globals__["__name__"]
    else:
        home = getattr(value if isinstance(value, type) else type(value), "__module__", None) or ""
    return str(home).partition(".")[0] in _TRUSTED


def _is_builtin(value: Any) -> bool:
    """Whether a value is a function written in C that changes nothing but its arguments, or a constant."""
    if isinstance(value, types.BuiltinFunctionType):
        home = value.__module__ or type(value.__self__).__module__
        if home == "builtins":
            return value.__name__ in _PURE_BUILTINS
        if home.partition(".")[0] == "torch":
            return id(value) in _functions_of_tensors()
        return home.partition(".")[0] in {"torch", "_operator", *_PURE_MODULES}
    if type(value).__module__ in ("torch._ops", "torch.library", "torch._jit_internal"):
        return True
    return value is NotImplemented or value is Ellipsis


def _loads_self(instruction: dis.Instruction | None) -> bool:
    if instruction is None or "LOAD_FAST" not in instruction.opname:
        return False
    name = instruction.argval
    return (name[-1] if isinstance(name, tuple) else name) == "self"
