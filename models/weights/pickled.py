"""A pickle read as data: what it would call is looked at and never called, no name in it is imported.

Only what a checkpoint is made of is understood: dictionaries, lists, numbers, strings, and tensors by the names of the
functions that would rebuild them. Anything else that a pickle wants to call makes it refused.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MARK = object()

_MAPPINGS = {
    "collections OrderedDict",
    "collections defaultdict",
    "collections Counter",
    "builtins dict",
    "__builtin__ dict",
}
# What lies in checkpoints beside the tensors, and does nothing here: it is kept as a name.
_INERT = {
    "argparse Namespace",
    "types SimpleNamespace",
    "copyreg _reconstructor",
    "copy_reg _reconstructor",
    "_codecs encode",
    *(f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("object", "set", "frozenset", "list")),
    *(
        f"{module} {name}"
        for module in ("builtins", "__builtin__")
        for name in ("bytearray", "complex", "slice", "int")
    ),
    *(f"pathlib {name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    *(f"datetime {name}" for name in ("datetime", "date", "timedelta")),
    *(f"numpy{core}.multiarray {name}" for core in (".core", "._core") for name in ("scalar", "_reconstruct")),
    *(f"numpy{core}.numeric _frombuffer" for core in (".core", "._core")),
    *(f"numpy {name}" for name in ("dtype", "ndarray", "float64", "float32", "int64", "bool_")),
    *(f"torch {name}" for name in ("Size", "device", "Tensor", "Generator", "strided", "contiguous_format")),
    *("torch channels_last", "torch preserve_format", "torch.torch_version TorchVersion"),
    *("torch.serialization _get_layout", "torch.nn.parameter Parameter", "torch.nn.parameter Buffer"),
}


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    path: str
    """Module and name, with a space between."""


@dataclass(frozen=True)
class Call:
    """What a pickle would have got from a call."""

    function: str
    arguments: tuple[Any, ...]


class Reader:
    """Bytes as a file, without a copy: no length that a file claims makes it read more than there is."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.position = content, 0

    def read(self, size: int) -> bytes:
        start, self.position = self.position, min(self.position + size, len(self.content))
        return bytes(self.content[start : self.position])

    def readline(self) -> bytes:
        line = bytes(self.content[self.position : self.position + 4096])
        return self.read(line.find(b"\n") + 1 or len(line))

    def tell(self) -> int:
        return self.position


def read_pickle(reader: Reader, tensors: Callable[[str], bool], stored: Callable[[Any], object]) -> Any:
    """What one pickle holds.

    Args:
        reader: at the pickle's first byte; then behind its last.
        tensors: whether a function or class, "module name", is one of those that tensors are made with.
        stored: what stands for the storage of a persistent id.

    Returns:
        The object. Dictionaries have those of their entries whose keys are strings; what is called is a `Call`.

    Raises:
        ValueError: it is damaged.
        MoreThanTensors: it names something else than tensors, containers and numbers.
    """
    machine = _Machine(tensors, stored)
    for opcode, argument, _ in pickletools.genops(reader):  # type: ignore[arg-type] # it asks for read, readline, tell
        step = _STEPS.get(opcode.name)
        if step is None:
            raise ValueError(f"a pickle with {opcode.name}")
        step(machine, argument)
    return machine.pop()


class MoreThanTensors(ValueError):
    """A pickle names what is no part of a checkpoint."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it holds more than tensors, and such a pickle can run any code (it names {name[:200]})")


class _Machine:
    """The stack and the memory of a pickle."""

    def __init__(self, tensors: Callable[[str], bool], stored: Callable[[Any], object]) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.tensors, self.stored = tensors, stored

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its stack is empty")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """All that was pushed since the last mark."""
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise ValueError("a mark is missing")

    def name(self, path: str) -> None:
        if path not in _MAPPINGS and path not in _INERT and not self.tensors(path):
            raise MoreThanTensors(path.replace(" ", "."))
        self.stack.append(Name(path))

    def call(self, function: object, arguments: object) -> None:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no function")
        if function.path not in _MAPPINGS:
            self.stack.append(Call(function.path, arguments))
            return
        entries = arguments[0] if arguments and isinstance(arguments[0], list) else []
        found: dict[str, Any] = {}
        _insert(found, [item for pair in entries for item in pair])
        self.stack.append(found)

    def set_items(self, items: list[Any]) -> None:
        target = self.pop()
        # Entries of what is no dictionary here, a `Call`, are part of what is not looked at.
        if isinstance(target, dict):
            _insert(target, items)
        self.stack.append(target)

    def append(self, items: list[Any]) -> None:
        target = self.pop()
        if isinstance(target, list):
            target.extend(items)
        self.stack.append(target)

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"it recalls number {index}, which it has not memorised")
        self.stack.append(self.memo[index])

    def memorise(self, index: int) -> None:
        self.memo[index] = self.pop()
        self.stack.append(self.memo[index])


def _insert(target: dict[str, Any], items: list[Any]) -> None:
    """Keys and values in turn; other keys than strings are no names of tensors (and may take for ever to hash)."""
    if len(items) % 2:
        raise ValueError("a key has no value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str):
            if key in target:
                raise ValueError(f"a dictionary has the key {key[:200]!r} twice")
            target[key] = value


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _tuple(size: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: Any) -> None:
        machine.stack.append(tuple(reversed([machine.pop() for _ in range(size)])))

    return step


def _reduce(machine: _Machine, _: Any) -> None:
    arguments = machine.pop()
    machine.call(machine.pop(), arguments)


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _new_object_with_keywords(machine: _Machine, _: Any) -> None:
    machine.pop()
    _reduce(machine, None)


def _stack_name(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(f"{module} {name}")


def _items(machine: _Machine) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _insert(found, machine.pop_to_mark())
    return found


_CONSTANTS = (
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_CONSTANTS, _push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "POP": lambda machine, _: machine.stack.pop() if machine.stack else None,
    "POP_MARK": lambda machine, _: machine.pop_to_mark().clear(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "EMPTY_TUPLE": _tuple(0),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "DICT": lambda machine, _: machine.stack.append(_items(machine)),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "EMPTY_SET": lambda machine, _: machine.stack.append(Call("builtins set", ())),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "FROZENSET": lambda machine, _: machine.stack.append(Call("builtins frozenset", tuple(machine.pop_to_mark()))),
    "GLOBAL": lambda machine, argument: machine.name(argument),
    "STACK_GLOBAL": _stack_name,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_object_with_keywords,
    # Attributes of a container, such as the versions in a state dict.
    "BUILD": lambda machine, _: machine.pop() and None,
    "BINPERSID": lambda machine, _: machine.stack.append(machine.stored(machine.pop())),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda machine, index: machine.memorise(index)),
    "MEMOIZE": lambda machine, _: machine.memorise(len(machine.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.recall(index)),
}
