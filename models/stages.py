"""Stages: blocks one after the other, recomputed in the backward pass if asked, forked where they are residual."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from setriton.stock import BatchNorm2d, Conv2d, SyncBatchNorm, is_stock, is_traced, must_call

Forked = Tensor | tuple[Tensor, Tensor | None]


class Stage(nn.Sequential):
    """Blocks of one resolution: what is compiled, sharded and checkpointed block by block."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = self.call(block, x)
        return x

    def call(self, block: nn.Module, *args: Any, **options: Any) -> Any:
        """The block's output; in training, its inputs alone are kept if `grad_checkpointing`."""
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()) or is_traced(args[0]):
            return block(*args, **options)
        # Of the contexts a compiler takes, none counts statistics: it traces a block once.
        context: dict[str, Any] = {}
        if not torch.compiler.is_compiling():
            context["context_fn"] = _statistics_counted_once(block)
        return checkpoint(block, *args, use_reentrant=False, **context, **options)


class ForkedStage(Stage):
    """Residual blocks, each output handed on twice for the two readers it has in the next block.

    Not to or from a block that hooks look at, or one of another class: those take one map and give one.
    """

    takes_forks = True

    def forward(self, x: Tensor, skip: Tensor | None = None, *, fork: bool = False) -> Forked:  # type: ignore[override]
        """The last block's output; with `fork` a pair, x and skip of the next block (see `ResidualBlock.forward`)."""
        if must_call(x):
            return self._unforked(x, fork)
        blocks = list(self)
        takes = [takes_forks(block) for block in blocks] + [fork]
        for position, block in enumerate(blocks):
            if not takes[position]:
                x, skip = self.call(block, x), None
            elif takes[position + 1]:
                x, skip = self.call(block, x, skip, fork=True)
            else:
                x, skip = self.call(block, x, skip), None
        return (x, skip) if fork else x

    def _unforked(self, x: Tensor, fork: bool) -> Forked:
        for block in self:
            x = self.call(block, x)
        return (x, None) if fork is True else x


def takes_forks(module: nn.Module) -> bool:
    """Whether a block or stage may be given, and give, a pair instead of one map: nobody else sees them."""
    return getattr(type(module), "takes_forks", False) and "forward" not in vars(module) and not _has_hooks(module)


def only_reads(module: nn.Module | None) -> bool:
    """Whether a module is known to leave its input as it is. What writes into it has to write into the shortcut too."""
    if module is None:
        return True
    kind = type(module)
    if not is_stock(module, kind):
        return False
    if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward and len(module):
        return only_reads(module[0])
    return kind in _READERS or bool(getattr(kind, "only_reads", False))


_READERS = (Conv2d, BatchNorm2d, SyncBatchNorm, nn.AvgPool2d, nn.MaxPool2d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _has_hooks(module: nn.Module) -> bool:
    """Those of fully_shard aside, which take whatever a forward takes and gives."""
    hooks = (hook for name in _HOOKS for hook in getattr(module, name).values())
    return not all(getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.") for hook in hooks)


def _statistics_counted_once(block: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """Contexts of the forward pass and of its repetition, which leaves running statistics alone."""
    return lambda: (contextlib.nullcontext(), _unmoved_statistics(block))


@contextlib.contextmanager
def _unmoved_statistics(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm) and m.training]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = count
