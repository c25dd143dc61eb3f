"""Copies of modules to be tried: in float64 on the CPU, of random numbers, without hooks; the module is not touched."""

import copy
import pickle
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils._python_dispatch import _disable_current_modes

from .convert_state import Unread
from .stock import BatchNorm2d, Conv2d, SyncBatchNorm

_HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)
_SEED = 0x5E


def twin(module: nn.Module, seed: int | None = None, stand_ins: Collection[nn.Module] = ()) -> nn.Module:
    """A deep copy with other numbers, the same for the same seed; convolutions in `stand_ins` are made cheap.

    Without a seed it has no numbers at all, to be traced. All parameters have a gradient to get, and none is so large
    or small that an activation hides it.

    Raises:
        Unread: the module cannot be copied.
    """
    generator = None if seed is None else torch.Generator().manual_seed(_SEED + seed)
    memo: dict[int, Any] = {}
    for child in module.modules():
        for name in _HOOKS:
            if (hooks := vars(child).get(name)) is not None:
                memo[id(hooks)] = OrderedDict()
        if child in stand_ins and child is not module:
            memo[id(child)] = _StandIn(cast(nn.Conv2d, child), generator)
            continue
        for parameter in child._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _random_parameter(parameter, generator)
        for buffer in child._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = _random_buffer(buffer, generator)
        if (group := vars(child).get("process_group")) is not None:
            memo[id(group)] = group
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:
        raise Unread(f"cannot be copied: {str(error).partition(chr(10))[0]}") from error
    if set(map(id, copied.modules())) & set(map(id, module.modules())):
        raise Unread("cannot be copied: its copy holds modules of its own")
    for child in copied.modules():
        if type(child) is SyncBatchNorm:  # the same where there is one process, and runs on the CPU
            cast(Any, child).__class__ = BatchNorm2d
    return copied


def cheap_to_replace(module: nn.Module) -> bool:
    """Whether a module is a convolution whose place a stand-in can take."""
    return type(module) is Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run what may draw random numbers, in the default modes, and give the state of all generators back."""
    numpy = sys.modules.get("numpy")
    states = torch.random.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(_without_global_hooks())
            stack.enter_context(_disable_current_modes())  # such as one that counts operations
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            if torch.get_default_device().type != "cpu":  # the mode of a device costs time at every call
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        if numpy is not None:
            numpy.random.set_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Hooks on all modules are not to see copies."""
    found = [hooks for name, hooks in vars(_module).items() if name.startswith("_global_") and isinstance(hooks, dict)]
    before = [dict(hooks) for hooks in found]
    try:
        for hooks in found:
            hooks.clear()
        yield
    finally:
        for hooks, saved in zip(found, before, strict=True):
            hooks.update(saved)


def seed_all(seed: int) -> None:
    """Start all generators anew, but for those of other devices."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


def drawn() -> tuple[object, ...]:
    """Where the generators are."""
    numpy = sys.modules.get("numpy")
    state = None if numpy is None else pickle.dumps(numpy.random.get_state())
    return torch.random.get_rng_state().tolist(), random.getstate(), state


class _StandIn(nn.Module):
    """Computes something of a convolution's inputs, as large as its result and for few operations."""

    def __init__(self, conv: nn.Conv2d, generator: torch.Generator | None) -> None:
        super().__init__()
        rank = 4
        self.options = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        shapes = (rank, conv.in_channels, 1, 1), (rank, 1, *conv.kernel_size), (conv.out_channels, rank, 1, 1)
        self.down, self.within, self.up = (
            nn.Parameter(_randn(shape, generator) / (shape[1] * shape[2] * shape[3]) ** 0.5) for shape in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        few = F.conv2d(x, self.down)
        return F.conv2d(F.conv2d(few, self.within, None, **self.options, groups=few.shape[1]), self.up)  # type: ignore[arg-type]


def _randn(shape: Any, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.empty(tuple(shape), dtype=torch.float64, device="meta")
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")


def _random_parameter(parameter: Tensor, generator: torch.Generator | None) -> nn.Parameter:
    if not parameter.is_floating_point():
        raise Unread(f"a parameter of dtype {parameter.dtype}")
    value = _randn(parameter.shape, generator)
    if parameter.dim() >= 2:
        return nn.Parameter(value / max(1, parameter.shape[1:].numel()) ** 0.5)
    return nn.Parameter(0.5 + 0.5 * value)


def _random_buffer(buffer: Tensor, generator: torch.Generator | None) -> Tensor:
    if buffer.is_floating_point() and generator is None:
        return torch.empty(buffer.shape, dtype=torch.float64, device="meta")
    if buffer.is_floating_point():
        return torch.rand(buffer.shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    if buffer.is_meta:
        return torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
    return buffer.detach().to("cpu", copy=True)
