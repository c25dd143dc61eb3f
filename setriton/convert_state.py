"""What a forward can read of a module besides its input: classes, attributes, which layers and tensors there are."""

import enum
import types
from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import parametrize

from .stock import BatchNorm2d, SyncBatchNorm, is_stock, must_call, why_all, why_called

OF_MODULE = frozenset(vars(nn.Module()))
_OWN = len(OF_MODULE)
# Set on modules by what goes on to call their forward, or instead of it.
_NOT_READ = {"forward", "_compiled_call_impl", *OF_MODULE}
# Whose classes nobody changes; those of torch that matter are looked at by `must_call`.
_FIXED = ("torch", "builtins", "setriton", "typing", "abc")
_UNCALLED = ("__init__", "__repr__", "extra_repr")
_SIMPLE = (
    bool, int, float, complex, str, bytes, types.NoneType, enum.Enum, type, torch.dtype, torch.device, torch.layout,
    torch.memory_format, types.FunctionType, types.BuiltinFunctionType,
)  # fmt: skip
_MISSING = object()


class Left(Exception):
    """What looks like an SE block or its tail cannot be replaced; the message says why."""


class Unread(Left):
    """A module cannot be looked into, so that what it computes is not known."""


class Read(NamedTuple):
    """What a fused forward takes for granted of one module that it does without.

    Attributes:
        path: of names, from the fused module; () is that module itself.
        kind: the class.
        attributes: their names and frozen values; None where the fused forward reads them as they are at the call.
        children: those that are there, all of them.
        absent: names of children, parameters and buffers that are None.
        tensors: how many parameters and buffers there are, None among them.
        asked: names in the code of its class that are no attributes of it yet.
    """

    path: tuple[str, ...]
    kind: type
    attributes: tuple[tuple[str, Any], ...] | None
    children: tuple[str, ...]
    absent: tuple[str, ...]
    tensors: int
    asked: tuple[str, ...]


def freeze(value: Any) -> Any:
    """A value that can be hashed and compared: containers as tuples.

    Raises:
        TypeError: it is an object whose changes could not be seen.
    """
    if isinstance(value, _SIMPLE):
        return value
    if type(value) in (tuple, list, torch.Size):
        return tuple(map(freeze, value))
    if type(value) in (set, frozenset):
        return frozenset(map(freeze, value))
    if type(value) in (dict, OrderedDict):
        return tuple((freeze(key), freeze(item)) for key, item in value.items())
    raise TypeError(type(value).__name__)


def kind_of(module: nn.Module) -> type:
    """The class of a module, or that which it had before it was fused."""
    recipe = vars(type(module)).get("recipe")
    return type(module) if recipe is None else recipe[0]


def attributes_of(module: nn.Module, path: str) -> tuple[tuple[str, Any], ...]:
    """What a module holds besides children, parameters, buffers and its mode, frozen.

    Raises:
        Unread: something that cannot be frozen.
    """
    found = []
    for name, value in vars(module).items():
        if name in OF_MODULE or name == "forward" or _is_process_group(name, value):
            continue
        try:
            found.append((name, freeze(value)))
        except TypeError as error:
            raise Unread(f"{path or 'it'} holds {name}, in it a {error}, whose changes would not be seen") from None
    return tuple(found)


def reads_of(module: nn.Module, called: Container[str]) -> tuple[Read, ...]:
    """What the forward of a module can read of itself and of its descendants but those at the paths `called`.

    Raises:
        Left: two of its parameters or buffers are one, which could change.
    """
    _require_untied(_bypassed(module, "", called))
    return tuple(
        Read(
            tuple(path.split(".")) if path else (),
            kind_of(child),
            None if _is_read_at_call(child) else attributes_of(child, path),
            tuple(name for name, layer in child._modules.items() if layer is not None),
            tuple(_absent(child)),
            len(child._parameters) + len(child._buffers),
            tuple(sorted(_asked_in_vain(child))),
        )
        for path, child in _bypassed(module, "", called)
    )


def is_as_read(module: nn.Module, reads: tuple[Read, ...], x: Any) -> bool:
    """Whether all is still as `reads` says, and no layer that a fused forward does without has to be called."""
    if must_call(x):
        return False
    for path, kind, attributes, children, absent, tensors, asked in reads:
        child: Any = module
        for name in path:
            child = child._modules.get(name)
        if path and not is_stock(child, kind):
            return False
        if attributes is not None:
            has = child.__dict__
            for name, value in attributes:
                found = has.get(name, _MISSING)
                if found is not value and not _is_same(found, value):
                    return False
            if _has_more(child, attributes, asked):
                return False
            if len(child._parameters) + len(child._buffers) != tensors and not parametrize.is_parametrized(child):
                return False
        layers = child._modules
        if len(layers) != len(children) and _added_children(child, children, absent):
            return False
        for name in children:
            if layers.get(name) is None:
                return False
        for name in absent:
            if layers.get(name) is not None or (attributes is not None and child._parameters.get(name) is not None):
                return False
    return True


def why_changed(module: nn.Module, reads: tuple[Read, ...], x: Any) -> str:
    """Of what `is_as_read` found, the first, in words."""
    if must_call(x):
        return why_all(x)
    for path, kind, attributes, children, absent, *_ in reads:
        name = ".".join(path)
        child: Any = module
        for part in path:
            child = child and child._modules.get(part)
        if child is None:
            return f"{name} is gone"
        if path and (reason := why_called(child, kind)) is not None:
            return f"{name}: {reason}"
        for attribute, value in attributes or ():
            if not _is_same(vars(child).get(attribute, _MISSING), value):
                return f"{name}.{attribute} is not {value!r} any more".removeprefix(".")
        added = [] if attributes is None else _added(child, attributes)
        if added := [*added, *_added_children(child, children, absent)]:
            return f"{name}.{min(added)} was added".removeprefix(".")
    return "its layers are not those that it had"


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Equal for two modules whose forwards compute the same of the same tensors.

    Raises:
        Unread: a module holds what cannot be compared.
    """
    seen: dict[int, int] = {}

    def tensors(found: dict[str, torch.Tensor | None], values: bool) -> tuple[Any, ...]:
        return tuple(
            (name, None if t is None else (_identity(t), type(t), t.shape, t.dtype, _integers(t) if values else None))
            for name, t in found.items()
        )

    def _identity(value: object) -> int:
        return seen.setdefault(id(value), len(seen))

    return tuple(
        (
            path,
            _identity(child),
            type(child),
            child.training,
            attributes_of(child, path),
            tensors(child._parameters, False),
            tensors(child._buffers, not isinstance(child, nn.modules.batchnorm._NormBase)),
            _absent(child),
            hooked(child),
        )
        for path, child in module.named_modules(remove_duplicate=False)
    )


def hooked(module: nn.Module) -> bool:
    """Whether anything is to happen when the module is called that its class does not say."""
    return "forward" in vars(module) or why_called(module, type(module)) is not None


def _bypassed(module: nn.Module, path: str, called: Container[str]) -> Iterator[tuple[str, nn.Module]]:
    if path and path in called:
        return
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _bypassed(child, f"{path}.{name}".strip("."), called)


def methods_of(kind: type) -> dict[tuple[type, str], Any]:
    """What a class and its bases outside of torch define, but for what no call comes to."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in _FIXED]
    return {
        (base, name): value
        for base in bases
        for name, value in vars(base).items()
        if isinstance(value, types.FunctionType | property | staticmethod | classmethod) and name not in _UNCALLED
    }


def _asked_in_vain(module: nn.Module) -> set[str]:
    """Names in the code of its class that are no attributes of a module, or its class's."""
    kind = kind_of(module)
    names = {name for name in _names_in_code(kind) if name.isidentifier()} - vars(module).keys() - _NOT_READ
    return {name for name in names if hasattr(kind, name) or not hasattr(module, name)}


def _names_in_code(kind: type) -> set[str]:
    """Names of attributes in it, those that are given to getattr among them."""
    found: set[str] = set()
    for method in methods_of(kind).values():
        function = getattr(method, "fget", getattr(method, "__func__", method))
        codes = [function.__code__] if isinstance(function, types.FunctionType) else []
        while codes:
            code = codes.pop()
            found |= {*code.co_names, *(value for value in code.co_consts if isinstance(value, str))}
            codes += [value for value in code.co_consts if isinstance(value, types.CodeType)]
    return found


def _has_more(module: nn.Module, attributes: tuple[tuple[str, Any], ...], asked: tuple[str, ...]) -> bool:
    """Whether a module has attributes that it had not."""
    has = module.__dict__
    if is_dynamo_compiling():  # which neither counts nor walks through them in torch 2.11, and guards hasattr alone
        return any(name in has if hasattr(type(module), name) else hasattr(module, name) for name in asked)
    return len(has) != len(attributes) + _OWN and bool(_added(module, attributes))


def _added(module: nn.Module, attributes: tuple[tuple[str, Any], ...]) -> list[str]:
    """Attributes of a module that are in neither list."""
    known = _NOT_READ.union(name for name, _ in attributes)
    return [name for name, value in vars(module).items() if name not in known and not _is_process_group(name, value)]


def _added_children(module: nn.Module, children: tuple[str, ...], absent: tuple[str, ...]) -> list[str]:
    return [name for name in module._modules if name not in (*children, *absent, "parametrizations")]


def _require_untied(modules: Iterator[tuple[str, nn.Module]]) -> None:
    names: dict[int, str] = {}
    for path, module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                here = f"{path}.{name}".strip(".")
                if (there := names.setdefault(id(tensor), here)) != here:
                    raise Left(f"{there} and {here} are one tensor")


def _absent(module: nn.Module) -> tuple[str, ...]:
    found = {**module._parameters, **module._buffers, **module._modules}
    return tuple(name for name, value in found.items() if value is None)


def _integers(tensor: torch.Tensor) -> Any:
    """The numbers of an index or a mask, which copies keep; of a large one that it is none but itself."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta:
        return None
    return tuple(tensor.detach().flatten().tolist()) if tensor.numel() <= 64 else id(tensor)


def _is_process_group(name: str, value: object) -> bool:
    return name == "process_group" and type(value).__module__.startswith("torch.")


def _is_read_at_call(module: nn.Module) -> bool:
    """BN's momentum, eps and the like are arguments of the fused call."""
    return isinstance(module, BatchNorm2d | SyncBatchNorm)


def _is_same(value: Any, frozen: Any) -> bool:
    if type(value) is tuple and value == frozen:
        return True
    if isinstance(value, _SIMPLE):
        return bool(value == frozen)
    try:
        return bool(freeze(value) == frozen)
    except TypeError:
        return False
