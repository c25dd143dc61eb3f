"""Whether a layer may be read instead of called: its class, and nothing else, says what it computes.

A fused forward takes the parameters of layers and calls none of them. That is right only where the call would do what
the class does: adapters, pruning, hooks, observers, sharding and other classes all act on the call. So a fused forward
asks first, at each call, and keeps nothing from one call to the next:

    if not must_call(x) and is_stock(self.fc1, Conv2d) and is_stock(self.fc2, Conv2d):
        return fused(...)                           # reads parameters, by weight_and_bias(self.fc1)
    report_calls(self, {"fc1": why_called(self.fc1, Conv2d), "fc2": why_called(self.fc2, Conv2d)}, x)
    return x * gate(self.fc2(act(self.fc1(...))))   # calls the children one after the other

The classes are torch's own, from here: what `torch.nn.Conv2d` names may be exchanged, as libraries of quantization do.
The check is a few look-ups, 0.5 us a layer; `weight_and_bias` saves 1 us beside two attributes of an nn.Module.
"""

import logging
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy
from torch.nn.modules import module as _module
from torch.nn.modules.activation import ReLU as ReLU
from torch.nn.modules.batchnorm import BatchNorm2d as BatchNorm2d
from torch.nn.modules.batchnorm import SyncBatchNorm as SyncBatchNorm
from torch.nn.modules.conv import Conv2d as Conv2d
from torch.nn.utils import parametrize

_M = TypeVar("_M", bound=nn.Module)
_log = logging.getLogger("setriton")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TRACKER = "torch.utils.module_tracker"
# functional_call puts plain tensors where parameters are.
_PLAIN = frozenset((nn.Parameter, Tensor, type(None)))
# Attributes that a class, its parameters or its buffers have, and a call would find in the instance first.
_OF_CALL = (
    "forward", "_conv_forward", "_check_input_dim", "_call_impl", "_wrapped_call_impl", "weight", "bias",
    "running_mean", "running_var", "num_batches_tracked",
)  # fmt: skip
# How many entries an instance of a class has: where there are as many, nothing was added. A fifth of the time of a look
# for each name. (Dynamo of torch 2.11 cannot count them.)
_SIZES: dict[type, int] = {}


def _methods() -> tuple[Any, ...]:
    """What calls of layers come to. (Calls themselves are exchanged by torch.export and others that watch.)"""
    return Conv2d.forward, Conv2d._conv_forward, BatchNorm2d.forward, SyncBatchNorm.forward, ReLU.forward


_METHODS = _methods()
_derived: dict[type, type] = {}
_reported: set[tuple[str, str]] = set()


def is_stock(module: Any, kind: type[_M]) -> TypeGuard[_M]:
    """Whether `module` computes what `kind` does from its own parameters and attributes, and calling it does no more.

    Its class is `kind` itself, or that of a `kind` with parametrizations (`torch.nn.utils.parametrize`), or one that
    `declare_stock` names. It has no hooks, no methods of its own, and was not compiled by itself; its parameters and
    buffers are registered and plain, no subclass such as DTensor. What acts on all modules is `must_call`'s.
    """
    if type(module) is not kind and not _stands_for(module, kind):
        return False
    has = module.__dict__
    return (
        not (has["_forward_hooks"] or has["_forward_pre_hooks"] or has["_backward_hooks"] or has["_backward_pre_hooks"])
        and ((not is_dynamo_compiling() and len(has) == _SIZES.get(kind)) or not _own(module, kind))
        and module._compiled_call_impl is None
        and (not has["_parameters"] or _are_plain(has["_parameters"]))
        and (not has["_buffers"] or _are_plain(has["_buffers"]))
    )


def must_call(x: Any) -> bool:
    """Whether every layer has to be called: something acts on all calls, or `x` on all functions that it is given to.

    Hooks on all modules, exchanged methods of torch's classes, and a proxy of a symbolic trace: a trace that reads
    parameters could not follow `training`, and quantization would find no layers in it.
    """
    return (
        (type(x) not in _PLAIN and (is_traced(x) or _overrides_functions(type(x))))
        or bool(
            (
                _module._global_forward_hooks
                or _module._global_forward_pre_hooks
                or _module._global_backward_hooks
                or _module._global_backward_pre_hooks
            )
            and _is_watched()
        )
        or _are_patched()
    )


def why_called(module: Any, kind: type[nn.Module]) -> str | None:
    """Why `module` is not stock, as in "with hooks"; None if it is."""
    if is_stock(module, kind):
        return None
    if type(module) is not kind and not _stands_for(module, kind):
        return f"a {type(module).__module__}.{type(module).__qualname__}"
    if any(getattr(module, name) for name in _HOOKS):
        return "with hooks"
    if own := _own(module, kind):
        return f"with a {min(own)} of its own"
    if module._compiled_call_impl is not None:
        return "compiled by itself"
    tensors = {**module._parameters, **module._buffers}
    names = (f"with a {type(t).__name__} as {name}" for name, t in tensors.items() if not _are_plain({name: t}))
    return next(names)


def report_calls(owner: nn.Module, reasons: Mapping[str, str | None], x: Any) -> None:
    """Say once, for each class and reason, why `owner` calls its layers one after the other.

    Args:
        owner: the module whose forward it is.
        reasons: what `why_called` says of its layers, by name.
        x: what `must_call` was asked.
    """
    found = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if must_call(x):
        found.append(why_all(x))
    _report(type(owner).__name__, "; ".join(found))


def why_all(x: Any) -> str:
    """Why `must_call`."""
    if is_traced(x):
        return "torch.fx traces it"
    if type(x) not in _PLAIN and _overrides_functions(type(x)):
        return f"its input is a {type(x).__name__}, which changes what torch's functions do"
    return "methods of torch's classes were exchanged" if _are_patched() else "hooks are registered for all modules"


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Those of a stock layer: registered, or computed by parametrizations."""
    own: Any = layer._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    parametrized: Any = layer
    return parametrized.weight, parametrized.bias


def is_traced(x: Any) -> bool:
    """Whether `x` is a proxy of `torch.fx.symbolic_trace`, and no tensor."""
    return isinstance(x, Proxy)


def leaf(module: nn.Module, x: Any) -> Any:
    """The call of `module` itself in the graph that is being traced, whose forward then sees sizes and `training`.

    None where the graph is that of the module itself.
    """
    tracer: Any = x.tracer
    return (
        None if module is tracer.root else tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})
    )


def count_entries(layer: nn.Module) -> None:
    """Know how many entries an unchanged instance of a class has; to be asked of a new one."""
    _SIZES[type(layer)] = len(vars(layer))


def declare_stock(derived: type[nn.Module], original: type[nn.Module]) -> None:
    """Let modules of class `derived` count as those of `original`, whose forward they have."""
    _derived[derived] = original


def _is_watched() -> bool:
    """Whether a hook on all modules is other than those that note which module runs, as FlopCounterMode has."""
    every = (
        _module._global_forward_hooks,
        _module._global_forward_pre_hooks,
        _module._global_backward_hooks,
        _module._global_backward_pre_hooks,
    )
    return any(getattr(hook, "__module__", None) != _TRACKER for hooks in every for hook in hooks.values())


def _own(module: Any, kind: type) -> list[str]:
    """What an instance holds in the place of its class's methods, its parameters or its buffers."""
    found = [name for name in _OF_CALL if name in module.__dict__]
    if kind in _SIZES:
        return found
    # Such as a flag `bias` of another class, which is nothing else's.
    return [n for n in found if hasattr(kind, n) or n in module._parameters or n in module._buffers]


def _overrides_functions(kind: type) -> bool:
    """Whether tensors of a class are asked what torch's functions do to them."""
    function = getattr(kind, "__torch_function__", None)
    return function is not torch._C._disabled_torch_function_impl and not _is_of_tracer(kind)


def _are_patched() -> bool:
    """Whether somebody exchanged a method of torch's classes, so that calling a layer does something else."""
    return _methods() != _METHODS


def _stands_for(module: Any, kind: type[nn.Module]) -> bool:
    if not isinstance(module, kind):
        return False
    plain = parametrize.type_before_parametrizations(module)
    return plain is kind or _derived.get(plain) is kind


def _are_plain(tensors: Mapping[str, Tensor | None]) -> bool:
    kinds = map(type, tensors.values())
    return _PLAIN.issuperset(kinds) or all(type(t) in _PLAIN or _is_of_tracer(type(t)) for t in tensors.values())


def _is_of_tracer(kind: type) -> bool:
    """Tensors that export and AOTAutograd put in the place of plain ones."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return issubclass(kind, FakeTensor | FunctionalTensor)


def _report(owner: str, reason: str) -> None:
    if (owner, reason) not in _reported:
        _reported.add((owner, reason))
        _log.warning("%s calls its layers one after the other instead of one fused operator: %s", owner, reason)


# Dynamo runs it while it traces, as torch.compiler.assume_constant_result says, which imports all of Dynamo.
_report._dynamo_marked_constant = True  # type: ignore[attr-defined]
_are_patched._dynamo_marked_constant = True  # type: ignore[attr-defined]
for _layer in (Conv2d(1, 1, 1), BatchNorm2d(1), SyncBatchNorm(1), ReLU()):
    count_entries(_layer)
