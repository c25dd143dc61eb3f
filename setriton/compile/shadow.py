"""A model traced by Dynamo on tensors without data, as if it had never been."""

import contextlib
import copy
import functools
import threading
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import convert_frame, pgo
from torch._dynamo.eval_frame import OptimizedModule, innermost_fn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

# What cannot be copied, and what tracing leaves as it is.
_SHARED = (torch.Generator, type(threading.Lock()), type(threading.RLock()))

Backend = Callable[[GraphModule, Sequence[Tensor]], Callable[..., Any]]


def trace(model: nn.Module, inputs: Sequence[Any], options: Mapping[str, Any], backend: Backend) -> str | None:
    """Give `backend` each graph that compiling a model makes; compute nothing and leave nothing behind.

    What was compiled before serves on, but for code after a graph break, which is compiled again at its next call.
    Values that the model asks for, such as those of `item()`, are taken for 1: no tensor has data.

    Args:
        model: it is not touched, nor is anything that it holds.
        inputs, options: of its call.
        backend: as torch.compile's.

    Returns:
        Why there may be more graphs than those given, where shapes depend on values; None otherwise.

    Raises:
        TypeError: the model cannot be copied, or has parameters without a shape.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Under a mode of the caller's, such as one that counts operations, Dynamo would compile nothing.
    with _disable_current_modes(), mode:
        shadow = _shadow(model, mode)
        without_data = functools.partial(mode.from_tensor, static_shapes=True)
        arguments, keywords = tree_map_only(Tensor, without_data, (inputs, dict(options)))
        # Code of its own: what was compiled before, or too often, does not matter.
        run = types.FunctionType(_call.__code__.replace(), globals())
        with _leaving_no_trace(backend), _NoData(mode):
            try:
                torch.compile(run, backend=backend)(shadow, *arguments, **keywords)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                return f"what {error.func} gives depends on values: what comes after it was not traced"
    return None


def unwrapped(model: Any) -> Any:
    """The module behind any number of `torch.compile`, which makes a function of what it is given the second time."""
    if isinstance(model, OptimizedModule):
        return unwrapped(model._orig_mod)
    if isinstance(model, nn.Module) or not callable(model):
        return model
    owner = getattr(innermost_fn(model), "__self__", None)
    return unwrapped(owner) if isinstance(owner, nn.Module) else model


def _call(self: nn.Module, *inputs: Any, **options: Any) -> Any:
    return self(*inputs, **options)


class _Shadows(TorchFunctionMode):
    """Copies of tensors, wherever copy.deepcopy meets them, have no data."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.mode.from_tensor(tensor, static_shapes=True)
            return memo[id(tensor)]
        if func is Tensor.clone:  # a parameter's own way
            return self.mode.from_tensor(args[0], static_shapes=True)
        return func(*args, **(kwargs or {}))


def _shadow(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy whose tensors are fake, with what was compiled in it as it was before."""
    model, memo = unwrapped(model), dict[int, Any]()
    if any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        raise TypeError("model has parameters without a shape; call it once, then explain it")
    held = [value for module in model.modules() for value in vars(module).values()]
    memo |= {id(value): value for value in held if isinstance(value, _SHARED)}
    with _Shadows(mode):
        try:
            for module in model.modules():
                if isinstance(module, OptimizedModule):
                    memo[id(module)] = copy.deepcopy(unwrapped(module), memo)
            return copy.deepcopy(model, memo)
        except Exception as error:
            raise TypeError(f"model cannot be copied, so it cannot be traced: {error}") from error


class _NoData(TorchDispatchMode):
    """Keeps data out: what a model reaches beside its copy is shadowed, and values that it asks for are 1."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo compiles nothing under other modes."""
        return True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            number = complex if dtype.is_complex else float if dtype.is_floating_point else int
            return True if dtype == torch.bool else number(1)
        args, kwargs = tree_map_only(Tensor, self._shadow, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _shadow(self, tensor: Tensor) -> Tensor:
        is_fake = isinstance(tensor, FakeTensor)
        return tensor if is_fake else self.mode.from_tensor(tensor, static_shapes=True)


@contextlib.contextmanager
def _leaving_no_trace(backend: Backend) -> Iterator[None]:
    """Undo what compiling leaves behind: code in Dynamo's caches, and sizes that it would take for changing ones."""
    unlimited = {"recompile_limit": 1 << 30, "accumulated_recompile_limit": 1 << 30, "suppress_errors": False}
    sizes = pgo._CODE_STATE
    pgo._CODE_STATE = defaultdict(pgo.CodeState)
    try:
        with torch._dynamo.config.patch(unlimited):
            yield
    finally:
        pgo._CODE_STATE = sizes
        for reference in list(convert_frame.input_codes.seen):
            if (code := reference()) is not None:
                _forget(code, backend)


def _forget(code: Any, backend: Backend) -> None:
    """Empty the cache of code that has entries of ours: taking out one alone leaves it counted."""
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)
    if any(getattr(entry.backend, "compiler_fn", None) is backend for entry in entries):
        torch._dynamo.eval_frame.remove_from_cache(code)
