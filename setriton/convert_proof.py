"""Whether a replacement does what the module does: both are run, and all that they leave behind is compared."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .convert_copy import drawn, seed_all
from .convert_state import Left, Unread, attributes_of

# float64 hardsigmoid and hardswish of torch are off by 3e-8.
_TOLERANCE = 1e-6
_TRIES = 8
# Height and width of the maps, larger ones for what makes them smaller.
_SIZES = ((5, 7), (17, 20), (41, 36))


class Trial(NamedTuple):
    """The circumstances of one run."""

    name: str
    training: bool = False
    batch: int = 3
    channels_last: bool = False
    input_needs_gradient: bool = True
    dtype: torch.dtype = torch.float64
    size: tuple[int, int] | None = None
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


_TRIALS = (
    Trial("evaluation"),
    Trial("training", training=True),
    Trial("training, channels_last", training=True, batch=2, channels_last=True),
    Trial("evaluation of one image", batch=1, input_needs_gradient=False),
    Trial("no_grad", training=True, context=torch.no_grad),
    Trial("inference_mode", context=torch.inference_mode),
    Trial("evaluation of another size", size=(6, 4)),
    Trial("evaluation of 1x1 maps", size=(1, 1)),
)
# Of these only the types of results are compared. Rounding is another, and so is that of a tail's intermediate results.
_TYPE_TRIALS = (
    Trial("autocast", dtype=torch.float32, context=lambda: torch.autocast("cpu", torch.bfloat16)),
    Trial("bfloat16", dtype=torch.bfloat16),
)


@dataclass
class Outcome:
    """What a run leaves: tensors by name, None for a gradient that is none, and everything else."""

    output: Tensor
    input: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]
    attributes: dict[str, Any]
    random: Any
    is_input: bool


def require_same(
    make: Callable[[int], nn.Module], replace: Callable[[nn.Module], None], channels: Iterable[int], types: bool
) -> None:
    """Left where a replacement and its module differ in anything.

    Args:
        make: a copy of the module, of the same numbers for the same seed.
        replace: makes the replacement of a copy.
        channels: what the input might have; the first that the module takes is used.
        types: whether to compare the types of outputs in lower precision as well.
    """
    size = _accepted(make(0), list(channels))
    seed = _live(make, size)
    module, replaced = make(seed), make(seed)
    replace(replaced)
    for trial in (*_TRIALS, *(_TYPE_TRIALS if types else ())):  # each goes on from where the last has left the two
        try:
            wanted = _outcome(module, trial, size)
        except Left:
            raise
        except Exception as error:
            if trial.dtype is torch.float64 and trial.size is None:
                raise Left(f"it could not be tried: {_first_line(error)} (in {trial.name})") from error
            continue  # not every module takes every size and type
        try:
            found = _outcome(replaced, trial, size)
        except Exception as error:
            raise Left(f"replaced, in {trial.name}: {_first_line(error)}") from error
        compare = _differences if trial.dtype is torch.float64 else _differences_of_type
        for what in compare(found, wanted):
            raise Left(f"{what} (in {trial.name})")


def _accepted(module: nn.Module, channels: list[int]) -> tuple[int, int, int]:
    """Channels, height and width of an input that the module takes."""
    first: Exception | None = None
    for height, width in _SIZES:
        for count in channels:
            try:
                _outcome(module, _TRIALS[0], (count, height, width))
            except Left:
                raise
            except Exception as error:
                first = first or error
            else:
                return count, height, width
    raise Left(f"it could not be tried: {_first_line(first) if first else 'channels of its input are unknown'}")


def _live(make: Callable[[int], nn.Module], size: tuple[int, int, int]) -> int:
    """A seed with which every parameter matters.

    Hidden units of a ReLU may all be off, and then a wrong squeeze changes nothing.
    """
    for seed in range(_TRIES):
        outcome = _outcome(make(seed), _TRIALS[0], size)
        dead = [name for name, grad in outcome.gradients.items() if grad is not None and not grad.any()]
        if not dead:
            return seed
    raise Left(f"it could not be tried: the gradient of {dead[0]} stays 0")


def _outcome(module: nn.Module, trial: Trial, size: tuple[int, int, int]) -> Outcome:
    kind: dict[str, Any] = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
    channels, height, width = size if trial.size is None else (size[0], *trial.size)
    leaf = torch.randn(trial.batch, channels, height, width, **kind) + torch.randn(trial.batch, channels, 1, 1, **kind)
    leaf = leaf.to(trial.dtype)
    if trial.channels_last:
        leaf = leaf.contiguous(memory_format=torch.channels_last)
    leaf.requires_grad_(trial.input_needs_gradient)
    module.train(trial.training).to(trial.dtype)
    module.zero_grad()
    seed_all(2)
    with trial.context():
        x = leaf.clone()
        y = module(x)
        if not isinstance(y, Tensor):
            raise Left(f"its output is a {type(y).__name__}")
    if y.requires_grad:
        y.backward(torch.randn(y.shape, **kind).to(y.dtype))
    gradients = {"its input": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}
    gradients["its output"] = y.detach() if y.requires_grad else None
    buffers: dict[str, Tensor | None] = dict(module.named_buffers())
    attributes: dict[str, Any] = {}
    for path, child in module.named_modules():
        try:
            attributes |= {f"{path}.{name}": value for name, value in attributes_of(child, path)}
        except Unread as reason:
            raise Left(str(reason)) from None
    return Outcome(y.detach(), x.detach(), gradients, buffers, attributes, drawn(), _shares(x, y))


def _differences(found: Outcome, wanted: Outcome) -> Iterator[str]:
    if found.attributes.keys() != wanted.attributes.keys() or found.attributes != wanted.attributes:
        names = found.attributes.items() ^ wanted.attributes.items()
        yield f"its forward sets {', '.join(sorted({name.strip('.') for name, _ in names}))}"
    if found.random != wanted.random:
        yield "its forward draws random numbers"
    if (error := _error(found.input, wanted.input)) is not None:
        yield f"its forward changes its input, and replaced would not: {error}"
    if found.is_input is not wanted.is_input:
        yield "its output shares memory with its input"
    if (error := _error(found.output, wanted.output)) is not None:
        yield f"replaced, its output would differ: {error}"
    for name, wanted_grad in wanted.gradients.items():
        if (error := _error(found.gradients.get(name), wanted_grad)) is not None:
            yield f"replaced, the gradient of {name} would differ: {error}"
    for name, buffer in wanted.buffers.items():
        if (error := _error(found.buffers.get(name), buffer)) is not None:
            yield f"replaced, {name} would differ: {error}"


def _differences_of_type(found: Outcome, wanted: Outcome) -> Iterator[str]:
    if found.output.dtype != wanted.output.dtype:
        yield f"replaced, its output would be {found.output.dtype}, not {wanted.output.dtype}"


def _error(found: Tensor | None, wanted: Tensor | None) -> str | None:
    """In words, what one tensor has another than the other; None if nothing."""
    if found is None or wanted is None:
        return None if found is wanted else "there is none" if wanted is None else "there would be none"
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{found.dtype} {tuple(found.shape)}, not {wanted.dtype} {tuple(wanted.shape)}"
    if _strides(found) != _strides(wanted):
        return f"strides {found.stride()}, not {wanted.stride()}"
    if not wanted.numel():
        return None
    found, wanted = found.double(), wanted.double()
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
    return None if error <= _TOLERANCE else f"by {error:.1e}"


def _strides(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _shares(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
