"""Batch normalization that has stopped learning, as in the last epochs of SENet-154's training."""

import functools
from collections.abc import Iterator
from typing import Any, ClassVar, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from setriton.stock import declare_stock


def freeze_bn(model: nn.Module) -> int:
    """Make every batch normalization use its running statistics and keep its scale and shift, in training too.

    SENet-154's training froze "all BN parameters" for its last few epochs (supplementary material of
    the CVPR 2018 paper). The layers stay in evaluation mode through later calls of `model.train()`, their running
    statistics stay what they are, their scale and shift get no gradients. They are the modules they were, of a class
    derived from their own: parameters, buffers, keys and hooks stay, and copies and pickles are frozen as well.
    Modules inside such a layer, as timm's activations are, keep following `model.train()`.

    Gradients that scale and shift have from before are dropped, lest an optimizer goes on with them. Freeze after
    `nn.SyncBatchNorm.convert_sync_batchnorm`, which makes new layers, and before DistributedDataParallel, which waits
    for the gradients that parameters required when it was made. `fully_shard` may stand before or after, and a
    compiled network is compiled again.

    Args:
        model: a network; `nn.BatchNorm1d` to `3d`, `nn.SyncBatchNorm` and classes derived from them are frozen.

    Returns:
        How many frozen layers the network now has.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: a layer has no running statistics to use, or no shape yet; none is frozen then.
    """
    layers = dict(_batch_norms(model))
    for path, layer in layers.items():
        if isinstance(layer, LazyModuleMixin):
            raise ValueError(f"model must have been called once before its lazy layers are frozen; got {path}")
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(f"model must have running statistics in what is frozen; {path} has none")
    for layer in layers.values():
        if isinstance(layer, Frozen):
            continue
        original: Any = type(layer)
        learns = {name: p.requires_grad for name, p in layer.named_parameters(recurse=False)}
        layer.before_freezing = (layer.training, learns)
        for name in learns:
            parameter = layer.get_parameter(name)
            parameter.requires_grad_(False)
            parameter.grad = None
        cast(Any, layer).__class__ = _frozen_class(original)
        layer.training = False
    return len(layers)


def unfreeze_bn(model: nn.Module) -> int:
    """Undo `freeze_bn`: classes, whether scale and shift learn, and the mode that `train` and `eval` last asked for.

    Args:
        model: a network; what is not frozen in it stays as it is.

    Returns:
        How many layers were frozen.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: a frozen layer has since been given another class, as fully_shard does; none is changed then.
    """
    frozen: list[tuple[str, Any]] = [(path, layer) for path, layer in _batch_norms(model) if isinstance(layer, Frozen)]
    for path, layer in frozen:
        if "original" not in vars(type(layer)):
            name = type(layer).__name__
            raise ValueError(f"model must have its layers as freeze_bn left them; got {path} of class {name}")
    for _, layer in frozen:
        mode, learns = layer.before_freezing
        cast(Any, layer).__class__ = type(layer).original
        del layer.before_freezing
        layer.training = mode
        for name, requires_grad in learns.items():
            layer.get_parameter(name).requires_grad_(requires_grad)
    return len(frozen)


class Frozen:
    """Mixed into the class of a batch normalization that stays in evaluation mode.

    Attributes:
        original: the class it had.
        before_freezing: the mode it would be in, and which of its parameters required gradients.
    """

    original: ClassVar[type]
    before_freezing: tuple[bool, dict[str, bool]]

    def train(self, mode: bool = True) -> Any:
        module = super().train(mode)  # type: ignore[misc]
        self.before_freezing = mode, self.before_freezing[1]
        module.training = False
        return module

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self).original,), cast(Any, self).__getstate__()


@functools.cache
def _frozen_class(original: type) -> type:
    """A class derived from `original`, one for all its modules; it counts as of the same module, as tracers ask."""
    members = {"original": original, "__module__": original.__module__}
    frozen = type(f"Frozen{original.__name__}", (Frozen, original), members)
    declare_stock(frozen, original)
    return frozen


def _rebuild(original: type) -> object:
    """A module of a frozen class, without its state."""
    frozen: Any = _frozen_class(original)
    return frozen.__new__(frozen)


def _batch_norms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            yield path or "the model", module
